"""The claim of gates with a learned temperature: what a linear gate cannot find, an activation's gate finds at n^-1/2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.claims._gate_rates import (
    COLOURS,
    cell_metric,
    draw_errors,
    each,
    edges,
    line_metric,
    loss_metric,
    matched,
    told,
)
from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.data.samples import sample
from mixtura.density.activations import activation_independence
from mixtura.density.gated_law import GateRule
from mixtura.density.gated_regression import GatedRegression
from mixtura.density.rates import RateResult, Truth, fit_near, rate_experiment, total_variation
from mixtura.density.voronoi import MixingMeasure

__all__ = ["CLAIM"]

TAU, BIAS = 0.6, 0.3
GATES = ("linear", "tanh", "sigmoid", "softplus", "silu", "gelu", "relu")
SLOPES = {"sigmoid": 4.0}  # others 3
PARTS = ("tau", "b1", "b0", "a", "b", "v", "D2")


@dataclass(frozen=True)
class Size:
    """How much a scale runs."""

    sizes: tuple[int, ...]
    replicates: int
    gates: tuple[str, ...]
    over_sizes: tuple[int, ...]
    over_replicates: int
    folds: int
    n_init: int = 5


SCALES: dict[Scale, Size] = {
    "smoke": Size((250, 1000), 4, ("linear", "tanh", "sigmoid", "relu"), (250, 500), 3, 2, 1),
    "cpu": Size((500, 2000, 8000, 32_000), 24, GATES, (1000, 4000, 16_000, 64_000), 8, 5),
    "gpu": Size((500, 4000, 32_000, 250_000, 1_000_000), 200, GATES, (1000, 8000, 64_000, 500_000), 64, 5),
}

LIMITS = (
    "One input, two experts, starts around the truth: the paper's own parameters were not at hand. What has no rate under the "
    "linear gate is slope, bias and temperature apart; their ratios and the experts do have n^-1/2, which the paper's table does "
    "not list. That a gate is slower than any polynomial cannot be shown at finite size; here its errors stay at those of the "
    "start. Activations other than tanh and sigmoid are reported without a bar on their slopes; of those that pass the paper's "
    "condition GELU is the least independent and errs most. With three experts for two there are 8 replicates. The mean error "
    "of b1 under tanh falls faster than the bar allows, and only because of the smallest size: at 500 pairs one "
    "maximum-likelihood slope in ten is three to ten times the truth, for tanh is flat there (starts at the truth end at the "
    "same place, and so does the best of four). By medians all slopes are inside (tanh_steepest_median)."
)


def truth(gate: str) -> Truth:
    """Two lines under a gate."""
    rule = GateRule("temperature") if gate == "linear" else GateRule("activation", gate)
    atoms = MixingMeasure.of(
        [math.exp(BIAS / TAU), 1.0], [[SLOPES.get(gate, 3.0)], [0.0]], TAU, [[2.0], [-1.5]], [1.0, -1.0], [0.25, 0.36]
    )
    return Truth(atoms, rule)


METRICS = {
    "tau": each(lambda fit, true: abs(fit.temperature - true.temperature)),
    "b1": matched(lambda fit, true: float(np.abs(fit.slope - true.slope).sum())),
    "b0": matched(lambda fit, true: float(abs(fit.temperature * np.log(fit.weight[0]) - BIAS))),
    "a": line_metric("coef"),
    "b": line_metric("intercept"),
    "v": line_metric("variance"),
    "ratio": matched(lambda fit, true: float(np.abs(fit.slope / fit.temperature - true.slope / TAU).sum())),
    "D2": loss_metric("exact"),
    "TV": total_variation,
    "edge": edges,
}
OVER = {
    **{
        f"split_{name}": cell_metric(part, split=True, slopes_shift=False)
        for name, part in (("b1", "slope"), ("a", "coef"), ("b", "intercept"), ("v", "variance"))
    },
    "single_a": cell_metric("coef", split=False, slopes_shift=False),
    "D4": loss_metric("over"),
    "TV": total_variation,
    "edge": edges,
}


def rank_agreement(gates: tuple[str, ...], errors: dict[str, float]) -> float:
    """Share of the pairs of gates, of clearly different independence, whose temperatures err in the opposite order."""
    known = {
        gate: activation_independence("identity" if gate == "linear" else gate, slopes=(SLOPES.get(gate, 3.0),))
        for gate in gates
    }
    pairs = [(a, b) for a in gates for b in gates if known[a] > 2 * known[b] and known[a] > 1e-8]
    return float(np.mean([errors[a] < errors[b] for a, b in pairs]))


def on_diabetes(folds: int, n_init: int, seed: int) -> dict[str, float]:
    """Held-out log density of gated regressions less that of one line, nats a patient."""
    found = sample("diabetes")
    models = {
        "line": GatedRegression(1),
        "softmax_2": GatedRegression(2, n_init=n_init, seed=seed),
        "softmax_3": GatedRegression(3, n_init=n_init, seed=seed),
        "tanh_2": GatedRegression(2, gate="activation", n_init=n_init, seed=seed),
    }
    held: dict[str, list[float]] = {name: [] for name in models}
    for part in np.array_split(np.random.default_rng(seed).permutation(len(found.y)), folds):
        train = np.setdiff1d(np.arange(len(found.y)), part)
        for name, model in models.items():
            model.fit(found.X[train], found.y[train])
            held[name].extend(model.score_samples(found.X[part], found.y[part]))
    return {f"diabetes_{name}": float(np.mean(held[name]) - np.mean(held["line"])) for name in models if name != "line"}


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed: both gates get the same starts, optimiser and budget."""
    size = SCALES[scale]
    figures: dict[str, Any] = {}
    detail: dict[str, Any] = {"exact": {}, "over": {}}
    for gate in size.gates:
        true = truth(gate)
        kept = scratch / gate
        result = rate_experiment(true, fit_near(true), size.sizes, size.replicates, METRICS, seed, folder=kept)
        figures |= told(gate, result)
        detail["exact"][gate] = result.to_json()
    for gate in ("linear", "tanh"):
        true = truth(gate)
        fit = fit_near(true, copies=(0,), n_starts=2)
        kept = scratch / f"over-{gate}"
        result = rate_experiment(true, fit, size.over_sizes, size.over_replicates, OVER, seed, folder=kept)
        figures |= told(f"over_{gate}", result)
        detail["over"][gate] = result.to_json()
    figures["linear_shallow_high"] = min(figures["linear_tau_high"], figures["linear_b1_high"])
    figures["linear_steepest"] = min(figures["linear_tau"], figures["linear_b1"])
    figures["tanh_shallowest"] = max(figures[f"tanh_{part}"] for part in PARTS)
    figures["tanh_steepest"] = min(figures[f"tanh_{part}"] for part in PARTS)
    figures["tanh_steepest_median"] = min(figures[f"tanh_{part}_median"] for part in PARTS)
    figures["tanh_shallowest_median"] = max(figures[f"tanh_{part}_median"] for part in PARTS)
    figures["tanh_worst_high"] = max(figures[f"tanh_{part}_high"] for part in PARTS)
    figures["sigmoid_shallowest"] = max(figures[f"sigmoid_{part}_median"] for part in PARTS)
    figures["tau_ratio"] = figures["tanh_tau_last"] / figures["linear_tau_last"]
    figures["rank_agreement"] = rank_agreement(size.gates, {g: figures[f"{g}_tau_last"] for g in size.gates})
    figures["over_TV"] = max(figures["over_linear_TV"], figures["over_tanh_TV"])
    figures["over_split"] = min(figures["over_tanh_split_v_median"], figures["over_tanh_split_b_median"])
    figures["over_single_a"] = figures["over_tanh_single_a_median"]
    return figures | on_diabetes(size.folds, size.n_init, seed) | {"detail": detail}


def plot(record: Record, figure: Any) -> None:
    """Errors of the temperature and of the density over sizes, and slopes of all parameters under two gates."""
    details = [row["detail"] for row in record["seeds"]]
    figure.set_size_inches(11.0, 4.2)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    for gate, colour in zip(details[0]["exact"], COLOURS, strict=False):
        results = [RateResult.from_json(detail["exact"][gate]) for detail in details]
        draw_errors(left, results, "tau", gate, colour)
        draw_errors(middle, results, "TV", gate, colour)
    left.set_title("error of the temperature, median", fontsize=9)
    middle.set_title("total variation of the density, median", fontsize=9)
    left.legend(frameon=False, fontsize=7, loc="lower left")
    names = {"tau": "τ", "b1": "b1", "b0": "b0", "ratio": "b1/τ", "a": "a", "b": "b", "v": "v", "TV": "TV"}
    for i, (gate, colour) in enumerate((("linear", COLOURS[0]), ("tanh", COLOURS[1]))):
        at = np.arange(len(names)) + (i - 0.5) * 0.3
        low = [min(row[f"{gate}_{key}_low"] for row in record["seeds"]) for key in names]
        high = [max(row[f"{gate}_{key}_high"] for row in record["seeds"]) for key in names]
        right.vlines(at, low, high, color=colour, linewidth=1.2)
        means = [np.mean([row[f"{gate}_{key}"] for row in record["seeds"]]) for key in names]
        right.plot(at, means, "o", color=colour, markersize=4, label=gate)
    right.axhline(-0.5, color="gray", linewidth=0.8, linestyle="--")
    right.axhline(0, color="gray", linewidth=0.8)
    right.set_xticks(range(len(names)), list(names.values()))
    right.set_title("slope of the mean error, 95 % intervals", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)


CLAIM = Claim(
    system="temperature-gate",
    sentence=(
        "With a linear gate, a learned temperature cannot be told from the gate's slopes, so neither is found at any polynomial "
        "rate although the density is; an activation before the temperature breaks the tie, and all parameters are found at "
        "n^-1/2."
    ),
    paper=(
        "Table 1: linear gate, density n^-1/2, slopes and temperature as slow as 1/log n; activation gate, n^-1/2 for all "
        "parameters where the number of experts is known (values of its simulations could not be checked)"
    ),
    metric="Slope of log mean error on log sample size over 24 replicates, with 95 % bootstrap intervals; -0.5 is n^-1/2.",
    baseline="The linear gate, from the same starts, with the same optimiser and budget.",
    checks=(
        Check(figure="linear_steepest", at_least=-0.25, why="linear gate, steeper of the slopes of temperature and b1"),
        Check(
            figure="linear_shallow_high", at_least=-0.2, why="linear gate, lower of the upper ends of their intervals"
        ),
        Check(figure="linear_TV", at_least=-0.62, why="linear gate, density"),
        Check(figure="linear_TV", at_most=-0.42, why="linear gate, density"),
        Check(figure="linear_ratio", at_most=-0.38, why="linear gate, b1 over temperature"),
        Check(figure="tanh_shallowest", at_most=-0.35, why="tanh gate, shallowest of tau, b1, b0, a, b, v and D2"),
        Check(figure="tanh_steepest", at_least=-0.70, why="tanh gate, steepest of them"),
        Check(figure="tanh_worst_high", at_most=-0.2, why="tanh gate, highest upper end of their intervals"),
        Check(figure="tau_ratio", at_most=0.25, why="error of the temperature at the last size, tanh over linear"),
        Check(figure="sigmoid_shallowest", at_most=-0.35, why="sigmoid gate, shallowest slope of a median"),
        Check(
            figure="rank_agreement", at_least=1.0, why="the more independent activation errs less in the temperature"
        ),
        Check(figure="over_TV", at_most=-0.40, why="three experts for two: density, both gates"),
        Check(
            figure="over_split", at_least=-0.35, why="three experts for two, tanh: v and b of the split expert are slow"
        ),
        Check(figure="over_single_a", at_most=-0.35, why="three experts for two, tanh: the whole expert is not"),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
)
