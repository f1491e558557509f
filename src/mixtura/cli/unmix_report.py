"""What ``unmix`` writes beside maps: tables of spectra and channels, and the report."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np

    from mixtura.vision.unmixing.cubes import Cube
    from mixtura.vision.unmixing.robust_sparse import SpectralUnmixing
    from mixtura.vision.unmixing.whole_cube import Survey

__all__ = ["Maps", "listed", "report_lines", "spoiled_channels", "write_tables"]

SPOILED = 0.25  # of the median weight: a channel below it is called spoiled


@dataclass(frozen=True)
class Maps:
    """What a picture needs: maps thinned to at most 1024 pixels a side, and sums over all pixels.

    Attributes:
        shares: (H', W', M). guide: (H', W').
        mean: mean share of each material, (M,). most: pixels of which it is more than half, (M,).
        unmixed: pixels that have shares.
    """

    shares: np.ndarray
    guide: np.ndarray
    mean: np.ndarray
    most: np.ndarray
    unmixed: int


def spoiled_channels(model: SpectralUnmixing) -> np.ndarray:
    """Channels whose weight is below a quarter of the median of those that are not blank, (L,)."""
    import numpy as np

    seen = ~model.blank_channels_
    return seen & (model.channel_weight_ < SPOILED * np.median(model.channel_weight_[seen]))


def listed(mask: np.ndarray) -> str:
    """Channels as ranges, counted from 0: ``3, 7-9``."""
    import numpy as np

    at = np.flatnonzero(mask)
    if not len(at):
        return "none"
    runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:12])
    text += f" and {sum(map(len, runs[12:]))} more" if len(runs) > 12 else ""
    return text


def write_tables(folder: Path, cube: Cube, model: SpectralUnmixing) -> None:
    """Write endmembers.csv and channels.csv."""
    waves = [""] * cube.shape[2] if cube.wavelengths is None else [f"{v:.6g}" for v in cube.wavelengths]
    names = [f"material_{i + 1}" for i in range(model.n_endmembers)]
    with (folder / "endmembers.csv").open("w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle)
        rows.writerow(["channel", "wavelength", *names])
        rows.writerows([i, wave, *(f"{v:.6g}" for v in model.endmembers_[:, i])] for i, wave in enumerate(waves))
    spoiled = spoiled_channels(model)
    with (folder / "channels.csv").open("w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle)
        rows.writerow(["channel", "wavelength", "weight", "found", "header"])
        for i, wave in enumerate(waves):
            found = "blank" if model.blank_channels_[i] else "spoiled" if spoiled[i] else "good"
            said = "" if cube.bad_bands is None else "bad" if cube.bad_bands[i] else "good"
            rows.writerow([i, wave, f"{model.channel_weight_[i]:.4g}", found, said])


def report_lines(
    path: Path, cube: Cube, seen: Survey, model: SpectralUnmixing, maps: Maps, seconds: float
) -> list[str]:
    """The report, in Markdown."""
    h, w, channels = cube.shape
    spoiled, of = spoiled_channels(model), model.strengths(channels)
    learned = "all pixels" if len(seen.sample) == seen.pixels else f"{len(model.abundances_):,} pixels"
    lines = [
        f"# {path.name}, unmixed",
        "",
        f"{h} x {w} pixels, {channels} channels; {model.n_endmembers} materials, learned from {learned} in {model.n_iter_} "
        f"iterations, {seconds:.1f} s.",
        "",
        "| material | mean share | pixels with more than half |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {i + 1} | {share:.1%} | {most:,} |"
        for i, (share, most) in enumerate(zip(maps.mean, maps.most, strict=True))
    ]
    lines += [
        "",
        f"- Pixels with shares: {maps.unmixed:,}; without data: {seen.empty:,}; left out as not finite: {seen.broken:,}.",
        f"- Blank channels: {listed(model.blank_channels_)}.",
        f"- Spoiled channels (weight below a quarter of the median): {listed(spoiled)}.",
    ]
    if cube.bad_bands is not None:
        lines.append(f"- Called bad by the header, kept: {listed(cube.bad_bands)}.")
    if seen.negative:
        lines.append(f"- Negative values taken as 0: {seen.negative:,}, the least {seen.low.min():.4g}.")
    lines += [
        f"- Sparsity lam {of.lam:.3g}, sum to one delta {of.delta:.3g}, guidance {model.guidance}, seed {model.seed}.",
        "",
        "| file | holds |",
        "|---|---|",
        "| abundances.npy | shares, (rows, columns, materials), float32, sum 1; NaN where a pixel was left out |",
        "| guidance.npy | how pure each pixel is, (rows, columns), 0 even to 0.9 pure |",
        *(["| abundances.tif, guidance.tif | the same as GeoTIFF, where the cube lies |"] if cube.place else []),
        "| endmembers.csv | spectra in the units of the cube, a row a channel |",
        "| channels.csv | weight of each channel, what was found, what the header says |",
        "| material-N.png, guidance.png | maps, white at 1 |",
        "| unmixed.png | maps, spectra and weights together |",
        "",
        "Materials have no names: compare endmembers.csv with a spectral library. Shares of spectra that are nearly alike are "
        "uncertain, and a material that covers no pixel nearly whole comes out mixed with its neighbours.",
        "",
        "Method: robust representation and learning-based sparsity (arXiv 1409.0685), mixtura system spectral-unmixing.",
    ]
    return lines
