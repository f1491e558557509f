"""What known classes tell about unknown ones: how wide a class is, and how much a split must gain to be one of classes.

A Gaussian cluster is a rough picture of a class, so halving a true class gains evidence too, more the more samples there are.
The classes whose labels are known say how much: the temper T divides every gain so that none of them would be halved and no
two would be merged.

Shapes: N samples, F features, C known classes.
Source: ours; the prior's use of a pooled covariance is in the spirit of 2305.06144, sec. 3.2, whose scale is a constant.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.core.gaussian import Covariance
from mixtura.core.sufficient import Statistics
from mixtura.density.cluster_moves import halves_of, rows_of, split_terms
from mixtura.density.set_evidence import ClusterPrior, set_statistics

__all__ = ["Calibration", "calibrate", "calibrated_prior", "within_covariance"]

log = logging.getLogger(__name__)

COPIES = 5  # of the known classes as Gaussians, whose ratios are averaged
PAIR_MARGIN = 0.9  # of the gain at which two known classes would merge


@dataclass(frozen=True)
class Calibration:
    """How far known classes temper the evidence.

    Attributes:
        temper: T >= 1.
        of_halves: gain over price of halving each known class, shape (C,): below it the class would be split.
        of_pairs: gain over price of each pair of known classes, shape (C (C - 1) / 2,): above the least two would merge.
    """

    temper: float
    of_halves: tuple[float, ...]
    of_pairs: tuple[float, ...]


def within_covariance(x: Tensor, classes: Tensor, n_classes: int, covariance: Covariance) -> Tensor:
    """Pooled covariance within classes, shape (F, F), or (F,) for diag; some of the total one is mixed in where rows are few.

    Args:
        x: shape (N, F).
        classes: shape (N,), in [0, n_classes), negative for rows to leave out.
        n_classes: C.
        covariance: ``"full"`` or ``"diag"``.
    """
    found = set_statistics(x, classes, n_classes, covariance)
    some = found.weight > 0
    mean_CF = found.first[some] / found.weight[some][:, None]
    total = float(found.weight.sum())
    if covariance == "full":
        within = found.second[some].sum(0) - mean_CF.mT @ (found.weight[some][:, None] * mean_CF)
    else:
        within = (found.second[some].sum(0) - found.weight[some] @ mean_CF.square()).clamp(min=0)
    # As much as F samples of round clusters: without it a class of fewer rows than features has no determinant.
    f = x.shape[1]
    free = max(total - float(some.sum()), 0.0)
    spread = float(within.diagonal().mean() if covariance == "full" else within.mean()) / max(free, 1.0)
    if not spread > 0:
        spread = float(x.var(0, unbiased=False).mean()) or 1.0
    ball = spread * (torch.eye(f, dtype=x.dtype) if covariance == "full" else torch.ones(f, dtype=x.dtype))
    prior = float(f if covariance == "full" else 1)
    return (within + prior * ball) / (free + prior)


def calibrated_prior(within: Tensor, mean: Tensor, kappa: float, nu: float) -> ClusterPrior:
    """The prior whose expected covariance is ``within``: Psi0 = (nu - D - 1) within; nu must exceed D + 1 (2 for diag)."""
    wide = len(mean) if within.dim() == 2 else 1
    return ClusterPrior(mean, kappa, nu, (nu - wide - 1) * within)


def calibrate(
    x: Tensor,
    classes: Tensor,
    n_classes: int,
    prior: ClusterPrior,
    *,
    margin: float = 0.25,
    sizes: Tensor | None = None,
    generator: torch.Generator,
) -> Calibration:
    """A temper at which no known class would be halved and no two would merge.

    With d the gain of log evidence of two sets over their union, divided by the price -log Gamma(a) Gamma(b) / Gamma(a + b):
    no class is halved from T = low = max(1, max_c d_c) on, and two merge from min d_cc' on; high is 0.9 of that. T lies
    between. Where high is not above low, T = max(1, high): classes stay apart before they stay whole.

    Args:
        x: shape (N, F).
        classes: of the rows to learn from, shape (N,), in [0, n_classes); negative for the others.
        n_classes: C; with one, T is 1, since nothing says from where on it would merge classes.
        prior: of the clusters.
        margin: where T lies between low (0) and high (1).
        sizes: how many samples each class has in all, shape (C,), where the rows are some of them: a gain grows faster than its
            price, so a class of few rows would seem less of two halves than it is. Rows then count as so many. That multiplies
            what is chance among few rows of many features, too; how much is read off Gaussians of the pooled covariance,
            drawn once as few and once as many, and taken off.
        generator: source of chance, of 2-means.
    """
    mine = classes >= 0
    x_NF, class_N = x[mine], classes[mine]
    count_C = torch.bincount(class_N, minlength=n_classes)
    found = _ratios_of(x_NF, class_N, n_classes, prior, sizes, generator)
    if sizes is not None and bool((sizes > count_C).any()):
        for drawn_C, sign in ((count_C, -1), (sizes.long().clamp(min=count_C), 1)):
            sets = torch.repeat_interleave(torch.arange(n_classes), drawn_C)
            for _ in range(COPIES):
                drawn = _gaussians_like(x_NF, class_N, n_classes, prior, sets, generator)
                copy = _ratios_of(drawn, sets, n_classes, prior, sizes, generator)
                found = _Ratios(found.halves + sign * copy.halves / COPIES, found.pairs + sign * copy.pairs / COPIES)
    of_halves, of_pairs = tuple(found.halves.tolist()), tuple(found.pairs.tolist())
    if n_classes < 2:
        return Calibration(1.0, of_halves, ())
    low, high = max(1.0, max(of_halves)), min(of_pairs)
    apart = PAIR_MARGIN * high  # the price of a pair is known as well as its classes are: never quite there
    temper = max(1.0, apart) if apart <= low else low + margin * (apart - low)
    return Calibration(temper, of_halves, of_pairs)


@dataclass(frozen=True)
class _Ratios:
    """Gain over price of halving each class, shape (C,), and of each pair of classes, shape (C (C - 1) / 2,)."""

    halves: Tensor
    pairs: Tensor


def _ratios_of(
    x: Tensor, sets: Tensor, n_sets: int, prior: ClusterPrior, sizes: Tensor | None, generator: torch.Generator
) -> _Ratios:
    first, second = halves_of(x, sets, n_sets, prior.covariance, generator)
    if sizes is not None:
        factor_C = sizes.to(x) / (first + second).weight.clamp(min=1)
        first, second = grown(first, factor_C), grown(second, factor_C)
    whole = first + second
    a, b = torch.triu_indices(n_sets, n_sets, 1)
    return _Ratios(
        _gain_over_price(first, second, prior), _gain_over_price(rows_of(whole, a), rows_of(whole, b), prior)
    )


def _gain_over_price(first: Statistics, second: Statistics, prior: ClusterPrior) -> Tensor:
    gain_C, price_C = split_terms(first, second, prior)
    # Halves of one sample cost nothing to tell apart; they say nothing either.
    return (gain_C / (-price_C).clamp(min=1e-9)).where(price_C < 0, 0.0)


def _gaussians_like(
    x: Tensor, classes: Tensor, n_classes: int, prior: ClusterPrior, sets: Tensor, generator: torch.Generator
) -> Tensor:
    """A sample of one Gaussian for each of ``sets``, (N, F): around the mean of its class, of the pooled covariance."""
    centre_CF = x.new_zeros(n_classes, x.shape[1]).index_add(0, classes, x)
    centre_CF /= torch.bincount(classes, minlength=n_classes).clamp(min=1)[:, None]
    within = within_covariance(x, classes, n_classes, prior.covariance)
    noise_NF = torch.randn(len(sets), x.shape[1], generator=generator, dtype=torch.float64)
    spread = noise_NF @ torch.linalg.cholesky(within).mT if within.dim() == 2 else noise_NF * within.sqrt()
    return centre_CF[sets] + spread


def grown(found: Statistics, factor: Tensor) -> Statistics:
    """Statistics of sets in which every sample counts ``factor`` times, shape (C,)."""
    wide = factor.reshape(-1, *[1] * (found.second.dim() - 1))
    return Statistics(found.weight * factor, found.first * factor[:, None], found.second * wide, found.log_likelihood)
