"""Norms, the dense feed-forward part and the one made of experts.

Shapes: B batch, L positions, T = B L tokens, D width, H hidden, E experts, K experts a token visits.

The block of experts speaks transformers' own interface, so everything that understands Mixtral understands it:
``gate(x) -> (logits, weights, indices)`` and ``experts(x, indices, weights)`` over stacked weights, dispatched by
``config._experts_implementation``.
"""

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from mixtura.core.capacity import CapacityPolicy, capacity
from mixtura.core.gates import Routing, limit_capacity, top_k
from mixtura.core.sparsity_gate import Gather, SparsityAwareGate, Statistics
from mixtura.lm.model.config import MixturaConfig

__all__ = [
    "Experts",
    "ExpertsBlock",
    "MixturaRMSNorm",
    "MixturaRouter",
    "Mlp",
    "SparsityRouter",
    "inner_weights",
    "make_experts",
    "make_feed_forward",
    "make_norm",
]


class MixturaRMSNorm(nn.Module):
    """Norm of the last dimension, computed in float32: root mean square, optionally 1 + w, optionally mean and bias.

    Wider input stays wide, which checks of one training against another need.

    Source: Zhang and Sennrich 2019 (1910.07467), eq. 4; LayerNorm: Ba et al. 2016 (1607.06450), eq. 4.
    """

    def __init__(self, width: int, config: MixturaConfig):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        start = torch.zeros if config.norm == "rms_plus_one" else torch.ones
        self.weight = nn.Parameter(start(width)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the dtype that came."""
        y = x if x.dtype == torch.float64 else x.float()
        if self.kind == "layer":
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            weight = self.weight.to(y.dtype)
            y = y * (1.0 + weight if self.kind == "rms_plus_one" else weight)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


def make_norm(config: MixturaConfig, width: int | None = None) -> MixturaRMSNorm:
    """The config's norm over the model's width, or over another."""
    return MixturaRMSNorm(width or config.hidden_size, config)


class Mlp(nn.Module):
    """Dense feed-forward part, (..., D) -> (..., D)."""

    def __init__(self, config: MixturaConfig, hidden: int | None = None):
        super().__init__()
        hidden = hidden or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, hidden, bias=config.mlp_bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(config.hidden_size, hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(hidden, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        up = self.up_proj(x)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up
        return self.down_proj(inner)


class MixturaRouter(nn.Module):
    """Softmax gate of the feed-forward experts.

    With ``norm_topk_prob`` false the chosen gates keep their softmax values: with one expert a token, gates that are made to
    sum to 1 are 1, and the router learns nothing from the loss. A pair over an expert's capacity has the index E and weight 0,
    which every experts engine passes over; logits say what the gate wanted.
    """

    def __init__(self, config: MixturaConfig, num_experts: int):
        super().__init__()
        self.num_experts, self.top_k = num_experts, config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.float32 = config.router_float32
        self.capacity_factors = (config.capacity_factor, config.eval_capacity_factor)
        self.min_capacity = config.min_capacity
        self.policy = cast(CapacityPolicy, config.capacity_policy)
        self.groups = config.capacity_groups
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    def forward(self, x: Tensor, *, tokens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> logits (T, E), weights (T, K) in the dtype of x, indices (T, K).

        ``tokens``, as many bools, is false at padding, which then visits no expert and takes no place of one.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        if self.float32:
            with torch.autocast(x.device.type, enabled=False):
                logits_TE = F.linear(x_TD.float(), self.weight.float())
        else:
            logits_TE = F.linear(x_TD, self.weight)
        routing = self._limited(top_k(logits_TE, self.top_k, renormalise=self.norm_topk_prob), tokens)
        return logits_TE, routing.weights.to(x.dtype), routing.indices

    def _limited(self, routing: Routing, tokens: Tensor | None = None) -> Routing:
        """The routing with the pairs over an expert's capacity left out."""
        factor = self.capacity_factors[0 if self.training else 1]
        if not factor:
            return routing
        n_tokens = len(routing.indices)
        if tokens is not None:
            padding_T1 = ~tokens.reshape(-1, 1)
            n_tokens -= int(padding_T1.sum())
            routing = replace(
                routing,
                indices=routing.indices.masked_fill(padding_T1, self.num_experts),
                weights=routing.weights.masked_fill(padding_T1, 0.0),
            )
        limit = capacity(n_tokens, self.num_experts, factor * self.top_k, minimum=self.min_capacity)
        policy = self.policy if self.training else "prefix"
        return limit_capacity(routing, limit, policy=policy, groups=self.groups if policy == "group" else 1)


class SparsityRouter(MixturaRouter):
    """Router without parameters: the experts that would fire the fewest hidden units on a token; reads the experts' weights.

    Source: MoE-X (2503.07639), eq. 9-11.
    """

    reads_experts = True  # what moves experts elsewhere, or packs them, has to know

    def __init__(self, config: MixturaConfig, num_experts: int):
        super().__init__(config, num_experts)
        self.register_parameter("weight", None)
        self.sparsity = SparsityAwareGate(self.top_k, statistics=cast(Statistics, config.router_statistics))

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None = None,
        *,
        gather: Gather | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., D), experts' input matrices (E, H, D) and biases (E, H) -> scores (T, E), weights and indices (T, K).

        Of experts that lie in several processes the matrices are those of this one, and ``gather`` asks the others.
        """
        routing = self._limited(self.sparsity(x, up, up_bias, gather=gather), tokens)
        return routing.logits, routing.weights.to(x.dtype), routing.indices


class Experts(nn.Module):
    """Stacked feed-forward experts: ``gate_up_proj`` (E, 2H, D) or ``up_proj`` (E, H, D), ``down_proj`` (E, D, H).

    This forward is the plain loop that defines the result; transformers' registry swaps in others by a config word.
    """

    gated: bool
    bias: bool

    def __init__(self, config: MixturaConfig, num_experts: int):
        super().__init__()
        E, H, D = num_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts, self.hidden_dim, self.intermediate_dim = E, D, H
        self.act_fn = ACT2FN[config.hidden_act]
        rows, up = (2 * H, "gate_up_proj") if self.gated else (H, "up_proj")
        setattr(self, up, nn.Parameter(torch.empty(E, rows, D)))
        self.down_proj = nn.Parameter(torch.empty(E, D, H))
        if self.bias:
            setattr(self, f"{up}_bias", nn.Parameter(torch.empty(E, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(E, D))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x (T, D), experts (T, K), weights (T, K) -> (T, D); index E means nothing."""
        up_name = "gate_up_proj" if self.gated else "up_proj"
        up_EHD = getattr(self, up_name)
        up_bias = getattr(self, f"{up_name}_bias") if self.bias else None
        out_TD = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = (top_k_index == e).nonzero(as_tuple=True)
            if len(tokens) == 0:
                continue
            inner = F.linear(hidden_states[tokens], up_EHD[e], None if up_bias is None else up_bias[e])
            if self.gated:
                gate, up = inner.chunk(2, dim=-1)
                inner = self.act_fn(gate) * up
            else:
                inner = self.act_fn(inner)
            y = F.linear(inner, self.down_proj[e], self.down_proj_bias[e] if self.bias else None)
            out_TD.index_add_(0, tokens, (y * top_k_weights[tokens, slots, None]).to(out_TD.dtype))
        return out_TD


# One class a layout: the decorator fixes the layout per class, and other libraries read it from there.
@use_experts_implementation
class GatedExperts(Experts):
    """Gated, without bias (Llama and its relatives)."""

    gated, bias = True, False


@use_experts_implementation(has_bias=True)
class GatedBiasExperts(Experts):
    """Gated, with biases."""

    gated, bias = True, True


@use_experts_implementation(has_gate=False)
class PlainExperts(Experts):
    """Two matrices, without bias."""

    gated, bias = False, False


@use_experts_implementation(has_gate=False, has_bias=True)
class PlainBiasExperts(Experts):
    """Two matrices, with biases (Phi, GPT-NeoX)."""

    gated, bias = False, True


def inner_weights(experts: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What decides whether a hidden unit fires: input matrices (E, H, D) and biases (E, H); of gated experts the gate's.

    Raises:
        ValueError: experts whose matrices are not stacked as they are, such as packed ones.
    """
    for name in ("gate_up_proj", "up_proj"):
        up, bias = getattr(experts, name, None), getattr(experts, f"{name}_bias", None)
        if isinstance(up, Tensor):
            rows = up.shape[1] // (2 if name == "gate_up_proj" else 1)
            return up[:, :rows], None if bias is None else bias[:, :rows]
    raise ValueError(f"{type(experts).__name__} holds no stacked matrices that a sparsity-aware router could read")


def make_experts(config: MixturaConfig, num_experts: int) -> Experts:
    """So many experts of the config's feed-forward layout."""
    layouts: dict[tuple[bool, bool], type[Experts]] = {
        (True, False): GatedExperts,
        (True, True): GatedBiasExperts,
        (False, False): PlainExperts,
        (False, True): PlainBiasExperts,
    }
    return layouts[config.mlp_gated, config.mlp_bias](config, num_experts)


class ExpertsBlock(nn.Module):
    """Router, routed experts and, where the config has one, a shared expert; (B, L, D) -> (B, L, D).

    The shared expert is added, or both are weighted by what ``shared_coefficient`` makes of the token: routed first.
    """

    def __init__(self, config: MixturaConfig, num_experts: int):
        super().__init__()
        router = SparsityRouter if config.router == "sparsity" else MixturaRouter
        self.gate = router(config, num_experts)
        self.experts = make_experts(config, num_experts)
        if config.capacity_factor or config.eval_capacity_factor:
            # transformers' engines look for the index E, which stands for no expert, only behind this flag.
            self.experts._is_expert_parallel = True  # type: ignore[assignment]
        shared = config.shared_expert_intermediate_size
        self.shared_expert = Mlp(config, shared) if shared else None
        weighted = config.shared_combine == "coefficient"
        self.shared_coefficient = nn.Linear(config.hidden_size, 2) if weighted else None

    def forward(self, hidden_states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); ``tokens`` (B, L) is false at padding, which takes no place of a limited expert."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        padded = {} if tokens is None else {"tokens": tokens}  # any gate(x) will do where nothing is padded
        if isinstance(self.gate, SparsityRouter):
            own = getattr(self.experts, "local_experts", self.experts)  # of a model spread over processes
            gather = getattr(self.experts, "gathered_statistics", None)
            _, weights_TK, indices_TK = self.gate(x_TD, *inner_weights(own), gather=gather, **padded)
        else:
            _, weights_TK, indices_TK = self.gate(x_TD, **padded)
        y_TD = self.experts(x_TD, indices_TK, weights_TK)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_coefficient is not None:
                share_T2 = self.shared_coefficient(x_TD).float().softmax(-1).to(x_TD.dtype)
                y_TD, shared_TD = share_T2[:, :1] * y_TD, share_T2[:, 1:] * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.reshape(hidden_states.shape)


def make_feed_forward(config: MixturaConfig, layer: int) -> nn.Module:
    """The feed-forward part that the config gives a layer, (B, L, D) -> (B, L, D). A new kind of part is chosen here."""
    experts = config.experts_of(layer)
    return ExpertsBlock(config, experts) if experts else Mlp(config)
