"""The picture of ``separate``: spectrograms of the mixture, of each stem and of the rest, on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.core.page import as_written, new_figure, save_figure
from mixtura.core.spectrum import band_positions

__all__ = ["draw"]

RANGE = 70.0  # decibels from the loudest place of the mixture down to black
TICKS = (100, 200, 500, 1000, 2000, 4000, 8000)


def draw(
    path: Path, sketches: Sequence[NDArray[np.float32]], titles: Sequence[str], found: Any, separator: Any
) -> None:
    """Write the picture.

    Args:
        path: .png, .svg or .pdf.
        sketches: mean power of the mixture, the stems and the rest, each of shape (bands, columns).
        titles: one each.
        found: the recording.
        separator: whose bands they are.
    """
    half = separator.sample_rate / 2
    hertz = band_positions(separator.bands).numpy() * half
    bands = int(np.searchsorted(hertz, min(half, found.rate / 2) * (1 + 1e-9)))
    top = 10 * np.log10(max(float(sketches[0].max()), 1e-20))
    figure = new_figure(10.0, 0.9 + 1.7 * len(sketches))
    axes = figure.subplots(len(sketches), 1, sharex=True, squeeze=False)[:, 0]
    minutes = found.seconds > 180
    length = found.seconds / 60 if minutes else found.seconds
    ticks = [hz for hz in TICKS if hz <= hertz[bands - 1]]
    for ax, sketch, title in zip(axes, sketches, titles, strict=True):
        decibels = 10 * np.log10(np.maximum(sketch[:bands], 1e-20)) - top
        image = ax.imshow(
            decibels,
            origin="lower",
            aspect="auto",
            extent=(0, length, -0.5, bands - 0.5),
            vmin=-RANGE,
            vmax=0,
            cmap="magma",
        )
        ax.set_yticks(np.interp(ticks, hertz, np.arange(separator.bands)), [f"{hz:,}" for hz in ticks], fontsize=7)
        ax.set_title(as_written(title), fontsize=9, loc="left")
    axes[-1].set_xlabel("minutes" if minutes else "seconds", fontsize=9)
    figure.supylabel("Hz", fontsize=9)
    figure.colorbar(image, ax=list(axes), label="dB below the loudest of the mixture", shrink=0.6)
    save_figure(figure, path)
