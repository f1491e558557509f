"""One move of a mask: the smallest active weights go, as many others come, and of equal ones the first.

Which weights go is decided over the whole layer, also where its rows lie in several processes: the edge between those that go
and those that stay is found digit by digit. Each digit takes one sum of 2048 counts over the processes, three of them for
float32, and one count from each process says whose ties come first. That is 48 KiB a choice and layer, whatever the size of
the layer, and the result is that of one process to the unit.

Source: Evci et al. 2020 (1911.11134), sec. 3, alg. 1.
"""

import math

import torch
from torch import Tensor

from mixtura.core.masks import Rows

__all__ = ["drop_share", "moved_mask", "smallest"]

DIGIT = 11  # bits


def drop_share(step: int, end: float, drop: float = 0.3) -> float:
    """Share of the active weights that a move at ``step`` drops: drop / 2 (1 + cos(pi step / end)), 0 from ``end`` on.

    Source: RigL, sec. 3 (2).
    Example:
        >>> [round(drop_share(step, 100), 3) for step in (0, 50, 100)]
        [0.3, 0.15, 0.0]
    """
    return drop / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def moved_mask(
    weight: Tensor,
    mask: Tensor,
    score: Tensor,
    share: float,
    *,
    n_m: tuple[int, int] = (0, 0),
    axis: int = -1,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """One move of one layer's mask.

    Args:
        weight: the layer's weight, any shape.
        mask: its mask, bool.
        score: where to grow, of the same shape: larger is sooner, and negative never before others. RigL's is the size of the
            gradient.
        share: of the active weights to drop, rounded down to a whole number of them.
        n_m: keep N active of every M neighbours along ``axis``: which weights drop is decided over the layer, and what a group
            drops grows in that group.
        axis: of the groups.
        rows: where the three hold some rows of a layer only: which ones. Collective then.
    Returns:
        The new mask, with as many active weights, and where it grew, both bool. A weight that was just dropped may grow
        again. Of equal weights or scores those with the smallest positions drop and grow.
    """
    if n_m != (0, 0) and axis % mask.dim() != mask.dim() - 1:
        weight, mask, score = (t.movedim(axis, -1).contiguous() for t in (weight, mask, score))
        new, grown = moved_mask(weight, mask, score, share, n_m=n_m, rows=rows)
        return new.movedim(-1, axis).contiguous(), grown.movedim(-1, axis).contiguous()
    rows = rows or Rows(0, len(mask))
    old = mask.flatten()
    n_drop = int(share * int(rows.sum(old.sum())))
    kept = old & ~smallest(_last(_keys(weight.detach().flatten()), ~old), n_drop, rows)
    sooner = _last(-_keys(score.flatten()), kept)
    if n_m == (0, 0):
        grown = smallest(sooner, n_drop, rows)
    else:
        groups = (-1, n_m[1])
        wanted = (old & ~kept).view(groups).sum(-1, keepdim=True)
        ranks = sooner.view(groups).argsort(dim=-1, stable=True).argsort(-1)
        grown = (ranks < wanted).flatten()
    return (kept | grown).view_as(mask), grown.view_as(mask)


def smallest(keys: Tensor, n: int, rows: Rows) -> Tensor:
    """Where the n smallest of a vector of int32 or int64 lie, of equal ones the first; bool.

    Args:
        keys: the vector, or this process's part of it.
        n: how many of the whole vector.
        rows: the processes that hold the parts, in the order of their rows.
    Example:
        >>> smallest(torch.tensor([3, 1, 2, 1, 1]), 2, Rows(0, 5))
        tensor([False,  True, False,  True, False])
    """
    if n == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    if rows.group is None:
        edge = int(keys.kthvalue(n).values)
        ties = n - int((keys < edge).sum())
    else:
        edge, ties = _edge(keys, n, rows)
    chosen = keys < edge
    places = (keys == edge).nonzero()[:, 0]
    if rows.group is not None:
        ties = max(0, ties - rows.before(len(places)))
    chosen[places[:ties]] = True
    return chosen


def _edge(keys: Tensor, n: int, rows: Rows) -> tuple[int, int]:
    """The n-th smallest key over the processes, and how many of the n equal it."""
    bits = 64 if keys.dtype == torch.int64 else 32
    # With the sign flipped, digits read as those of numbers without sign keep the order.
    left = keys.long() ^ (-(2**63) if bits == 64 else 2**31)
    found = 0
    for shift in range((bits - 1) // DIGIT * DIGIT, -1, -DIGIT):
        digits = (left >> shift) & (2 ** min(DIGIT, bits - shift) - 1)
        below = rows.sum(torch.bincount(digits, minlength=2**DIGIT)).cumsum(0)
        digit = int((below < n).sum())
        n -= int(below[digit - 1]) if digit else 0
        left = left[digits == digit]
        found |= digit << shift
    return found - 2 ** (bits - 1), n


def _keys(values: Tensor) -> Tensor:
    """Integers in the order of the values' sizes, those without a size (NaN) last."""
    sizes = values.abs() if values.dtype == torch.float64 else values.float().abs()
    return sizes.view(torch.int64 if sizes.dtype == torch.float64 else torch.int32)


def _last(keys: Tensor, where: Tensor) -> Tensor:
    return keys.masked_fill(where, torch.iinfo(keys.dtype).max)
