"""Noise laws q: what can be sampled and whose log density is known, to weigh an unnormalised model against.

A law must be positive wherever the model is, and its tails should be heavier than the model's: the variance of the
weights p / q, and with it the speed of learning, is that of chi²(p || q). ``fit`` therefore widens what it finds in the
data.

Draws come from a generator on the CPU, whatever the device of the law, so that a seed means the same everywhere.

Shapes: N points, F features (images are flattened first).
Source: Gaussian and mixture densities are those of ``core.gaussian``; multivariate Student-t as in Kotz and Nadarajah 2004,
eq. 1.1; the kernel's bandwidth is Scott's rule (1992, eq. 6.42).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from mixtura.core.gaussian import Gaussians, whiten

__all__ = [
    "DistributionNoise",
    "FlowNoise",
    "GaussianNoise",
    "KernelNoise",
    "MixtureNoise",
    "NoiseLaw",
    "StudentNoise",
    "UniformNoise",
    "check_support",
    "noise_law",
]


@runtime_checkable
class NoiseLaw(Protocol):
    """What an objective needs of a noise law; anything that has both verbs will do."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws, shape (n, F)."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x of shape (N, F), in nats, shape (N,); -inf outside the support."""
        ...


@dataclass(frozen=True)
class _FromGaussians:
    """A law that is a mixture of Gaussians."""

    gaussians: Gaussians

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, F), float64."""
        return _draw(self.gaussians, n, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x of shape (N, F), shape (N,), float64."""
        return self.gaussians.score_samples(x.to(self.gaussians.means))

    def to(self, device: torch.device | str) -> Self:
        """The same law on another device."""
        return replace(self, gaussians=self.gaussians.to(device))


class GaussianNoise(_FromGaussians):
    """One Gaussian around the data.

    Example:
        >>> law = GaussianNoise.fit(torch.tensor([[0.0], [2.0]]), scale=2.0)
        >>> law.gaussians.means, law.gaussians.covariances
        (tensor([[1.]], dtype=torch.float64), tensor([[4.]], dtype=torch.float64))
    """

    @classmethod
    def fit(cls, X: Tensor, scale: float = 2.0, diagonal: bool = True) -> Self:
        """Mean of the data, ``scale`` times its spread.

        Args:
            X: shape (N, F), N >= 2; no feature constant.
            scale: standard deviations of the law over those of the data, > 0; above 1 the tails are heavier.
            diagonal: take the variances alone, not the correlations. A correlated law of scale 1 lets few points out.
        Raises:
            ValueError: fewer than 2 points, a constant feature (named), a scale not above 0, correlations without rank.
        """
        return cls(_around(X, scale, diagonal))


class MixtureNoise(_FromGaussians):
    """A mixture of Gaussians fitted to the data and widened: closer to the data than one Gaussian."""

    @classmethod
    def fit(cls, X: Tensor, n_components: int = 20, scale: float = 1.5, *, seed: int = 0) -> Self:
        """A mixture of full Gaussians, each ``scale`` times as wide as fitted.

        Args:
            X: shape (N, F).
            n_components: at most N.
            scale: standard deviations of the law over the fitted ones, > 0.
            seed: of the fit's initial values.
        """
        from mixtura.density.mixture import GaussianMixture

        _check_scale(scale)
        _spread(X)
        found = GaussianMixture(n_components, covariance="full", random_state=seed).fit(X.double().numpy())
        wider = torch.as_tensor(found.covariances_) * scale**2
        return cls(Gaussians.build(torch.as_tensor(found.weights_), torch.as_tensor(found.means_), wider, "full"))


class KernelNoise(_FromGaussians):
    """A Gaussian bump at every data point: follows any shape, at the cost of N densities a noise point."""

    @classmethod
    def fit(cls, X: Tensor, bandwidth: float | None = None) -> Self:
        """One bump a point, ``bandwidth`` times the spread of each feature wide.

        Args:
            X: shape (N, F), N >= 2; no feature constant.
            bandwidth: > 0; by default twice Scott's N^(-1 / (F + 4)), since tails of the law must be heavy.
        """
        X_NF, (_, spread_F) = X.double(), _spread(X)
        width = 2 * len(X) ** (-1 / (X.shape[1] + 4)) if bandwidth is None else bandwidth
        _check_scale(width, "bandwidth")
        even_N = X_NF.new_full((len(X),), 1 / len(X))
        return cls(Gaussians.build(even_N, X_NF, torch.diag((width * spread_F).square()), "tied"))


@dataclass(frozen=True)
class StudentNoise:
    """A multivariate Student-t around the data: tails that fall as a power, heavier than any Gaussian's.

    Attributes:
        gaussians: one Gaussian, whose mean is the law's and whose covariance is the law's scale matrix.
        df: degrees of freedom, > 0.
    """

    gaussians: Gaussians
    df: float

    @classmethod
    def fit(cls, X: Tensor, df: float = 5.0, scale: float = 1.5, diagonal: bool = True) -> Self:
        """Mean of the data, ``scale`` times its spread as scale matrix; the other arguments are GaussianNoise's."""
        if not df > 0:
            raise ValueError(f"df must be > 0, got {df}")
        return cls(_around(X, scale, diagonal), df)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, F), float64: Gaussian ones divided by the root of a chi-square over its freedom."""
        mean_F = self.gaussians.means[0]
        normal_NF = _draw(self.gaussians, n, generator) - mean_F
        half_N = torch.full((n,), self.df / 2, dtype=torch.float64)
        stretch_N = (half_N / torch._standard_gamma(half_N, generator=generator)).sqrt()
        return mean_F + normal_NF * stretch_N.to(mean_F)[:, None]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x of shape (N, F), shape (N,), float64."""
        g, df, n_features = self.gaussians, self.df, x.shape[-1]
        y_NF, log_det = whiten(x.to(g.means), g.means, g.precisions_cholesky, g.covariance, 0)
        constant = math.lgamma((df + n_features) / 2) - math.lgamma(df / 2) - n_features / 2 * math.log(df * math.pi)
        return constant + log_det - (df + n_features) / 2 * (y_NF.square().sum(-1) / df).log1p()

    def to(self, device: torch.device | str) -> Self:
        """The same law on another device."""
        return replace(self, gaussians=self.gaussians.to(device))


@dataclass(frozen=True)
class UniformNoise:
    """A box. The model then lives in the box alone: what it would give outside does not count.

    Attributes:
        low, high: corners, shape (F,), low < high.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, X: Tensor, margin: float = 0.5) -> Self:
        """The smallest box around the data, widened on each side by ``margin`` times its width, >= 0."""
        _spread(X)
        if not margin >= 0:
            raise ValueError(f"margin must be >= 0, got {margin}")
        low_F, high_F = X.double().amin(0), X.double().amax(0)
        return cls(low_F - margin * (high_F - low_F), high_F + margin * (high_F - low_F))

    def __post_init__(self) -> None:
        if self.low.shape != self.high.shape or self.low.dim() != 1 or not bool((self.low < self.high).all()):
            raise ValueError(
                f"low and high must be vectors of one length with low < high, got {self.low.tolist()} and {self.high.tolist()}"
            )

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, F)."""
        unit_NF = torch.rand(n, len(self.low), dtype=self.low.dtype, generator=generator)
        return self.low + (self.high - self.low) * unit_NF.to(self.low)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x of shape (N, F), shape (N,): a constant in the box, -inf outside."""
        # A draw that was rounded to float32 may lie beyond the edge by one step; it is inside all the same.
        slack_F = torch.maximum(self.low.abs(), self.high.abs()) * 2.0**-22
        x_NF = x.to(self.low)
        inside_N = ((x_NF >= self.low - slack_F) & (x_NF <= self.high + slack_F)).all(-1)
        return torch.where(inside_N, -(self.high - self.low).log().sum(), -math.inf)

    def to(self, device: torch.device | str) -> Self:
        """The same law on another device."""
        return replace(self, low=self.low.to(device), high=self.high.to(device))


@dataclass(frozen=True)
class DistributionNoise:
    """A ``torch.distributions.Distribution`` over vectors as a noise law; it stays on its own device.

    Raises:
        ValueError: events that are no vectors; ``torch.distributions.Independent`` makes them so.
    """

    distribution: torch.distributions.Distribution

    def __post_init__(self) -> None:
        if len(self.distribution.event_shape) != 1 or len(self.distribution.batch_shape) != 0:
            raise ValueError(
                "noise must be one distribution over vectors, got event shape "
                f"{tuple(self.distribution.event_shape)} and batch shape {tuple(self.distribution.batch_shape)}; "
                "torch.distributions.Independent(distribution, 1) turns a batch into a vector"
            )

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, F)."""
        with _seeded_by(generator):
            return self.distribution.sample(torch.Size([n]))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x of shape (N, F), shape (N,)."""
        # Outside the support torch raises unless told not to; a noise law answers -inf.
        inside_N = self.distribution.support.check(x) if self.distribution.support is not None else None  # type: ignore[attr-defined]
        if inside_N is None or bool(inside_N.all()):
            return self.distribution.log_prob(x)
        found_N = x.new_full((len(x),), -math.inf)
        found_N[inside_N] = self.distribution.log_prob(x[inside_N])
        return found_N


@dataclass(frozen=True)
class FlowNoise:
    """A trained normalising flow, or any module with ``sample(n)`` and ``log_prob(x)``, as a noise law.

    It is not trained here. An estimator that holds one can not be saved: a module is no plain value.
    """

    module: nn.Module

    def __post_init__(self) -> None:
        _check_verbs(self.module)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, F), without gradient."""
        with _seeded_by(generator), torch.no_grad():
            found = self.module.sample(n)  # type: ignore[operator]
        # Several flow libraries return (draws, log densities).
        return (found[0] if isinstance(found, tuple) else found).flatten(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x of shape (N, F), shape (N,), without gradient."""
        with torch.no_grad():
            return self.module.log_prob(x)  # type: ignore[operator]

    def to(self, device: torch.device | str) -> Self:
        """The module itself, moved to another device."""
        return replace(self, module=self.module.to(device))


def noise_law(noise: Any) -> NoiseLaw:
    """``noise`` as a noise law: distributions of torch and modules are wrapped, laws returned as they are.

    Raises:
        TypeError: no ``sample`` or no ``log_prob``.
    """
    if isinstance(noise, torch.distributions.Distribution):
        return DistributionNoise(noise)
    _check_verbs(noise)
    return FlowNoise(noise) if isinstance(noise, nn.Module) else noise


def check_support(noise: NoiseLaw, x: Tensor) -> Tensor:
    """Log density of the law at the data, shape (N,).

    Raises:
        ValueError: a point where the law has no density, which no weight can make up for; its row is named.
    """
    log_q_N = noise.log_prob(x).detach()
    if not bool(log_q_N.isfinite().all()):
        row = int((~log_q_N.isfinite()).nonzero()[0])
        raise ValueError(
            f"the noise law has log density {float(log_q_N[row])} at row {row} of the data: it must be positive wherever "
            "the data are; widen it or take one with unbounded support"
        )
    return log_q_N


def _check_verbs(noise: object) -> None:
    missing = [verb for verb in ("sample", "log_prob") if not callable(getattr(noise, verb, None))]
    if missing:
        raise TypeError(
            f"noise must have sample(n, generator) and log_prob(x); {type(noise).__name__} has no {' and no '.join(missing)}"
        )


def _check_scale(value: float, name: str = "scale") -> None:
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def _spread(X: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, shape (F,), float64."""
    if X.dim() != 2 or len(X) < 2:
        raise ValueError(f"a noise law is fitted to at least 2 points, shape (N, F), got {tuple(X.shape)}")
    spread_F = X.double().std(0, correction=0)
    if not bool((spread_F > 0).all()):
        raise ValueError(
            f"feature {int((~(spread_F > 0)).nonzero()[0])} is constant, so it has no density; leave it out"
        )
    return X.double().mean(0), spread_F


def _draw(gaussians: Gaussians, n: int, generator: torch.Generator | None) -> Tensor:
    """n draws, made on the CPU and moved to where the Gaussians are."""
    return gaussians.to("cpu").sample(n, generator=generator)[0].to(gaussians.means)


def _around(X: Tensor, scale: float, diagonal: bool) -> Gaussians:
    """One Gaussian with the mean of the data and ``scale`` times its spread."""
    _check_scale(scale)
    mean_F, spread_F = _spread(X)
    if diagonal:
        return Gaussians.build([1.0], mean_F[None], (scale * spread_F).square()[None], "diag")
    sigma_FF = torch.cov(X.double().mT, correction=0).reshape(len(mean_F), len(mean_F))
    return Gaussians.build([1.0], mean_F[None], scale**2 * sigma_FF[None], "full")


@contextmanager
def _seeded_by(generator: torch.Generator | None) -> Iterator[None]:
    """Global chance seeded from ``generator`` and put back afterwards, for code that takes no generator."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
