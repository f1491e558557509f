"""Hyperspectral cubes from disk, without reading more of them than is asked for.

ENVI (a header beside a raw file of any interleave), GeoTIFF, MATLAB (.mat), NumPy (.npy). All but .mat files stay on disk and
are read by rows; a .mat file is read whole.

Shapes: H rows, W columns, L channels.
"""

from __future__ import annotations

import mmap
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.vision.unmixing.geotiff import Place, Raster, open_raster, place_of

__all__ = ["Cube", "read_cube"]

SUFFIXES = (".hdr", ".tif", ".tiff", ".mat", ".npy")
RAW_SUFFIXES = ("", ".img", ".dat", ".raw", ".bin", ".bsq", ".bil", ".bip", ".sli")
AXES = {
    "bsq": ("bands", "lines", "samples"),
    "bil": ("lines", "bands", "samples"),
    "bip": ("lines", "samples", "bands"),
}
DTYPES = {"1": "u1", "2": "i2", "3": "i4", "4": "f4", "5": "f8", "12": "u2", "13": "u4", "14": "i8", "15": "u8"}
MAT_NAMES = ("Y", "V", "cube", "data", "hypercube", "img", "image", "X")
MAT_ROWS, MAT_COLUMNS = ("nRow", "nrow", "Lines", "lines", "H"), ("nCol", "ncol", "Columns", "columns", "W")
BLOCK_BYTES = 32 << 20  # of float32: what is in memory at once
MOST_BLOCKS = 8  # times that, where a file keeps so many rows in one piece
MICROMETRES = {"nanometers": 1e-3, "nanometer": 1e-3, "nm": 1e-3, "angstroms": 1e-4}


@dataclass(frozen=True)
class Cube:
    """A cube on disk or in memory.

    Attributes:
        data: array, memory map or raster file of shape (H, W, L), in whatever type and order it has.
        wavelengths: shape (L,), micrometres where the file says the unit; None where it has none.
        bad_bands: shape (L,), boolean: channels that the file calls bad. They are flagged and kept.
        ignore: value that stands for "no data", or None.
        meta: the header, or the names in the file.
        name: of the file.
        dead: shape (L,), boolean: channels to hand out as 0, whatever they hold.
        place: where it lies on the earth, or None.
    """

    data: np.ndarray | Raster
    wavelengths: np.ndarray | None = None
    bad_bands: np.ndarray | None = None
    ignore: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    name: str = "cube"
    dead: np.ndarray | None = None
    place: Place | None = None

    def __post_init__(self) -> None:
        if self.data.ndim != 3 or 0 in self.data.shape:
            raise ValueError(f"{self.name} must be a cube (rows, columns, channels), got shape {self.data.shape}")
        if self.data.dtype.kind not in "iuf":
            raise ValueError(f"{self.name} must hold real numbers, got {self.data.dtype}")
        for what, values in (("wavelengths", self.wavelengths), ("bad_bands", self.bad_bands), ("dead", self.dead)):
            if values is not None and len(values) != self.data.shape[2]:
                raise ValueError(f"{self.name} has {self.data.shape[2]} channels and {len(values)} {what}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, L)."""
        h, w, channels = self.data.shape
        return h, w, channels

    def rows_a_block(self) -> int:
        """How many rows are read at once: about 32 MB of them as float32; whole pieces of the file where they are not huge."""
        _, w, channels = self.shape
        fit, together = max(1, BLOCK_BYTES // (4 * w * channels)), getattr(self.data, "rows_together", 1)
        if fit >= together:
            return fit // together * together
        return together if together <= MOST_BLOCKS * fit else fit

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Rows in turn: which ones, their pixels (P, L) in float32, and which of those hold data, (P,).

        A pixel without data has the ignored value in all of its channels. In some of them it is NaN, for a pixel that is known
        in part is of no use; but a 0 there, though "ignored", is what a blank channel reads.
        """
        h, _, channels = self.shape
        step = self.rows_a_block()
        for start in range(0, h, step):
            rows = slice(start, min(start + step, h))
            raw = np.asarray(self.data[rows]).reshape(-1, channels)
            held = _held(raw, self.ignore)
            y_PL = np.array(raw, dtype=np.float32, order="C")
            if self.ignore:
                y_PL[(raw == self.ignore) & held[:, None]] = np.nan
            if self.dead is not None:
                y_PL[:, self.dead] = 0
            yield rows, y_PL, held
            del raw, y_PL
            _forget(self.data)


def read_cube(path: str | Path, *, variable: str | None = None, rows: int | None = None) -> Cube:
    """A cube from an ENVI header, a GeoTIFF, a .mat or a .npy file.

    Args:
        path: the .hdr file of an ENVI pair or its raw file; .tif or .tiff; .mat; .npy.
        variable: name of the cube within a .mat file, where it is none of the usual ones (Y, V, cube, data, ...).
        rows: of the image, where a .mat file holds a matrix and does not say how it is shaped.
    Raises:
        FileNotFoundError: no such file, or a header without its raw file.
        ValueError: another kind of file; a header that contradicts the size of its file (both are named); a .mat file without a
            cube (its variables are listed).
        ImportError: the package ``spectral`` is missing, which reads ENVI headers, or ``rasterio``, which reads GeoTIFF.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the cube's file ({', '.join(SUFFIXES)})")
    suffix = path.suffix.lower()
    if (variable is not None or rows is not None) and suffix != ".mat":
        raise ValueError(f"variable and rows are of .mat files, and {path} is none; leave them out")
    if suffix == ".hdr":
        return _envi(path)
    if suffix in (".tif", ".tiff"):
        raster, waves, ignore, place, tags = open_raster(path)
        return Cube(raster, waves, ignore=ignore, meta=tags, name=path.name, place=place)
    if suffix == ".mat":
        return _mat(path, variable, rows)
    if suffix == ".npy":
        try:
            data = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no NumPy file of numbers, or was cut short ({error})") from error
        return Cube(data, name=path.name)
    header = next((h for h in (path.with_suffix(".hdr"), Path(f"{path}.hdr")) if h.exists()), None)
    if header is None:
        raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}, and no ENVI header stands beside it")
    return _envi(header)


def _held(raw_PL: np.ndarray, ignore: float | None) -> np.ndarray:
    """Which pixels hold data, (P,)."""
    if ignore is None:
        return np.ones(len(raw_PL), dtype=bool)
    return (~np.isnan(raw_PL) if np.isnan(ignore) else raw_PL != ignore).any(1)


def _forget(data: Any) -> None:
    """Give back the pages of a file that were read: else they count as ours until the system is short of memory."""
    while data is not None and not isinstance(data, mmap.mmap):
        data = getattr(data, "base", None)
    if data is not None and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


def _envi(path: Path) -> Cube:
    from spectral.io.envi import read_envi_header

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as spare:
        warnings.simplefilter("ignore")
        try:
            header = read_envi_header(str(_in_utf8(path, Path(spare))))
        except Exception as error:  # the package has its own kinds, and a parser's IndexError among them
            raise ValueError(
                f"{path} is no ENVI header ({' '.join(str(error).split()) or type(error).__name__})"
            ) from error
    header = {key.lower(): value for key, value in header.items()}
    sizes = {name: _whole(header, name, path) for name in ("lines", "samples", "bands")}
    offset = _whole(header, "header offset", path, least=0, default=0)
    interleave = str(header.get("interleave", "")).lower()
    if interleave not in AXES:
        raise ValueError(f"{path}: interleave must be bsq, bil or bip, got {interleave!r}")
    kind = str(header.get("data type", ""))
    if kind not in DTYPES:
        raise ValueError(f"{path}: data type must be one of {', '.join(DTYPES)} (real numbers), got {kind!r}")
    dtype = np.dtype((">" if str(header.get("byte order", "0")).strip() == "1" else "<") + DTYPES[kind])
    raw = _raw_file(path)
    shape = tuple(sizes[axis] for axis in AXES[interleave])
    want, got = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, raw.stat().st_size
    if got != want:
        raise ValueError(
            f"{path} promises {sizes['lines']} lines x {sizes['samples']} samples x {sizes['bands']} bands of "
            f"{dtype.itemsize} bytes, {want:,} in all, and {raw.name} has {got:,}; "
            + ("the file was cut short" if got < want else "the header is of another file or misses its offset")
        )
    found = np.memmap(raw, dtype, "r", offset, shape)
    data = found.transpose([AXES[interleave].index(axis) for axis in ("lines", "samples", "bands")])
    unit = str(header.get("wavelength units", "")).lower()
    waves = _numbers(header, "wavelength", path)
    bad = _numbers(header, "bbl", path)
    ignore = header.get("data ignore value")
    try:
        nothing = None if ignore is None else float(ignore)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: data ignore value must be a number, got {ignore!r}") from error
    return Cube(
        data,
        None if waves is None else waves * MICROMETRES.get(unit, 1.0),
        None if bad is None else bad == 0,
        nothing,
        header,
        path.name,
        place=place_of(raw) if "map info" in header else None,
    )


def _in_utf8(path: Path, spare: Path) -> Path:
    """A header in an encoding that the package reads: instruments write degrees and micrometres in Latin-1."""
    raw = path.read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        if b"\0" not in raw:
            (copy := spare / path.name).write_text(raw.decode("latin-1"), encoding="utf-8")
            return copy
    return path


def _raw_file(path: Path) -> Path:
    """The raw file of a header: the same name with another ending or none, or the name before .hdr."""
    stem = path.with_suffix("")
    tried = [stem.with_name(stem.name + suffix) for suffix in RAW_SUFFIXES]
    tried += [stem.with_name(stem.name + suffix.upper()) for suffix in RAW_SUFFIXES[1:]]
    for candidate in tried:
        if candidate.is_file() and candidate != path:
            return candidate
    raise FileNotFoundError(
        f"{path} has no raw file beside it: tried {stem.name} alone and with {', '.join(RAW_SUFFIXES[1:])}"
    )


def _whole(header: Mapping[str, Any], name: str, path: Path, *, least: int = 1, default: int | None = None) -> int:
    value = header.get(name, default)
    if value is None:
        raise ValueError(f"{path} has no entry {name!r}")
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {name} must be a whole number, got {value!r}") from error
    if number < least:
        raise ValueError(f"{path}: {name} must be at least {least}, got {number}")
    return number


def _numbers(header: Mapping[str, Any], name: str, path: Path) -> np.ndarray | None:
    values = header.get(name)
    if values is None:
        return None
    try:
        return np.array([float(value) for value in (values if isinstance(values, list) else [values])])
    except ValueError as error:
        raise ValueError(f"{path}: {name} must be numbers ({error})") from error


def _mat(path: Path, variable: str | None, given_rows: int | None) -> Cube:
    """The layouts in use: a cube (H, W, L), or Y or V of shape (L, H W) by columns, with nRow and nCol beside it."""
    from scipy.io import loadmat

    try:
        found = loadmat(path)
    except NotImplementedError as error:
        raise ValueError(f"{path} is a MATLAB 7.3 file (HDF5); save it with -v7, or as .npy") from error
    except Exception as error:  # scipy's reader fails in many ways on what is no such file
        raise ValueError(f"{path} is no MATLAB file, or a damaged one ({error})") from error
    arrays = {k: v for k, v in found.items() if not k.startswith("__") and isinstance(v, np.ndarray)}
    listed = ", ".join(f"{k} {v.shape}" for k, v in arrays.items()) or "nothing"
    if variable is not None and variable not in arrays:
        raise ValueError(f"{path} has no variable {variable!r}; it has {listed}")
    named = {k: v for k, v in arrays.items() if v.ndim in (2, 3) and min(v.shape) > 1 and v.dtype.kind in "iuf"}
    cubes = [k for k, v in named.items() if v.ndim == 3]
    chosen = variable or next((k for k in MAT_NAMES if k in named), cubes[0] if len(cubes) == 1 else None)
    if chosen is None:
        raise ValueError(
            f"{path} has none of the variables {', '.join(MAT_NAMES)}; it has {listed}; name one with --variable"
        )
    values = arrays[chosen]
    if values.ndim == 2:
        rows, columns = (_scalar(arrays, names) for names in (MAT_ROWS, MAT_COLUMNS))
        if given_rows is not None:
            rows, columns = given_rows, max(values.shape) // max(given_rows, 1)
        if rows is None or columns is None:
            raise ValueError(
                f"{path}: {chosen} is a matrix {values.shape}, and nRow and nCol, which shape it, are missing; say how many "
                "rows the image has with --rows"
            )
        if rows * columns not in values.shape:
            raise ValueError(
                f"{path}: {chosen} has shape {values.shape}, and {rows} rows x {columns} columns are {rows * columns} pixels"
            )
        flat = values if values.shape[1] == rows * columns else values.T
        values = flat.reshape(len(flat), columns, rows).transpose(2, 1, 0)  # MATLAB counts down the columns
    selected = next((arrays[k].ravel() for k in ("wavelengths", "wavelength", "wl") if k in arrays), None)
    waves = selected if selected is not None and len(selected) == values.shape[-1] else None
    return Cube(values, waves, meta={k: list(v.shape) for k, v in arrays.items()}, name=path.name)


def _scalar(arrays: Mapping[str, np.ndarray], names: tuple[str, ...]) -> int | None:
    value = next((arrays[name] for name in names if name in arrays and arrays[name].size == 1), None)
    return None if value is None else int(value.item())
