"""The picture of ``discover``: the classes on the principal components, and how their number moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mixtura.cli.cluster_picture import draw_plane
from mixtura.core.page import new_figure, save_figure

__all__ = ["draw"]


def draw(path: Path, Z: np.ndarray, model: Any, component: np.ndarray, titles: Sequence[str]) -> None:
    """Write the picture.

    Args:
        path: .png, .svg or .pdf.
        Z: reduced coordinates, shape (N, D).
        model: fitted discovery.
        component: number of each row's class, shape (N,).
        titles: names of the classes.
    """
    figure = new_figure(11.0, 5.0)
    plane, trace = figure.subplots(1, 2, width_ratios=[1.7, 1])
    if Z.shape[1] == 1:
        Z = np.column_stack([Z, np.zeros(len(Z))])
        plane.scatter(Z[:, 0], component, s=8, color="#0072B2")
        plane.set_yticks(range(len(titles)), list(titles))
        plane.set_xlabel("the one column")
    else:
        shown = SimpleNamespace(labels_=component, means_=model.means_, gaussians_=model.gaussians_)
        draw_plane(plane, Z, shown, titles, units=True)
    plane.set_title(f"{len(titles)} classes, {model.n_novel_} of them new", fontsize=10)
    _draw_trace(trace, model)
    save_figure(figure, path)


def _draw_trace(axes: Any, model: Any) -> None:
    """Number of clusters after every round, with the moves that were made."""
    rounds = np.arange(1, len(model.history_) + 1)
    axes.plot(rounds, [r.n_clusters for r in model.history_], color="black", marker="o", ms=4, label="classes")
    for kinds, colour, marker in ((("split", "shed"), "#D55E00", "^"), (("merge", "absorb"), "#0072B2", "v")):
        made = [sum(move.kind in kinds for move in r.moves) for r in model.history_]
        axes.plot(rounds, made, color=colour, marker=marker, ms=4, lw=1, label=" and ".join(kinds))
    axes.axhline(model.n_classes_ - model.n_novel_, color="gray", lw=0.8, ls="--", label="known classes")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round of the run that is kept")
    axes.set_ylabel("number")
    axes.set_title("how many classes", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
