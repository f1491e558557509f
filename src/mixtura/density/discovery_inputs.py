"""What discovering classes is given, checked once: labels, held-out samples, whole numbers.

Every complaint names what came and what would do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixtura.density.labels import UNLABELLED

__all__ = ["check_whole", "held_out_rows", "known_classes"]

LEAST_ROWS = 2  # labelled samples of a class


def known_classes(y_N: np.ndarray, n: int) -> np.ndarray:
    """The labelled classes, sorted.

    Raises:
        ValueError: another number of labels than of samples, no labelled sample, or a class of too few.
    """
    if len(y_N) != n:
        raise ValueError(f"y has {len(y_N)} labels and X has {n} samples; they must be as many")
    known, counts = np.unique(y_N[y_N != UNLABELLED], return_counts=True)
    if not len(known):
        raise ValueError("y has no labelled sample (all are -1); label some, or use GaussianMixture, which needs none")
    if counts.min() < LEAST_ROWS:
        few = known[counts < LEAST_ROWS]
        raise ValueError(
            f"class {few[0]} has {counts.min()} labelled sample, and a class needs at least {LEAST_ROWS}; "
            "label more of it, or set it to -1"
        )
    return known


def held_out_rows(held_out: Any, y_N: np.ndarray, calibration: str | None) -> np.ndarray | None:
    """Which labelled samples are held out, shape (N,), boolean; None where ``calibration`` does not ask for them.

    Raises:
        ValueError: another type or shape, or fewer than two samples of a class.
    """
    if held_out is None:
        return None
    held_N = np.asarray(held_out)
    if held_N.dtype != bool or held_N.shape != y_N.shape:
        raise ValueError(f"held_out must be boolean of shape {y_N.shape}, got {held_N.dtype} of shape {held_N.shape}")
    if calibration != "heldout":
        return None
    held_N = held_N & (y_N != UNLABELLED)
    for label in np.unique(y_N[y_N != UNLABELLED]):
        n = int(held_N[y_N == label].sum())
        if n < LEAST_ROWS:
            raise ValueError(
                f"held_out has {n} samples of class {label}, and calibration needs at least {LEAST_ROWS} of each; "
                "hold out more, or use calibration='members'"
            )
    return held_N


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise a ValueError where ``value`` is no whole number of at least ``least``."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
