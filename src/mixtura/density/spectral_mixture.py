"""Stationary kernels whose spectrum is a mixture, with closed-form derivatives of every order that exists.

A sum of (decay x cosine) in one input dimension: by Wiener-Khinchin its spectrum is a mixture of bumps at the learned
frequencies, Gaussian bumps for a Gaussian decay, Student-t bumps for a Matern-5/2 decay.

- Derivatives are written out, not taken by autograd: autograd through ``abs`` gives 0 at distance 0, and the diagonal of
  the second derivative would silently be 0 instead of its most negative value.
- Weights are learned in the log domain, which amounts to the prior p(w) ~ 1/w: components that do not help die out.
- Autograd reaches the parameters, for any order.

Letters: Q components. Source: 2311.04465, eq. 6-8 and appendix; Gaussian kind: Wilson and Adams 2013 (1302.4245), eq. 12.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mixtura.core.simplex import entropy

__all__ = ["KINDS", "Kind", "SpectralComponent", "SpectralMixture1D"]

Kind = Literal["gaussian", "student"]
KINDS: tuple[Kind, ...] = ("gaussian", "student")

# Orders that the conditional mean of a Matern-5/2 process still has: k itself is four times continuously differentiable.
STUDENT_ORDERS = 4
# Distances at once: each takes Q numbers a few times over, which shall stay in the processor's cache.
BLOCK = 8192
WIDTH = 0.25  # initial half-width of a bump, in units of the spacing of the frequencies


@dataclass(frozen=True)
class SpectralComponent:
    """One bump of the spectrum."""

    weight: float  # w_q, variance at distance 0
    frequency: float  # |mu_q|, cycles per unit of length
    scale: float  # rho_q (gaussian) or exp(log-scale) of the Matern decay (student)


class SpectralMixture1D(nn.Module):
    """k(d) = sum_q w_q g_q(|d|) cos(2 pi mu_q d), and its derivatives.

    ``gaussian``: g(r) = exp(-rho r^2). ``student``: g(r) = (1 + a r + (a r)^2 / 3) exp(-a r), a = sqrt(5) exp(log-scale).

    Args:
        kind: shape of a bump of the spectrum.
        n_components: Q, at least 1.
        max_frequency: largest initial frequency; they start evenly between 0 and it, in cycles per unit of length.
        learn_frequency: False freezes the frequencies. With ``max_frequency=0`` that is the plain squared-exponential or
            Matern kernel.
        log_scale: initial log-scale of every component; None widens each bump to a quarter of their spacing in
            frequency, so that what lies between two of them is within reach whatever the unit of length.
        trend: adds one Matern-5/2 component without a frequency and of this initial length, for a slow trend under fast
            oscillation; None adds none.
        log_weights: False learns the weights themselves, clamped at 0, as a comparison; there is no such prior then.
    Raises:
        ValueError: an unknown kind, no component, or a negative or infinite ``max_frequency``.
    Example:
        >>> kernel = SpectralMixture1D(n_components=2, max_frequency=3.0)
        >>> kernel(torch.zeros(1, dtype=torch.float64)).tolist()
        [1.0]
    """

    def __init__(
        self,
        kind: Kind = "gaussian",
        n_components: int = 30,
        max_frequency: float = 1.0,
        *,
        learn_frequency: bool = True,
        log_scale: float | None = 0.0,
        trend: float | None = None,
        log_weights: bool = True,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
        if n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        if not 0 <= max_frequency < math.inf:
            raise ValueError(f"max_frequency must be finite and >= 0, got {max_frequency}")
        self.kind = kind
        self.log_weights = log_weights
        # Without a ladder of frequencies there is no spacing; 1 per unit of length leaves log_scale to decide.
        self.frequency_spacing = max_frequency / (n_components - 1) if max_frequency > 0 and n_components > 1 else 1.0
        if log_scale is None:
            log_scale = _log_scale_of_width(kind, WIDTH * self.frequency_spacing)
        share = 1.0 / n_components
        start = math.log(share) if log_weights else share
        self.raw_weight = nn.Parameter(torch.full((n_components,), start, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.full((n_components,), float(log_scale), dtype=torch.float64))
        self.frequency = nn.Parameter(
            torch.linspace(0.0, max_frequency, n_components, dtype=torch.float64), requires_grad=learn_frequency
        )
        # (log-weight, log-scale) of the trend.
        self.trend = None
        if trend is not None:
            self.trend = nn.Parameter(torch.tensor([math.log(share), -math.log(trend)], dtype=torch.float64))

    def weights(self) -> Tensor:
        """Weights w, shape (Q,), >= 0; the trend's is not among them."""
        return self.raw_weight.exp() if self.log_weights else self.raw_weight.clamp(min=0)

    def forward(self, d: Tensor, order: int = 0) -> Tensor:
        """Derivative of the given order with respect to d, at signed distances d; same shape, float64.

        ``cov(f^(p)(x), f(x')) = k^(p)(x - x')``: the derivative belongs to the left argument.

        Raises:
            ValueError: a negative order, or one above 4 for the student kind (and for a trend), which has no more.
        """
        self.check_order(order)
        parts = [self._block(part, order) for part in d.double().reshape(-1).split(BLOCK)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(d.shape)

    def _block(self, d: Tensor, order: int) -> Tensor:
        d_1 = d.unsqueeze(-1)
        m_Q = 2 * math.pi * self.frequency
        scale_Q = self.log_scale.exp()
        decays = (
            _gaussian_decays(d_1, scale_Q, order) if self.kind == "gaussian" else _matern_decays(d_1, scale_Q, order)
        )
        angle = m_Q * d_1
        cosine, sine = angle.cos(), angle.sin()
        # The j-th derivative of the cosine is m^j times one of cos, -sin, -cos, sin in turn.
        turn = (cosine, -sine, -cosine, sine)
        terms = [math.comb(order, j) * decays[order - j] * m_Q**j * turn[j % 4] for j in range(order + 1)]
        total: Tensor = (torch.stack(terms).sum(0) * self.weights()).sum(-1)
        if self.trend is not None:
            log_weight, log_scale = self.trend
            total = total + log_weight.exp() * _matern_decays(d_1, log_scale.exp(), order)[order].squeeze(-1)
        return total

    def check_order(self, order: int) -> None:
        """Refuse a derivative that the kernel does not have."""
        if order < 0:
            raise ValueError(f"order must be >= 0, got {order}")
        if order > STUDENT_ORDERS and (self.kind == "student" or self.trend is not None):
            raise ValueError(
                f"order must be at most {STUDENT_ORDERS} for a Matern-5/2 decay (kind='student' or a trend), got {order}; "
                "use kind='gaussian' without a trend, which has derivatives of every order"
            )

    def spectrum(self, frequencies: Tensor) -> Tensor:
        """Spectral density at frequencies in cycles per unit of length, same shape; it is even and integrates to k(0).

        Fourier pair: S(s) = integral of k(d) exp(-2 pi i s d) over d.
        """
        s_1 = frequencies.double().unsqueeze(-1)
        scale_Q, mu_Q = self.log_scale.exp(), self.frequency
        bump = _gaussian_bump if self.kind == "gaussian" else _student_bump
        density = 0.5 * (bump(s_1 - mu_Q, scale_Q) + bump(s_1 + mu_Q, scale_Q))
        total: Tensor = (density * self.weights()).sum(-1)
        if self.trend is not None:
            log_weight, log_scale = self.trend
            total = total + log_weight.exp() * _student_bump(s_1, log_scale.exp()).squeeze(-1)
        return total

    def components(self) -> list[SpectralComponent]:
        """Weight, frequency and scale of every component, heaviest first; the trend, if any, has frequency 0."""
        with torch.no_grad():
            rows = list(
                zip(self.weights().tolist(), self.frequency.abs().tolist(), self.log_scale.exp().tolist(), strict=True)
            )
            if self.trend is not None:
                rows.append((float(self.trend[0].exp()), 0.0, float(self.trend[1].exp())))
        return [SpectralComponent(*row) for row in sorted(rows, key=lambda row: -row[0])]

    def effective_components(self) -> float:
        """exp(entropy) of the weights' shares: Q when all weigh the same, 1 when one carries everything."""
        with torch.no_grad():
            weights_Q = self.weights()
            return math.exp(float(entropy(weights_Q / weights_Q.sum())))


def _log_scale_of_width(kind: Kind, width: float) -> float:
    """Log-scale at which a bump has the given standard deviation (gaussian) or half-width at half height (student)."""
    if kind == "gaussian":
        return math.log(2 * (math.pi * width) ** 2)
    return math.log(2 * math.pi * width / math.sqrt(5 * (2 ** (1 / 3) - 1)))


def _gaussian_decays(d: Tensor, rho: Tensor, order: int) -> list[Tensor]:
    """exp(-rho d^2) and its derivatives up to ``order``, by g^(n) = -2 rho (d g^(n-1) + (n - 1) g^(n-2))."""
    decays = [(-rho * d.square()).exp()]
    for n in range(1, order + 1):
        before = (n - 1) * decays[n - 2] if n > 1 else 0.0
        decays.append(-2 * rho * (d * decays[n - 1] + before))
    return decays


def _matern_decays(d: Tensor, scale: Tensor, order: int) -> list[Tensor]:
    """(1 + a r + (a r)^2 / 3) exp(-a r) and its derivatives up to ``order`` <= 4; even ones hold at d = 0 too."""
    a = math.sqrt(5) * scale
    t = a * d.abs()
    fall = (-t).exp()
    third = a.square() / 3
    forms = (
        lambda: (1 + t + t.square() / 3) * fall,
        lambda: -third * d * (1 + t) * fall,
        lambda: -third * (1 + t - t.square()) * fall,
        lambda: third * a.square() * d * (3 - t) * fall,
        lambda: third * a.square() * (3 - 5 * t + t.square()) * fall,
    )
    return [form() for form in forms[: order + 1]]


def _gaussian_bump(s: Tensor, rho: Tensor) -> Tensor:
    """Fourier transform of exp(-rho d^2): integrates to 1 over s."""
    return (math.pi / rho).sqrt() * (-(math.pi * s).square() / rho).exp()


def _student_bump(s: Tensor, scale: Tensor) -> Tensor:
    """Fourier transform of the Matern-5/2 decay, a Student-t density with 5 degrees of freedom in s."""
    a = math.sqrt(5) * scale
    return 16 * a**5 / (3 * (a.square() + (2 * math.pi * s).square()) ** 3)
