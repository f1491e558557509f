"""Many small experts and a few that every token shares: the layer of DeepSeekMoE, and shapes of equal cost.

- *Fine-grained segmentation*: each of N experts is cut into m pieces and m times as many are chosen, which costs the same
  and allows many more combinations.
- *Shared experts*: K_s of the pieces are always on, outside the router, and hold what every token needs. They are one
  feed-forward network of width K_s h, which is the same function.

    p_t = softmax over the routed experts only;  K' = m K - K_s of the m N - K_s are chosen;  weights are p_t, as they are
    y_t = shared(x_t) + sum over the chosen of p_te expert_e(x_t)

No token is dropped. Both balance losses travel on the output.

Shapes: T tokens, D width, h hidden units of one expert, E routed experts, K routed experts a token visits.
Source: DeepSeekMoE (2401.06066), eq. 3-17.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixtura.core.balance import BalancePer, balance_loss, device_split
from mixtura.core.dispatch import BACKENDS
from mixtura.core.experts import Experts, ExpertsConfig, FeedForward
from mixtura.core.gates import Gate, GateConfig, Routing
from mixtura.core.mixture import MixtureLayer, MixtureOutput

if TYPE_CHECKING:
    from mixtura.lm.model import MixturaConfig

__all__ = ["PAPER", "BalancedOutput", "FineGrainedMoE", "MatchedShape", "matched", "paper_config"]

# The paper's three models (its table 7 and sec. 4.1, 5.1, 6.1). An expert has a quarter, or an eighth, of 2.75 D hidden units;
# the dense first layer has as many as the experts that a token visits together, but for the released 16B model's own.
PAPER: Mapping[str, Mapping[str, Any]] = {
    "2b": {
        "vocab_size": 8192,
        "hidden_size": 1280,
        "num_hidden_layers": 9,
        "num_attention_heads": 10,
        "intermediate_size": 7040,
        "moe_intermediate_size": 880,
        "num_experts": 63,
        "num_experts_per_tok": 7,
        "shared_expert_intermediate_size": 880,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": 2048,
    },
    "16b": {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "shared_expert_intermediate_size": 2 * 1408,
        "dense_layers": [0],
        "router_aux_loss_coef": 0.001,
        "balance_per": "sequence",
    },
    "145b": {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "intermediate_size": 16 * 1408,
        "moe_intermediate_size": 1408,
        "num_experts": 128,
        "num_experts_per_tok": 12,
        "shared_expert_intermediate_size": 4 * 1408,
        "dense_layers": [0],
        "router_aux_loss_coef": 0.003,
        "device_balance_coef": 0.05,
        "device_groups": 8,
    },
}


@dataclass(frozen=True)
class BalancedOutput(MixtureOutput):
    """What the layer computed, how the tokens went, and what uneven routing costs."""

    aux_loss: Tensor  # scalar, factors applied; add it to the loss


@dataclass(frozen=True, kw_only=True)
class MatchedShape:
    """Fine-grained experts that cost what standard ones cost.

    Attributes:
        hidden: hidden units of one small expert.
        routed, active, shared: small experts behind the router, those of them that a token visits, those always on.
        expert_parameters, active_parameters: of the experts for each unit of width, equal to the standard layer's.
        router_rows: rows of the router, the only parameters that differ; the standard layer has ``experts`` of them.
    """

    hidden: int
    routed: int
    active: int
    shared: int
    expert_parameters: int
    active_parameters: int
    router_rows: int


def matched(hidden: int, experts: int, active: int, *, split: int, shared: int = 0) -> MatchedShape:
    """Shape of a fine-grained layer with as many expert parameters, in all and a token, as a standard one.

    Args:
        hidden: hidden units of one standard expert.
        experts, active: standard experts of a layer, and those that a token visits.
        split: pieces m that each is cut into.
        shared: pieces K_s that are always on; they come out of both budgets.
    Raises:
        ValueError: ``split`` does not divide ``hidden``, ``active`` is above ``experts``, or the shared pieces leave
            nothing to route.
    Example:
        >>> shape = matched(256, 16, 2, split=4, shared=1)
        >>> shape.hidden, shape.routed, shape.active, shape.shared
        (64, 63, 7, 1)
    """
    if split < 1 or hidden % split:
        raise ValueError(f"split must divide hidden={hidden}, got {split}")
    if not 1 <= active <= experts:
        raise ValueError(f"active must be between 1 and experts={experts}, got {active}")
    if not 0 <= shared < split * active:
        raise ValueError(
            f"shared must be between 0 and split * active - 1 = {split * active - 1} (one piece has to be routed), got {shared}"
        )
    h = hidden // split
    return MatchedShape(
        hidden=h,
        routed=split * experts - shared,
        active=split * active - shared,
        shared=shared,
        expert_parameters=3 * h * split * experts,
        active_parameters=3 * h * split * active,
        router_rows=split * experts - shared,
    )


def paper_config(name: str) -> MixturaConfig:
    """Config of one of the paper's models, :data:`PAPER`, for a ``MixturaForCausalLM``.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    Example:
        >>> config = paper_config("16b")
        >>> config.num_experts, config.num_experts_per_tok, config.dense_layers
        (64, 6, [0])
    """
    from mixtura.lm.model import MixturaConfig

    if name not in PAPER:
        raise ValueError(f"name must be one of {list(PAPER)}, got {name!r}")
    always = {"norm_topk_prob": False, "initializer_range": 0.006, "router_z_loss_coef": 0.0}
    return MixturaConfig(**always | dict(PAPER[name]))


class FineGrainedMoE(MixtureLayer):
    """Fine-grained experts beside shared ones in place of a feed-forward layer, (..., D) -> (..., D).

    Calling it returns the tensor; :meth:`mix` returns the routing and the balance loss with it. Feed-forward networks are
    gated, without bias. An expert that no token visits gets a zero gradient.

    Args:
        d: width of the model, D.
        hidden: hidden units of one expert; see :func:`matched` for those of equal cost.
        routed: experts behind the router, E.
        active: routed experts that a token visits, K.
        shared: experts that every token visits with weight 1; one network of ``shared * hidden`` units.
        activation: of the gated networks; see `ExpertsConfig`.
        expert_balance, device_balance: factors alpha1 and alpha2 of the two balance losses.
        device_groups: number of groups of equal size, or the experts of each group; for ``device_balance``.
        balance_per: ``"batch"`` or ``"sequence"`` (the second-last dimension of the input).
        renormalise: make the chosen weights sum to 1; the paper does not.
        backend: one of `dispatch.BACKENDS`.
        init_std: standard deviation of every matrix at the start.
        generator: source of chance for the start.
    Raises:
        ValueError: the argument is named.
    Source:
        DeepSeekMoE (2401.06066), eq. 9-11 and sec. 4.1 (start).
    Example:
        >>> layer = FineGrainedMoE(16, 8, routed=15, active=3, shared=1)
        >>> out = layer.mix(torch.randn(2, 5, 16))
        >>> out.hidden.shape, out.routing.indices.shape
        (torch.Size([2, 5, 16]), torch.Size([10, 3]))
    """

    def __init__(
        self,
        d: int,
        hidden: int,
        routed: int,
        active: int,
        shared: int = 0,
        *,
        activation: str = "silu",
        expert_balance: float = 0.01,
        device_balance: float = 0.0,
        device_groups: int | Sequence[Sequence[int]] | None = None,
        balance_per: BalancePer = "batch",
        renormalise: bool = False,
        backend: str = "grouped",
        init_std: float = 0.006,
        generator: torch.Generator | None = None,
    ) -> None:
        if shared < 0:
            raise ValueError(f"shared must be >= 0, got {shared}")
        if not 1 <= active <= routed:
            raise ValueError(f"active must be between 1 and routed={routed}, got {active}")
        for name, factor in (("expert_balance", expert_balance), ("device_balance", device_balance)):
            if factor < 0:
                raise ValueError(f"{name} must be >= 0, got {factor}")
        if balance_per not in ("batch", "sequence"):
            raise ValueError(f"balance_per must be one of ['batch', 'sequence'], got {balance_per!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {backend!r}")
        if device_balance and device_groups is None:
            raise ValueError("device_balance needs device_groups: their number, or the experts of each")
        groups = device_split(routed, device_groups) if isinstance(device_groups, int) else device_groups
        config = ExpertsConfig(width=d, hidden=hidden, n_experts=routed, activation=activation)
        always = ExpertsConfig(width=d, hidden=hidden * shared, activation=activation) if shared else None
        super().__init__(
            Gate(d, routed, GateConfig(k=active, renormalise=renormalise)),
            Experts(config, backend=backend),
            shared=FeedForward(always) if always is not None else None,
        )
        self.expert_balance, self.device_balance = expert_balance, device_balance
        self.groups = None if groups is None else [list(group) for group in groups]
        self.balance_per: BalancePer = balance_per
        self.start(init_std, generator)

    @torch.no_grad()
    def start(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw every matrix anew: normal with standard deviation ``std``."""
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def mix(self, x: Tensor, routing: Routing | None = None) -> BalancedOutput:
        """The layer's output with its routing and balance loss.

        Args:
            x: shape (..., D); of three dimensions and more the second-last is a sequence.
            routing: one to use in place of the gate's, for probing; see :mod:`mixtura.lm.specialization`.
        Raises:
            ValueError: the router's logits are not finite.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.gate(x_TD) if routing is None else routing
        if not bool(routing.logits.isfinite().all()):
            raise ValueError(
                "router logits of FineGrainedMoE are not finite; the input or the router's weight has a NaN or inf"
            )
        y_TD: Tensor = self.experts(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        length = x.shape[-2] if x.dim() > 2 else len(x_TD)
        lead = (-1, length) if length else (1, 0)
        aux = balance_loss(
            routing.probs.reshape(*lead, routing.n_experts),
            routing.indices.reshape(*lead, routing.indices.shape[-1]),
            expert=self.expert_balance,
            device=self.device_balance,
            groups=self.groups,
            per=self.balance_per,
        )
        return BalancedOutput(y_TD.reshape(x.shape), routing, aux)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x).hidden
