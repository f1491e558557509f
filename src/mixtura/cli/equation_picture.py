"""The picture of ``solve-pde``: the solution, its error (or the equation's residual), and the spectrum that was learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixtura.core.page import new_figure, save_figure

if TYPE_CHECKING:
    from mixtura.cli.solve_pde import Found
    from mixtura.density.problem_file import FileProblem

__all__ = ["draw"]

OURS, TRUTH, ERROR = "#0072B2", "#E69F00", "#D55E00"
FINE = 4  # points drawn for each of the grid
FLOOR = 1e-17  # so that an exact zero has a logarithm


def draw(path: Path, problem: FileProblem, found: Found) -> None:
    """Write the picture.

    Args:
        path: .png, .svg or .pdf.
        problem: what was asked.
        found: the solution that was kept.
    """
    figure = new_figure(12.0, 3.8)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1.2, 1.0))
    drawn = _draw_line if len(problem.names) == 1 else _draw_plane
    drawn(figure, left, middle, problem, found)
    _draw_spectrum(right, problem, found)
    figure.suptitle(problem.title, fontsize=10)
    save_figure(figure, path)


def _draw_line(figure: Any, left: Any, middle: Any, problem: FileProblem, found: Found) -> None:
    grid, name = problem.grids[0], problem.names[0]
    fine = np.linspace(grid[0], grid[-1], FINE * (len(grid) - 1) + 1)
    left.plot(fine, found.model.predict(fine), color=OURS, linewidth=0.9, label="solution")
    if problem.truth is not None:
        left.plot(fine, problem.truth.on(fine), "--", color=TRUTH, linewidth=0.8, label="truth")
        left.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)
        middle.semilogy(
            fine, np.abs(found.model.predict(fine) - problem.truth.on(fine)) + FLOOR, color=ERROR, linewidth=0.8
        )
        middle.set_title("absolute error", fontsize=9)
    else:
        middle.semilogy(grid, np.abs(found.model.residual_) + FLOOR, color=ERROR, linewidth=0.8)
        middle.set_title("residual of the equation", fontsize=9)
    left.set(xlabel=name, ylabel="u")
    middle.set(xlabel=name)
    for axes in (left, middle):
        axes.spines[["top", "right"]].set_visible(False)


def _draw_plane(figure: Any, left: Any, middle: Any, problem: FileProblem, found: Found) -> None:
    """The first two axes, the others at their middle."""
    at: tuple[Any, ...] = (slice(None), slice(None), *(len(grid) // 2 for grid in problem.grids[2:]))
    x, y = problem.grids[:2]
    extent = (x[0], x[-1], y[0], y[-1])
    u = found.u[at]
    size = float(np.abs(u).max()) or 1.0
    off, title = found.model.residual_, "residual of the equation, log10"
    if found.truth is not None:
        off, title = found.u - found.truth, "absolute error, log10"
    shown = np.log10(np.abs(off[at]) + FLOOR)
    high = float(shown.max())
    images = (
        (left, u, "solution", {"cmap": "RdBu_r", "vmin": -size, "vmax": size}),
        (middle, shown, title, {"cmap": "magma", "vmin": max(float(shown.min()), high - 6), "vmax": high}),
    )
    for axes, values, name, options in images:
        image = axes.imshow(values.T, origin="lower", extent=extent, aspect="auto", **options)
        figure.colorbar(image, ax=axes, shrink=0.9)
        axes.set(xlabel=problem.names[0], ylabel=problem.names[1])
        axes.set_title(name, fontsize=9)


def _draw_spectrum(axes: Any, problem: FileProblem, found: Found) -> None:
    top, colours = 0.0, (OURS, ERROR, "#009E73")
    for i, (name, grid) in enumerate(zip(problem.names, problem.grids, strict=True)):
        limit = (len(grid) - 1) / (2 * (grid[-1] - grid[0]))
        frequencies = np.linspace(0, limit, 1500)
        density = found.model.spectrum(frequencies, i)
        top = max(top, float(density.max()))
        axes.semilogy(frequencies, density, color=colours[i % 3], linewidth=1.1, alpha=0.85, label=name)
    axes.set(ylim=(1e-8 * top, 4 * top), xlabel="cycles per unit of length")
    axes.set_title("spectrum learned", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if len(problem.names) > 1:
        axes.legend(frameon=False, fontsize=8)
