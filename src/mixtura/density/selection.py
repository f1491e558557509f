"""How many components: mixtures of growing size, each grown from the last by a split, and a criterion over them.

From C to C + 1 components two starts compete: the fitted mixture with the component split that gains most from it, and a
fresh k-means++ start. The first makes the likelihood grow with C; the second escapes where splits lead astray.

Source: Ueda, Nakano, Ghahramani and Hinton 2000, SMEM, sec. 3 (which component to split); BIC, AIC and ICL as
``density.criteria`` says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtura.core.gaussian import Gaussians
from mixtura.core.natural_form import Frame
from mixtura.core.processes import ALONE, join
from mixtura.core.progress import progress
from mixtura.density.criteria import CRITERIA, criteria
from mixtura.density.em import Collapsed, Fit, Samples, Sweep, fit_em
from mixtura.density.inputs import Given, check_parameters, prepare, subsample
from mixtura.density.mixture import GaussianMixture
from mixtura.density.sources import Arrays
from mixtura.density.split_and_merge import split_component
from mixtura.density.starts import start_mixture

__all__ = ["Selection", "select_components"]

log = logging.getLogger(__name__)

LOCAL_SAMPLES, LOCAL_STEPS = 4096, 5


@dataclass(frozen=True)
class Selection:
    """The criteria over the numbers of components that were tried, lower for better.

    Attributes:
        n_components: numbers tried, ascending, shape (T,).
        log_likelihood: mean a sample, in nats, shape (T,).
        bic, aic, icl: shape (T,).
        criterion: the one that decided.
        best: the number it chose.
    """

    n_components: np.ndarray
    log_likelihood: np.ndarray
    bic: np.ndarray
    aic: np.ndarray
    icl: np.ndarray
    criterion: str
    best: int


def select_components(
    X: Any,
    n_components: Iterable[int] = range(1, 11),
    criterion: str = "bic",
    *,
    y: Any = None,
    sample_weight: Any = None,
    patience: int | None = None,
    **options: Any,
) -> tuple[GaussianMixture, Selection]:
    """The mixture whose number of components a criterion prefers, and the curve it preferred it by.

    Args:
        X, y, sample_weight: as :meth:`GaussianMixture.fit` takes them.
        n_components: numbers to try, e.g. ``range(1, 11)``.
        criterion: ``"bic"``, ``"aic"`` or ``"icl"``.
        patience: stop after so many numbers in a row that are no better than the best; None tries all.
        options: of :class:`GaussianMixture`, but for ``n_components`` and the parts of a start.
    Returns:
        The fitted mixture and a :class:`Selection`.
    Raises:
        ValueError: an unknown criterion, an empty range, numbers below 1 or below the number of classes, options that fix
            a start; and what ``fit`` raises.
    Example:
        >>> X = np.concatenate([np.random.default_rng(0).normal(m, 1, size=(100, 2)) for m in (0, 10, 20)])
        >>> model, curve = select_components(X, range(1, 6), random_state=0)
        >>> model.n_components, curve.best
        (3, 3)
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {list(CRITERIA)}, got {criterion!r}")
    tried = sorted({int(n) for n in n_components})
    if not tried or tried[0] < 1:
        raise ValueError(f"n_components must be a range of numbers >= 1, got {tried}")
    fixing = {"n_components", "means_init", "weights_init", "precisions_init", "class_components"} & set(options)
    if fixing:
        raise ValueError(f"{sorted(fixing)[0]} has no meaning where several numbers of components are tried")
    model = GaussianMixture(tried[0], **options)
    check_parameters(model)
    processes = join(model.distributed)  # type: ignore[arg-type]
    rng = processes.chance(model.random_state)
    rows: list[dict[str, float]] = []
    best, last, waited = model, None, 0
    for n in progress(tried, desc="components", unit="model"):
        model = GaussianMixture(n, **options)
        try:
            given = prepare(model, X, y, sample_weight, processes)
            last = _fit_size(model, given, last, rng)
        except ValueError as error:
            if not rows:
                raise
            log.warning("stopped before %d components: %s", n, error)
            break
        model._adopt(given, last)
        rows.append(
            {"n": n, "fit": last.lower_bounds[-1], **_judge(given.samples, last.gaussians, model.n_parameters())}
        )
        waited += 1
        if rows[-1][criterion] <= min(row[criterion] for row in rows):
            best, waited = model, 0
        if patience is not None and waited >= patience:
            break
    columns = {key: np.array([row[key] for row in rows]) for key in ("fit", *CRITERIA)}
    sizes = np.array([int(row["n"]) for row in rows])
    return best, Selection(
        sizes, columns["fit"], columns["bic"], columns["aic"], columns["icl"], criterion, best.n_components
    )


def _fit_size(model: GaussianMixture, given: Given, last: Fit | None, rng: np.random.RandomState) -> Fit:
    """The best fit of the model's number of components, from the last smaller one and from fresh starts."""
    starts = [start_mixture(given, model, rng) for _ in range(model.n_init)]
    if last is not None:
        grown = _grow(given, last.gaussians, model.n_components, rng)
        starts += [grown] if grown is not None else []
    fits, problem = [], None
    for start in starts:
        try:
            fits.append(fit_em(given.samples, start, tol=model.tol, max_iter=model.max_iter, names=given.names))
        except Collapsed as error:
            problem = error
    if not fits:
        assert problem is not None
        raise problem
    return max(fits, key=lambda fit: fit.lower_bounds[-1])


def _grow(given: Given, gaussians: Gaussians, n_components: int, rng: np.random.RandomState) -> Gaussians | None:
    """The mixture with components split until there are so many; None where no split holds."""
    drawn = subsample(given, LOCAL_SAMPLES, rng)
    x_MF = torch.from_numpy(drawn.z)
    weight_M = torch.from_numpy(np.ones(len(drawn.z)) if drawn.weights is None else drawn.weights)
    while gaussians.n_components < n_components:
        r_MC = gaussians.responsibilities(x_MF) * weight_M[:, None]
        gains = [_gain(given.samples, gaussians, c, x_MF, r_MC[:, c]) for c in range(gaussians.n_components)]
        best = int(np.argmax(gains))
        if gains[best] == -np.inf:
            return None
        gaussians = split_component(gaussians, best)
    return gaussians


def _gain(samples: Samples, gaussians: Gaussians, component: int, x_MF: Tensor, r_M: Tensor) -> float:
    """How much log likelihood a component's own samples gain, in nats, when it is split and both halves are fitted."""
    mine = r_M > 0.01
    if int(mine.sum()) < 2:
        return -np.inf
    one = gaussians.pick([component])
    own = replace(
        samples,
        source=Arrays(x_MF[mine]),
        frame=Frame(torch.zeros(one.n_features).double(), torch.ones(one.n_features).double()),
        n=int(mine.sum()),
        weight=float(r_M[mine].sum()),
        weights=r_M[mine],
        classes=None,
        table=None,
        idle=(),
        missing=False,
        processes=ALONE,
    )
    before = float(one.score_samples(x_MF[mine]) @ r_M[mine])
    try:
        halves = fit_em(own, split_component(one, 0), tol=0.0, max_iter=LOCAL_STEPS)
    except Collapsed:
        return -np.inf
    return halves.lower_bounds[-1] * own.weight - before


def _judge(samples: Samples, gaussians: Gaussians, n_parameters: int) -> dict[str, float]:
    """The criteria of a fitted mixture over the samples of all processes."""
    total, entropy, start = 0.0, 0.0, 0
    for x_BF, logs_B, r_CB in Sweep(replace(samples, weights=None), gaussians).blocks():
        entropy_B = torch.special.entr(r_CB.double()).sum(0).cpu()
        weights = torch.ones(len(x_BF), dtype=torch.float64)
        if samples.weights is not None:
            weights = samples.weights[start : start + len(x_BF)]
        start += len(x_BF)
        total, entropy = total + float(logs_B.cpu() @ weights), entropy + float(entropy_B @ weights)
    both = samples.processes.sum(torch.tensor([total, entropy], dtype=torch.float64))
    return criteria(float(both[0]), float(both[1]), samples.weight, n_parameters)
