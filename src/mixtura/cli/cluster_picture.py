"""The picture of ``cluster``: samples and ellipses on the principal components, and the curve of the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.core.page import new_figure, save_figure

__all__ = ["COLOURS", "draw", "draw_plane"]

SHOWN = 4000  # samples drawn at most
# Okabe and Ito's colours, which people with any colour vision tell apart, then greys and darker ones.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#6A3D9A", "#7F7F7F", "#8B4513")


def draw(path: Path, X: np.ndarray, names: Sequence[str], model: Any, curve: Any, titles: Sequence[str]) -> None:
    """Write the picture.

    Args:
        path: .png, .svg or .pdf.
        X: samples, shape (N, F); gaps are drawn at the mean.
        names: of the features.
        model: fitted clustering with ``labels_``, ``means_``, ``weights_`` and ``gaussians_``.
        curve: :class:`mixtura.density.selection.Selection`, or None.
        titles: name of each cluster.
    """
    figure = new_figure(11.0 if curve is not None else 7.0, 5.0)
    panels = figure.subplots(
        1, 2 if curve is not None else 1, width_ratios=[1.7, 1] if curve is not None else [1], squeeze=False
    )
    if X.shape[1] == 1:
        _draw_line(panels[0, 0], X[:, 0], names[0], model, titles)
    else:
        draw_plane(panels[0, 0], X, model, titles)
    if curve is not None:
        _draw_curve(panels[0, 1], curve)
    save_figure(figure, path)


def draw_plane(axes: Any, X: np.ndarray, model: Any, titles: Sequence[str], *, units: bool = False) -> None:
    """Samples and ellipses on the two principal components; arguments as :func:`draw`'s.

    With ``units`` the columns keep theirs: coordinates that are principal components already would else all look alike.
    """
    from matplotlib.patches import Ellipse

    mean_F, spread_F = np.nanmean(X, 0), np.nanstd(X, 0)
    spread_F = np.where((spread_F > 0) & (not units), spread_F, 1.0)
    z_NF = np.nan_to_num((X - mean_F) / spread_F)
    # Principal components of the standardised columns, so that units do not choose the view.
    values_F, vectors_FF = np.linalg.eigh(z_NF.T @ z_NF / len(z_NF))
    axes_F2 = vectors_FF[:, ::-1][:, :2]
    shares = values_F[::-1][:2] / values_F.sum()
    shown = np.random.default_rng(0).permutation(len(X))[:SHOWN]
    plane_N2 = z_NF[shown] @ axes_F2
    labels_N = model.labels_[shown]
    size = float(np.clip(4000 / len(shown), 2, 22))
    sigma_CFF = model.gaussians_.full_covariances().numpy() / spread_F[:, None] / spread_F
    for c, title in enumerate(titles):
        colour, mine = COLOURS[c % len(COLOURS)], labels_N == c
        axes.scatter(*plane_N2[mine].T, s=size, color=colour, alpha=0.5, linewidths=0, rasterized=True)
        centre_2 = (model.means_[c] - mean_F) / spread_F @ axes_F2
        widths_2, turns_22 = np.linalg.eigh(axes_F2.T @ sigma_CFF[c] @ axes_F2)
        angle = float(np.degrees(np.arctan2(turns_22[1, 1], turns_22[0, 1])))
        for k, style in ((1.0, "-"), (2.0, "--")):
            width, height = 2 * k * np.sqrt(widths_2[::-1])
            axes.add_patch(Ellipse(centre_2, width, height, angle=angle, fill=False, color=colour, lw=1.6, ls=style))
        axes.annotate(
            title, centre_2, ha="center", va="center", fontsize=9, fontweight="bold",
            bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": colour, "alpha": 0.9},
        )  # fmt: skip
    axes.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second ({shares[1]:.0%})")
    axes.set_title(f"{len(titles)} clusters; ellipses at one and two standard deviations", fontsize=10)
    axes.set_aspect("equal", adjustable="datalim")


def _draw_line(axes: Any, x_N: np.ndarray, name: str, model: Any, titles: Sequence[str]) -> None:
    x_N = x_N[np.isfinite(x_N)]
    axes.hist(x_N, bins=min(60, max(10, int(len(x_N) ** 0.5))), density=True, color="#d9d9de")
    grid = np.linspace(x_N.min(), x_N.max(), 400)
    variances = model.gaussians_.full_covariances().numpy()[:, 0, 0]
    total = np.zeros_like(grid)
    for c, title in enumerate(titles):
        part = np.exp(-0.5 * (grid - model.means_[c, 0]) ** 2 / variances[c]) / np.sqrt(2 * np.pi * variances[c])
        part = part * model.weights_[c]
        total += part
        axes.plot(grid, part, color=COLOURS[c % len(COLOURS)], label=title)
    axes.plot(grid, total, color="black", lw=1, label="mixture")
    axes.set_xlabel(name)
    axes.set_ylabel("density")
    axes.set_title(f"{len(titles)} clusters", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def _draw_curve(axes: Any, curve: Any) -> None:
    shown = {"bic": "BIC", "icl": "ICL", "aic": "AIC"}
    for (key, title), style in zip(shown.items(), ("-", "--", ":"), strict=True):
        decides = key == curve.criterion
        values = getattr(curve, key)
        axes.plot(
            curve.n_components, values, style, marker="o", ms=4, color="black" if decides else "#9a9aa0",
            label=title + (", decides" if decides else ""), zorder=3 if decides else 2,
        )  # fmt: skip
    best = float(getattr(curve, curve.criterion).min())
    axes.scatter([curve.best], [best], s=110, facecolors="none", edgecolors="#D55E00", linewidths=2, zorder=4)
    axes.annotate(
        f"{curve.best}", (curve.best, best), textcoords="offset points", xytext=(0, -18), ha="center", color="#D55E00"
    )
    axes.set_xticks(curve.n_components)
    axes.set_xlabel("number of clusters")
    axes.set_ylabel("criterion (lower is better)")
    axes.set_title("how many clusters", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.margins(y=0.12)
