"""Objectives for models whose normalising constant nobody knows: compositional likelihood and noise contrast.

A model gives log p0(x), the log density up to a constant, and its constant is Z = ∫ p0. With a noise law q that can be
sampled and evaluated, log Z = log E_q[p0 / q]: the logarithm of an expectation, of which a minibatch gives a biased
estimate. ``CompositionalLikelihood`` follows the inner expectation with a running estimate u, so that small batches lead to
the true maximum of the likelihood; ``NoiseContrastive`` is what it is compared with.

- Sums over noise are kept as logarithms, in float64: the weights p0 / q span hundreds of orders of magnitude.
- Noise is drawn anew at every call. A fixed set of noise points has a maximum of its own, which lies at those points.
- No gradient flows through u. A step's pull by noise is at most 1 / gamma times that of the data, since u >= gamma ghat.

Shapes: B data points, J noise points (B' in the paper), W parameters in all.
Source: Jiang et al. 2023 (2306.07485) for the problem and the moving average of the inner expectation; Gutmann and
Hyvärinen 2010 for noise contrast; Liu et al. 2021 (2110.11271) for its exponential form and normalised gradients; Senetaire
et al. 2025 (2503.07021) for the learned constant.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.density.noise_laws import NoiseLaw, check_support, noise_law
from mixtura.density.noise_weights import LogP0, NoiseSums, draw_noise, evaluate_both, noise_sums, not_finite

__all__ = ["INNER", "CompositionalLikelihood", "NoiseContrastive", "NoiseCoverageWarning"]

Inner = Literal["ema", "storm", "batch", "learned"]
INNER: tuple[Inner, ...] = ("ema", "storm", "batch", "learned")
FORMS = ("logistic", "exponential")
ESS_MEMORY = 0.05  # weight of the newest step in the running mean of the effective sample size
ESS_SETTLED = 50  # steps before that mean is judged: early in a training q need not fit yet


class NoiseCoverageWarning(UserWarning):
    """A handful of noise points carries the whole normalising constant: q does not cover the model."""


class CompositionalLikelihood(nn.Module):
    """Negative log-likelihood of an unnormalised model, F(θ) = -mean log p0(x; θ) + log E_q[p0(z; θ) / q(z)].

    The gradient of a call is -mean ∇ log p0(x) + (1/J) Σ_j exp(log w_j - log u) ∇ log p0(z_j), with w = p0 / q and the
    running estimate u of E_q[w]:

    ============ ====================================================================================================
    ``inner``    u
    ============ ====================================================================================================
    ``ema``      moving average: u_t = (1 - γ) u_{t-1} + γ ŵ_t, with ŵ_t the step's mean weight and u_1 = ŵ_1
    ``storm``    the same, with u_{t-1} first multiplied by ŵ_t(θ_t) / ŵ_t(θ_{t-1}), both on the step's noise, so that u
                 follows moving weights without lag; one more forward pass over the noise
    ``batch``    u_t = ŵ_t: self-normalised importance sampling, biased; the baseline, not the method
    ``learned``  a parameter b with u = exp(b), which the linear bound log Z <= exp(-b) Z + b - 1 moves to log Z; hand the
                 objective's own parameters to the optimiser as well
    ============ ====================================================================================================

    Args:
        noise: the law q, with heavier tails than the model: a ``NoiseLaw`` or a ``torch.distributions.Distribution``.
        gamma: weight γ of the newest step, in (0, 1]; may be lowered during training by setting the attribute.
        inner: how u is followed, see above.
        noise_batch_size: noise points a call; 0 takes as many as there are data points.
        ess_floor: share of the noise points below which the running mean of the effective sample size warns.
    Attributes:
        log_partition: log u after the latest call, nats: an estimate without error bar, to watch a training with.
        ess_fraction: effective sample size over the number of noise points at the latest call.
    Raises:
        TypeError: ``noise`` can not be sampled or has no ``log_prob``.
        ValueError: ``gamma`` outside (0, 1], an unknown ``inner``, a negative ``noise_batch_size``, ``ess_floor`` not in
            [0, 1).
    Example:
        >>> from mixtura.density.noise_laws import UniformNoise
        >>> objective = CompositionalLikelihood(UniformNoise(torch.zeros(1), torch.ones(1)))
        >>> flat = lambda x: torch.full((len(x),), 3.0)     # p0 = e^3 on [0, 1], so log Z = 3 and log p = 0
        >>> abs(float(objective(flat, torch.rand(8, 1)))) < 1e-12
        True
        >>> round(objective.log_partition, 9)
        3.0
    """

    log_u: Tensor
    steps: Tensor
    ess_mean: Tensor
    previous: Tensor

    def __init__(
        self,
        noise: NoiseLaw | torch.distributions.Distribution,
        *,
        gamma: float = 0.1,
        inner: Inner = "ema",
        noise_batch_size: int = 0,
        ess_floor: float = 0.02,
    ) -> None:
        super().__init__()
        if inner not in INNER:
            raise ValueError(f"inner must be one of {list(INNER)}, got {inner!r}")
        _check_noise_batch_size(noise_batch_size)
        if not 0 <= ess_floor < 1:
            raise ValueError(f"ess_floor is a share and must be in [0, 1), got {ess_floor}")
        self.noise = noise_law(noise)
        self.gamma = gamma
        self.inner: Inner = inner
        self.noise_batch_size = noise_batch_size
        self.ess_floor = ess_floor
        self.ess_fraction = math.nan
        self._warned = False
        # Saved with a training: without them a resumed run jumps.
        self.register_buffer("log_u", torch.tensor(-math.inf, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("ess_mean", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("previous", torch.empty(0))
        if inner == "learned":
            self.log_z = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    @property
    def gamma(self) -> float:
        """Weight of the newest step in u."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {value}")
        self._gamma = value

    @property
    def log_partition(self) -> float:
        """Log u after the latest call, in nats; -inf before the first."""
        return float(self.log_u)

    def forward(
        self,
        log_p0: LogP0,
        x: Tensor,
        *,
        noise_batch: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The negative log-likelihood of a batch, with log u for log Z; one step of u.

        Args:
            log_p0: the model: points (n, ...) -> log p0 of shape (n,). An ``nn.Module`` where ``inner="storm"``.
            x: data, shape (B, ...), B + J > 0; the same features as the noise when flattened.
            noise_batch: fresh draws from the noise law, shape (J, ...); ``None`` draws them here.
            generator: source of chance for those draws.
        Returns:
            Scalar, nats, float64. Its value is log u - mean log p0(x) over all processes; its gradient is the one above,
            scaled so that the mean over processes, which distributed training takes, is the gradient of all data.
        Raises:
            ValueError: log p0 of another shape than (n,).
            NonFiniteLoss: log p0 is NaN, or infinite where it may not be; the step is named, u has not moved.
        Warns:
            NoiseCoverageWarning: once, when the running mean of the effective sample size falls below ``ess_floor``.
        """
        z = draw_noise(self.noise, x, noise_batch, self.noise_batch_size, generator)
        step = int(self.steps)
        values_BJ = evaluate_both(log_p0, x, z)
        log_x_B, log_z_J = values_BJ.detach().split([len(x), len(z)])
        log_w_J = log_z_J - self.noise.log_prob(z.flatten(1)).detach().to(log_z_J)
        sums = noise_sums(log_x_B, log_w_J, step)
        log_u = self._follow(log_p0, z, log_z_J, log_w_J, sums)
        self._watch(sums, step)
        # The gradient is a weighted sum of those of log p0, so the graph needs nothing but that sum. The mean over processes
        # of these local terms is the gradient over all points, however uneven the shares.
        pull_J = torch.exp(log_w_J - (log_u + math.log(sums.n_noise / sums.world)))
        push_B = log_x_B.new_full((len(x),), -sums.world / max(1, sums.n_data))
        # A noise point outside the model's support has the value -inf and the weight 0.
        surrogate = values_BJ.nan_to_num(neginf=0.0) @ torch.cat([push_B, pull_J])
        if self.inner == "learned":
            # d/db of the bound exp(log ghat - b) + b.
            surrogate = surrogate + self.log_z * (1.0 - math.exp(sums.log_mean - log_u))
        return surrogate - surrogate.detach() + (log_u - sums.mean_log_p0)

    def _follow(self, log_p0: LogP0, z: Tensor, log_z_J: Tensor, log_w_J: Tensor, sums: NoiseSums) -> float:
        """Move u by one step and return its logarithm."""
        first = int(self.steps) == 0
        log_u = sums.log_mean
        if self.inner == "learned":
            with torch.no_grad():
                if first:
                    self.log_z.fill_(log_u)
                log_u = float(self.log_z)
        elif not first and self.inner != "batch" and self.gamma < 1:
            drift = self._drift(log_p0, z, log_z_J, log_w_J, sums) if self.inner == "storm" else 0.0
            kept = math.log1p(-self.gamma) + float(self.log_u) + drift
            log_u = float(np.logaddexp(kept, math.log(self.gamma) + sums.log_mean))
        if self.inner == "storm":
            self.previous = nn.utils.parameters_to_vector(_module(log_p0).parameters()).detach()
        self.log_u.fill_(log_u)
        self.steps += 1
        return log_u

    def _drift(self, log_p0: LogP0, z: Tensor, log_z_J: Tensor, log_w_J: Tensor, sums: NoiseSums) -> float:
        """Log of the step's mean weight over what it was with the previous step's weights, on the same noise."""
        module = _module(log_p0)
        with torch.no_grad():
            before_J = torch.func.functional_call(module, _unflatten(self.previous, module), (z,)).double()
        log_w_before_J = log_w_J - log_z_J + before_J
        return sums.log_mean - noise_sums(before_J[:0], log_w_before_J, int(self.steps)).log_mean

    def _watch(self, sums: NoiseSums, step: int) -> None:
        self.ess_fraction = sums.ess_fraction
        mean = float(self.ess_mean)
        mean += max(ESS_MEMORY, 1 / (step + 1)) * (sums.ess_fraction - mean)
        self.ess_mean.fill_(mean)
        if step + 1 >= ESS_SETTLED and not self._warned and mean < self.ess_floor:
            self._warned = True
            warnings.warn(
                f"the effective sample size of the noise has fallen to {mean:.2%} of {sums.n_noise} points "
                f"at step {step} (floor {self.ess_floor:.0%}): u sees rare huge weights only, and the weights of the model "
                "may run away; take a noise law with heavier tails or closer to the data, or a larger noise_batch_size",
                NoiseCoverageWarning,
                stacklevel=3,
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}log_u" not in state_dict:
            rest[-1].append(  # the list of errors, which load_state_dict raises whether strict or not
                f"the saved state has no {prefix}log_u, the running estimate of the normalising constant: without it a "
                "resumed training jumps. Save the objective's state_dict beside the model's"
            )
            return
        if (saved := state_dict.get(f"{prefix}previous")) is not None:
            self.previous = self.previous.new_empty(saved.shape, dtype=saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Shown in ``repr``."""
        return f"inner={self.inner!r}, gamma={self.gamma}"


class NoiseContrastive(nn.Module):
    """Noise-contrastive estimation: how well log p0 - c tells data from noise, with a learned log constant c.

    With ν = J / B and h(x) = log p0(x) - c - log(ν q(x)), the logistic form is mean softplus(-h(x)) + ν mean softplus(h(z));
    the exponential form (eNCE) is mean sqrt(q / p)(x) + mean sqrt(p / q)(z) with p = p0 exp(-c).

    Args:
        noise: the law q, as in :class:`CompositionalLikelihood`.
        ratio: noise points per data point, > 0.
        form: ``logistic`` or ``exponential``.
        normalized_gradient: divide the gradient, over the model's parameters and c together, by its norm; the model must be
            an ``nn.Module``.
    Attributes:
        log_z: the parameter c, nats, float64; hand it to the optimiser. It starts at the first call's importance estimate
            of log Z, which is what the compositional objective starts from.
    Raises:
        TypeError, ValueError: as in :class:`CompositionalLikelihood`; a ``ratio`` not above 0; an unknown ``form``.
    """

    steps: Tensor

    def __init__(
        self,
        noise: NoiseLaw | torch.distributions.Distribution,
        *,
        ratio: float = 1.0,
        form: Literal["logistic", "exponential"] = "logistic",
        normalized_gradient: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {list(FORMS)}, got {form!r}")
        if not ratio > 0:
            raise ValueError(f"ratio is noise points per data point and must be > 0, got {ratio}")
        self.noise = noise_law(noise)
        self.ratio = ratio
        self.form = form
        self.normalized_gradient = normalized_gradient
        self.log_z = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))

    @property
    def log_partition(self) -> float:
        """The learned log constant c, nats."""
        return float(self.log_z.detach())

    def forward(
        self,
        log_p0: LogP0,
        x: Tensor,
        *,
        noise_batch: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of a batch; the arguments are those of :meth:`CompositionalLikelihood.forward`.

        Returns:
            Scalar without unit, float64.
        Raises:
            ValueError: log p0 of another shape than (n,), or a data point outside the support of q (its row is named).
            NonFiniteLoss: log p0 is NaN, or infinite where it may not be.
        """
        z = draw_noise(self.noise, x, noise_batch, max(1, round(self.ratio * len(x))), generator)
        step = int(self.steps)
        log_x_B, log_z_J = evaluate_both(log_p0, x, z).split([len(x), len(z)])
        log_q_x_B = check_support(self.noise, x.flatten(1)).to(log_x_B)
        log_q_z_J = self.noise.log_prob(z.flatten(1)).detach().to(log_z_J)
        if step == 0:
            with torch.no_grad():
                self.log_z.fill_(noise_sums(log_x_B, log_z_J - log_q_z_J, step).log_mean)
        log_ratio_B, log_ratio_J = log_x_B - self.log_z - log_q_x_B, log_z_J - self.log_z - log_q_z_J
        if self.form == "exponential":
            loss = torch.exp(-log_ratio_B / 2).mean() + torch.exp(log_ratio_J / 2).mean()
        else:
            nu = len(z) / len(x)
            loss = F.softplus(math.log(nu) - log_ratio_B).mean() + nu * F.softplus(log_ratio_J - math.log(nu)).mean()
        if not math.isfinite(loss.item()):
            raise not_finite(log_x_B, log_z_J - log_q_z_J, step)
        self.steps += 1
        return self._normalized(loss, _module(log_p0, "normalized_gradient=True")) if self.normalized_gradient else loss

    def _normalized(self, loss: Tensor, module: nn.Module) -> Tensor:
        """A scalar with the value of ``loss`` whose gradient is that of ``loss`` divided by its norm."""
        parameters = [p for p in (*module.parameters(), self.log_z) if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        # A norm of zero is a stationary point: the gradient stays zero.
        scale = 1 / norm.clamp(min=torch.finfo(torch.float64).tiny)
        linear = torch.stack(
            [(p * (g * scale).to(p.dtype)).double().sum() for p, g in zip(parameters, gradients, strict=True)]
        )
        return linear.sum() - linear.sum().detach() + loss.detach()


def _check_noise_batch_size(value: int) -> None:
    if value < 0:
        raise ValueError(f"noise_batch_size must be >= 0 (0: as many as there are data points), got {value}")


def _module(log_p0: LogP0, why: str = 'inner="storm"') -> nn.Module:
    if not isinstance(log_p0, nn.Module):
        raise TypeError(
            f"{why} needs log_p0 to be an nn.Module, whose weights it can read, got {type(log_p0).__name__}"
        )
    return log_p0


def _unflatten(flat_W: Tensor, module: nn.Module) -> dict[str, Tensor]:
    parts = dict(module.named_parameters())
    sizes = [p.numel() for p in parts.values()]
    return {
        name: part.view_as(p).to(p.dtype) for (name, p), part in zip(parts.items(), flat_W.split(sizes), strict=True)
    }
