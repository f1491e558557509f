"""What estimators built on a process are given: a kernel, inputs, targets; checked once, here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mixtura.data.tables import non_finite
from mixtura.density.inputs import as_matrix
from mixtura.density.network_covariance import ACTIVATIONS
from mixtura.density.wide_network_kernel import WideNetworkKernel

__all__ = ["checked_inputs", "checked_targets", "kernel_from"]


def kernel_from(kernel: Any, depth: int, device: str) -> Any:
    """A kernel as it is, or the dense network of a name, with weight variance 1 and bias variance 0.1.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if isinstance(kernel, str):
        if kernel not in ACTIVATIONS:
            raise ValueError(
                f"kernel must be one of {list(ACTIVATIONS)}, a WideNetworkKernel or a callable, got {kernel!r}"
            )
        return WideNetworkKernel(depth, kernel, 1.0, 0.1, device=device)
    if not callable(kernel):
        raise TypeError(f"kernel must be a name, a WideNetworkKernel or a callable, got {type(kernel).__name__}")
    return replace(kernel, device=device) if isinstance(kernel, WideNetworkKernel) else kernel


def checked_inputs(estimator: Any, X: Any, *, reset: bool) -> np.ndarray:
    """X as float64, finite, of the fitted number of features."""
    return as_matrix(estimator, X, reset=reset, allow_nd=True, ensure_min_samples=2 if reset else 1)


def checked_targets(X: np.ndarray, y: Any) -> np.ndarray:
    """y as float64, finite, of one or two dimensions and as many rows as X."""
    if y is None:
        raise ValueError("this regressor requires y to be passed, but the target y is None")
    y = np.asarray(y)
    if np.iscomplexobj(y):
        raise ValueError("Complex data not supported: y is complex")
    try:
        y = y.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"y must hold numbers ({error}); for classes there is ScaleMixtureClassifier") from error
    if y.ndim not in (1, 2):
        raise ValueError(f"y must have 1 or 2 dimensions, got shape {y.shape}")
    if len(y) != len(X):
        raise ValueError(f"X and y must have as many rows, got {len(X)} and {len(y)}")
    if problem := non_finite(y.reshape(len(y), -1)):
        raise ValueError(f"y contains {problem}")
    return y
