"""Attention, and a mixture of attentions computed as one.

Shapes: B batch, L positions of the queries, D width, N attention experts, Q heads of queries, G heads of keys and values,
P queries per key/value head (Q = G P), C width of a head.

- The mixture is exact: the heads of all experts go through one attention call, each expert's heads are scaled by its gate
  *after* attention, and one stacked projection adds them up. Gates scale outputs, so this equals the sum of N attentions.
- Keys and values are every expert's own (cache of N G heads) or shared by all (cache of G heads).

Source: BAM (2408.08274), sec. 3.2, its soft-routing mixture of attention experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixtura.core.gates import Routing, soft, top_k
from mixtura.lm.model.config import MixturaConfig
from mixtura.lm.model.parts import MixturaRMSNorm

__all__ = ["Attention", "AttentionMixture", "MixturaRotaryEmbedding", "rotate"]

FEW_TOKENS = 64  # up to here N small products beat copying the output projection into one matrix


class MixturaRotaryEmbedding(nn.Module):
    """Cosine and sine of the rotary position embedding, over all or a leading part of each head.

    Source: RoFormer (2104.09864), eq. 34; scaled variants as registered in transformers.
    """

    def __init__(self, config: MixturaConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        scaled = self.rope_type != "default"
        init = ROPE_INIT_FUNCTIONS[self.rope_type] if scaled else self.compute_default_rope_parameters
        inv_freq, scaling = init(config)
        self.attention_scaling: float = scaling
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MixturaConfig, **_: Any) -> tuple[Tensor, float]:
        """Inverse frequencies of the rotated part of a head, and the factor 1."""
        width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        # Divided, not raised to a negative power: transformers rounds so, and its models' logits come out to the bit.
        return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, L) -> cos, sin (B, L, rotated width) in the dtype of x."""
        angle = position_ids[..., None].float() * self.inv_freq.to(x.device).float()
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading part of each head: x (B, heads, L, C), cos and sin (B, L, R), R <= C; the rest passes through."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    left, right = turned.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The plain computation that the other engines must agree with: (B, Q, L, C) -> (B, L, Q, C) and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.float().softmax(-1).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _AttentionCore(nn.Module):
    """What both attentions share: clamp, rotation, cache and the call of the engine."""

    def __init__(self, config: MixturaConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.head_dim
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.rotates = layer_idx not in (config.no_rope_layers or [])

    def _clamp(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        limit = self.config.clip_qkv
        return tensors if limit is None else tuple(t.clamp(-limit, limit) for t in tensors)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """All (B, heads, L, C) -> (B, L, query heads, C)."""
        if self.rotates and position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            _check_heads(past_key_values, self.layer_idx, key.shape[1])
            key, value = past_key_values.update(key, value, self.layer_idx)
        engine: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        return engine(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )


def _check_heads(cache: Any, layer_idx: int, heads: int) -> None:
    layers = getattr(cache, "layers", [])
    kept = getattr(layers[layer_idx], "keys", None) if layer_idx < len(layers) else None
    if kept is not None and kept.dim() == 4 and kept.shape[1] != heads:
        raise ValueError(
            f"past_key_values holds {kept.shape[1]} key/value heads in layer {layer_idx}, this model has {heads}: it is the "
            "cache of a model with another number of attention experts; start from an empty one"
        )


class Attention(_AttentionCore):
    """Grouped-query attention, (B, L, D) -> (B, L, D)."""

    def __init__(self, config: MixturaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.o_bias)
        widths = {"none": None, "head": (self.head_dim, self.head_dim), "full": (queries, keys)}[config.qk_norm]
        self.q_norm = MixturaRMSNorm(widths[0], config) if widths else None
        self.k_norm = MixturaRMSNorm(widths[1], config) if widths else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Input and rotary tables -> output (B, L, D) and, from the eager engine, attention weights."""
        lead = hidden_states.shape[:-1]
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.q_norm is not None and self.k_norm is not None and self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(*lead, -1, self.head_dim) for t in self._clamp(q, k, v))
        if self.q_norm is not None and self.k_norm is not None and self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y, weights = self._attend(q, k, v, position_embeddings, attention_mask, past_key_values, **kwargs)
        return self.o_proj(y.reshape(*lead, -1)), weights


class AttentionMixture(_AttentionCore):
    """Sum over N attention experts of gate times attention, (B, L, D) -> (B, L, D).

    Weights are stacked by expert: ``q_proj`` (N, Q C, D), ``o_proj`` (N, D, Q C), and ``k_proj``, ``v_proj`` (N, G C, D), or
    (1, G C, D) where keys and values are shared. The gate is a softmax over ``router.weight @ x``. With ``top1`` and
    ``top2`` routing the other gates are zero and the kept ones stay as they are; every expert still runs.

    After a forward pass :attr:`routing` holds that pass's gates, cut off from the graph.
    """

    q_proj_bias: nn.Parameter | None
    k_proj_bias: nn.Parameter | None
    v_proj_bias: nn.Parameter | None
    o_proj_bias: nn.Parameter | None

    def __init__(self, config: MixturaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        N, D = config.attention_experts, config.hidden_size
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        kv = N if config.attention_kv == "expert" else 1
        self.num_experts, self.num_kv_experts = N, kv
        # The engines divide query heads by this to repeat keys and values; shared ones serve N times as many queries.
        self.num_key_value_groups = self.num_key_value_groups * N // kv
        self.router = nn.Linear(D, N, bias=False)
        self.q_proj = nn.Parameter(torch.empty(N, queries, D))
        self.k_proj = nn.Parameter(torch.empty(kv, keys, D))
        self.v_proj = nn.Parameter(torch.empty(kv, keys, D))
        self.o_proj = nn.Parameter(torch.empty(N, D, queries))
        for name, rows, wanted in (
            ("q_proj_bias", (N, queries), config.qkv_bias),
            ("k_proj_bias", (kv, keys), config.qkv_bias),
            ("v_proj_bias", (kv, keys), config.qkv_bias),
            ("o_proj_bias", (N, D), config.o_bias),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(rows)) if wanted else None)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = _stacked_norm(config, N, queries if full else self.head_dim)
            self.k_norm = _stacked_norm(config, kv, keys if full else self.head_dim)
        self.routing: Routing | None = None

    def unstack(self) -> None:
        """Hold the weights as four linear layers over all experts, ``q_stack`` to ``o_stack``, in place of the stacked ones.

        Compression needs layers that it can replace; the result of a forward pass is the same.
        """
        for name in ("q", "k", "v", "o"):
            stacked = getattr(self, f"{name}_proj")
            weight = stacked.transpose(0, 1).flatten(1) if name == "o" else stacked.flatten(0, 1)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.detach(), requires_grad=stacked.requires_grad)
            delattr(self, f"{name}_proj")
            self.add_module(f"{name}_stack", linear)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Input and rotary tables -> output (B, L, D) and, from the eager engine, attention weights."""
        B, L, _ = hidden_states.shape
        N, G, C = self.num_experts, self.num_key_value_heads, self.head_dim
        q_BLNQC = self._project(hidden_states, "q", N, self.q_norm)
        k_BLNGC = self._project(hidden_states, "k", self.num_kv_experts, self.k_norm)
        v_BLNGC = self._project(hidden_states, "v", self.num_kv_experts, None)
        shared = self.num_kv_experts == 1 and N > 1
        if shared:  # heads that share keys must lie together: key/value head first, then expert
            q_BLNQC = q_BLNQC.view(B, L, N, G, -1, C).transpose(2, 3)
        q, k, v = (t.reshape(B, L, -1, C).transpose(1, 2) for t in (q_BLNQC, k_BLNGC, v_BLNGC))
        y, weights = self._attend(q, k, v, position_embeddings, attention_mask, past_key_values, **kwargs)
        if shared:
            y = y.view(B, L, G, N, -1, C).transpose(2, 3)
        gates_BLN = self._gates(hidden_states)
        return self._mix(y.reshape(B, L, N, -1), gates_BLN), weights

    def _project(self, x: Tensor, name: str, experts: int, norm: MixturaRMSNorm | None) -> Tensor:
        """(B, L, D) -> (B, L, experts, heads, C), one product for all experts."""
        stack, bias = self._modules.get(f"{name}_stack"), getattr(self, f"{name}_proj_bias")
        y = F.linear(x, getattr(self, f"{name}_proj").flatten(0, 1)) if stack is None else stack(x)
        if bias is not None:
            y = y + bias.flatten()
        y = y.view(*x.shape[:-1], experts, -1)
        if norm is not None and self.config.qk_norm == "full":
            y = norm(y)
        y = self._clamp(y)[0].view(*y.shape[:-1], -1, self.head_dim)
        if norm is not None and self.config.qk_norm == "head":
            y = norm(y)
        return y

    def _gates(self, x: Tensor) -> Tensor:
        """(B, L, D) -> gates (B, L, N), float32."""
        logits_TN = self.router(x.reshape(-1, x.shape[-1]))
        kept = {"soft": 0, "top1": 1, "top2": 2}[self.config.attention_routing]
        routing = top_k(logits_TN, kept, renormalise=False) if kept else soft(logits_TN)
        gates_TN = routing.probs
        if kept:
            gates_TN = torch.zeros_like(gates_TN).scatter(-1, routing.indices, routing.weights)
        parts = (routing.weights, routing.indices, routing.logits, routing.probs)
        self.routing = Routing(*(t.detach() for t in parts))
        return gates_TN.view(*x.shape[:-1], -1)

    def _mix(self, y_BLNF: Tensor, gates_BLN: Tensor) -> Tensor:
        """Scale each expert's heads (B, L, N, Q C) by its gate and add their projections up: (B, L, D)."""
        gates_BLN = gates_BLN.to(y_BLNF.dtype)
        y_BLNF = y_BLNF * gates_BLN[..., None]
        B, L, N, _ = y_BLNF.shape
        stack = self._modules.get("o_stack")
        if stack is not None:
            out_BLD = stack(y_BLNF.flatten(2))
        elif B * L > FEW_TOKENS:
            stacked_DF = self.o_proj.transpose(0, 1).flatten(1)
            out_BLD = F.linear(y_BLNF.flatten(2), stacked_DF)
        else:
            each_NTD = torch.bmm(y_BLNF.reshape(B * L, N, -1).transpose(0, 1), self.o_proj.transpose(1, 2))
            out_BLD = each_NTD.sum(0).view(B, L, -1)
        if self.o_proj_bias is not None:
            out_BLD = out_BLD + gates_BLN @ self.o_proj_bias
        return out_BLD


def _stacked_norm(config: MixturaConfig, n: int, width: int) -> MixturaRMSNorm:
    """A norm of the last dimension whose weights are one row an expert: (N, 1, C) for heads, (N, width) for the full width."""
    norm = MixturaRMSNorm(width, config)
    shape = (n, width) if config.qk_norm == "full" else (n, 1, width)
    for name in ("weight", "bias"):
        if (row := getattr(norm, name)) is not None:
            setattr(norm, name, nn.Parameter(row.detach().expand(shape).clone()))
    return norm
