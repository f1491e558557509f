"""The pictures of ``unmix``: maps of shares, the spectra found, and what each channel counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mixtura.core.page import new_figure, save_figure

__all__ = ["draw", "draw_map"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#7f7f7f")
MAPS_A_ROW = 5


def draw_map(path: Path, values: np.ndarray) -> None:
    """Write a map of values from 0 to 1 as a picture of one pixel a pixel; what has no value is transparent."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    imsave(path, colormaps["gray"](np.ma.masked_invalid(values)), format="png")


def draw(path: Path, cube: Any, model: Any, maps: Any, spoiled: np.ndarray) -> None:
    """Write the overview.

    Args:
        path: .png, .svg or .pdf.
        cube: what was unmixed; its wavelengths label the channels.
        model: fitted unmixing.
        maps: shares (H, W, M) and guide (H, W), thinned.
        spoiled: channels that hardly count, (L,).
    """
    m = model.n_endmembers
    shown = [*np.moveaxis(maps.shares, -1, 0), maps.guide]
    titles = [*(f"material {i + 1}: {share:.0%}" for i, share in enumerate(maps.mean)), "how pure each pixel is"]
    across = min(len(shown), MAPS_A_ROW)
    lines = -(-len(shown) // across)
    tall = np.clip(maps.guide.shape[0] / maps.guide.shape[1], 0.4, 1.6)
    figure = new_figure(11.0, 10.5 / across * tall * lines + 3.4)
    upper, lower = figure.subfigures(2, 1, height_ratios=[10.5 / across * tall * lines, 3.4])
    grid = upper.subplots(lines, across, squeeze=False).ravel()
    for i, axes in enumerate(grid):
        if i >= len(shown):
            axes.axis("off")
            continue
        drawn = axes.imshow(shown[i], vmin=0, vmax=1, cmap="viridis" if i < m else "magma", interpolation="nearest")
        axes.set_title(titles[i], fontsize=9, color=COLOURS[i % len(COLOURS)] if i < m else "black")
        axes.set_xticks([])
        axes.set_yticks([])
        if i in (m - 1, m):
            upper.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02)
    left, right = lower.subplots(1, 2)
    known = cube.wavelengths is not None
    x = cube.wavelengths if known else np.arange(cube.shape[2])
    label = "wavelength, micrometres" if known and x.max() < 100 else "wavelength" if known else "channel"
    for i in range(m):
        # A spoiled channel's value is no property of the material: the line has a gap there.
        line = np.where(spoiled | model.blank_channels_, np.nan, model.endmembers_[i])
        left.plot(x, line, color=COLOURS[i % len(COLOURS)], lw=1.3, ls="-" if i < len(COLOURS) else "--")
    left.set_xlabel(label)
    left.set_title("spectra, in the units of the cube", fontsize=9)
    left.set_ylim(bottom=0)
    weight = model.channel_weight_
    for mask, colour, marker, name in (
        (~spoiled & ~model.blank_channels_, "#0072B2", ".", "good"),
        (spoiled, "#D55E00", "x", "spoiled"),
        (model.blank_channels_, "#7f7f7f", "s", "blank"),
    ):
        if mask.any():
            right.plot(x[mask], weight[mask], marker, color=colour, ms=5, label=f"{name}: {int(mask.sum())}")
    right.set_ylim(bottom=-0.03 * max(float(weight.max()), 1e-9))
    right.set_xlabel(label)
    right.set_title("weight of each channel", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
