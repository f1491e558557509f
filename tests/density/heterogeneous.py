"""Groups of different shapes to test clusterings on, and a way to count what they got wrong."""

import numpy as np

from mixtura.claims.adjusted_sdp import Row, draw, error

__all__ = ["error", "groups"]


def groups(
    n: int, f: int, k: int, *, apart: float, spread: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, labels and covariances: means on a sphere of radius ``apart``, rotated diag(exp U(-spread, spread))."""
    return draw(Row(n, f, k, apart, spread), (seed,))
