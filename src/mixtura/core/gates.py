"""Gates: which experts a token visits, and with what weight.

A gate is a pure function from logits to a `Routing`; the modules at the end only own the projection that makes the
logits. Every gate

- computes in float32 (float64 stays), also under autocast: in bfloat16 two close logits tie, and the tie moves with
  the batch size;
- breaks ties by expert index: of two equal scores the lower index wins, on every device;
- marks a place that no expert fills (over capacity) with the *sentinel* index E and weight 0. `dispatch` skips those.

Shapes: T tokens, D width, E experts, K experts a token visits. Functions take tokens flattened; modules take (..., D).

Sources: Shazeer et al. 2017 (1701.06538), eq. 3-5 (top-k, noise); Switch Transformers (2101.03961), sec. 2.2
(capacity); 2109.10465, sec. 3.2 (random token selection); EvoMoE (2112.14397), sec. 3.3 (dense-to-sparse);
2401.13875 (activation before softmax). The gate without parameters is in `sparsity_gate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.core.capacity import CapacityPolicy, capacity, capacity_select

__all__ = [
    "CapacityPolicy",
    "Gate",
    "GateConfig",
    "Routing",
    "TemperatureSchedule",
    "activation_gate",
    "best_experts",
    "capacity",
    "capacity_select",
    "limit_capacity",
    "log_weights",
    "soft",
    "temperature_gate",
    "top_k",
]

_FEW = 8  # experts up to which all pairs are compared; each pair is one pass over the tokens


@dataclass(frozen=True)
class Routing:
    """What a gate decided for T tokens. Differentiable in ``weights``, ``logits`` and ``probs``."""

    weights: Tensor  # (T, K), what each visited expert's output is multiplied by; 0 at the sentinel
    indices: Tensor  # (T, K), int64 in [0, E); E is the sentinel: no expert here
    logits: Tensor  # (T, E), before any noise
    probs: Tensor  # (T, E), softmax of all logits; what balance losses read

    @property
    def n_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def dropped(self) -> int:
        """Token-expert pairs that no expert computes: over capacity, or under a threshold."""
        return int((self.indices == self.n_experts).sum())


def soft(logits: Tensor) -> Routing:
    """Every token visits every expert, weighted by the softmax of the logits.

    Args:
        logits: shape (T, E).
    Returns:
        Routing with K = E and ``indices`` 0 ... E-1 in every row.
    Example:
        >>> soft(torch.zeros(1, 2)).weights
        tensor([[0.5000, 0.5000]])
    """
    logits_TE = _checked_logits(logits)
    probs_TE = logits_TE.softmax(-1)
    return Routing(weights=probs_TE, indices=_all_experts(logits_TE), logits=logits_TE, probs=probs_TE)


def top_k(
    logits: Tensor,
    k: int,
    *,
    renormalise: bool = True,
    select_by: Tensor | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Routing:
    """Every token visits its k best experts, ordered from the best.

    Args:
        logits: shape (T, E).
        k: experts a token visits, 1 <= k <= E.
        renormalise: True: the k weights are the softmax over the chosen logits and sum to 1 (Mixtral). False: they are
            the chosen entries of the softmax over all logits (Switch, OLMoE).
        select_by: scores that choose the experts in place of the logits, shape (T, E) or (E,) plus broadcasting; the
            weights still come from the logits. Bias-based balancing and slope-only selection use it.
        noise: standard deviation, in logits, of normal noise added to the scores for the choice only.
        generator: source of the noise.
    Returns:
        Routing with K = k. With k = E and renormalised weights it equals `soft` up to the order of the experts.
    Raises:
        ValueError: k outside [1, E], negative noise, or a shape that does not fit.
    Source:
        1701.06538, eq. 3-5. The noise has one fixed scale, where the paper learns one (its eq. 4).
    Example:
        >>> top_k(torch.tensor([[0.0, 2.0, 2.0]]), k=2).indices
        tensor([[1, 2]])
    """
    logits_TE = _checked_logits(logits)
    _check_k(k, logits_TE.shape[-1])
    if noise < 0:
        raise ValueError(f"noise must be >= 0, got {noise}")
    scores_TE = logits_TE.detach() if select_by is None else _scores_like(select_by, logits_TE)
    if noise > 0:
        eps_TE = torch.randn(scores_TE.shape, generator=generator, dtype=scores_TE.dtype, device=scores_TE.device)
        scores_TE = scores_TE + noise * eps_TE
    probs_TE = logits_TE.softmax(-1)
    indices_TK = _best(scores_TE, k)
    if renormalise:
        weights_TK = logits_TE.gather(-1, indices_TK).softmax(-1)
    else:
        weights_TK = probs_TE.gather(-1, indices_TK)
    return Routing(weights=weights_TK, indices=indices_TK, logits=logits_TE, probs=probs_TE)


def best_experts(scores: Tensor, k: int, *, dim: int = -1) -> Tensor:
    """Which experts are among the k best: those that `top_k` would choose, as a mask in index order.

    Args:
        scores: any shape, experts along ``dim``. No NaN.
        k: between 1 and the number of experts.
        dim: where the experts are. With tokens last, every comparison is one pass over contiguous memory.
    Returns:
        Boolean, shape of ``scores``, k True along ``dim``; of two equal scores the lower index wins.
    Raises:
        ValueError: k out of range.
    Example:
        >>> best_experts(torch.tensor([0.0, 2.0, 2.0, 2.0]), 2)
        tensor([False,  True,  True, False])
    """
    n_experts = scores.shape[dim]
    _check_k(k, n_experts)
    scores = scores.detach()
    if n_experts <= _FEW:
        parts = scores.unbind(dim)
        beaten = [torch.zeros_like(part, dtype=torch.int8) for part in parts]
        for i in range(n_experts):
            for j in range(i + 1, n_experts):
                wins = parts[i] >= parts[j]
                beaten[j] += wins
                beaten[i] += ~wins
        return torch.stack([count < k for count in beaten], dim)
    left, chosen = scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(k):
        best = left.max(dim, keepdim=True).indices  # of equal entries the first
        chosen.scatter_(dim, best, True)
        left.scatter_(dim, best, -torch.inf)
    return chosen


def log_weights(logits: Tensor, chosen: Tensor | None = None, *, dim: int = -1) -> Tensor:
    """Logarithm of the gate's weights: log softmax over the chosen experts, exactly minus infinity for the others.

    In the log domain a weight of e^-1000 still has a size, which a likelihood needs.

    Args:
        logits: any shape, experts along ``dim``, after division by a temperature.
        chosen: mask of the same shape, at least one True along ``dim``; None: all. See `best_experts`.
        dim: where the experts are.
    Returns:
        Shape of ``logits``; exponentials sum to 1 along ``dim``. No gradient reaches the logit of an expert not chosen.
    Example:
        >>> log_weights(torch.tensor([0.0, 5.0, 0.0]), torch.tensor([True, False, True])).exp()
        tensor([0.5000, 0.0000, 0.5000])
    """
    if chosen is not None:
        logits = logits.masked_fill(~chosen, -torch.inf)
    return logits.log_softmax(dim)


def temperature_gate(logits: Tensor, temperature: float | Tensor, *, threshold: float = 0.0) -> Routing:
    """Dense to sparse: the softmax of logits / temperature, with experts below a threshold left out.

    At a high temperature every expert gets about 1/E and all are trained; as it falls, weights gather on few experts,
    and those under the threshold are no longer visited. The best expert is always kept.

    Args:
        logits: shape (T, E).
        temperature: > 0, a number or a scalar tensor (then learnable).
        threshold: weights below it become 0 and their place the sentinel; in [0, 1). The rest is not renormalised.
    Returns:
        Routing with K = E in index order. ``probs`` is at the temperature too; ``logits`` are as given.
    Raises:
        ValueError: temperature not above 0 or threshold outside [0, 1).
    Source:
        EvoMoE (2112.14397), eq. 6 without its Gumbel noise; 2401.13875, eq. 1.
    """
    logits_TE = _checked_logits(logits)
    value = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
    if not value > 0:
        raise ValueError(f"temperature must be > 0, got {value}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    probs_TE = (logits_TE / temperature).softmax(-1)
    kept_TE = probs_TE.detach() >= threshold
    kept_TE = kept_TE.scatter(-1, _best(logits_TE.detach(), 1), True)
    routing = Routing(weights=probs_TE, indices=_all_experts(logits_TE), logits=logits_TE, probs=probs_TE)
    return _without(routing, ~kept_TE)


@dataclass(frozen=True, kw_only=True)
class TemperatureSchedule:
    """Temperature by step: from ``start`` down to ``end`` over ``steps``, then constant. Units: steps, logits."""

    start: float = 2.0
    end: float = 0.3
    steps: int = 1000
    shape: Literal["linear", "exponential"] = "linear"

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f"start and end must be > 0, got {self.start} and {self.end}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.shape not in ("linear", "exponential"):
            raise ValueError(f"shape must be one of ['exponential', 'linear'], got {self.shape!r}")

    def at(self, step: int) -> float:
        """Temperature at a step, counted from 0.

        Example:
            >>> TemperatureSchedule(start=2.0, end=1.0, steps=10).at(5)
            1.5
        """
        share = min(max(step, 0), self.steps) / self.steps
        if self.shape == "linear":
            return self.start + share * (self.end - self.start)
        return math.exp(math.log(self.start) + share * math.log(self.end / self.start))


def activation_gate(
    slopes: Tensor,
    bias: Tensor,
    *,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
    temperature: float | Tensor = 1.0,
) -> Routing:
    """Softmax of (activation(slopes) + bias) / temperature: the activation breaks the tie of slope and temperature.

    Args:
        slopes: inner products of token and expert, shape (T, E), without bias.
        bias: shape (E,), added after the activation.
        activation: elementwise, not linear; tanh or sigmoid satisfy the paper's independence condition.
        temperature: > 0.
    Returns:
        Routing with K = E; ``logits`` are after the activation and the bias, before the temperature.
    Source:
        2401.13875, eq. 5.
    """
    return temperature_gate(activation(_checked_logits(slopes)) + bias, temperature)


def limit_capacity(
    routing: Routing,
    limit: int,
    *,
    policy: CapacityPolicy = "prefix",
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> Routing:
    """The same routing with the pairs over an expert's capacity sent to the sentinel, at weight 0.

    Remaining weights are not renormalised: a token that lost an expert gets less from the mixture. ``logits`` and
    ``probs`` are as before, so a balance loss still sees what the gate wanted.
    """
    kept_TK = capacity_select(
        routing.indices,
        routing.n_experts,
        limit,
        policy=policy,
        probs=routing.weights.detach() if policy == "probs" else None,
        groups=groups,
        generator=generator,
    )
    return _without(routing, ~kept_TK)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How a `Gate` turns logits into a routing."""

    k: int
    renormalise: bool = True
    noise: float = 0.0  # standard deviation, in logits; training only
    capacity_factor: float = 0.0  # 0: no limit; training
    eval_capacity_factor: float = 0.0  # 0: no limit; evaluation, where the first come stay
    min_capacity: int = 4  # tokens
    policy: CapacityPolicy = "random"  # who stays in training

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        for name in ("noise", "capacity_factor", "eval_capacity_factor", "min_capacity"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.policy not in ("random", "prefix", "probs"):
            raise ValueError(f"policy must be one of ['prefix', 'probs', 'random'], got {self.policy!r}")


class Gate(nn.Module):
    """Linear top-k gate: a token's logits are its inner products with one row an expert.

    Args:
        width: D.
        n_experts: E.
        config: see `GateConfig`.
        generator: source of chance for the start; the start is normal with standard deviation D^-1/2.

    The buffer ``balance_bias`` (E,) is added to the scores for the choice only; it is zero until bias-based balancing
    (`balance.updated_bias`) moves it.
    """

    balance_bias: Tensor

    def __init__(
        self, width: int, n_experts: int, config: GateConfig, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        _check_k(config.k, n_experts)
        self.config = config
        self.n_experts = n_experts
        self.weight = nn.Parameter(torch.randn(n_experts, width, generator=generator) * width**-0.5)
        self.register_buffer("balance_bias", torch.zeros(n_experts))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Routing:
        """Routing of x (..., D), tokens flattened. ``generator`` feeds noise and random selection in training."""
        config = self.config
        x_TD = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            logits_TE = F.linear(_wide(x_TD), _wide(self.weight))
        routing = top_k(
            logits_TE,
            config.k,
            renormalise=config.renormalise,
            select_by=logits_TE.detach() + self.balance_bias,
            noise=config.noise if self.training else 0.0,
            generator=generator,
        )
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor == 0:
            return routing
        limit = capacity(len(x_TD), self.n_experts, factor * config.k, minimum=config.min_capacity)
        policy = config.policy if self.training else "prefix"
        return limit_capacity(routing, limit, policy=policy, generator=generator)

    def extra_repr(self) -> str:
        return f"width={self.weight.shape[1]}, n_experts={self.n_experts}, k={self.config.k}"


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _checked_logits(logits: Tensor) -> Tensor:
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (T, E), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    return _wide(logits)


def _check_k(k: int, n_experts: int) -> None:
    if not 1 <= k <= n_experts:
        raise ValueError(f"k must be between 1 and n_experts={n_experts}, got {k}")


def _scores_like(select_by: Tensor, logits_TE: Tensor) -> Tensor:
    if select_by.shape[-1:] != logits_TE.shape[-1:]:
        raise ValueError(f"select_by must end in E={logits_TE.shape[-1]}, got shape {tuple(select_by.shape)}")
    return _wide(select_by.detach()).expand_as(logits_TE)


def _best(scores_TE: Tensor, k: int) -> Tensor:
    if k == 1:
        return scores_TE.max(-1, keepdim=True).indices  # of equal entries the first, too; a sort takes 25 times as long
    # topk promises no order among equal scores (and gives different ones on CPU and CUDA); a stable sort does.
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _all_experts(logits_TE: Tensor) -> Tensor:
    n_tokens, n_experts = logits_TE.shape
    return torch.arange(n_experts, device=logits_TE.device).expand(n_tokens, n_experts)


def _without(routing: Routing, dropped_TK: Tensor) -> Routing:
    return replace(
        routing,
        weights=routing.weights.masked_fill(dropped_TK, 0.0),
        indices=routing.indices.masked_fill(dropped_TK, routing.n_experts),
    )
