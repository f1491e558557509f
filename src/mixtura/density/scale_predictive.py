"""What a process with an uncertain scale predicts, value by value: a Student-t, or a mixture of Gaussians over scales.

Shapes: N inputs, C outputs (absent for targets of one dimension), R scales. Values are marginal; the joint density of several
is the process's (``ScaleMixtureRegressor.log_prob``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

__all__ = ["ScaleMixture", "StudentT"]


class _Predictive:
    """What both kinds share, from their ``cdf`` and ``quantile``."""

    location: np.ndarray

    def quantile(self, p: float) -> np.ndarray:
        raise NotImplementedError

    @property
    def mean(self) -> np.ndarray:
        """Centre of the prediction, shape (N,) or (N, C): its median, and its mean where that exists."""
        return self.location

    def interval(self, share: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the central interval that holds ``share`` of the probability.

        Raises:
            ValueError: a share outside (0, 1).
        """
        if not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, got {share}")
        return self.quantile((1 - share) / 2), self.quantile((1 + share) / 2)


@dataclass(frozen=True)
class StudentT(_Predictive):
    """Student-t at every input.

    Attributes:
        location: shape (N,) or (N, C).
        scale: shape of ``location``, > 0; not the standard deviation, see :attr:`std`.
        df: degrees of freedom, > 0.
    """

    location: np.ndarray
    scale: np.ndarray
    df: float

    @property
    def std(self) -> np.ndarray:
        """Standard deviation.

        Raises:
            ValueError: two degrees of freedom or fewer, where the variance is infinite.
        """
        if self.df <= 2:
            raise ValueError(
                f"a Student-t with df={self.df:g} has no finite variance (that takes df > 2); use interval() or quantile(), "
                "or a prior with a larger a"
            )
        return self.scale * math.sqrt(self.df / (self.df - 2))

    def log_prob(self, y: np.ndarray) -> np.ndarray:
        """Log density of each value, nats, shape of ``location``."""
        return np.asarray(stats.t.logpdf(y, self.df, self.location, self.scale))

    def cdf(self, y: np.ndarray) -> np.ndarray:
        """Probability below each value."""
        return np.asarray(stats.t.cdf(y, self.df, self.location, self.scale))

    def quantile(self, p: float) -> np.ndarray:
        """The value with probability ``p`` below it, p in (0, 1)."""
        return self.location + self.scale * stats.t.ppf(p, self.df)


@dataclass(frozen=True)
class ScaleMixture(_Predictive):
    """A mixture of Gaussians with one centre and R variances s_r V at every input; R = 1 is a Gaussian.

    Attributes:
        location: shape (N,) or (N, C).
        unit: standard deviation at s = 1, the square root of V, in the shape of ``location``, > 0.
        log_scale: log s, shape (R,).
        log_weight: log probabilities, shape (R,).
    """

    location: np.ndarray
    unit: np.ndarray
    log_scale: np.ndarray
    log_weight: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """Standard deviation."""
        return self.unit * math.exp(0.5 * special.logsumexp(self.log_weight + self.log_scale))

    def log_prob(self, y: np.ndarray) -> np.ndarray:
        """Log density of each value, nats, shape of ``location``."""
        z = ((np.asarray(y) - self.location) / self.unit)[..., None]
        parts = self.log_weight - 0.5 * (math.log(2 * math.pi) + self.log_scale + z**2 * np.exp(-self.log_scale))
        return special.logsumexp(parts, axis=-1) - np.log(self.unit)

    def cdf(self, y: np.ndarray) -> np.ndarray:
        """Probability below each value."""
        z = ((np.asarray(y) - self.location) / self.unit)[..., None]
        return special.ndtr(z * np.exp(-0.5 * self.log_scale)) @ np.exp(self.log_weight)

    def quantile(self, p: float) -> np.ndarray:
        """The value with probability ``p`` below it, p in (0, 1)."""
        return self.location + self.unit * self._unit_quantile(p)

    def _unit_quantile(self, p: float) -> float:
        # All inputs share the mixture up to centre and unit, so one root serves them all.
        from scipy.optimize import brentq

        if not 0 < p < 1:
            raise ValueError(f"p must be between 0 and 1, got {p}")
        if p == 0.5:
            return 0.0
        weights, widths = np.exp(self.log_weight), np.exp(0.5 * self.log_scale)
        far = abs(special.ndtri(p)) * widths.max()
        # Relative precision only: the widest node may be far wider than the mixture.
        return float(brentq(lambda z: special.ndtr(z / widths) @ weights - p, -far, far, xtol=1e-300, rtol=1e-14))
