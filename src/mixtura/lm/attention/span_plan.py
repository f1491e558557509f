"""Which head looks how far: an integer program over rules, for several lengths at once (MoA 2406.14909, sec. 4.2 and appendix).

Shapes: L layers, G key/value heads, R rules, n blocks.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mixtura.core.assign import Infeasible, allocate_spans
from mixtura.core.progress import progress
from mixtura.lm.attention.span_rules import Rule, SpanPlan, rule_grid, span_of, window_blocks

__all__ = ["Planned", "pareto_plans", "plan_spans", "rule_losses"]

INTERVALS = 4  # into which the range of every other length's loss is cut


@dataclass(frozen=True)
class Planned:
    """A plan on the Pareto front.

    Attributes:
        plan: the spans.
        loss: length -> influence that it cuts.
    """

    plan: SpanPlan
    loss: dict[int, float]


def rule_losses(influence: Tensor, windows: Sequence[int]) -> NDArray[np.float64]:
    """Influence that windows cut off, heads by windows, shape (L G, R).

    Args:
        influence: [L, G, n, n], as :func:`mixtura.lm.attention.profile_spans` gives it.
        windows: blocks of each of R windows.
    """
    flat = influence.double().flatten(0, 1).numpy()
    n = flat.shape[-1]
    distance = np.subtract.outer(np.arange(n), np.arange(n))
    # By distance of blocks; the sink, column 0, is never cut.
    by_distance = np.zeros((len(flat), n + 1))
    for d in range(1, n):
        by_distance[:, d] = flat[:, (distance == d) & (np.arange(n) > 0)].sum(-1)
    beyond = by_distance[:, ::-1].cumsum(-1)[:, ::-1]
    return beyond[:, np.minimum(windows, n)]


def pareto_plans(
    influence: Mapping[int, Tensor],
    density: float = 0.5,
    *,
    extend: Sequence[int] = (),
    rules: Sequence[Rule] | None = None,
    max_rules_per_layer: int | None = 2,
    lower: float = 0.9,
    time_limit: float = 60.0,
) -> list[Planned]:
    """All plans found that no other beats at every profiled length; see :func:`plan_spans` for the arguments."""
    if not influence:
        raise ValueError("there is no influence to plan from; profile at least one length")
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    profiled = sorted(influence)
    blocks = {length: length // influence[length].shape[-1] for length in profiled}
    if len(set(blocks.values())) != 1:
        raise ValueError(f"all lengths must be profiled with one block, got tokens a block by length {blocks}")
    block = blocks[profiled[0]]
    lengths = sorted({*profiled, *extend})
    candidates = list(rules) if rules is not None else rule_grid(lengths, block)
    alphas, betas = (np.array(part) for part in zip(*candidates, strict=True))
    weight = np.stack([span_of(window_blocks(alphas, betas, n, block), n, block) / n for n in lengths])
    cost = {n: rule_losses(influence[n], window_blocks(alphas, betas, n, block).tolist()) for n in profiled}
    n_layers, n_heads = influence[profiled[0]].shape[:2]
    groups = np.repeat(np.arange(n_layers), n_heads).tolist()
    if (least := float(weight.min(1).max())) > density:
        raise Infeasible(
            f"no plan has density {density:g} at lengths {lengths}: the smallest that rules of whole blocks of {block} tokens "
            f"can have at all of them is {math.ceil(1000 * least) / 1000:g}"
        )

    def solve(length: int, within: Sequence[tuple[NDArray[np.float64], float, float]] = ()) -> NDArray[np.int64] | None:
        budget = np.full(len(lengths), density)
        # Whole blocks may leave no plan between lower and full budget; spending less is then better than none.
        for share in (lower, 0.0):
            try:
                return allocate_spans(
                    cost[length],
                    weight,
                    budget,
                    groups,
                    most=max_rules_per_layer,
                    lower=share,
                    within=within,
                    time_limit=time_limit,
                )
            except Infeasible:
                continue
        return None

    def losses(chosen: NDArray[np.int64]) -> dict[int, float]:
        return {n: float(cost[n][np.arange(len(chosen)), chosen].sum()) for n in profiled}

    alone = {n: solve(n) for n in profiled}
    found = [chosen for chosen in alone.values() if chosen is not None]
    if not found:
        raise Infeasible(
            f"no plan of density {density:g} was found in {time_limit:g} s; allow more time or a larger density"
        )
    ranges = {n: (min(losses(c)[n] for c in found), max(losses(c)[n] for c in found)) for n in profiled}
    jobs = []
    for length in profiled:
        others = [n for n in profiled if n != length]
        if not others:
            continue
        edges = {n: np.linspace(*ranges[n], INTERVALS + 1) for n in others}
        for cells in itertools.product(range(INTERVALS), repeat=len(others)):
            jobs.append((length, [(cost[n], edges[n][i], edges[n][i + 1]) for n, i in zip(others, cells, strict=True)]))
    for length, within in progress(jobs, desc="plan", unit="program"):
        chosen = solve(length, within)
        if chosen is not None:
            found.append(chosen)
    points = [(losses(chosen), chosen) for chosen in found]
    front: list[Planned] = []
    for loss, chosen in points:
        if any(_beats(other, loss) for other, _ in points) or any(loss == kept.loss for kept in front):
            continue
        table = (alphas[chosen].reshape(n_layers, n_heads), betas[chosen].reshape(n_layers, n_heads))
        front.append(Planned(SpanPlan(table[0].tolist(), table[1].tolist(), block, max(lengths)), loss))
    return front


def plan_spans(
    influence: Mapping[int, Tensor],
    density: float = 0.5,
    *,
    extend: Sequence[int] = (),
    rules: Sequence[Rule] | None = None,
    max_rules_per_layer: int | None = 2,
    lower: float = 0.9,
    time_limit: float = 60.0,
    validate: Callable[[SpanPlan], float] | None = None,
) -> SpanPlan:
    """Spans for every head, so that what is cut matters least and the cache keeps a share ``density`` of its full size.

    Args:
        influence: length -> [L, G, n, n], from :func:`mixtura.lm.attention.profile_spans`.
        density: largest mean share of the cache, at every profiled length and at those of ``extend``; in (0, 1].
        extend: longer lengths that the plan is to keep the budget at without being profiled there.
        rules: candidates; a grid over the lengths where None.
        max_rules_per_layer: different rules a layer may have; None for any number.
        lower: share of the budget that is to be spent.
        time_limit: seconds a program.
        validate: loss of a plan at a length that was not profiled; the plan of least loss wins. Where None, the one of least
            summed loss, each length's over its own best.
    Raises:
        Infeasible: no rule is short enough; the smallest density that can be had is named.
        ValueError: a density outside (0, 1], or lengths profiled with different blocks.
    """
    front = pareto_plans(
        influence,
        density,
        extend=extend,
        rules=rules,
        max_rules_per_layer=max_rules_per_layer,
        lower=lower,
        time_limit=time_limit,
    )
    if len(front) == 1:
        return front[0].plan
    if validate is not None:
        judge = validate
        return min((one.plan for one in progress(front, desc="validate", unit="plan")), key=judge)
    best = {n: max(min(one.loss[n] for one in front), 1e-300) for n in front[0].loss}
    return min(front, key=lambda one: sum(loss / best[n] for n, loss in one.loss.items())).plan


def _beats(a: Mapping[int, float], b: Mapping[int, float]) -> bool:
    """Whether a is nowhere worse and somewhere better."""
    return all(a[n] <= b[n] for n in b) and any(a[n] < b[n] for n in b)
