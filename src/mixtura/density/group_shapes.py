"""Covariances of groups from their membership matrices: full, shrunk towards what groups share, diagonal, tied, spherical.

Shapes: N samples, F features, K groups.
Source: Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices, eq. 14 and lemma
3.3-3.4, with the pooled covariance for their target.
"""

from __future__ import annotations

import numpy as np

__all__ = ["SHAPES", "group_covariances", "shaped"]

SHAPES = ("auto", "full", "shrunk", "diag", "tied", "spherical")
SAMPLES_A_FEATURE = 3  # "auto" shrinks a group with fewer


def group_covariances(X: np.ndarray, memberships: np.ndarray, crossed: np.ndarray) -> np.ndarray:
    """(X' diag(Z_k 1) X - X' Z_k X) / 1'Z_k 1, shape (K, F, F).

    For a hard partition these are the groups' covariances around their own means: the formula centres by itself. X should
    still be centred around the mean of all, so that the difference does not cancel.

    Args:
        X: shape (N, F).
        memberships: row sums Z_k 1, shape (N, K).
        crossed: X' Z_k X, shape (K, F, F).
    """
    second_KFF = np.stack([(X * sums_N[:, None]).T @ X for sums_N in memberships.T])
    return (second_KFF - crossed) / np.maximum(memberships.sum(0), np.finfo(float).tiny)[:, None, None]


def shaped(covariances: np.ndarray, X: np.ndarray, memberships: np.ndarray, kind: str, reg: float) -> np.ndarray:
    """The covariances as their kind allows, with ``reg`` on the diagonal, shape (K, F, F).

    Args:
        covariances: of the groups, shape (K, F, F).
        X: shape (N, F).
        memberships: how much of each sample is in each group, shape (N, K), >= 0.
        kind: one of :data:`SHAPES`; ``"auto"`` is ``"shrunk"`` for groups of fewer than 3 F samples, else ``"full"``.
        reg: variance added to every feature.
    """
    k, f = covariances.shape[:2]
    sizes_K = memberships.sum(0)
    pooled_FF = np.tensordot(sizes_K / sizes_K.sum(), covariances, 1)
    if kind == "tied":
        found = np.repeat(pooled_FF[None], k, 0)
    elif kind == "diag":
        found = covariances * np.eye(f)
    elif kind == "spherical":
        found = np.trace(covariances, axis1=1, axis2=2)[:, None, None] / f * np.eye(f)
    else:
        found = covariances.copy()
        for group in range(k):
            if kind == "shrunk" or (kind == "auto" and f * SAMPLES_A_FEATURE > sizes_K[group]):
                weight = _shrinkage(covariances[group], X, memberships[:, group], pooled_FF)
                found[group] = weight * pooled_FF + (1 - weight) * covariances[group]
    return found + reg * np.eye(f)


def _shrinkage(sigma_FF: np.ndarray, X: np.ndarray, weights_N: np.ndarray, target_FF: np.ndarray) -> float:
    """Weight of the target: error of the covariance over its distance from the target, at most 1."""
    size = weights_N.sum()
    if size <= 2:  # one or two samples look free of error, having no spread around their own product
        return 1.0
    apart_NF = X - weights_N @ X / size
    distance = float(((sigma_FF - target_FF) ** 2).sum())
    # sum_i w_i |x_i x_i' - S|^2 = sum_i w_i |x_i|^4 - size |S|^2 for S the weighted covariance.
    error = float(weights_N @ (apart_NF**2).sum(1) ** 2 - size * (sigma_FF**2).sum()) / size**2
    return min(1.0, max(0.0, error) / distance) if distance > 0 else 1.0
