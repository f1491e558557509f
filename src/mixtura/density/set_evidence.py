"""How probable a set of samples is as one Gaussian cluster of unknown mean and covariance, in closed form.

The mean and the covariance are integrated out under a normal-inverse-Wishart prior, so that two clusters pay for their second
set of parameters: point estimates would always prefer two. ``diag`` takes a prior of its own for every feature.

Shapes: N samples, F features, C sets.
Source: Murphy 2007, Conjugate Bayesian analysis of the Gaussian distribution, eq. 250-266, as in 2305.06144, eq. 4-8;
the modes of mean and covariance, there eq. 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.core.gaussian import Covariance, Gaussians, precisions_cholesky
from mixtura.core.sufficient import Statistics

__all__ = ["ClusterPrior", "log_evidence", "map_mixture", "set_statistics"]


@dataclass(frozen=True)
class ClusterPrior:
    """Normal-inverse-Wishart prior of a cluster's mean and covariance.

    Attributes:
        mean: expected mean m0, shape (F,).
        kappa: how many samples that expectation counts as, > 0.
        nu: degrees of freedom, > F - 1; > 0 for diag.
        scale: Psi0, shape (F, F), positive definite; shape (F,), > 0, for diag.
    """

    mean: Tensor
    kappa: float
    nu: float
    scale: Tensor

    def __post_init__(self) -> None:
        f = len(self.mean)
        if self.scale.shape not in ((f, f), (f,)):
            raise ValueError(f"scale must have shape {(f, f)} or {(f,)}, got {tuple(self.scale.shape)}")
        if not self.kappa > 0:
            raise ValueError(f"kappa must be > 0, got {self.kappa}")
        if not self.nu > self.wide - 1:
            raise ValueError(f"nu must be > {self.wide - 1}, got {self.nu}")

    @property
    def covariance(self) -> Covariance:
        """``"full"`` or ``"diag"``."""
        return "full" if self.scale.dim() == 2 else "diag"

    @property
    def wide(self) -> int:
        """Features that share one covariance: F, or 1 for diag."""
        return len(self.mean) if self.scale.dim() == 2 else 1


def set_statistics(x: Tensor, sets: Tensor, n_sets: int, covariance: Covariance) -> Statistics:
    """Sufficient statistics of each set: counts, sums and sums of outer products (squares for diag).

    Args:
        x: shape (N, F), float64.
        sets: of each sample, shape (N,), in [0, n_sets); a negative one belongs to none.
        n_sets: C; a set may be empty.
        covariance: ``"full"`` or ``"diag"``.
    """
    order_N = sets.argsort(stable=True)
    order_N = order_N[int((sets < 0).sum()) :]
    count_C = torch.bincount(sets[order_N], minlength=n_sets)
    f = x.shape[1]
    first_CF = x.new_zeros(n_sets, f)
    second = x.new_zeros(n_sets, f, f) if covariance == "full" else x.new_zeros(n_sets, f)
    start = 0
    for c, count in enumerate(count_C.tolist()):
        mine_NF = x[order_N[start : start + count]]
        start += count
        first_CF[c] = mine_NF.sum(0)
        second[c] = mine_NF.mT @ mine_NF if covariance == "full" else mine_NF.square().sum(0)
    return Statistics(count_C.to(x), first_CF, second, x.new_zeros(()))


def log_evidence(found: Statistics, prior: ClusterPrior) -> Tensor:
    """Log probability of each set of samples as one cluster, log h, shape (C,), in nats; 0 for an empty set.

    Source:
        2305.06144, eq. 4-8 (Murphy 2007, eq. 266).
    """
    d, n_C = prior.wide, found.weight
    kappa_C, nu_C = prior.kappa + n_C, prior.nu + n_C
    gammas_C = torch.special.multigammaln(nu_C / 2, d) - _log_gamma(prior.nu / 2, d)
    shrink_C = 0.5 * d * (math.log(prior.kappa) - kappa_C.log())
    per_C = gammas_C + shrink_C - 0.5 * n_C * d * math.log(math.pi)
    before, after = prior.scale, _posterior_scale(found, prior)
    if prior.covariance == "diag":
        dets_C = 0.5 * prior.nu * before.log().sum() - 0.5 * nu_C * after.log().sum(-1)
        return len(prior.mean) * per_C + dets_C
    return per_C + 0.5 * prior.nu * torch.logdet(before) - 0.5 * nu_C * torch.logdet(after)


def map_mixture(found: Statistics, prior: ClusterPrior, concentration: float = 0.1) -> Gaussians:
    """The most probable mixture given its statistics: modes of means, covariances and weights.

    Args:
        found: statistics under responsibilities; a component may be empty.
        prior: of every component.
        concentration: added to each component's count, >= 0.
    Source:
        2305.06144, eq. 3; the mode of a normal-inverse-Wishart, with D + 2 in the denominator.
    """
    n_C = found.weight
    mean_CF = (found.first + prior.kappa * prior.mean) / (n_C + prior.kappa)[:, None]
    spread_C = prior.nu + n_C + prior.wide + 2
    scale = _posterior_scale(found, prior)
    sigma = scale / (spread_C[:, None, None] if prior.covariance == "full" else spread_C[:, None])
    weights_C = (n_C + concentration) / (n_C.sum() + concentration * len(n_C))
    return Gaussians(weights_C, mean_CF, sigma, precisions_cholesky(sigma, prior.covariance), prior.covariance)


def _posterior_scale(found: Statistics, prior: ClusterPrior) -> Tensor:
    """Psi_N = Psi0 + scatter around the mean + kappa0 N / kappa_N (mean - m0)(mean - m0)', shape (C, F, F) or (C, F)."""
    n_C = found.weight
    # Around the prior's mean, in which the two terms of the formula are one.
    apart_CF = found.first - n_C[:, None] * prior.mean
    pull_C = 1 / (prior.kappa + n_C)
    if prior.covariance == "diag":
        second_CF = found.second - 2 * found.first * prior.mean + n_C[:, None] * prior.mean.square()
        return prior.scale + (second_CF - pull_C[:, None] * apart_CF.square()).clamp(min=0)
    cross_CFF = found.first[:, :, None] * prior.mean
    second_CFF = found.second - cross_CFF - cross_CFF.mT + n_C[:, None, None] * torch.outer(prior.mean, prior.mean)
    return prior.scale + second_CFF - pull_C[:, None, None] * apart_CF[:, :, None] * apart_CF[:, None, :]


def _log_gamma(a: float, d: int) -> float:
    return float(torch.special.multigammaln(torch.tensor(a, dtype=torch.float64), d))
