"""Where a mixture starts: k-means++ centres, a few Lloyd steps, and a mixture from the groups they make.

Labels enter as constraints: a labelled sample belongs to a component of its class from the start, and its class's
components start among its samples.

Shapes: M samples of a subsample, F features, C components.
Source: Arthur and Vassilvitskii 2007, k-means++, sec. 2 (with the greedy choice of their conclusion); Lloyd 1982.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtura.core.gaussian import Covariance, Gaussians, LostRank, covariance_shape
from mixtura.core.sufficient import statistics
from mixtura.density.em import Collapsed, lost_rank
from mixtura.density.inputs import Given, subsample

__all__ = ["initial_mixture", "kmeans_plus_plus", "lloyd", "start_means", "start_mixture"]

LLOYD_STEPS = 10
START_SAMPLES, START_SAMPLES_EACH = 4096, 128  # a start looks at so many samples, or so many a component


def kmeans_plus_plus(
    X: np.ndarray,
    n_clusters: int,
    *,
    first: np.ndarray | None = None,
    sample_weight: np.ndarray | None = None,
    random_state: int | np.random.RandomState | None = None,
) -> np.ndarray:
    """Centres far from each other: each is drawn with probability proportional to the squared distance to those before.

    Args:
        X: shape (M, F), finite.
        n_clusters: how many centres, those in ``first`` included; at most M.
        first: centres that are given, shape (G, F); they come first in the result.
        sample_weight: shape (M,), >= 0.
        random_state: source of chance.
    Returns:
        Shape (n_clusters, F). All but the given ones are rows of X, twice the same only where X has too few different ones.
    Raises:
        ValueError: more clusters than samples, or fewer than are given.
    """
    from sklearn.utils import check_random_state

    rng = check_random_state(random_state)
    given = np.empty((0, X.shape[1])) if first is None else np.asarray(first, dtype=np.float64)
    if not len(given) <= n_clusters or n_clusters - len(given) > len(X):
        raise ValueError(
            f"n_clusters must be between the {len(given)} given and {len(given) + len(X)}, with the {len(X)} samples, "
            f"got {n_clusters}"
        )
    x_MF = np.asarray(X, dtype=np.float64)
    weight_M = np.ones(len(x_MF)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    centres = list(given)
    if n_clusters and not centres:
        centres.append(x_MF[rng.choice(len(x_MF), p=weight_M / weight_M.sum())])
    squares_M = (x_MF**2).sum(1)
    nearest_M = np.full(len(x_MF), np.inf)
    for centre in centres:
        nearest_M = np.minimum(nearest_M, _distances(x_MF, squares_M, centre[None])[0])
    # Several candidates a step, of which the best stays: rarely two centres in one group.
    n_candidates = 2 + int(np.log(max(n_clusters, 1)))
    while len(centres) < n_clusters:
        mass_M = nearest_M * weight_M
        if not mass_M.sum() > 0:  # fewer different samples than clusters
            mass_M = weight_M
        drawn = rng.choice(len(x_MF), size=n_candidates, p=mass_M / mass_M.sum())
        left = np.minimum(nearest_M, _distances(x_MF, squares_M, x_MF[drawn]))
        best = int((left @ weight_M).argmin())
        nearest_M = left[best]
        centres.append(x_MF[drawn[best]])
    return np.array(centres).reshape(n_clusters, X.shape[1])


def lloyd(
    X: np.ndarray,
    centres: np.ndarray,
    *,
    steps: int = 10,
    allowed: np.ndarray | None = None,
    sample_weight: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A few steps of k-means.

    Args:
        X: shape (M, F).
        centres: where to start, shape (C, F).
        steps: at most so many; it ends sooner when no sample moves.
        allowed: which clusters a sample may join, shape (M, C), boolean; all by default.
        sample_weight: shape (M,), >= 0.
    Returns:
        Centres, shape (C, F), and the cluster of each sample, shape (M,). An empty cluster keeps its centre.
    """
    x_MF, centres_CF = np.asarray(X, dtype=np.float64), np.array(centres, dtype=np.float64)
    weight_M = np.ones(len(x_MF)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    squares_M = (x_MF**2).sum(1)
    label_M = np.full(len(x_MF), -1)
    for step in range(steps + 1):
        distance_CM = _distances(x_MF, squares_M, centres_CF)
        if allowed is not None:
            distance_CM = np.where(allowed.T, distance_CM, np.inf)
        before, label_M = label_M, distance_CM.argmin(0)
        if step == steps or (before == label_M).all():
            break
        mass_C = np.bincount(label_M, weight_M, minlength=len(centres_CF))
        sums_CF = np.zeros_like(centres_CF)
        np.add.at(sums_CF, label_M, x_MF * weight_M[:, None])
        centres_CF = np.where(mass_C[:, None] > 0, sums_CF / np.where(mass_C > 0, mass_C, 1.0)[:, None], centres_CF)
    return centres_CF, label_M


def start_means(
    X: np.ndarray,
    n_components: int,
    init: str,
    *,
    classes: np.ndarray,
    class_components: Mapping[int, Sequence[int]],
    sample_weight: np.ndarray | None,
    random_state: np.random.RandomState,
) -> np.ndarray:
    """First means, shape (C, F): those of a class's components lie among its samples, the others far from all those.

    Args:
        X: shape (M, F).
        n_components: C.
        init: ``"k-means++"`` or ``"random"`` (samples drawn evenly).
        classes: class of each sample, shape (M,), -1 where unlabelled.
        class_components: class -> its components.
        sample_weight: shape (M,).
        random_state: source of chance.
    """
    weight_M = np.ones(len(X)) if sample_weight is None else sample_weight
    means_CF = np.zeros((n_components, X.shape[1]))
    taken: list[int] = []
    for label, components in class_components.items():
        mine = (classes == label) & (weight_M > 0)
        if not mine.any():
            continue
        x, w = X[mine], weight_M[mine]
        if len(components) == 1:
            means_CF[components[0]] = w @ x / w.sum()
        else:
            rows = np.arange(max(len(x), len(components))) % len(x)
            means_CF[list(components)] = kmeans_plus_plus(
                x[rows], len(components), sample_weight=w[rows], random_state=random_state
            )
        taken += components
    free = [c for c in range(n_components) if c not in set(taken)]
    if free:
        open_M = (classes < 0) & (weight_M > 0)
        x, w = (X[open_M], weight_M[open_M]) if open_M.sum() >= len(free) else (X[weight_M > 0], weight_M[weight_M > 0])
        if init == "random":
            chosen = random_state.choice(len(x), len(free), replace=len(x) < len(free))
            means_CF[free] = x[chosen]
        else:
            given = means_CF[taken] if taken else None
            found = kmeans_plus_plus(x, len(taken) + len(free), first=given, sample_weight=w, random_state=random_state)
            means_CF[free] = found[len(taken) :]
    return means_CF


def initial_mixture(
    X: np.ndarray,
    labels: np.ndarray,
    means: np.ndarray,
    covariance: Covariance,
    *,
    floor: Any,
    sample_weight: np.ndarray | None,
) -> Gaussians:
    """The mixture of groups: their shares, means and covariances, the latter drawn towards what the groups share.

    A group's covariance counts as much as F samples of the pooled one: a group of a few samples would otherwise start
    flat, and EM hardly leaves a flat start.

    Args:
        X: shape (M, F).
        labels: group of each sample, shape (M,).
        means: shape (C, F), for groups without samples.
        covariance: the kind.
        floor: variance added to every feature, scalar or shape (F,).
        sample_weight: shape (M,).
    """
    x_MF = torch.from_numpy(np.asarray(X, dtype=np.float64))
    weight_M = None if sample_weight is None else torch.from_numpy(np.asarray(sample_weight, dtype=np.float64))
    one_hot_MC = torch.nn.functional.one_hot(torch.from_numpy(labels), len(means)).double()
    # Around the groups' own centres, so that the pooled scatter is within groups.
    centres_CF = torch.from_numpy(np.asarray(means, dtype=np.float64))
    found = statistics(x_MF - centres_CF[torch.from_numpy(labels)], one_hot_MC, "full", weights=weight_M)
    total = found.weight.sum()
    n_features = x_MF.shape[1]
    pooled_FF = found.second.sum(0) / total
    apart_CF = found.first / found.weight.clamp(min=1e-300)[:, None]
    mean_weight = total / len(x_MF)
    prior = n_features * mean_weight if len(means) > 1 else 0.0
    centred_CFF = found.second - found.weight[:, None, None] * apart_CF[:, :, None] * apart_CF[:, None, :]
    sigma_CFF = (centred_CFF + prior * pooled_FF) / (found.weight + prior).clamp(min=1e-300)[:, None, None]
    # An empty group gets the weight of one sample, so that EM can still fill it.
    weight_C = found.weight.clamp(min=float(mean_weight))
    if covariance == "full":
        sigma = sigma_CFF
    elif covariance == "tied":
        sigma = pooled_FF
    else:
        sigma = sigma_CFF.diagonal(dim1=-2, dim2=-1)
        sigma = sigma if covariance == "diag" else sigma.mean(1)
    floor_F = torch.as_tensor(floor, dtype=torch.float64).expand(n_features)
    if covariance in ("full", "tied"):
        sigma = sigma + torch.diag(floor_F)
    else:
        sigma = sigma + (floor_F if covariance == "diag" else floor_F.mean())
    return Gaussians.build(weight_C / weight_C.sum(), centres_CF + apart_CF, sigma, covariance)


def start_mixture(given: Given, estimator: Any, random_state: np.random.RandomState) -> Gaussians:
    """The mixture that EM starts from, in the coordinates of the frame.

    Args:
        given: checked input.
        estimator: with the number of components, how means are found (``init``), and the parts of a start that are given.
        random_state: source of chance.
    Raises:
        ValueError: a given part of another shape, not finite, or precisions that are not positive definite.
        Collapsed: samples that leave a covariance without rank, where no floor holds it.
    """
    n_components, init = estimator.n_components, estimator.init
    means_init, weights_init = estimator.means_init, estimator.weights_init
    precisions_init = estimator.precisions_init
    frame, covariance = given.samples.frame, given.samples.covariance
    f = len(frame.centre)
    means_CF = None
    if means_init is not None:
        means_CF = (_given(means_init, "means_init", (n_components, f)) - frame.centre.numpy()) / frame.scale.numpy()
    if weights_init is not None:
        weights_C = torch.from_numpy(_given(weights_init, "weights_init", (n_components,)))
        if bool((weights_C < 0).any()) or abs(float(weights_C.sum()) - 1) > 1e-6:
            raise ValueError(f"weights_init must be >= 0 and sum to 1, got a sum of {float(weights_C.sum()):g}")
        weights_C = weights_C / weights_C.sum()
    if precisions_init is not None:
        sigma = _given_covariances(precisions_init, n_components, frame.scale, covariance)
    if means_CF is not None and weights_init is not None and precisions_init is not None:
        return Gaussians.build(weights_C, torch.from_numpy(means_CF), sigma, covariance)
    n = max(START_SAMPLES, START_SAMPLES_EACH * n_components)
    drawn = subsample(given, n, random_state)
    z_MF, class_M, w_M = drawn.z, drawn.classes, drawn.weights
    components = dict(enumerate(given.classes.components)) if given.classes is not None else {}
    allowed_MC = None
    if given.classes is not None:
        allowed_MC = given.classes.table()[class_M] | (class_M < 0)[:, None]
    if means_CF is None:
        means_CF = start_means(
            z_MF,
            n_components,
            init,
            classes=class_M,
            class_components=components,
            sample_weight=w_M,
            random_state=random_state,
        )
        steps = LLOYD_STEPS if init == "k-means++" else 0
        means_CF, group_M = lloyd(z_MF, means_CF, steps=steps, allowed=allowed_MC, sample_weight=w_M)
    else:
        _, group_M = lloyd(z_MF, means_CF, steps=0, allowed=allowed_MC, sample_weight=w_M)
    try:
        found = initial_mixture(z_MF, group_M, means_CF, covariance, floor=given.samples.floor, sample_weight=w_M)
    except LostRank as error:
        raise Collapsed(lost_rank(error, given.names)) from error
    return Gaussians.build(
        weights_C if weights_init is not None else found.weights,
        torch.from_numpy(means_CF) if means_init is not None or init == "random" else found.means,
        sigma if precisions_init is not None else _start_covariances(given, found),
        covariance,
    )


def _start_covariances(given: Given, found: Gaussians) -> Tensor:
    """Those of the groups, or the known variance."""
    known = given.samples.variance
    return found.covariances if known is None else torch.full_like(found.covariances, known)


def _given(value: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    found = np.asarray(value, dtype=np.float64)
    if found.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite")
    return found


def _given_covariances(precisions: Any, n_components: int, scale: Tensor, covariance: Covariance) -> Tensor:
    """Covariances in the coordinates of the frame, from precisions in the units of the samples."""
    shape = covariance_shape(n_components, len(scale), covariance)
    inverse = torch.from_numpy(_given(precisions, "precisions_init", shape))
    if covariance in ("diag", "spherical"):
        if not bool((inverse > 0).all()):
            raise ValueError(f"precisions_init must be > 0, got {float(inverse.min()):g}")
        return 1 / (inverse * (scale if covariance == "diag" else scale[0]) ** 2)
    scaled = inverse * scale[:, None] * scale
    lower, info = torch.linalg.cholesky_ex(scaled)
    if bool(info.any()) or not torch.allclose(scaled, scaled.mT, rtol=1e-8, atol=0.0):
        raise ValueError("precisions_init must be symmetric and positive definite")
    return torch.cholesky_inverse(lower)


def _distances(x_MF: np.ndarray, squares_M: np.ndarray, centres_CF: np.ndarray) -> np.ndarray:
    """Squared distances, shape (C, M), never below zero."""
    found = (centres_CF**2).sum(1)[:, None] - 2 * centres_CF @ x_MF.T + squares_M
    return np.maximum(found, 0.0)
