"""The picture of a gated regression: the experts' lines where they are in charge, and the gate's partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mixtura.core.page import new_figure, save_figure

__all__ = ["draw"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F")
SHOWN = 2000  # rows drawn at most
GRID = 200


def draw(path: Path, model: Any, X: np.ndarray, y: np.ndarray, names: list[str], target: str, band: float) -> None:
    """Write the picture.

    Args:
        path: .png, .svg or .pdf.
        model: fitted to all rows with a target.
        X, y: rows with a target, shapes (N, F) and (N,).
        names: of the features.
        target: name of the target.
        band: share that the band holds.
    """
    if len(y) > SHOWN:
        rows = np.linspace(0, len(y) - 1, SHOWN).astype(int)
        X, y = X[rows], y[rows]
    if X.shape[1] == 1:
        figure = new_figure(8.0, 6.0)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _lines(above, model, X, y, target, band)
        _weights(below, model, X, names[0])
    else:
        figure = new_figure(11.0, 5.0)
        left, right = figure.subplots(1, 2)
        _partition(left, model, X, y, names)
        _by_expert(right, model, X, y, target)
    save_figure(figure, path)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _lines(axes: Any, model: Any, X: np.ndarray, y: np.ndarray, target: str, band: float) -> None:
    grid = np.linspace(X.min(), X.max(), GRID * 2)[:, None]
    low, high = model.predict_quantile(grid, [(1 - band) / 2, (1 + band) / 2]).T
    axes.fill_between(grid[:, 0], low, high, color="0.5", alpha=0.15, linewidth=0, label=f"{band:.0%} band")
    expert_N = model.responsibilities(X, y).argmax(1)
    gate = model.predict_proba(grid)
    for i in range(model.n_experts):
        mine = expert_N == i
        axes.plot(X[mine, 0], y[mine], "o", color=_colour(i), markersize=3.2, alpha=0.55)
        line = grid[:, 0] * model.coef_[i, 0] + model.intercept_[i]
        # Thin all over, bold where the gate gives it more than a tenth.
        axes.plot(grid[:, 0], line, color=_colour(i), linewidth=0.7, alpha=0.5)
        axes.plot(
            grid[:, 0],
            np.where(gate[:, i] > 0.1, line, np.nan),
            color=_colour(i),
            linewidth=2.2,
            label=f"expert {i + 1}",
        )
    axes.plot(grid[:, 0], model.predict(grid), "--", color="black", linewidth=1.2, label="prediction (mean)")
    room = 0.15 * (np.ptp(y) or 1.0)
    axes.set(ylabel=target, ylim=(min(y.min(), low.min()) - room, max(y.max(), high.max()) + room))
    _finish(axes)


def _weights(axes: Any, model: Any, X: np.ndarray, name: str) -> None:
    grid = np.linspace(X.min(), X.max(), GRID * 2)[:, None]
    gate = model.predict_proba(grid)
    axes.stackplot(grid[:, 0], gate.T, colors=[_colour(i) for i in range(model.n_experts)], alpha=0.7, linewidth=0)
    axes.set(xlabel=name, ylabel="gate", ylim=(0, 1), xlim=(X.min(), X.max()))
    axes.spines[["top", "right"]].set_visible(False)


def _partition(axes: Any, model: Any, X: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    """Who is in charge over the two features that the gate looks at most, the others at their means."""
    size = (np.abs(model.gate_weights_ - model.gate_weights_.mean(0)) * X.std(0)).max(0)
    first, second = np.argsort(-size)[:2]
    sides = []
    for f in (first, second):
        margin = 0.05 * (np.ptp(X[:, f]) or 1.0)
        sides.append(np.linspace(X[:, f].min() - margin, X[:, f].max() + margin, GRID))
    across, up = np.meshgrid(*sides)
    inputs = np.tile(X.mean(0), (across.size, 1))
    inputs[:, first], inputs[:, second] = across.ravel(), up.ravel()
    winner = model.predict_proba(inputs).argmax(1).reshape(across.shape)
    expert_N = model.responsibilities(X, y).argmax(1)
    for i in range(model.n_experts):
        axes.contourf(across, up, (winner == i).astype(float), levels=[0.5, 1.5], colors=[_colour(i)], alpha=0.15)
        mine = expert_N == i
        axes.plot(
            X[mine, first], X[mine, second], "o", color=_colour(i), markersize=3.2, alpha=0.6, label=f"expert {i + 1}"
        )
    title = "dots: who explains the row; ground: who is in charge"
    title += ", other columns at their means" if X.shape[1] > 2 else ""
    axes.set(xlabel=names[first], ylabel=names[second])
    axes.set_title(title, fontsize=9)
    _finish(axes)


def _by_expert(axes: Any, model: Any, X: np.ndarray, y: np.ndarray, target: str) -> None:
    found = model.predict(X)
    expert_N = model.responsibilities(X, y).argmax(1)
    for i in range(model.n_experts):
        mine = expert_N == i
        lines = X[mine] @ model.coef_[i] + model.intercept_[i]
        axes.plot(lines, y[mine], "o", color=_colour(i), markersize=3.2, alpha=0.6)
    ends = [min(y.min(), found.min()), max(y.max(), found.max())]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.set(xlabel=f"{target}, the row's own line", ylabel=f"{target}, observed")
    axes.set_title("rows against the line of the expert that explains them", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
