"""Spectra of materials, and hyperspectral scenes mixed from them whose truth is known.

Reflectance spectra measured in the field and the laboratory come with the package ``earthlib``; a folder of USGS splib07
ASCII files is read as well. Where neither is at hand, :func:`made_up_library` draws smooth curves, which are no materials.

Shapes: H rows, W columns, N = H W pixels, L channels, K materials.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtura.data.texts import MissingData

__all__ = ["Scene", "SpectralLibrary", "library", "made_up_library", "synthesize_scene"]

OUTLIERS = ("blank", "noise", "stripes")
USGS_DELETED = -1e30  # splib07 writes -1.23e34 where a channel was deleted
APART = 0.1  # radians: materials of a scene that are nearer differ less than their own samples do
DRAWS = 200


@dataclass(frozen=True)
class SpectralLibrary:
    """Reflectance spectra with their names.

    Attributes:
        spectra: shape (S, L), reflectance, mostly in [0, 1].
        wavelengths: shape (L,), micrometres.
        names: one a spectrum.
        kinds: the material of each spectrum, such as "soil".
        source: where they come from, for records.
    """

    spectra: np.ndarray
    wavelengths: np.ndarray
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Scene:
    """A synthetic cube and what it was made of.

    Attributes:
        cube: shape (H, W, L), float32, >= 0.
        endmembers: shape (K, L), true spectra; also in the outlier channels, where the cube does not show them.
        abundances: shape (H, W, K), true shares, sum 1.
        outliers: shape (L,), boolean: channels that were spoiled.
        blank: shape (L,), boolean: those of them that are zero throughout.
        names: of the materials.
        wavelengths: shape (L,), micrometres.
    """

    cube: np.ndarray
    endmembers: np.ndarray
    abundances: np.ndarray
    outliers: np.ndarray
    blank: np.ndarray
    names: tuple[str, ...]
    wavelengths: np.ndarray


def library(name: str | Path = "earthlib") -> SpectralLibrary:
    """A spectral library by name, or from a folder of USGS splib07 ASCII files.

    ``"earthlib"`` has 7261 spectra of 180 channels, 0.40 to 2.45 micrometres, of 26 kinds. Those of the kind "canopy" are
    simulated by a radiative transfer model; their kind reads "canopy (simulated)".

    Raises:
        MissingData: the package or the folder is not there.
        ValueError: the folder holds no spectrum, or spectra of different length.
    """
    return _earthlib() if str(name) == "earthlib" else _usgs(Path(name))


def made_up_library(n: int = 24, channels: int = 180, *, seed: int = 0) -> SpectralLibrary:
    """Smooth random curves with absorption dips, n of them, each a kind of its own: stand-ins, and no materials."""
    rng = np.random.default_rng(seed)
    waves_L = np.linspace(0.4, 2.45, channels)
    at_L = np.linspace(0, 1, channels)
    rows = []
    for _ in range(n):
        knots = rng.uniform(0.05, 0.8, 5)
        curve_L = np.interp(at_L, np.linspace(0, 1, 5), knots)
        width = channels // 8
        curve_L = np.convolve(np.pad(curve_L, width, mode="edge"), np.hanning(2 * width + 1) / width, "valid")
        for centre, spread, depth in zip(
            rng.uniform(0, 1, 4), rng.uniform(0.01, 0.08, 4), rng.uniform(0.1, 0.6, 4), strict=True
        ):
            curve_L = curve_L * (1 - depth * np.exp(-(((at_L - centre) / spread) ** 2)))
        rows.append(curve_L)
    names = tuple(f"curve {i}" for i in range(n))
    return SpectralLibrary(np.array(rows), waves_L, names, names, f"{n} made-up curves, seed {seed}")


def synthesize_scene(
    source: SpectralLibrary,
    k: int,
    size: int | tuple[int, int] = 40,
    *,
    snr_db: float = 20.0,
    outlier_channels: int = 0,
    purity: float = 1.0,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
) -> Scene:
    """A cube of linear mixtures, whose abundances are smooth fields, sharp in some regions and blurred in others.

    The k materials are of different kinds where the library has that many, and at least 0.1 radians apart. White noise is
    added to all channels, negative values become 0, and then channels are spoiled in turn: one blank, one of uniform noise up
    to the largest value, one with stripes along the columns that are as strong as the signal.

    Args:
        source: spectra to draw from.
        k: materials, at least 2.
        size: side of the scene in pixels, or (rows, columns).
        snr_db: mean power of the signal over that of the noise, decibels; infinity for none.
        outlier_channels: how many channels are spoiled, drawn by the seed.
        purity: largest abundance, in (1/k, 1]; below 1 no pixel is pure.
        kinds: kinds to draw from; all where None.
        seed: of everything.
    Raises:
        ValueError: an argument out of its range, or no k spectra that far apart in 200 draws.
    """
    from scipy.ndimage import gaussian_filter

    rows, columns = (size, size) if isinstance(size, int) else size
    channels = source.spectra.shape[1]
    if k < 2 or min(rows, columns) < 2:
        raise ValueError(f"k and both sides of size must be at least 2, got k={k}, size={rows} x {columns}")
    if not 1 / k < purity <= 1:
        raise ValueError(f"purity must be above 1/k = {1 / k:.3g} and at most 1, got {purity}")
    if not 0 <= outlier_channels < channels:
        raise ValueError(f"outlier_channels must be from 0 to {channels - 1}, got {outlier_channels}")
    rng = np.random.default_rng(seed)
    chosen = _draw_materials(source, k, kinds, rng)
    spectra_KL = source.spectra[chosen].clip(0)

    def field(width: float) -> np.ndarray:
        drawn = gaussian_filter(rng.normal(size=(rows, columns)), width, mode="wrap")
        return (drawn - drawn.mean()) / drawn.std()

    width = max(rows, columns) / 12
    height_KHW = np.stack([field(width) for _ in range(k)])
    sharpness_HW = 1.0 + 1.2 * field(1.5 * width)  # of log inverse temperature
    logits = height_KHW * np.exp(sharpness_HW.clip(-1.5, 3.0))
    shares = np.exp(logits - logits.max(0))
    shares /= shares.sum(0)
    kept = (purity * k - 1) / (k - 1)
    shares_HWK = np.moveaxis(kept * shares + (1 - kept) / k, 0, -1)
    clean = shares_HWK @ spectra_KL
    noise = float(np.sqrt((clean**2).mean() / 10 ** (snr_db / 10)))
    cube = (clean + noise * rng.normal(size=clean.shape)).clip(0)
    spoiled = rng.permutation(channels)[:outlier_channels]
    top = float(cube.max())
    blank = np.zeros(channels, dtype=bool)
    for i, channel in enumerate(spoiled):
        kind = OUTLIERS[i % len(OUTLIERS)]
        if kind == "blank":
            cube[:, :, channel], blank[channel] = 0.0, True
        elif kind == "noise":
            cube[:, :, channel] = rng.uniform(0, top, (rows, columns))
        else:
            cube[:, :, channel] += top * rng.uniform(0.5, 1, columns) * (rng.random(columns) < 0.3)
    outliers = np.isin(np.arange(channels), spoiled)
    names = tuple(source.names[i] for i in chosen)
    return Scene(cube.astype(np.float32), spectra_KL, shares_HWK, outliers, blank, names, source.wavelengths)


def _draw_materials(
    source: SpectralLibrary, k: int, kinds: Sequence[str] | None, rng: np.random.Generator
) -> list[int]:
    """Positions of k spectra, of different kinds where there are that many, no two within ``APART``."""
    known = sorted(set(source.kinds))
    if kinds is not None and (unknown := sorted(set(kinds) - set(known))):
        raise ValueError(f"kinds must be among {known}, got {unknown}")
    wanted = known if kinds is None else sorted(set(kinds))
    of_kind = {kind: [i for i, mine in enumerate(source.kinds) if mine == kind] for kind in wanted}
    total = sum(map(len, of_kind.values()))
    if total < k:
        raise ValueError(f"{k} materials were asked for, and {source.source} has {total} spectra to draw from")
    for _ in range(DRAWS):
        if len(wanted) >= k:
            chosen = [int(rng.choice(of_kind[kind])) for kind in rng.choice(wanted, k, replace=False)]
        else:
            chosen = rng.choice(np.concatenate([of_kind[kind] for kind in wanted]), k, replace=False).tolist()
        x_KL = source.spectra[chosen]
        unit_KL = x_KL / np.linalg.norm(x_KL, axis=1, keepdims=True).clip(1e-12)
        angle_KK = np.arccos((unit_KL @ unit_KL.T).clip(-1, 1)) + 10 * np.eye(k)
        if angle_KK.min() >= APART:
            return [int(i) for i in chosen]
    raise ValueError(f"no {k} spectra of {source.source} that lie {APART} radians apart were found in {DRAWS} draws")


def _earthlib() -> SpectralLibrary:
    # The package's own import wants a logger of its own; its two files are all that is read.
    found = importlib.util.find_spec("earthlib")
    if found is None or not found.submodule_search_locations:
        raise MissingData(
            "the measured spectra are in the package earthlib; install it with: pip install 'mixtura[spectra]', or name a "
            "folder of USGS splib07 ASCII files"
        )
    folder = Path(found.submodule_search_locations[0]) / "data"
    waves: list[float] = []
    with (folder / "spectra.csv").open(newline="", encoding="utf-8") as handle:
        table = list(csv.DictReader(handle))
    names = tuple(row["NAME"] for row in table)
    kinds = tuple(row["LEVEL_3"] + (" (simulated)" if row["LEVEL_4"] == "simulated" else "") for row in table)
    header = (folder / "spectra.sli.hdr").read_text(encoding="utf-8")
    for key, _, value in (line.partition("=") for line in header.splitlines()):
        if key.strip() == "wavelength":
            waves = [float(part) for part in value.strip(" {}").split(",") if part.strip()]
    values = np.fromfile(folder / "spectra.sli", "<f4").astype(np.float64)
    if not waves or len(values) != len(names) * len(waves):
        raise ValueError(
            f"{folder} must hold {len(names)} spectra of {len(waves)} channels, got {len(values)} values; install it again"
        )
    return SpectralLibrary(
        values.reshape(len(names), -1), np.array(waves), names, kinds, f"earthlib, {len(names)} spectra"
    )


def _usgs(folder: Path) -> SpectralLibrary:
    """A folder of splib07 ASCII files: a title line, then one value a line; the wavelengths are a file of their own."""
    if not folder.is_dir():
        raise MissingData(f"{folder} is no folder; name one of USGS splib07 ASCII files, or take 'earthlib'")
    spectra: dict[str, np.ndarray] = {}
    waves: np.ndarray | None = None
    for path in sorted(folder.rglob("*.txt")):
        lines = path.read_text(encoding="latin-1").splitlines()
        try:
            values = np.array([float(line) for line in lines[1:] if line.strip()])
        except ValueError:
            continue  # a readme among them
        title = lines[0].lower() if lines else ""
        if "wavelength" in title:
            waves = values
        elif "bandpass" not in title and "error" not in path.name.lower() and len(values) > 1:
            spectra[lines[0].partition(":")[2].strip() or path.stem] = values
    if not spectra or waves is None:
        raise ValueError(
            f"{folder} holds {len(spectra)} spectra and {'a' if waves is not None else 'no'} wavelength file"
        )
    lengths = {len(values) for values in spectra.values()} | {len(waves)}
    if len(lengths) != 1:
        raise ValueError(f"{folder} must hold spectra of one spectrometer, got lengths {sorted(lengths)}")
    matrix = np.array(list(spectra.values()))
    whole = (matrix > USGS_DELETED).all(0)
    names = tuple(spectra)
    kinds = tuple(name.split()[0] for name in names)
    return SpectralLibrary(matrix[:, whole].clip(0), waves[whole], names, kinds, f"{folder.name}, {len(names)} spectra")
