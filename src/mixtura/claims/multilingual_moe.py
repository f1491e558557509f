"""Claim of ``multilingual-moe``: experts in a multilingual, multitask encoder-decoder, and random selection within capacity.

Real text: package descriptions in twelve languages of very unequal size, translated from English and repaired. Families of
packages are held out whole, so that near copies do not leak.

- *Experts*: 16 of them in every second layer against the dense model of the same width, each at its best learning rate of the
  same three, with the same rows; and how many updates the mixture needs for the dense model's final loss.
- *Selection*: at capacity factor 1 with tokens laid out sequence-major, chosen at random against first come, first served.
- *Aggregation*: two branches of one ancestor, each with half of the languages at last, joined and trained on.
- *Pruning*: a quarter of the experts kept, by their use on one language against at random.
"""

import math
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mixtura.claims._multilingual_runs import (
    QUARTERS,
    SIZES,
    Data,
    Drops,
    Sizes,
    fit_model,
    load_data,
    nats,
    new_model,
    trained,
    tuned,
)
from mixtura.claims.framework import Check, Claim, Figures, Record, Scale
from mixtura.lm.aggregate_experts import aggregate
from mixtura.lm.model import MultitaskMoEForConditionalGeneration
from mixtura.lm.prune_experts import expert_usage, prune

__all__ = ["CLAIM", "SIZES", "Sizes"]

NEVER = (
    2.0  # updates, as a share of the dense model's, where the mixture does not get there: a record holds no infinity
)


def run(scale: Scale, seed: int, scratch: Path) -> Figures:
    """All four parts with one seed."""
    sizes = SIZES[scale]
    data = load_data(sizes, seed)
    dense, experts = (tuned(sizes, data, seed, n) for n in (0, sizes.experts))
    efficiency, model, random = _efficiency(sizes, data, seed, dense, experts)
    selection = _selection(sizes, data, seed, experts, model, random)
    joined = _aggregation(sizes, data, seed, experts, scratch, model)
    pruned = _pruning(sizes, data, seed, model)
    rates = {"dense": dense, "experts": experts}
    parts = (efficiency, selection, joined, pruned)
    figures = {name: value for part in parts for name, value in part.items() if name != "detail"}
    return {
        **figures,
        "detail": {"rates": rates, **{k: v for part in parts for k, v in part.get("detail", {}).items()}},
    }


# (a) Experts against dense.


def _efficiency(
    sizes: Sizes, data: Data, seed: int, dense: Mapping[str, Any], experts: Mapping[str, Any]
) -> tuple[dict[str, Any], MultitaskMoEForConditionalGeneration, list[Drops]]:
    plain, _ = trained(sizes, data, 0, sizes.steps, dense["lr"], seed)
    goal = nats(plain, data.test, sizes)[0]
    curve = {}
    for share in sizes.shares:
        model, _ = trained(sizes, data, sizes.experts, round(share * sizes.steps), experts["lr"], seed)
        curve[share] = nats(model, data.test, sizes)[0]
        if curve[share] <= goal:  # longer runs would say nothing more about the ratio
            break
    model, drops = trained(sizes, data, sizes.experts, sizes.steps, experts["lr"], seed)
    curve[1.0] = nats(model, data.test, sizes)[0]
    figures = {
        "loss_dense": goal,
        "loss_experts": curve[1.0],
        "gain": goal - curve[1.0],
        "updates_ratio": min(reached(curve, goal), NEVER),
        "detail": {"curve": {f"{share:g}": loss for share, loss in curve.items()}},
    }
    return figures, model, drops


def reached(curve: Mapping[float, float], goal: float) -> float:
    """Share of the updates at which a falling curve meets a loss, between its points; its first if it starts below, else inf.

    Example:
        >>> reached({0.5: 3.0, 1.0: 2.0}, 2.5)
        0.75
    """
    shares = sorted(curve)
    if curve[shares[0]] <= goal:
        return shares[0]
    for left, right in pairwise(shares):
        if curve[right] <= goal:
            return left + (right - left) * (curve[left] - goal) / (curve[left] - curve[right])
    return math.inf


# (b) Selection within capacity.


def _selection(
    sizes: Sizes, data: Data, seed: int, experts: Mapping[str, Any], random_model: Any, random_drops: list[Drops]
) -> dict[str, Any]:
    prefix_model, prefix_drops = trained(sizes, data, sizes.experts, sizes.steps, experts["lr"], seed, "prefix")
    tenths = {"random": random_drops, "prefix": prefix_drops}
    by_tenth = {name: [tenth.shares() for tenth in found] for name, found in tenths.items()}
    drops = {name: shares[-1] for name, shares in by_tenth.items()}
    losses = {
        name: {f"{factor:g}": nats(model, data.test, sizes, factor) for factor in (1.0, 2.0, 0.0)}
        for name, model in (("random", random_model), ("prefix", prefix_model))
    }
    mean = sum(drops["random"]) / QUARTERS
    last = {name: found["2"][1][-1] for name, found in losses.items()}
    return {
        "random_unevenness": max(abs(share - mean) for share in drops["random"]) / max(mean, 1e-9),
        "prefix_last_over_second": drops["prefix"][-1] / max(drops["prefix"][1], 1e-3),
        **{f"last_quarter_{name}": loss for name, loss in last.items()},
        "last_quarter_gain": last["prefix"] - last["random"],
        **{f"selection_loss_{name}": found["2"][0] for name, found in losses.items()},
        "detail": {
            "drops": drops,
            "drops_by_tenth": by_tenth,
            "selection": {
                name: {factor: {"whole": whole, "quarters": quarters} for factor, (whole, quarters) in found.items()}
                for name, found in losses.items()
            },
        },
    }


# (c) Aggregation of experts.


def _aggregation(
    sizes: Sizes, data: Data, seed: int, experts: Mapping[str, Any], scratch: Path, scratch_model: Any
) -> dict[str, Any]:
    lr, half = experts["lr"], sizes.experts // 2
    targets = [target for _, target in data.train.pairs]
    trunk = round(0.7 * sizes.related)
    begun = scratch / "ancestor"
    ancestor = new_model(sizes, data, half, seed, "random")
    fit_model(sizes, ancestor, data.train, sizes.related, lr, seed, out=begun, stop=trunk)
    branches = []
    for side in (0, 1):
        state = scratch / f"branch-{side}"
        shutil.copytree(begun, state, dirs_exist_ok=True)
        branch = new_model(sizes, data, half, seed, "random")
        fit_model(sizes, branch, data.train.only([*targets[side::2], "en"]), sizes.related, lr, seed, out=state)
        branches.append(branch)
    joined = aggregate(*branches)
    begin = nats(joined, data.test, sizes)[0]
    ends = {}
    for name, model in (("joined", joined), ("branch 0", branches[0]), ("branch 1", branches[1])):
        fit_model(sizes, model, data.train, sizes.continued, lr / 2, seed, first=sizes.related)
        ends[name] = nats(model, data.test, sizes)[0]
    return {
        "joined_at_start": begin,
        "joined": ends["joined"],
        "joined_below_branches": min(ends["branch 0"], ends["branch 1"]) - ends["joined"],
        "joined_below_scratch": nats(scratch_model, data.test, sizes)[0] - ends["joined"],
        "detail": {"joined": ends},
    }


# (d) Pruning by use.


def _pruning(sizes: Sizes, data: Data, seed: int, model: Any) -> dict[str, Any]:
    before = nats(model, data.language, sizes)[0]
    part = data.train.only([sizes.language])
    batches = [{name: t.to(sizes.device) for name, t in part.batch_at(step).items()} for step in range(8)]
    by_use = prune(model, expert_usage(model, batches), sizes.keep)
    draws = torch.Generator().manual_seed(seed)
    by_chance = [prune(model, None, sizes.keep, policy="random", generator=draws) for _ in range(3)]
    used = nats(by_use, data.language, sizes, 0.0)[0] - before
    chance = sum(nats(m, data.language, sizes, 0.0)[0] - before for m in by_chance) / len(by_chance)
    return {"pruned_by_use": used, "pruned_at_random": chance, "pruned_ratio": used / chance if chance else math.inf}


def plot(record: Record, figure: Any) -> None:
    """Loss by updates, tokens without a place by quarter, losses before and after joining, and what pruning costs."""
    figure.set_size_inches(13.0, 4.2)
    curve, drops, joined, pruned = figure.subplots(1, 4)
    rows = record["seeds"]
    for row in rows:
        points = {float(share): loss for share, loss in row["detail"]["curve"].items()}
        curve.plot(list(points), list(points.values()), ".-", color="tab:orange", alpha=0.6)
        curve.axhline(row["loss_dense"], color="tab:gray", alpha=0.6)
        for name, colour in (("random", "tab:orange"), ("prefix", "tab:gray")):
            drops.plot(range(1, QUARTERS + 1), row["detail"]["drops"][name], ".-", color=colour, alpha=0.6)
    curve.set_title("16 experts (dense: grey)", fontsize=10)
    curve.set_xlabel("share of the updates")
    curve.set_ylabel("nats a token")
    drops.set_title("random (first come: grey)", fontsize=10)
    drops.set_xlabel("quarter of the sequence")
    drops.set_ylabel("share of tokens without a place")
    ends = ("joined_at_start", "joined", "branch 0", "branch 1", "loss_experts")
    names = ("joined,\nat start", "joined", "branch\none", "branch\ntwo", "from\nscratch")
    for i, name in enumerate(ends):
        values = [{**row["detail"]["joined"], **row}[name] for row in rows]
        joined.bar(i, sum(values) / len(values), color="tab:orange" if name == "joined" else "tab:gray", alpha=0.6)
        joined.plot([i] * len(values), values, "k.")
    joined.set_xticks(range(len(ends)), names, fontsize=6)
    low = min({**row["detail"]["joined"], **row}[name] for row in rows for name in ends)
    joined.set_ylim(bottom=low - 0.15)  # bars of losses near 5 would all look alike
    joined.set_title("aggregation: nats a token", fontsize=10)
    for i, name in enumerate(("pruned_by_use", "pruned_at_random")):
        values = [row[name] for row in rows]
        pruned.bar(i, sum(values) / len(values), color="tab:orange" if i == 0 else "tab:gray", alpha=0.6)
        pruned.plot([i] * len(values), values, "k.")
    pruned.set_xticks(range(2), ["by use", "at random"])
    pruned.set_title("4 of 16 kept: nats lost", fontsize=10)


CLAIM = Claim(
    system="multilingual-moe",
    sentence=(
        "In one encoder-decoder for many languages and two tasks, experts reach a dense model's loss in fewer updates; and with "
        "limited capacity, tokens chosen at random are taught evenly, where first come, first served starves the late ones."
    ),
    paper=(
        "64 experts reach the loss of the dense 0.7B model in about a tenth of its updates (WMT-10); random token selection "
        "converges better than first come and than groups (its ablation figure); 10B parameters, 98 directions: BLEU 37.15 "
        "against 32.76 of the dense model."
    ),
    metric=(
        "Nats a token on held-out families of packages, translation and repair together; share of the dense model's updates; "
        "share of tokens without a place, by quarter of the sequence. Lower is better."
    ),
    baseline=(
        "The dense model of the same width, and for selection the same mixture with first come, first served: same rows, same "
        "updates; dense and experts each at the best of the same three learning rates, chosen on other held-out text."
    ),
    checks=(
        Check(figure="gain", at_least=0.03, why="nats a token that 16 experts are below dense"),
        Check(figure="gain", at_least=0.0, over="every", why="experts end below dense in every seed"),
        Check(
            figure="updates_ratio",
            at_most=0.85,
            why="updates of the experts for the dense model's final loss, over its own",
        ),
        Check(
            figure="random_unevenness",
            at_most=0.10,
            over="every",
            why="at random: farthest quarter's drop rate from the mean",
        ),
        Check(
            figure="prefix_last_over_second",
            at_least=5.0,
            over="every",
            why="first come: drop rate of the last quarter",
        ),
        Check(
            figure="last_quarter_gain",
            at_least=0.005,
            why="last quarter at capacity 2: nats that chance is below first come",
        ),
    ),
    run=run,
    plot=plot,
    limits=(
        "Fails on three checks: experts are 0.024 nats behind the dense model after 1,500 updates (0.025, 0.010 and "
        "0.037 by seed), where they should be 0.03 ahead, and so never reach its loss sooner. Both do best at a rate of "
        "0.006, chosen after 400 updates. With seed 10, which is not measured here, the same training at that rate had "
        "them 0.15 ahead (3.16 and 3.31), so seeds outside these three can differ by more than these three do. With 600 "
        "updates, at rates chosen after 120, they were 0.16 and 0.12 ahead and 0.09 behind, but where they led the dense "
        "model had been given twice its best rate: a part of that lead was the choice. What stands in the way is the "
        "size: about 2,000 tokens an update, of which an expert sees a sixteenth, less a tenth that finds no place; the "
        "paper's lead is at 0.7B parameters and 336B tokens. With twice the updates at the same rate, on a seed that is "
        "not measured here (11), they were 0.020 ahead (2.789 and 2.809). Selection decides who finds a place as it "
        "should, and helps the last quarter (0.015, 0.031 and 0.001). Rows of 64 tokens, far from converged and too "
        "short to translate well; losses only. The ratio counts updates: one of the mixture took 1.3 times the processor "
        "time of a dense one; 2 stands for never. Tokens without a place are counted in the last tenth of the training: "
        "earlier the gates send most tokens to few experts, and many find none, whoever chooses (drops_by_tenth). No bar "
        "on the loss of the whole text by selection, reported at capacity 1, 2 and without limit. Aggregation and "
        "pruning are reported and not judged: a branch has gone 400 steps and the joined model 80 more, while the one "
        "from scratch has gone 1,500, so it is far ahead of both."
    ),
)
