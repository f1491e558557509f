"""Distributions of one scale s > 0, and what a Gaussian process with that scale says about it.

A process with covariance s K, seen at n values, tells of s only through two numbers: the quadratic form q = y' K^-1 y and n.
:func:`condition` turns a prior, q and n into a posterior and into the log of the integral over s. With an inverse-gamma
prior both are closed forms; any other prior takes a one-dimensional integral in log s.

Shapes: R nodes. All densities are over s, evaluated at log s, so that no scale under- or overflows.
Source: Scale Mixtures of Neural Network Gaussian Processes (2107.01408), sec. 3; any prior by importance sampling, sec. 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "INTEGRATIONS",
    "PRIORS",
    "BurrXII",
    "FixedScale",
    "InverseGamma",
    "ScaleNodes",
    "ScalePrior",
    "condition",
    "log_marginal",
    "named_prior",
]

Integration = Literal["auto", "closed", "quadrature", "importance"]
INTEGRATIONS: tuple[str, ...] = get_args(Integration)
LOG_2PI = math.log(2 * math.pi)
N_NODES = 256
N_DRAWS = 1000  # of importance sampling, as in the paper
# The integrand is cut where it fell below e^-45 of its top: what lies beyond is under 1e-12 of the mass even for tails in
# log s that fall as slowly as e^(-u / 1000).
DROP = 45.0
# Targets without any signal leave q = 0, where a prior with mass at zero has an improper posterior.
SMALLEST_Q = 1e-12  # a value


@runtime_checkable
class ScalePrior(Protocol):
    """What a prior of the scale must offer to be mixed over numerically."""

    def log_density(self, log_scale: Tensor) -> Tensor:
        """Log density of s at exp(log_scale), elementwise, in float64."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of log s, shape (n,), float64."""


@dataclass(frozen=True)
class InverseGamma:
    """s with density proportional to s^(-a-1) exp(-b/s): its mixture is a Student-t process with 2a degrees of freedom.

    Attributes:
        a: shape, > 0. The mean of s is b / (a - 1) where a > 1.
        b: rate, > 0, in units of the squared targets.
    """

    a: float = 2.0
    b: float = 2.0

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} of InverseGamma must be > 0 and finite, got {getattr(self, name)}")

    def log_density(self, log_scale: Tensor) -> Tensor:
        """Log density at exp(log_scale)."""
        normaliser = self.a * math.log(self.b) - math.lgamma(self.a)
        return normaliser - (self.a + 1) * log_scale - self.b * (-log_scale).exp()

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of log s."""
        shape = torch.full((n,), self.a + 1, dtype=torch.float64)
        # Gamma(a) = Gamma(a + 1) U^(1/a), in logs: for a << 1 a direct draw underflows to 0.
        uniform = torch.rand(n, generator=generator, dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
        log_gamma = torch._standard_gamma(shape, generator=generator).log() + uniform.log() / self.a
        return math.log(self.b) - log_gamma

    @property
    def mean_precision(self) -> float:
        """E[1/s]."""
        return self.a / self.b


@dataclass(frozen=True)
class BurrXII:
    """s with density c d s^(c-1) (1 + s^c)^(-d-1): heavy tails without a closed form.

    Attributes:
        c, d: shapes, > 0; the tail falls as s^(-c d).
    """

    c: float = 2.0
    d: float = 1.0

    def __post_init__(self) -> None:
        for name in ("c", "d"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} of BurrXII must be > 0 and finite, got {getattr(self, name)}")

    def log_density(self, log_scale: Tensor) -> Tensor:
        """Log density at exp(log_scale)."""
        softplus = torch.nn.functional.softplus(self.c * log_scale)
        return math.log(self.c * self.d) + (self.c - 1) * log_scale - (self.d + 1) * softplus

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of log s, by inverting the distribution function 1 - (1 + s^c)^-d."""
        uniform = torch.rand(n, generator=generator, dtype=torch.float64).clamp(min=1e-300)
        return torch.expm1(-uniform.log() / self.d).clamp(min=1e-300).log() / self.c


@dataclass(frozen=True)
class FixedScale:
    """One scale: the plain process of a wide network.

    Attributes:
        value: s, > 0; or ``"evidence"``: the s that makes the targets most likely, q / n.
    """

    value: float | Literal["evidence"] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.value, str):
            if self.value != "evidence":
                raise ValueError(f"value of FixedScale must be a number > 0 or 'evidence', got {self.value!r}")
        elif not (self.value > 0 and math.isfinite(self.value)):
            raise ValueError(f"value of FixedScale must be > 0 and finite, got {self.value}")


@dataclass(frozen=True)
class ScaleNodes:
    """A posterior of s as weights on a few values of it.

    Attributes:
        log_scale: log s of each node, shape (R,), float64.
        log_weight: log probability of each node, shape (R,), sums to one.
    """

    log_scale: Tensor
    log_weight: Tensor

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of log s among the nodes."""
        chosen = torch.multinomial(self.log_weight.exp(), n, replacement=True, generator=generator)
        return self.log_scale[chosen]

    @property
    def mean_precision(self) -> float:
        """E[1/s]."""
        return float((self.log_weight - self.log_scale).logsumexp(0).exp())


Prior = InverseGamma | BurrXII | FixedScale | ScalePrior
Posterior = InverseGamma | ScaleNodes

PRIORS: dict[str, InverseGamma | BurrXII | FixedScale] = {
    "inverse-gamma": InverseGamma(),
    "burr": BurrXII(),
    "fixed": FixedScale("evidence"),
}


def named_prior(prior: str | Prior) -> Prior:
    """A prior as it is, or the one of a name.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a prior.
    """
    if isinstance(prior, str):
        if prior not in PRIORS:
            raise ValueError(f"scale_prior must be one of {sorted(PRIORS)} or a prior, got {prior!r}")
        return PRIORS[prior]
    if not isinstance(prior, (FixedScale, ScalePrior)):
        raise TypeError(
            f"scale_prior must be a name, FixedScale or have log_density and draw, got {type(prior).__name__}"
        )
    return prior


def condition(
    prior: Prior | Posterior, quadratic: float, n_values: int, integration: Integration = "auto", *, seed: int = 0
) -> tuple[Posterior, float]:
    """Posterior of the scale after n values with quadratic form q, and their log density without the determinant.

    The log density of y is the returned number minus log|K| / 2.

    Args:
        prior: of s; a posterior found before serves as the prior of what comes next.
        quadratic: q = y' K^-1 y, >= 0, summed over outputs that share the scale.
        n_values: number of values, outputs counted, >= 0.
        integration: ``"closed"`` (inverse gamma, a fixed scale), ``"quadrature"`` (Gauss-Legendre in log s), ``"importance"``
            (1000 draws from the prior, as in the paper) or ``"auto"``: closed where there is a closed form.
        seed: of importance sampling.
    Raises:
        ValueError: an unknown ``integration``, or one that the prior has no use for.
    Source:
        2107.01408: posterior of the inverse gamma, and eq. for self-normalised importance sampling.
    Example:
        >>> posterior, _ = condition(InverseGamma(2.0, 2.0), quadratic=6.0, n_values=8)
        >>> posterior
        InverseGamma(a=6.0, b=5.0)
    """
    if integration not in INTEGRATIONS:
        raise ValueError(f"integration must be one of {list(INTEGRATIONS)}, got {integration!r}")
    if isinstance(prior, (FixedScale, ScaleNodes)):
        return _condition_nodes(_nodes_of(prior, quadratic, n_values), quadratic, n_values)
    if isinstance(prior, InverseGamma) and integration in ("auto", "closed"):
        log_density = float(log_marginal(prior, torch.tensor(quadratic, dtype=torch.float64), n_values))
        return InverseGamma(prior.a + n_values / 2, prior.b + quadratic / 2), log_density
    if integration == "closed":
        raise ValueError(
            f"integration='closed' needs InverseGamma or FixedScale, got {type(prior).__name__}; use 'quadrature'"
        )
    if integration == "importance":
        drawn = prior.draw(N_DRAWS, torch.Generator().manual_seed(seed))
        nodes = ScaleNodes(drawn, torch.full_like(drawn, -math.log(N_DRAWS)))
        return _condition_nodes(nodes, quadratic, n_values)
    return _by_quadrature(prior, max(quadratic, SMALLEST_Q * n_values), n_values)


def log_marginal(scale: Posterior, quadratic: Tensor, n_values: int) -> Tensor:
    """Log density of n values with quadratic form q when s has this distribution, without the determinant.

    Args:
        scale: inverse gamma, or weighted nodes.
        quadratic: q, any shape (one a group of values), float64.
        n_values: values in a group.
    """
    if isinstance(scale, InverseGamma):
        half = n_values / 2
        normaliser = _log_gamma_ratio(scale.a, half) - half * (LOG_2PI + math.log(scale.b))
        return normaliser - (scale.a + half) * (quadratic / (2 * scale.b)).log1p()
    return (scale.log_weight + _log_likelihood(scale.log_scale, quadratic[..., None], n_values)).logsumexp(-1)


def _nodes_of(prior: FixedScale | ScaleNodes, quadratic: float, n_values: int) -> ScaleNodes:
    if isinstance(prior, ScaleNodes):
        return prior
    scale = max(quadratic / n_values, SMALLEST_Q) if prior.value == "evidence" else float(prior.value)
    return ScaleNodes(torch.tensor([math.log(scale)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def _log_likelihood(log_scale: Tensor, quadratic: float | Tensor, n_values: int) -> Tensor:
    return -0.5 * (n_values * (LOG_2PI + log_scale) + quadratic * (-log_scale).exp())


def _condition_nodes(nodes: ScaleNodes, quadratic: float, n_values: int) -> tuple[ScaleNodes, float]:
    joint_R = nodes.log_weight + _log_likelihood(nodes.log_scale, quadratic, n_values)
    total = joint_R.logsumexp(0)
    return ScaleNodes(nodes.log_scale, joint_R - total), float(total)


def _by_quadrature(prior: ScalePrior, quadratic: float, n_values: int) -> tuple[ScaleNodes, float]:
    def integrand(u: Tensor) -> Tensor:
        return _log_likelihood(u, quadratic, n_values) + prior.log_density(u) + u

    low, high = _bracket(integrand)
    x_R, w_R = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(N_NODES))
    u_R = (high + low) / 2 + (high - low) / 2 * x_R
    joint_R = integrand(u_R) + w_R.log() + math.log((high - low) / 2)
    total = joint_R.logsumexp(0)
    return ScaleNodes(u_R, joint_R - total), float(total)


def _bracket(integrand: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Where a log density over the line lies less than DROP below its top.

    A grid is laid over an interval, which then shrinks to the points above the cut, or doubles where its ends are above;
    once it keeps more than half of itself it fits. A density 1e-4 wide in an interval of 128 is found in four rounds.
    """
    low, high = -64.0, 64.0
    for _ in range(60):
        grid = torch.linspace(low, high, 129, dtype=torch.float64)
        values = integrand(grid).nan_to_num(nan=-math.inf)
        above = (values > values.max() - DROP).nonzero().flatten()
        first, last = int(above[0]), int(above[-1])
        width = high - low
        if first == 0 or last == len(grid) - 1:
            low, high = low - width / 2 * (first == 0), high + width / 2 * (last == len(grid) - 1)
            continue
        low, high = float(grid[first - 1]), float(grid[last + 1])
        if high - low > width / 2:
            return low, high
    raise ValueError("the posterior of the scale is improper under this prior: its density does not fall off in log s")


def _log_gamma_ratio(a: float, half: float) -> float:
    """lgamma(a + half) - lgamma(a), to full precision also for large a, where both terms nearly cancel."""
    if a < 1e4:
        return math.lgamma(a + half) - math.lgamma(a)
    # Stirling's series: the difference of (x - 1/2) log x - x is taken by hand.
    x = a + half
    series = sum(c * (x**-p - a**-p) for c, p in ((1 / 12, 1), (-1 / 360, 3), (1 / 1260, 5)))
    return half * math.log(a) + (x - 0.5) * math.log1p(half / a) - half + series
