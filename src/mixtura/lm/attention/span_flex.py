"""Attention with spans by torch's FlexAttention: one kernel for all heads, which skips the tiles that a head does not see.

The kernel is compiled when it is first wanted, which takes a C++ compiler on a CPU and Triton on a GPU, and half a minute or so;
torch keeps what it compiled on disk. A tile of the mask is skipped, read whole, or read under the mask; which, follows from the
first and the last position in it, so that no mask of all queries and keys is ever made.

Shapes: B rows, H query heads, G key/value heads, N tokens, t tiles, C width of a head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mixtura.lm.attention.span_mask import HeadGroup, sees

__all__ = ["block_mask", "flex_attend", "why_not_flex"]

# Tokens a tile of the mask. On a CPU as many as a block has by default, since then only the diagonal is read under the mask; on a
# GPU the least that its kernels take whatever they choose for tiles of their own.
TILES = {"cpu": 64, "cuda": 128}
NOWHERE = torch.iinfo(torch.int64).max // 2


def why_not_flex(query: Tensor, dropout: float = 0.0) -> str | None:
    """Reason why FlexAttention cannot take these queries, or None."""
    device = query.device.type
    if device not in TILES:
        return f"it is made for {' and '.join(TILES)}, and these tensors are on {query.device}"
    if dropout:
        return f"it has no dropout, and {dropout:g} is asked for"
    if device == "cpu" and query.requires_grad and torch.is_grad_enabled():
        return "on a CPU it has no backward pass (under torch.no_grad() it needs none)"
    return _why_not_compiled() if device == "cpu" else None


@functools.cache
def _why_not_compiled() -> str | None:
    """Reason why nothing can be compiled for this CPU, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "it is compiled on a CPU, and there is no C++ compiler here (install g++, or name one in CXX)"
    return None


def block_mask(positions: Tensor, windows: Tensor, block: int, *, tile: int, backward: bool = False) -> BlockMask:
    """What every query head sees of a prompt, tile by tile.

    Args:
        positions: numbers of real tokens, shape (B, N), one after another; -1 for padding before and behind them.
        windows: blocks of each query head's window, shape (H,).
        block: tokens a block.
        tile: tokens a tile.
        backward: say as well which queries see a tile of keys, as gradients need it.
    """
    b, n = positions.shape
    tiles = F.pad(positions, (0, -n % tile), value=-1).view(b, 1, -1, tile)
    real = tiles >= 0
    first, last = tiles.where(real, NOWHERE).amin(-1), tiles.amax(-1)
    whole = real.all(-1)
    q_first, q_last, q_whole = first[..., :, None], last[..., :, None], whole[..., :, None]
    k_first, k_last, k_whole = first[..., None, :], last[..., None, :], whole[..., None, :]
    w = windows[:, None, None]
    some = (k_first <= q_last) & ((k_first < block) | (q_first // block - k_last // block < w))
    # Of the keys all are seen by all queries; the sink's block may end within a tile, which is then read under the mask.
    every = (k_last <= q_first) & ((k_last < block) | (q_last // block - k_first // block < w)) & q_whole & k_whole
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(some & every),
        BLOCK_SIZE=tile,
        mask_mod=_mask_of(positions, windows, block),
        seq_lengths=(n, n),
        compute_q_blocks=backward,
    )


def _mask_of(positions: Tensor, windows: Tensor, block: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask within a tile, from tables whose sizes do not change with the prompt.

    Inductor (torch 2.13) renames the symbols of sizes in the mask of its CPU kernel by replacing text, which spoils those whose
    name begins like another's. So no size may be left open there.
    """
    b = len(positions)
    # Padding before the first token, and tokens, of each row; room for more rows than there are.
    rows = positions.new_zeros(2, max(64, 1 << (b - 1).bit_length()))
    rows[0, :b], rows[1, :b] = (positions < 0).int().cummin(-1).values.sum(-1), positions.amax(-1) + 1
    heads = torch.stack([windows, torch.full_like(windows, block)])
    for table in (rows, heads):
        torch._dynamo.mark_static(table)

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, of = query - rows[0, row], key - rows[0, row]
        return sees(at, of, heads[0, head], heads[1, head]) & (at < rows[1, row])

    return seen


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys there are for each tile of queries, (B, H, t), and which, those first, (B, H, t, t)."""
    return tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    groups: Sequence[HeadGroup],
    block: int,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over a prompt, all heads at once: (B, H, N, C), with keys and values of G heads.

    Args:
        positions: numbers of real tokens, shape (N,) or (B, N); -1 for padding.
        groups: key/value heads by window.
        block: tokens a block.
    Raises:
        ValueError: the machine or the call is none for FlexAttention; the reason is named.
    """
    if (reason := why_not_flex(query, dropout)) is not None:
        raise ValueError(
            f"backend 'flex' does not run here: {reason}; set model.config.mixtura_spans['backend'] to 'windowed'"
        )
    b, h, n, _ = query.shape
    windows = torch.empty(key.shape[1], dtype=torch.int64, device=query.device)
    for group in groups:
        windows[list(group.heads)] = group.window
    mask = block_mask(
        positions.expand(b, n),
        windows.repeat_interleave(h // len(windows)),
        block,
        tile=TILES[query.device.type],
        backward=query.requires_grad and torch.is_grad_enabled(),
    )
    # Else sizes that are alike by chance when the kernel is compiled, 64 tiles and heads 64 wide, have to stay alike.
    with fx_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # made when torch is imported
        found: Tensor = _kernel()(query, key, value, block_mask=mask, scale=scale, enable_gqa=h != len(windows))
    return found


@functools.cache
def _kernel() -> Callable[..., Any]:
    """One compiled kernel for every length and number of rows."""
    return torch.compile(flex_attention, dynamic=True)
