"""Partial labels: which components a labelled sample may come from.

A label is a constraint, not a prior: the responsibilities of a labelled sample are zero outside its class's components.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Classes", "as_labels", "map_classes"]

log = logging.getLogger(__name__)
UNLABELLED = -1


@dataclass(frozen=True)
class Classes:
    """The classes that occur and their components.

    Attributes:
        labels: sorted, shape (classes,), int64, >= 0.
        components: of each class, in the order of ``labels``.
        n_components: C.
    """

    labels: np.ndarray
    components: list[list[int]]
    n_components: int

    def table(self) -> np.ndarray:
        """Which components a class may have, shape (classes, C), boolean."""
        found = np.zeros((len(self.labels), self.n_components), dtype=bool)
        for row, components in enumerate(self.components):
            found[row, components] = True
        return found

    def rows(self, y: np.ndarray) -> np.ndarray:
        """Row of the table for each label, -1 for unlabelled, shape (N,)."""
        found = np.searchsorted(self.labels, y)
        return np.where(y == UNLABELLED, UNLABELLED, found)

    def of_components(self) -> np.ndarray:
        """Class of each component, shape (C,); -1 for one that belongs to none."""
        found = np.full(self.n_components, UNLABELLED)
        for label, components in zip(self.labels, self.components, strict=True):
            found[components] = label
        return found


def as_labels(y: Any, name: str = "y") -> np.ndarray:
    """Labels as int64, shape (N,); ``name`` is what errors call them.

    Raises:
        ValueError: labels that are not whole numbers, or negative ones other than -1; the first is named.
    """
    from sklearn.utils import column_or_1d

    found = column_or_1d(y, warn=True)
    if found.dtype.kind not in "biuf":
        try:
            found = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} must hold whole numbers, -1 for unlabelled, got {str(found[0])!r}; number the classes first "
                "(pandas.factorize does)"
            ) from None
    if found.dtype.kind == "f":
        bad = np.flatnonzero(~(np.isfinite(found) & (found == np.round(found))))
        if len(bad):
            raise ValueError(
                f"{name} must hold whole numbers, -1 for unlabelled, got {found[bad[0]]} at position {bad[0]} "
                "(Unknown label type: continuous values are no classes)"
            )
    found = found.astype(np.int64)
    bad = np.flatnonzero(found < UNLABELLED)
    if len(bad):
        raise ValueError(f"{name} must be >= 0, or -1 for unlabelled, got {found[bad[0]]} at position {bad[0]}")
    return found


def map_classes(y: np.ndarray, n_components: int, chosen: Mapping[int, Sequence[int]] | None) -> Classes | None:
    """The classes among the labels and their components; None where nothing is labelled.

    Args:
        y: labels of all samples, shape (N,), int64, -1 where unlabelled.
        n_components: C.
        chosen: class -> its components; by default the i-th class in sorted order has component i.
    Raises:
        ValueError: more classes than components, a class without a component, or components that do not exist.
    """
    labels, counts = np.unique(y[y != UNLABELLED], return_counts=True)
    if len(labels) == 0:
        return None
    for label in labels[counts == 1]:
        log.warning(
            "class %d has one labelled sample, which fixes where its component starts and hardly how wide it is; "
            "label a few more, or share the covariance (covariance='tied')",
            label,
        )
    if chosen is None:
        if len(labels) > n_components:
            raise ValueError(
                f"y has {len(labels)} classes and there are n_components={n_components}; every class needs a component of its own"
            )
        return Classes(labels, [[i] for i in range(len(labels))], n_components)
    components = []
    for label in labels.tolist():
        mine = list(chosen.get(label, []))
        if not mine:
            raise ValueError(f"class {label} has no component in class_components={dict(chosen)}")
        if not all(isinstance(c, (int, np.integer)) and 0 <= c < n_components for c in mine):
            raise ValueError(f"class_components of class {label} must lie between 0 and {n_components - 1}, got {mine}")
        components.append([int(c) for c in mine])
    flat = [c for mine in components for c in mine]
    if len(set(flat)) != len(flat):
        raise ValueError(f"class_components gives a component to two classes: {dict(chosen)}")
    return Classes(labels, components, n_components)
