"""How close spectra and abundances are to the truth, after matching one with the other.

Shapes: P pixels, L channels, M endmembers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

__all__ = ["abundance_rmse", "match_endmembers", "sad", "spectral_angles"]


def spectral_angles(endmembers: Any, truth: Any, *, bands: Any = None) -> np.ndarray:
    """Angle between every spectrum and every true one, radians, shape (M, M').

    Args:
        endmembers, truth: shapes (M, L) and (M', L). A spectrum of zeros is pi / 2 away from all.
        bands: channels to look at, boolean or positions; all where None. Score spoiled channels and the angle says nothing.
    """
    found_ML, true_ML = (np.atleast_2d(np.asarray(part, dtype=np.float64)) for part in (endmembers, truth))
    if found_ML.shape[1] != true_ML.shape[1]:
        raise ValueError(f"both must have as many channels, got shapes {found_ML.shape} and {true_ML.shape}")
    if bands is not None:
        found_ML, true_ML = found_ML[:, bands], true_ML[:, bands]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-300) for x in (found_ML, true_ML)]
    return np.arccos((unit[0] @ unit[1].T).clip(-1, 1))


def match_endmembers(endmembers: Any, truth: Any, *, bands: Any = None) -> np.ndarray:
    """For each true spectrum the position of the one found for it, shape (M,): least sum of angles.

    Example:
        >>> match_endmembers([[0, 1], [1, 0]], [[2, 0], [0, 3]]).tolist()
        [1, 0]
    """
    angles = spectral_angles(endmembers, truth, bands=bands)
    if angles.shape[0] != angles.shape[1]:
        raise ValueError(f"there must be as many spectra as true ones, got {angles.shape[0]} and {angles.shape[1]}")
    return linear_sum_assignment(angles.T)[1]


def sad(endmembers: Any, truth: Any, *, bands: Any = None) -> float:
    """Mean spectral angle distance of matched spectra, radians; 0 where each is a multiple of the true one."""
    matched = match_endmembers(endmembers, truth, bands=bands)
    return float(spectral_angles(endmembers, truth, bands=bands)[matched, np.arange(len(matched))].mean())


def abundance_rmse(abundances: Any, truth: Any) -> float:
    """Root mean squared error of abundances (P, M), whose columns are matched already."""
    a, b = np.asarray(abundances, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"abundances and truth must have one shape, got {a.shape} and {b.shape}")
    return float(np.sqrt(((a - b) ** 2).mean()))
