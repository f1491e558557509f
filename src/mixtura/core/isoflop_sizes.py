"""How large equal-cost layers are, and how many of their weights are active: the numbers of Sparse-IFT, without a network.

Source: Saxena et al. 2023 (2303.11525), sec. 2.2-2.3; densities by shape (ERK): RigL (1911.11134), sec. 3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from mixtura.core.flops import WeightCost
from mixtura.core.sparse_layers import Between

__all__ = [
    "MEMBERS",
    "IsoFlop",
    "active_counts",
    "branches",
    "doped_rank",
    "factorized_rank",
    "matrix_shape",
    "scaled_width",
    "widening",
]

MEMBERS = ("wide", "parallel", "factorized", "doped")


@dataclass(frozen=True)
class IsoFlop:
    """Which transformation, and how sparse.

    Attributes:
        member: ``"wide"``, ``"parallel"``, ``"factorized"`` or ``"doped"``.
        sparsity: s in [0, 1); it sets the size, and the density up to what ``match`` changes.
        skip: patterns (as of a shell) of layers to leave dense, by the names of their modules. The last layer that is called
            (the head) and, where it is a convolution, the first (the stem) are left in any case.
        match: ``"network"``: the network's multiply-adds equal the dense one's to the unit of one weight; ``"layer"``: masked
            layers have density 1 - s.
        distribution: ``"uniform"``: one density for all masked layers; ``"erk"``: larger where a layer is small.
        between: the norm and activation inside parallel and factorized layers.
        n_m: (N, M) for masks with N active of every M neighbours along the axis of the inputs, with N / M = 1 - s and
            ``match="layer"``: which hardware computes quicker, and why costs are equal layer by layer only. M has to divide the
            inputs of every layer; factorized ranks are rounded up to a multiple of M. (0, 0): none.
    """

    member: Literal["wide", "parallel", "factorized", "doped"]
    sparsity: float
    skip: tuple[str, ...] = ()
    match: Literal["network", "layer"] = "network"
    distribution: Literal["uniform", "erk"] = "uniform"
    between: Between = field(default_factory=Between)
    n_m: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("member", self.member, MEMBERS),
            ("match", self.match, ("network", "layer")),
            ("distribution", self.distribution, ("uniform", "erk")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.member == "parallel":
            branches(self.sparsity)
        n, m = self.n_m
        if (n, m) != (0, 0) and not 0 < n <= m:
            raise ValueError(f"n_m must be (N, M) with 0 < N <= M, got {self.n_m}")
        if m and (
            self.match != "layer" or not math.isclose(n / m, 1 - self.sparsity) or self.distribution != "uniform"
        ):
            raise ValueError(
                f"n_m={self.n_m} fixes the density at {n}/{m}: give match='layer', distribution='uniform' and "
                f"sparsity={1 - n / m:g}, got {self.match!r}, {self.distribution!r} and {self.sparsity}"
            )


def widening(sparsity: float) -> float:
    """Factor on both sides of every layer: k = 1 / sqrt(1 - s).

    Example:
        >>> [round(widening(s), 2) for s in (0, 0.5, 0.75, 0.9)]
        [1.0, 1.41, 2.0, 3.16]
    """
    return 1 / math.sqrt(1 - sparsity)


def branches(sparsity: float) -> int:
    """Parallel branches: 1 / (1 - s).

    Raises:
        ValueError: it is no integer; the nearest sparsities on both sides for which it is are named.
    """
    n = 1 / (1 - sparsity)
    if abs(n - round(n)) > 1e-6 * n:
        low, high = math.floor(n), math.ceil(n)
        raise ValueError(
            f"parallel branches number 1 / (1 - sparsity), which must be an integer; sparsity={sparsity} gives {n:.3g}: "
            f"take {1 - 1 / low:.4g} ({low} branches) or {1 - 1 / high:.4g} ({high})"
        )
    return round(n)


def factorized_rank(inputs: int, outputs: int, sparsity: float, *, multiple_of: int = 1) -> int:
    """Smallest multiple d with d (I + O) (1 - s) >= I O; for a k x k convolution I counts the kernel, I = k² channels.

    Example:
        >>> factorized_rank(64, 64, 0.5), factorized_rank(9 * 16, 16, 0.75)
        (64, 58)
    """
    return math.ceil(inputs * outputs / ((1 - sparsity) * (inputs + outputs)) / multiple_of) * multiple_of


def doped_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """Largest d with d (I + O) <= s I O.

    Example:
        >>> doped_rank(64, 64, 0.5), doped_rank(64, 64, 0.0)
        (16, 0)
    """
    return math.floor(sparsity * inputs * outputs / (inputs + outputs))


def scaled_width(width: int, sparsity: float, *, multiple_of: int = 1) -> int:
    """The multiple of ``multiple_of`` nearest to ``width * widening(sparsity)``, at least one of them."""
    return max(1, round(width * widening(sparsity) / multiple_of)) * multiple_of


def matrix_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Inputs and outputs of a layer's matrix; the inputs of a convolution count its kernel."""
    return layer.weight[0].numel(), layer.weight.shape[0]


def active_counts(
    costs: Mapping[str, WeightCost],
    budget: float,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, int]:
    """Active weights of each masked parameter, so that their multiply-adds come to ``budget``.

    Args:
        costs: by name, what each parameter costs when all of it is active.
        budget: multiply-adds to spend, between 0 and the sum of the costs.
        shapes: with them densities follow ERK, sum of a shape's axes over their product, and layers that would pass 1 are
            dense; without them one density serves all.
    Returns:
        Numbers whose cost is below the budget by less than the cheapest weight, as long as any can be added.
    Example:
        >>> active_counts({"a": WeightCost(100, 100, 100), "b": WeightCost(300, 100, 100)}, 200)
        {'a': 50, 'b': 50}
    """
    raw = {n: 1.0 if shapes is None else sum(shapes[n]) / math.prod(shapes[n]) for n in costs}
    full: set[str] = set()
    while True:
        free = [n for n in costs if n not in full]
        left = budget - sum(costs[n].dense for n in full)
        scale = left / sum(raw[n] * costs[n].dense for n in free) if free else 0.0
        passed = {n for n in free if scale * raw[n] > 1}
        if not passed:
            break
        full |= passed
    ideal = {n: costs[n].numel * (1.0 if n in full else scale * raw[n]) for n in costs}
    counts = {n: min(costs[n].numel, int(ideal[n] + 1e-6)) for n in costs}
    left = budget - sum(costs[n].each * counts[n] for n in costs)
    # What rounding down left over, one weight each in the order of what each layer lost; then anything that still fits.
    for n in sorted(costs, key=lambda n: counts[n] - ideal[n]):
        if counts[n] < costs[n].numel and costs[n].each <= left + 1e-6:
            counts[n] += 1
            left -= costs[n].each
    for n in sorted(costs, key=lambda n: -costs[n].each):
        more = min(costs[n].numel - counts[n], int((left + 1e-6) / costs[n].each))
        counts[n] += more
        left -= more * costs[n].each
    return counts
