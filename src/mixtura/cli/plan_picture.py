"""The picture of ``plan``: memory of a device by form, time of a step by system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mixtura.core.page import new_figure, save_figure

if TYPE_CHECKING:
    from mixtura.lm.parallel.plan import Memory
    from mixtura.lm.parallel.simulate import SimReport

__all__ = ["draw"]

MEMORY = {"weights": "#0072B2", "gradients": "#56B4E9", "states": "#999999", "copies": "#E69F00", "buffer": "#CC79A7"}
TIME = {"attention": "#999999", "experts": "#0072B2", "exchange": "#D55E00", "copies": "#E69F00", "moves": "#000000"}


def draw(
    path: Path, needs: Mapping[str, Memory], times: Mapping[str, SimReport], memory: float, names: Mapping[str, str]
) -> None:
    """Write the picture.

    Args:
        path: .png, .svg or .pdf.
        needs: memory by form.
        times: reports by system; may be empty.
        memory: gigabytes of a device, drawn as a line.
        names: of the systems.
    """
    figure = new_figure(11.0, 4.2)
    axes = figure.subplots(1, 2) if times else [figure.subplots()]
    _bars(axes[0], {form: {k: v / 1e9 for k, v in need.parts.items()} for form, need in needs.items()}, MEMORY)
    most = max(need.device for need in needs.values()) / 1e9
    if memory < 2 * most:
        axes[0].axvline(memory, color="black", linestyle="--", linewidth=1)
    axes[0].set_xlabel(f"gigabytes of a device that has {memory:g}, without activations")
    if times:
        _bars(axes[1], {names[s]: {k: 1e3 * v for k, v in r.phases.items()} for s, r in times.items()}, TIME)
        axes[1].set_xlabel("modelled milliseconds of a step")
    save_figure(figure, path)


def _bars(axes, rows: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> None:  # type: ignore[no-untyped-def]
    labels = list(rows)
    left = [0.0] * len(labels)
    for part, colour in colours.items():
        values = [row.get(part, 0.0) for row in rows.values()]
        if any(values):
            axes.barh(range(len(labels)), values, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="lower right")
