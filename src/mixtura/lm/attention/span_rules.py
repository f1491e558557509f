"""Rules that say how far each head looks back, and plans made of them.

A rule gives a head the span alpha + beta N at total length N: the first block of real tokens (the sink), always visible,
and a window of whole blocks (MoA 2406.14909, sec. 3.1). Everything is counted in whole blocks, as the mask and the cache are.

Shapes: L layers, G key/value heads, R rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtura.core.checkpoint import read_json, write_json

__all__ = ["Rule", "SpanPlan", "rule_grid", "span_of", "uniform_plan", "window_blocks"]

ALPHAS, BETAS = 6, 9  # values on the grid, as in the paper


class Rule(NamedTuple):
    """Span alpha + beta N, in tokens."""

    alpha: float
    beta: float


def window_blocks(alpha: Any, beta: Any, length: int, block: int) -> NDArray[np.int64]:
    """Blocks of the window, the sink's block not counted, at least 1 and at most what the length holds.

    Args:
        alpha, beta: arrays of one shape, or numbers.
        length: total tokens N, prompt and answer.
        block: tokens a block.
    """
    whole = -(-length // block)
    # A hair is added so that a span of exactly so many blocks is not lost to rounding.
    blocks = np.floor((np.asarray(alpha) + np.asarray(beta) * length) / block + 1e-9).astype(np.int64) - 1
    return np.clip(blocks, 1, whole)


def span_of(blocks: Any, length: int, block: int) -> NDArray[np.int64]:
    """Tokens that a head keeps, sink and window: (1 + blocks) times the block, at most the length."""
    return np.minimum((1 + np.asarray(blocks)) * block, length)


def rule_grid(lengths: Sequence[int], block: int) -> list[Rule]:
    """Candidate rules for some lengths: alpha evenly on [-min N, max N], beta on [0, 1] (MoA, sec. 4.1, scaled).

    Rules that pass the longest length or vanish at the shortest are dropped, and of those that keep the same at every length
    all but the first.
    """
    shortest, longest = min(lengths), max(lengths)
    kept: dict[tuple[int, ...], Rule] = {}
    # The rule that keeps everything first: no plan can be refused for want of it.
    grid = [Rule(0.0, 1.0)]
    grid += [
        Rule(float(a), float(b)) for a in np.linspace(-shortest, longest, ALPHAS) for b in np.linspace(0, 1, BETAS)
    ]
    for rule in grid:
        if rule.alpha + rule.beta * longest > longest or rule.alpha + rule.beta * shortest <= 0:
            continue
        key = tuple(int(span_of(window_blocks(*rule, n, block), n, block)) for n in sorted(lengths))
        kept.setdefault(key, rule)
    return list(kept.values())


@dataclass(frozen=True)
class SpanPlan:
    """How far every key/value head looks back.

    Attributes:
        alphas, betas: tokens and tokens a token of length, [L][G].
        block: tokens a block.
        longest: largest total length it was planned for; a longer one is refused. None: any.

    Example:
        >>> plan = SpanPlan([[64.0, 0.0]], [[0.0, 0.5]], block=16)
        >>> plan.spans(256).tolist(), plan.density(256)
        ([[64, 128]], 0.375)
    """

    alphas: list[list[float]]
    betas: list[list[float]]
    block: int = 64
    longest: int | None = None

    def __post_init__(self) -> None:
        shapes = [[len(row) for row in table] for table in (self.alphas, self.betas)]
        if shapes[0] != shapes[1] or len(set(shapes[0])) != 1:
            raise ValueError(f"alphas and betas must be tables of one shape, got rows of {shapes[0]} and {shapes[1]}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, got {self.block}")

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and key/value heads."""
        return len(self.alphas), len(self.alphas[0])

    def blocks(self, length: int) -> NDArray[np.int64]:
        """Window of each head in blocks, shape (L, G)."""
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if self.longest is not None and length > self.longest:
            raise ValueError(
                f"this plan was made for up to {self.longest} tokens, prompt and answer together, and {length} are asked for; "
                f"plan again with that length among `extend` (--lengths), or generate fewer tokens"
            )
        return window_blocks(self.alphas, self.betas, length, self.block)

    def spans(self, length: int) -> Tensor:
        """Tokens each head keeps at a total length, int64, shape (L, G)."""
        return torch.from_numpy(span_of(self.blocks(length), length, self.block))

    def density(self, length: int) -> float:
        """Mean of spans over length: the share of the full cache that is kept."""
        return float(self.spans(length).double().mean()) / length

    def to_json(self, path: str | Path) -> None:
        """Write the plan; ``alphas`` and ``betas`` by layer and head, as the authors' plans have them."""
        write_json(path, asdict(self))

    @classmethod
    def from_json(cls, path: str | Path) -> "SpanPlan":
        """Read a plan; the authors' own plans are read as well."""
        return cls.of(read_json(path))

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "SpanPlan":
        """From a mapping with at least ``alphas`` and ``betas``."""
        if missing := sorted({"alphas", "betas"} - set(found)):
            raise ValueError(f"a plan of spans has alphas and betas, this one lacks {', '.join(missing)}")
        named = {name: found[name] for name in ("block", "longest") if name in found}
        return cls(
            [list(map(float, row)) for row in found["alphas"]],
            [list(map(float, row)) for row in found["betas"]],
            **named,
        )


def uniform_plan(shape: tuple[int, int], length: int, density: float, block: int) -> SpanPlan:
    """The same window for every head with the average density: the baseline, its sink the same as ours.

    Whole blocks rarely meet a density exactly, so the first heads, layer by layer, get one block more than the others.
    """
    low = max(1, int(density * length / block + 1e-9) - 1)
    low_share, high_share = (float(span_of(w, length, block)) / length for w in (low, low + 1))
    heads = shape[0] * shape[1]
    more = 0 if high_share == low_share else round(heads * (density - low_share) / (high_share - low_share))
    # Spread evenly over depth: neither end of the network is favoured.
    order = np.argsort(np.argsort((np.arange(heads) * 0.6180339887) % 1.0))
    windows = np.where(order < max(0, min(heads, more)), low + 1, low).reshape(shape)
    return SpanPlan(((1 + windows) * block).astype(float).tolist(), np.zeros(shape).tolist(), block)
