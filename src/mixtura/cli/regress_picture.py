"""The picture of ``regress``: the band over the one feature, or predicted against observed with error bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mixtura.core.page import new_figure, save_figure

__all__ = ["against_observed", "draw"]

OURS, PLAIN, OUTSIDE = "#0072B2", "#7F7F7F", "#D55E00"
SHOWN = 1500  # error bars drawn at most


def draw(path: Path, job: Any, target: str, held: dict[str, Any], models: dict[str, Any], band: float) -> None:
    """Write the picture.

    Args:
        path: .png, .svg or .pdf.
        job: the table, its features and target.
        target: name of the target.
        held: what each rival said of rows that it had not seen; the first is ours.
        models: each rival fitted to all rows with a target.
        band: share that the band holds.
    """
    if job.X.shape[1] == 1:
        figure = new_figure(8.0, 4.6)
        _over_x(figure.subplots(), job, target, models, band)
    else:
        figure = new_figure(6.2, 5.6)
        against_observed(figure.subplots(), job.y, target, next(iter(held.values())), band)
    save_figure(figure, path)


def _over_x(axes: Any, job: Any, target: str, models: dict[str, Any], band: float) -> None:
    x = job.X[:, 0]
    margin = 0.1 * (x.max() - x.min() or 1.0)
    grid = np.linspace(x.min() - margin, x.max() + margin, 400)
    ours, *others = models
    laws = {name: m[-1].predict_distribution(m[0].transform(grid[:, None])) for name, m in models.items()}
    low, high = laws[ours].interval(band)
    axes.fill_between(grid, low, high, color=OURS, alpha=0.18, linewidth=0, label=f"{band:.0%} band of {ours}")
    axes.plot(grid, laws[ours].location, color=OURS, linewidth=1.8, label="prediction")
    for name in others:
        for edge, label in zip(laws[name].interval(band), (f"{band:.0%} band of the {name}", None), strict=True):
            axes.plot(grid, edge, "--", color=PLAIN, linewidth=1, label=label)
    axes.plot(x, job.y, "o", color="black", markersize=3.5, alpha=0.7, label="rows")
    axes.set(xlabel=job.names[0], ylabel=target)
    _finish(axes)


def against_observed(axes: Any, y: np.ndarray, target: str, held: Any, band: float) -> None:
    """Predictions of rows that were not seen, over their targets, with error bars."""
    rows = np.flatnonzero(np.isfinite(y))
    if len(rows) > SHOWN:
        rows = rows[np.linspace(0, len(rows) - 1, SHOWN).astype(int)]
    inside = (held.low <= y) & (y <= held.high)
    for chosen, color, label in (
        (rows[inside[rows]], OURS, f"inside its {band:.0%} band"),
        (rows[~inside[rows]], OUTSIDE, "outside"),
    ):
        centre = held.location[chosen]
        bars = np.stack([centre - held.low[chosen], held.high[chosen] - centre])
        axes.errorbar(
            y[chosen],
            centre,
            bars,
            fmt="o",
            color=color,
            markersize=3,
            elinewidth=0.7,
            alpha=0.55,
            label=f"{len(chosen)} {label}",
        )
    ends = [y[rows].min(), y[rows].max()]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.set(xlabel=f"{target}, observed", ylabel=f"{target}, predicted without seeing it")
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
