"""GeoTIFF in and out: a cube that stays on disk, where it lies on the earth, and maps that lie there as well.

Shapes: H rows, W columns, L channels, M maps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["Place", "PlacedMaps", "Raster", "open_raster", "place_of", "write_maps"]

MISSING = "GeoTIFF needs the package rasterio; install it with: pip install 'mixtura[geotiff]'"
LEAST_CACHE = 64 << 20  # bytes
MICROMETRES = {"nanometers": 1e-3, "nanometer": 1e-3, "nm": 1e-3, "micrometers": 1.0, "um": 1.0, "µm": 1.0}


@dataclass(frozen=True)
class Place:
    """Where pixels lie.

    Attributes:
        crs: the coordinate system as WKT, or None where the file does not name one.
        transform: six numbers (a, b, c, d, e, f): x = a column + b row + c, y = d column + e row + f.
        points: ground control points (row, column, x, y, z) where there is no transform.
    """

    crs: str | None
    transform: tuple[float, float, float, float, float, float]
    points: tuple[tuple[float, float, float, float, float], ...] = ()


class Raster:
    """The values of a raster file as an array (H, W, L) of which rows are read when they are asked for.

    Attributes:
        shape, ndim, dtype: as of an array.
        rows_together: rows that the file keeps in one piece; reading fewer decodes them again.
    """

    ndim = 3

    def __init__(self, source: Any, name: str) -> None:
        self._source, self._name = source, name
        self.shape = (source.height, source.width, source.count)
        self.dtype = np.dtype(np.result_type(*source.dtypes))
        self.rows_together = max(rows for rows, _ in source.block_shapes)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows, (h, W, L)."""
        import rasterio
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        start, stop, _ = rows.indices(self.shape[0])
        # GDAL keeps what it decoded up to a twentieth of the memory; two pieces are all that rows in turn need.
        piece = self.rows_together * self.shape[1] * self.shape[2] * self.dtype.itemsize
        try:
            with rasterio.Env(GDAL_CACHEMAX=max(LEAST_CACHE, 2 * piece)):
                found = self._source.read(window=Window(0, start, self.shape[1], stop - start))
        except RasterioError as error:
            raise ValueError(f"{self._name}: rows {start} to {stop - 1} cannot be read; the file is damaged") from error
        return np.moveaxis(found, 0, -1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


class PlacedMaps(Protocol):
    """A file that takes maps by rows."""

    def write(self, rows: slice, values: np.ndarray) -> None:
        """Rows of all maps, shape (rows, W, M), float32; NaN where there is no value."""


def open_raster(path: Path) -> tuple[Raster, np.ndarray | None, float | None, Place | None, dict[str, Any]]:
    """Values, wavelengths (L,) in micrometres, the value for "no data", the place, and the file's tags.

    Raises:
        ImportError: rasterio is missing.
        ValueError: no raster file, a damaged one, or one whose channels have offsets or scales of their own.
    """
    rasterio = _rasterio()
    with _quiet():
        try:
            source = rasterio.open(path)
        except rasterio.errors.RasterioError as error:
            raise ValueError(f"{path} is no GeoTIFF, or a damaged one ({error})") from error
        if len({*zip(source.scales, source.offsets, strict=True)}) > 1 or any(source.offsets):
            raise ValueError(
                f"{path} stores channels with offsets or different scales; write what they stand for first, for example "
                "with: gdal_translate -unscale -ot Float32"
            )
        tags = dict(source.tags())
        return Raster(source, path.name), _wavelengths(source), source.nodata, _place(source), tags


def place_of(path: Path) -> Place | None:
    """The place of a file that another reader opens (ENVI's ``map info``); None where it has none or rasterio is missing."""
    try:
        rasterio = _rasterio()
        with _quiet(), rasterio.open(path) as source:
            return _place(source)
    except (ImportError, OSError):
        return None


@contextmanager
def write_maps(path: Path, shape: tuple[int, int], names: list[str], place: Place) -> Iterator[PlacedMaps]:
    """A GeoTIFF of len(names) maps in float32, compressed, to write by rows from the top.

    Args:
        path: the file.
        shape: (H, W).
        names: of the maps, which become the descriptions of the bands.
        place: where they lie.
    """
    rasterio = _rasterio()
    from rasterio.control import GroundControlPoint

    where: dict[str, Any] = {"crs": place.crs} if place.crs else {}
    if place.points:
        where["gcps"] = [GroundControlPoint(*point) for point in place.points]
    else:
        where["transform"] = rasterio.Affine(*place.transform)
    form = {"height": shape[0], "width": shape[1], "count": len(names), "dtype": "float32", "nodata": float("nan")}
    packed = {"compress": "deflate", "predictor": 3, "interleave": "band", "bigtiff": "if_safer"}
    with _quiet(), rasterio.open(path, "w", driver="GTiff", **form, **packed, **where) as target:
        for i, name in enumerate(names):
            target.set_band_description(i + 1, name)
        yield _Target(target)


class _Target:
    def __init__(self, target: Any) -> None:
        self._target = target

    def write(self, rows: slice, values: np.ndarray) -> None:
        from rasterio.windows import Window

        window = Window(0, rows.start, values.shape[1], rows.stop - rows.start)
        self._target.write(np.moveaxis(values, -1, 0).astype(np.float32), window=window)


def _rasterio() -> Any:
    try:
        import rasterio
        import rasterio.errors
    except ImportError as error:
        raise ImportError(MISSING) from error
    return rasterio


@contextmanager
def _quiet() -> Iterator[None]:
    """Without rasterio's warning that a file has no place: that is no fault here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _place(source: Any) -> Place | None:
    points, system = source.gcps
    if points:
        at = tuple((float(p.row), float(p.col), float(p.x), float(p.y), float(p.z or 0.0)) for p in points)
        return Place(system.to_wkt() if system else None, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), at)
    if source.crs is None and source.transform.is_identity:
        return None
    a, b, c, d, e, f = tuple(source.transform)[:6]
    return Place(source.crs.to_wkt() if source.crs else None, (a, b, c, d, e, f))


def _wavelengths(source: Any) -> np.ndarray | None:
    """What GDAL keeps of each band: ``CENTRAL_WAVELENGTH_UM``, or ENVI's wavelength and its unit."""
    found = []
    for band in range(1, source.count + 1):
        tags = {**source.tags(band), **source.tags(band, ns="IMAGERY")}
        value = tags.get("CENTRAL_WAVELENGTH_UM")
        unit = 1.0
        if value is None:
            value = tags.get("wavelength")
            unit = MICROMETRES.get(str(tags.get("wavelength_units", "")).lower(), 1.0)
        try:
            found.append(float(value or "none") * unit)
        except ValueError:
            return None
    return np.array(found)
