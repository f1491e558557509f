"""Attention in which every key/value head sees its own sink and window: the mask, and products that skip what it hides.

Query i sees key j where j <= i and either j lies in the first block of real tokens or the blocks of i and j are fewer than
W apart (MoA 2406.14909, sec. 3.1). Positions count real tokens, so padding moves nothing.

Registered with transformers as attention ``mixtura-spans``. Backends of a prompt: ``reference`` builds the whole mask;
``windowed``, the default, multiplies each tile of queries with its sink and window only, which costs time in proportion to the
span; ``flex`` has FlexAttention compiled for the same.

Shapes: B rows, H query heads, G key/value heads, Q queries, K keys, C width of a head.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from mixtura.lm.attention.span_rules import SpanPlan

__all__ = ["BACKENDS", "NAME", "HeadGroup", "attend", "attend_window", "head_groups", "register", "visible"]

NAME = "mixtura-spans"
BACKENDS = ("windowed", "flex", "reference")
TILE = 256  # queries whose keys are cut out together


class HeadGroup(NamedTuple):
    """Key/value heads of a layer that keep the same.

    Attributes:
        heads: their numbers.
        window: blocks of their window.
    """

    heads: tuple[int, ...]
    window: int

    def of(self, x: Tensor, total: int) -> Tensor:
        """Their part of a tensor (B, ``total``, ...); no copy where they are all or stand side by side."""
        if len(self.heads) == total:
            return x
        first, last = self.heads[0], self.heads[-1]
        if last - first + 1 == len(self.heads):
            return x[:, first : last + 1]
        return x[:, list(self.heads)]


def head_groups(windows: Sequence[int]) -> list[HeadGroup]:
    """Heads of one layer, gathered by window."""
    distinct = sorted({int(w) for w in windows})
    return [HeadGroup(tuple(np.flatnonzero(np.asarray(windows) == w).tolist()), w) for w in distinct]


def visible(positions_Q: Tensor, positions_K: Tensor, window: int, block: int) -> Tensor:
    """Which keys a query sees.

    Args:
        positions_Q, positions_K: numbers of real tokens, shape (Q,) or (B, Q), and (K,) or (B, K); -1 for what is none.
        window, block: blocks of the window, tokens a block.
    Returns:
        bool, shape (Q, K) or (B, Q, K).
    """
    return sees(positions_Q[..., :, None], positions_K[..., None, :], window, block)


def sees(query: Tensor, key: Tensor, window: int | Tensor, block: int | Tensor) -> Tensor:
    """Whether a query at a position sees a key at another: the mask itself, for arguments that go together by broadcasting."""
    near = (key < block) | (query // block - key // block < window)
    return (key >= 0) & (key <= query) & near


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of grouped queries, (B, G, r, Q, C) with keys (B, G, K, C) -> (B, G, r, Q, C).

    Queries that share keys are laid side by side instead of repeating the keys.

    Args:
        mask: bool, shape (Q, K) or (B, Q, K), True where a key is seen; None: all are, or those before where ``causal``.
    """
    b, g, r, n, c = query.shape
    if causal and r > 1:
        mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
        causal = False
    if mask is not None:
        # A query that sees nothing is padding; it may see everything, for nobody reads it.
        mask = mask | ~mask.any(-1, keepdim=True)
        mask = mask.repeat(*(1 for _ in mask.shape[:-2]), r, 1)
        mask = mask if mask.dim() == 2 else mask[:, None]
    packed = query.reshape(b, g, r * n, c)
    out = F.scaled_dot_product_attention(
        packed, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )
    return out.view(b, g, r, n, c)


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    window: int,
    block: int,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """As :func:`attend` over a whole prompt, tile by tile, each with the keys that its queries can see.

    Args:
        query, key, value: (B, G, r, N, C) and (B, G, N, C) of the same N tokens.
        positions: shape (N,) or (B, N); padding, -1, stands before or behind the real tokens of a row, never between.
    """
    n = key.shape[2]
    first = 0 if positions.dim() == 1 else int((positions < 0).int().cummin(-1).values.sum(-1).max())
    out = torch.empty_like(query)
    for begin in range(0, n, TILE):
        end = min(n, begin + TILE)
        sink, start = min(first + block, begin), max(0, begin - window * block + 1)
        pieces = [slice(0, end)] if start <= sink else [slice(0, sink), slice(start, end)]
        keys, values = (torch.cat([x[:, :, piece] for piece in pieces], 2) for x in (key, value))
        seen = torch.cat([positions[..., piece] for piece in pieces], -1)
        mask = visible(positions[..., begin:end], seen, window, block)
        out[..., begin:end, :] = attend(query[..., begin:end, :], keys, values, mask, scale=scale, dropout=dropout)
    return out


def span_attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls; keys and values come plain, or held by a layer of a span cache.

    Args:
        module: an attention layer; its config carries the plan.
        query: (B, H, Q, C).
        attention_mask: None, or bool (B, tokens so far), False for padding.
    Returns:
        (B, Q, H, C), and None: no weights are kept.
    """
    from mixtura.lm.attention.span_cache import Held

    if kwargs.get("output_attentions"):
        raise ValueError(
            "attention with spans keeps no weights; convert nothing, or load with attn_implementation='eager'"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention with spans takes a mask of padding, (rows, tokens), got one of shape {tuple(attention_mask.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Held):
        out = key.layer.attend(query, key.states, value.states, attention_mask, scale)
        return out.transpose(1, 2).contiguous(), None
    n = query.shape[2]
    if key.shape[2] != n:
        raise ValueError(
            f"{key.shape[2]} keys for {n} queries: this cache keeps everything. Let generate make the cache, or pass "
            f"past_key_values=SpanCache(model, length)"
        )
    spans = module.config.mixtura_spans
    plan = SpanPlan.of(spans)
    groups = head_groups(plan.blocks(n)[module.layer_idx].tolist())
    positions = real_positions(attention_mask, n, query.device)
    out = prompt_attention(
        query, key, value, positions, groups, plan.block, scale=scale, dropout=dropout, backend=spans["backend"]
    )
    return out.transpose(1, 2).contiguous(), None


def real_positions(attention_mask: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Numbers of the real tokens among the last n, shape (n,) or (B, n); -1 for padding. Nothing came before."""
    if attention_mask is None:
        return torch.arange(n, device=device)
    real = attention_mask[:, -n:].to(device)
    return torch.where(real, real.long().cumsum(-1) - 1, -1)


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    groups: Sequence[HeadGroup],
    block: int,
    *,
    scale: float,
    dropout: float = 0.0,
    backend: str = "windowed",
) -> Tensor:
    """Attention over a prompt that nothing came before, (B, H, N, C)."""
    n, padded = key.shape[2], positions.dim() == 2
    whole = not padded and all((1 + group.window) * block >= n for group in groups)
    # Padding on both sides of a row, or within it, has no columns to cut out.
    if padded and bool(((positions[:, 1:] < 0) != (positions[:, :-1] < 0)).sum(-1).max() > 1):
        backend = "reference"
    if backend == "flex" and not whole:
        # The compiler is loaded only where it is wanted.
        from mixtura.lm.attention.span_flex import flex_attend

        return flex_attend(query, key, value, positions, groups, block, scale=scale, dropout=dropout)
    parts = _by_group(query, key, value, positions, groups, block, scale, dropout, backend)
    return merged(parts, groups, query)


def _by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    groups: Sequence[HeadGroup],
    block: int,
    scale: float,
    dropout: float,
    backend: str,
) -> Iterator[Tensor]:
    """The same group by group, each (B, g, r, N, C)."""
    total, n = key.shape[1], key.shape[2]
    for group in groups:
        q, k, v = grouped(query, group, total), group.of(key, total), group.of(value, total)
        if (1 + group.window) * block >= n and positions.dim() == 1:
            yield attend(q, k, v, None, scale=scale, causal=True, dropout=dropout)
        elif backend == "reference":
            yield attend(q, k, v, visible(positions, positions, group.window, block), scale=scale, dropout=dropout)
        else:
            yield attend_window(q, k, v, positions, group.window, block, scale=scale, dropout=dropout)


def grouped(query: Tensor, group: HeadGroup, total: int) -> Tensor:
    """Queries (B, H, Q, C) of a group's heads, (B, g, r, Q, C): heads that share keys stand together."""
    b, h, n, c = query.shape
    return group.of(query.view(b, total, h // total, n, c), total)


def merged(parts: Iterator[Tensor], groups: Sequence[HeadGroup], like: Tensor) -> Tensor:
    """Outputs of all groups, back in the order of the heads, (B, H, Q, C)."""
    found = list(parts)
    b, h, n, c = like.shape
    if len(found) == 1:
        return found[0].reshape(b, h, n, c)
    order = torch.tensor([head for group in groups for head in group.heads], device=like.device)
    return torch.cat(found, 1)[:, order.argsort()].reshape(b, h, n, c)


def span_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers asks for: padding only, (B, tokens so far); the spans are the attention's own business."""
    if "local_size" in kwargs:
        return None  # of sliding layers, which some families ask for without having any
    if mask_function is not causal_mask_function:
        raise ValueError(
            "attention with spans knows padding and the order of tokens; sequences packed into one row, and masks of one's own, "
            "are not supported: give each sequence its row"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, :kv_length]


def register() -> None:
    """Make ``mixtura-spans`` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, span_attention)
    AttentionMaskInterface.register(NAME, span_mask)
