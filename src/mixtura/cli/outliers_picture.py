"""The pictures of ``outliers``: scores on either side of the threshold, and the images that look least known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.core.page import as_written, new_figure, save_figure

__all__ = ["draw_fit", "draw_scores"]

COLOURS = ("#0072B2", "#D55E00")
COLUMNS = 8


def draw_fit(
    path: Path,
    known: NDArray[np.float64],
    others: NDArray[np.float64],
    threshold: float,
    shares: Sequence[float],
    confidence: Sequence[float],
    n_classes: int,
) -> None:
    """Write the picture of a training: scores of what was set aside, and how confidence falls on the way to the outliers.

    Args:
        path: .png, .svg or .pdf.
        known, others: scores of known images and of outliers set aside; there may be no outliers.
        threshold: below it an image is rejected.
        shares, confidence: shares of known image in mixtures, and the mean confidence there.
        n_classes: K.
    """
    figure = new_figure(10.0, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_scores(left, {"known images set aside": known, "outliers set aside": others}, threshold)
    right.plot(shares, confidence, color=COLOURS[0], lw=2, marker="o", ms=3, label="mean confidence")
    right.plot(
        [0, 1], [1 / n_classes, 1], color="black", lw=1, ls="--", label="the known share, and the rest spread evenly"
    )
    right.set_xlabel("share of the known image in a mixture with an outlier")
    right.set_ylim(0, 1.02)
    right.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    right.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def draw_scores(
    path: Path,
    scores: Mapping[str, Sequence[float]],
    threshold: float,
    least: Sequence[tuple[float, Path, str, NDArray[np.uint8]]],
) -> None:
    """Write the picture of scored folders.

    Args:
        path: .png, .svg or .pdf.
        scores: of each folder, by its name.
        threshold: below it an image is rejected.
        least: (score, path, class, image (channels, side, side)) of the images that look least known, lowest first.
    """
    rows = -(-len(least) // COLUMNS)
    figure = new_figure(11.0, 3.2 + 1.35 * rows)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.0, 1.35 * rows))
    _draw_scores(top.subplots(), scores, threshold)
    bottom.suptitle("the images that look least like any class; red: would be rejected", fontsize=10)
    grid = bottom.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (value, file, name, image) in zip(grid, least, strict=False):
        axes.set_axis_on()
        axes.imshow(image[0] if len(image) == 1 else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        tone = "#D55E00" if value < threshold else "#6b6b70"
        for spine in axes.spines.values():
            spine.set_color(tone)
            spine.set_linewidth(1.6)
        title = as_written(f"{_short(file.name)}\n{_short(name)} {value:.2f}")
        axes.set_title(title, fontsize=6.5, color=tone, pad=2)
    save_figure(figure, path)


def _draw_scores(axes: Any, scores: Mapping[str, Any], threshold: float) -> None:
    filled = {name: np.asarray(values) for name, values in scores.items() if len(values)}
    low = min(min(values.min() for values in filled.values()), threshold)
    high = max(max(values.max() for values in filled.values()), threshold)
    edges = np.linspace(low, high if high > low else low + 1, 41)
    for (name, values), colour in zip(filled.items(), COLOURS, strict=False):
        # Shares, so that ten thousand outliers do not hide a hundred known images.
        weights = np.full(len(values), 1 / len(values))
        axes.hist(
            values, edges, weights=weights, color=colour, alpha=0.55, label=f"{as_written(name)} ({len(values):,})"
        )
    axes.axvline(threshold, color="black", lw=1, ls="--")
    axes.annotate(
        f" threshold {threshold:.3g}",
        (threshold, 1),
        xycoords=("data", "axes fraction"),
        va="top",
        ha="left",
        fontsize=8,
    )
    axes.set_xlabel("score: how much an image looks like the known classes")
    axes.set_ylabel("share of images")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _short(text: str, most: int = 16) -> str:
    return text if len(text) <= most else text[: most - 6] + "…" + text[-5:]
