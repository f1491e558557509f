"""A cube from disk, unmixed in memory that does not grow with it.

Three passes by blocks of rows: one looks (what is finite, which channels are blank, how channels vary together) and draws pixels
by chance; one adds to them the pixels of each block that span it, so that a rare pure pixel is not missed; spectra and channel
weights are learned from those; the last finds the shares of every pixel and hands them on, block by block.

Shapes: H rows, W columns, L channels, M endmembers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mixtura.core.progress import bar
from mixtura.vision.unmixing.cubes import Cube
from mixtura.vision.unmixing.robust_sparse import SpectralUnmixing
from mixtura.vision.unmixing.starts import vca, whitening

__all__ = ["Survey", "learn_from", "survey", "unmix_blocks"]

log = logging.getLogger(__name__)

PIXELS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Survey:
    """What one pass over a cube has seen.

    Attributes:
        pixels: that hold data and are finite.
        empty: pixels without data.
        broken: pixels with a value that is not finite.
        broken_channels: shape (L,), how many values of each channel are not finite.
        low, high: shape (L,), least and largest value of the finite ones.
        negative: values below 0.
        moment: mean of y y', shape (L, L), over the pixels counted, negative values as 0.
        sample: pixels drawn by chance, (n, L), float32.
    """

    pixels: int
    empty: int
    broken: int
    broken_channels: np.ndarray
    low: np.ndarray
    high: np.ndarray
    negative: int
    moment: np.ndarray
    sample: np.ndarray

    @property
    def blank(self) -> np.ndarray:
        """Channels that are 0 throughout, (L,)."""
        return (self.low == 0) & (self.high == 0)

    @property
    def constant(self) -> np.ndarray:
        """Channels with one value, which is not 0, (L,)."""
        return (self.low == self.high) & (self.high != 0)


def survey(cube: Cube, *, sample: int, seed: int = 0) -> Survey:
    """Look at every pixel once, and draw about ``sample`` of them, all where there are not more."""
    h, w, channels = cube.shape
    rng = np.random.default_rng(seed)
    chance = min(1.0, sample / (h * w))
    pixels = empty = broken = negative = 0
    broken_L = np.zeros(channels, dtype=np.int64)
    low_L, high_L = np.full(channels, np.inf), np.full(channels, -np.inf)
    moment_LL = np.zeros((channels, channels))
    drawn = []
    with bar(desc="looking", unit="row", total=h) as shown:
        for rows, y_PL, held_P in cube.blocks():
            empty += int((~held_P).sum())
            y_PL = y_PL if held_P.all() else y_PL[held_P]
            finite_PL = np.isfinite(y_PL)
            whole_P = finite_PL.all(1)
            if not whole_P.all():
                broken += int((~whole_P).sum())
                broken_L += (~finite_PL).sum(0)
                y_PL = y_PL[whole_P]
            if len(y_PL):
                low_L, high_L = np.minimum(low_L, y_PL.min(0)), np.maximum(high_L, y_PL.max(0))
                if low_L.min() < 0:
                    negative += int((y_PL < 0).sum())
                    y_PL = y_PL.clip(0)
                pixels += len(y_PL)
                moment_LL += y_PL.T @ y_PL
                drawn.append(y_PL if chance == 1.0 else y_PL[rng.random(len(y_PL)) < chance])
            shown.update(rows.stop - rows.start)
    kept = np.concatenate(drawn) if drawn else np.empty((0, channels), np.float32)
    moment_LL /= max(pixels, 1)
    return Survey(pixels, empty, broken, broken_L, low_L, high_L, negative, moment_LL, kept)


def learn_from(cube: Cube, seen: Survey, model: SpectralUnmixing) -> SpectralUnmixing:
    """Fit ``model`` to the pixels that were drawn and, where those are not all, to the ones that span each block."""
    if len(seen.sample) == seen.pixels:
        return model.fit(seen.sample)
    factors = whitening(seen.sample, moment=seen.moment)
    extreme = []
    with bar(desc="spanning pixels", unit="row", total=cube.shape[0]) as shown:
        for rows, y_PL, held_P in cube.blocks():
            y_PL = y_PL[held_P & np.isfinite(y_PL).all(1)].clip(0)
            if len(y_PL) > model.n_endmembers:
                extreme.append(y_PL[vca(y_PL, model.n_endmembers, seed=model.seed, factors=factors)])
            shown.update(rows.stop - rows.start)
    return model.fit(np.concatenate([seen.sample, *extreme]))


def unmix_blocks(cube: Cube, model: SpectralUnmixing, give: Callable[[slice, np.ndarray, np.ndarray], None]) -> None:
    """Find the shares of every pixel for the spectra of a fitted model.

    Args:
        give: called for each block of rows with their slice, abundances (rows, W, M) and guidance (rows, W), float32; NaN where a
            pixel has no data or is not finite.
    """
    _, w, channels = cube.shape
    m = model.n_endmembers
    if channels != len(model.channel_weight_):
        raise ValueError(f"{cube.name} has {channels} channels, and the spectra have {len(model.channel_weight_)}")
    with bar(desc="abundances", unit="row", total=cube.shape[0]) as shown:
        for rows, y_PL, held_P in cube.blocks():
            good = np.flatnonzero(held_P & np.isfinite(y_PL).all(1))
            shares = np.full((len(y_PL), m), np.nan, np.float32)
            guide = np.full(len(y_PL), np.nan, np.float32)
            for start in range(0, len(good), PIXELS_AT_ONCE):
                part = good[start : start + PIXELS_AT_ONCE]
                shares[part], guide[part] = model.abundances_and_guidance(y_PL[part])
            give(rows, shares.reshape(-1, w, m), guide.reshape(-1, w))
            shown.update(rows.stop - rows.start)
