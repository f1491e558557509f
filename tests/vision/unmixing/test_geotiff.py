"""GeoTIFF: values, wavelengths and places come back as another program wrote them; maps lie where the cube does."""

import sys

import numpy as np
import pytest

from mixtura.vision.unmixing import cubes as module
from mixtura.vision.unmixing import read_cube
from mixtura.vision.unmixing.geotiff import Place, write_maps
from mixtura.vision.unmixing.whole_cube import survey

try:
    import rasterio
    from rasterio.control import GroundControlPoint
    from rasterio.transform import from_origin
except ImportError:
    rasterio = None

# The tests' own files need no place, and rasterio's transforms warn of its own future.
pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform", "ignore:Use `@` matmul")
needs_rasterio = pytest.mark.skipif(rasterio is None, reason="needs rasterio: pip install rasterio")


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(1, 1000, (37, 20, 6)).astype(np.uint16)


def written(path, data, *, bands=(), **options):
    """A GeoTIFF by rasterio; ``bands`` are tags of each band."""
    h, w, channels = data.shape
    form = {"driver": "GTiff", "height": h, "width": w, "count": channels, "dtype": data.dtype}
    with rasterio.open(path, "w", **form, **options) as target:
        target.write(np.moveaxis(data, -1, 0))
        for i, tags in enumerate(bands):
            target.update_tags(i + 1, **tags)
    return path


@needs_rasterio
@pytest.mark.parametrize("interleave", ["band", "pixel"])
@pytest.mark.parametrize("tiles", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16}])
def test_what_another_program_wrote_comes_back_by_rows(tmp_path, data, interleave, tiles, monkeypatch):
    where = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_000_000, 30, 30)}
    bands = [{"wavelength": str(v), "wavelength_units": "Nanometers"} for v in range(400, 1000, 100)]
    path = written(tmp_path / "c.tif", data, bands=bands, interleave=interleave, compress="deflate", **tiles, **where)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 20 * 6 * 18)
    cube = read_cube(path)
    assert cube.shape == data.shape and cube.data.dtype == np.uint16
    rows, blocks, held = zip(*cube.blocks(), strict=True)
    if tiles:  # no tile is decoded twice, though 18 rows would fit
        assert [(r.start, r.stop) for r in rows] == [(0, 16), (16, 32), (32, 37)]
    np.testing.assert_array_equal(np.concatenate(blocks), data.reshape(-1, 6))
    assert np.concatenate(held).all()
    np.testing.assert_allclose(cube.wavelengths, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert cube.place.transform == (30, 0, 500_000, 0, -30, 5_000_000)
    assert rasterio.crs.CRS.from_wkt(cube.place.crs).to_epsg() == 32632


@needs_rasterio
def test_no_data_may_be_a_number_or_nan_and_a_place_may_be_missing(tmp_path, data):
    data[2, 3] = 0
    cube = read_cube(written(tmp_path / "zero.tiff", data, nodata=0))
    ((_, _, held),) = cube.blocks()
    assert np.flatnonzero(~held).tolist() == [2 * 20 + 3] and cube.place is None and cube.wavelengths is None
    floats = data.astype(np.float32)
    floats[4, 5] = np.nan
    floats[6, 7, 0] = np.nan  # a hole in one channel is no pixel without data
    seen = survey(read_cube(written(tmp_path / "nan.tif", floats, nodata=float("nan"))), sample=10_000)
    assert (seen.empty, seen.broken, seen.pixels) == (1, 1, 37 * 20 - 2)


@needs_rasterio
def test_control_points_come_through_and_maps_are_written_by_rows(tmp_path, data):
    points = [GroundControlPoint(r, c, 10 + 0.1 * c, 50 - 0.1 * r) for r, c in ((0, 0), (0, 19), (36, 0), (36, 19))]
    place = read_cube(written(tmp_path / "c.tif", data, crs="EPSG:4326", gcps=points)).place
    assert place.points == tuple((p.row, p.col, p.x, p.y, 0.0) for p in points)
    maps = np.random.default_rng(1).random((37, 20, 2)).astype(np.float32)
    maps[3, 4] = np.nan
    with write_maps(tmp_path / "maps.tif", (37, 20), ["soil", "road"], place) as target:
        for start in range(0, 37, 10):
            target.write(slice(start, min(start + 10, 37)), maps[start : start + 10])
    with rasterio.open(tmp_path / "maps.tif") as found:
        np.testing.assert_array_equal(np.moveaxis(found.read(), 0, -1), maps)
        assert found.descriptions == ("soil", "road") and np.isnan(found.nodata)
        assert [(p.row, p.col, p.x, p.y) for p in found.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
        assert found.gcps[1].to_epsg() == 4326


@needs_rasterio
def test_an_envi_cube_with_map_info_has_a_place(tmp_path, data):
    envi = pytest.importorskip("spectral.io.envi", reason="needs spectral: pip install spectral")
    meta = {"map info": ["UTM", "1", "1", "500000", "5000000", "30", "30", "32", "North", "WGS-84"]}
    envi.save_image(str(tmp_path / "c.hdr"), data, metadata=meta)
    cube = read_cube(tmp_path / "c.hdr")
    np.testing.assert_array_equal(cube.data, data)
    assert cube.place.transform == (30, 0, 500_000, 0, -30, 5_000_000)
    assert 'PARAMETER["central_meridian",9]' in cube.place.crs  # zone 32


@needs_rasterio
def test_files_that_are_none_damaged_or_stored_with_offsets_are_named(tmp_path, data):
    (tmp_path / "note.tif").write_text("no raster")
    with pytest.raises(ValueError, match=r"note\.tif is no GeoTIFF, or a damaged one"):
        read_cube(tmp_path / "note.tif")
    whole = written(tmp_path / "whole.tif", data).read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.tif"):
        list(read_cube(tmp_path / "cut.tif").blocks())
    with rasterio.open(written(tmp_path / "offset.tif", data), "r+") as target:
        target.offsets = [0, 0, 0, 5, 0, 0]
    with pytest.raises(
        ValueError, match=r"stores channels with offsets or different scales; .*gdal_translate -unscale"
    ):
        read_cube(tmp_path / "offset.tif")


def test_without_rasterio_an_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "c.tif").write_bytes(b"II*\0")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImportError, match=r"GeoTIFF needs the package rasterio; .* pip install 'mixtura\[geotiff\]'"):
        read_cube(tmp_path / "c.tif")
    place = Place(None, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0))
    with pytest.raises(ImportError, match="mixtura"), write_maps(tmp_path / "m.tif", (2, 2), ["a"], place):
        pass
