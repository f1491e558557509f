"""Latent attention: keys and values of all heads out of one short vector a token, which is all that the cache keeps.

Shapes: B batch, L positions, D width, Q heads, R width of the latent, N and P widths of a head's unrotated and rotated part,
V width of a head's values.
Source: DeepSeek-V2 (2405.04434), sec. 2.1, eq. 9-19.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixtura.lm.model.attention import _AttentionCore, _check_heads, eager_attention, rotate
from mixtura.lm.model.config import MixturaConfig
from mixtura.lm.model.parts import MixturaRMSNorm

__all__ = ["LatentAttention"]

EPS = 1e-6  # of the norms of latents, which DeepSeek-V2 keeps apart from the model's own


class LatentAttention(_AttentionCore):
    """Attention over keys and values of low rank, (B, L, D) -> (B, L, D).

    A head's key is [k, r]: k (N) comes from the normed latent, r (P) is rotated and shared by all heads. The cache holds the
    latent (R) and r (P) of a token, whatever the number of heads.
    """

    def __init__(self, config: MixturaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        D, Q = config.hidden_size, self.num_heads
        self.rank, self.nope, self.rope = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.values = config.v_head_dim
        self.scaling = (self.nope + self.rope) ** -0.5
        width = Q * (self.nope + self.rope)
        short = config.q_lora_rank
        self.q_proj = None if short else nn.Linear(D, width, bias=False)
        self.q_a_proj = nn.Linear(D, short, bias=config.qkv_bias) if short else None
        self.q_a_layernorm = _norm(short, config) if short else None
        self.q_b_proj = nn.Linear(short, width, bias=False) if short else None
        self.kv_a_proj_with_mqa = nn.Linear(D, self.rank + self.rope, bias=config.qkv_bias)
        self.kv_a_layernorm = _norm(self.rank, config)
        self.kv_b_proj = nn.Linear(self.rank, Q * (self.nope + self.values), bias=False)
        self.o_proj = nn.Linear(Q * self.values, D, bias=config.o_bias)

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
        q_BQLC = self._queries(hidden_states).view(B, L, self.num_heads, -1).transpose(1, 2)
        latent_BLR, turned_BLP = self.kv_a_proj_with_mqa(hidden_states).split([self.rank, self.rope], dim=-1)
        # One head each, so that every cache of transformers holds them.
        latent, turned = self.kv_a_layernorm(latent_BLR)[:, None], turned_BLP[:, None]
        q_fixed, q_turned = q_BQLC.split([self.nope, self.rope], dim=-1)
        if self.rotates and position_embeddings is not None:
            q_turned, turned = rotate(q_turned, *position_embeddings), rotate(turned, *position_embeddings)
        if past_key_values is not None:
            _check_heads(past_key_values, self.layer_idx, 1)
            latent, turned = past_key_values.update(latent, turned, self.layer_idx)
        kv_BQLC = self.kv_b_proj(latent[:, 0]).view(B, latent.shape[2], self.num_heads, -1).transpose(1, 2)
        k_fixed, values = kv_BQLC.split([self.nope, self.values], dim=-1)
        keys = torch.cat((k_fixed, turned.expand(-1, self.num_heads, -1, -1)), dim=-1)
        engine = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y_BLQV, weights = engine(
            self,
            torch.cat((q_fixed, q_turned), dim=-1),
            keys,
            values,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        return self.o_proj(y_BLQV.reshape(B, L, -1)), weights

    def _queries(self, x: Tensor) -> Tensor:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None and self.q_a_layernorm is not None and self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))


def _norm(width: int, config: MixturaConfig) -> MixturaRMSNorm:
    norm = MixturaRMSNorm(width, config)
    norm.eps = EPS
    return norm
