"""What the claims of the two gates share: metrics of a fit, and a rate experiment told in figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.optimize import linear_sum_assignment

from mixtura.density.rates import Fits, RateResult, Truth
from mixtura.density.voronoi import MixingMeasure, cell_errors, voronoi_loss

__all__ = ["COLOURS", "cell_metric", "draw_errors", "each", "edges", "line_metric", "loss_metric", "matched", "told"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
Metric = Callable[[Fits, Truth], Sequence[float]]


def each(measure: Callable[[MixingMeasure, MixingMeasure], float]) -> Metric:
    """A metric of one fit as a metric of all."""
    return lambda fits, truth: [measure(fit, truth.measure) for fit in fits.measures()]


def matched(measure: Callable[[MixingMeasure, MixingMeasure], float]) -> Metric:
    """The same, where each fitted expert stands beside the true one that its line is: experts have no names.

    The fit has as many experts as the truth; the last true one is the reference of the gauge.
    """

    def all_of(fits: Fits, truth: Truth) -> list[float]:
        want = _lines(truth.measure)
        found = []
        for fit in fits.measures():
            away = np.abs(_lines(fit)[None] - want[:, None]).sum(-1)
            ordered = fit.pick(linear_sum_assignment(away)[1]).gauge(slopes=fits.rule.slopes_shift)
            found.append(measure(ordered, truth.measure))
        return found

    return all_of


def _lines(measure: MixingMeasure) -> np.ndarray:
    return np.column_stack([measure.coef, measure.intercept, measure.variance])


def line_metric(part: Literal["coef", "intercept", "variance"]) -> Metric:
    """Mean absolute error of the lines' parameters."""
    return matched(lambda fit, truth: float(np.abs(getattr(fit, part) - getattr(truth, part)).mean()))


def loss_metric(kind: Any, **options: Any) -> Metric:
    """A Voronoi loss."""
    return each(lambda fit, truth: voronoi_loss(fit, truth, kind, **options))


def cell_metric(part: Any, *, split: bool, slopes_shift: bool) -> Metric:
    """Error over atoms that share a cell, or that have one alone."""
    return each(lambda fit, truth: cell_errors(fit, truth, part, split=split, slopes_shift=slopes_shift))


def edges(fits: Fits, _: Truth) -> list[float]:
    """1 where a parameter ended at the edge of the box."""
    return [float(hit) for hit in fits.edge]


def told(name: str, result: RateResult) -> dict[str, Any]:
    """Slopes of means and medians with the ends of their intervals, and the errors at the last size."""
    figures: dict[str, Any] = {}
    for metric in result.values:
        if metric == "edge":
            figures[f"{name}_edge"] = float(np.mean(result.values[metric]))
            continue
        for by, suffix in (("mean", ""), ("median", "_median")):
            low, high = result.interval(metric, by)  # type: ignore[arg-type]
            key = f"{name}_{metric}{suffix}"
            figures |= {key: result.slope(metric, by), f"{key}_low": low, f"{key}_high": high}  # type: ignore[arg-type]
        figures[f"{name}_{metric}_first"] = result.summary(metric)[0]
        figures[f"{name}_{metric}_last"] = result.summary(metric)[-1]
    return figures


def draw_errors(
    axes: Any, results: Sequence[RateResult], metric: str, label: str, colour: str, style: str = "-"
) -> None:
    """Median error over sizes with the quarters of the replicates of all seeds as a band."""
    rows = np.concatenate([np.asarray(result.values[metric]) for result in results], axis=1)
    sizes = results[0].sizes
    low, middle, high = np.quantile(rows, [0.25, 0.5, 0.75], axis=1)
    axes.plot(sizes, middle, "o", linestyle=style, color=colour, markersize=3.5, linewidth=1.4, label=label)
    axes.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="sample size")
    # Less than a decade, or little more: powers of ten alone would leave an axis without numbers.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
