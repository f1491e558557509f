"""How good discovered classes are, by the protocol of category discovery, and the count by labelled rows to compare with.

Source: Vaze et al. 2022, Generalized category discovery (2201.02609), sec. 4.1 (accuracy with one matching over all classes)
and sec. 3.3 (the number of classes by the accuracy on labelled rows).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.utils import check_random_state

from mixtura.density.labels import UNLABELLED, as_labels
from mixtura.density.starts import kmeans_plus_plus, lloyd

__all__ = ["DiscoveryAccuracy", "discovery_accuracy", "estimate_classes_by_labels"]

LLOYD_STEPS = 100


@dataclass(frozen=True)
class DiscoveryAccuracy:
    """Shares of rows whose cluster is matched with their class.

    Attributes:
        all: of all rows.
        old: of those of known classes; NaN where there are none.
        new: of the others; NaN where there are none.
    """

    all: float
    old: float
    new: float


def discovery_accuracy(y_true: Any, labels: Any, known: Iterable[int]) -> DiscoveryAccuracy:
    """Accuracy of clusters under the one matching of clusters and classes that is best for all rows together.

    A cluster beyond the number of classes is matched with none, so its rows are errors. Give unlabelled rows only: what was
    told is no discovery.

    Args:
        y_true: class of each row, shape (N,), whole numbers.
        labels: cluster of each row, shape (N,), whole numbers.
        known: the classes that had labels.
    Raises:
        ValueError: no rows, or shapes that differ.
    Source:
        2201.02609, sec. 4.1. A matching of old and new rows apart would be kinder to the new ones.
    Example:
        >>> discovery_accuracy([0, 0, 1, 1, 2, 2], [5, 5, 3, 3, 3, 4], known=[0])
        DiscoveryAccuracy(all=0.8333333333333334, old=1.0, new=0.75)
    """
    true_N, found_N = np.asarray(y_true), np.asarray(labels)
    if true_N.shape != found_N.shape or true_N.ndim != 1 or not len(true_N):
        raise ValueError(
            f"y_true and labels must be as long as each other and not empty, got {true_N.shape} and {found_N.shape}"
        )
    right_N = _matched(true_N, found_N)
    old_N = np.isin(true_N, np.asarray(list(known)))
    return DiscoveryAccuracy(float(right_N.mean()), _mean(right_N[old_N]), _mean(right_N[~old_N]))


def estimate_classes_by_labels(X: Any, y: Any, candidates: Sequence[int], *, n_init: int = 3, seed: int = 0) -> int:
    """The number of clusters at which k-means of all rows agrees best with the labelled ones; the least of equals.

    Args:
        X: shape (N, F), finite.
        y: class of each row, -1 where unlabelled, shape (N,).
        candidates: numbers of clusters to try.
        n_init: starts of each.
        seed: of the starts.
    Raises:
        ValueError: no labelled row, or no candidate between 1 and N.
    Source:
        2201.02609, sec. 3.3, over all candidates instead of by Brent's search.
    """
    x_NF, y_N = np.asarray(X, dtype=np.float64), as_labels(y)
    told_N = y_N != UNLABELLED
    if not told_N.any():
        raise ValueError("y has no labelled row (all are -1), so no number of clusters agrees better than another")
    if not len(candidates) or not all(1 <= k <= len(x_NF) for k in candidates):
        raise ValueError(f"candidates must lie between 1 and the {len(x_NF)} rows, got {list(candidates)}")
    rng = check_random_state(seed)
    best, most = int(candidates[0]), -1.0
    for k in sorted(set(map(int, candidates))):
        label_N = _kmeans(x_NF, k, n_init, rng)
        right = float(_matched(y_N[told_N], label_N[told_N]).mean())
        if right > most:
            best, most = k, right
    return best


def _kmeans(x_NF: np.ndarray, k: int, n_init: int, rng: np.random.RandomState) -> np.ndarray:
    best, least = np.empty(0), np.inf
    for _ in range(n_init):
        centres_KF, label_N = lloyd(x_NF, kmeans_plus_plus(x_NF, k, random_state=rng), steps=LLOYD_STEPS)
        spread = float(((x_NF - centres_KF[label_N]) ** 2).sum())
        if spread < least:
            best, least = label_N, spread
    return best


def _matched(true_N: np.ndarray, found_N: np.ndarray) -> np.ndarray:
    """Whether the cluster of each row is matched with its class, shape (N,)."""
    classes, class_N = np.unique(true_N, return_inverse=True)
    clusters, cluster_N = np.unique(found_N, return_inverse=True)
    counts = np.zeros((len(clusters), len(classes)))
    np.add.at(counts, (cluster_N, class_N), 1)
    rows, columns = linear_sum_assignment(-counts)
    mate = np.full(len(clusters), -1)
    mate[rows] = columns
    right_N: np.ndarray = mate[cluster_N] == class_N
    return right_N


def _mean(right: np.ndarray) -> float:
    return float(right.mean()) if len(right) else float("nan")
