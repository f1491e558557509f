"""``mixtura unmix``: a cube in; maps, spectra, weights, pictures and a report out; errors of one line."""

import csv
import sys

import numpy as np
import pytest
from test_cli import here  # noqa: F401 (a fixture)

from mixtura.data.spectra import made_up_library, synthesize_scene
from mixtura.vision.unmixing import abundance_rmse, match_endmembers

envi = pytest.importorskip("spectral.io.envi", reason="needs spectral: pip install spectral")


@pytest.fixture(scope="module")
def scene():
    return synthesize_scene(made_up_library(channels=90), 3, (30, 40), snr_db=30, outlier_channels=9, seed=3)


@pytest.fixture
def folder(tmp_path, scene):
    """An ENVI pair in counts, and the same as .npy in reflectance."""
    counts = np.rint(10_000 * scene.cube).clip(0, 65535).astype(np.uint16)
    waves = [f"{1000 * w:.1f}" for w in scene.wavelengths]
    meta = {"wavelength": waves, "wavelength units": "Nanometers", "bbl": ["0", *["1"] * 89]}
    envi.save_image(str(tmp_path / "cube.hdr"), counts, interleave="bil", metadata=meta)
    np.save(tmp_path / "cube.npy", scene.cube)
    return tmp_path


QUICK = ("--endmembers", 3, "--steps", 60)


def test_a_cube_becomes_maps_spectra_weights_pictures_and_a_report(here, folder, scene):  # noqa: F811
    done = here("unmix", "cube.hdr", *QUICK, "--out", "maps", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "30 x 40 pixels, 90 channels of uint16" in done.stdout and "maps is written" in done.stdout
    maps = folder / "maps"
    shares, guide = np.load(maps / "abundances.npy"), np.load(maps / "guidance.npy")
    assert shares.shape == (30, 40, 3) and guide.shape == (30, 40) and shares.dtype == np.float32
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    with (maps / "endmembers.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    spectra = np.array([[float(row[f"material_{i}"]) for row in rows] for i in (1, 2, 3)])
    assert float(rows[0]["wavelength"]) == pytest.approx(0.4)
    order = match_endmembers(spectra, scene.endmembers, bands=~scene.outliers)
    assert abundance_rmse(shares.reshape(-1, 3)[:, order], scene.abundances.reshape(-1, 3)) < 0.1
    good = ~scene.outliers
    assert spectra[order][:, good].mean() / scene.endmembers[:, good].mean() == pytest.approx(10_000, rel=0.1)
    with (maps / "channels.csv").open() as handle:
        channels = list(csv.DictReader(handle))
    assert [row["found"] == "blank" for row in channels] == scene.blank.tolist()
    assert [row["found"] != "good" for row in channels] == scene.outliers.tolist()
    assert [row["header"] for row in channels] == ["bad"] + ["good"] * 89
    report = (maps / "report.md").read_text()
    assert "Called bad by the header, kept: 0." in report and "learned from all pixels" in report
    for name in ("material-1", "material-2", "material-3", "guidance", "unmixed"):
        assert (maps / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "spoiled channels, which hardly count" in done.stdout


def test_maps_of_a_geotiff_lie_where_it_lies(here, folder, scene):  # noqa: F811
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio: pip install rasterio")
    where = {"crs": "EPSG:32632", "transform": rasterio.Affine(30, 0, 500_000, 0, -30, 5_000_000)}
    form = {"driver": "GTiff", "height": 30, "width": 40, "count": 90, "dtype": "float32", "nodata": -1}
    data = scene.cube.copy()
    data[2, 3] = -1
    with rasterio.open(folder / "valley.tif", "w", **form, **where) as target:
        target.write(np.moveaxis(data, -1, 0))
    done = here("unmix", "valley.tif", *QUICK, "--out", "maps", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "1 pixels hold no data (value -1)" in done.stdout
    for name in ("abundances", "guidance"):
        values = np.load(folder / "maps" / f"{name}.npy").reshape(30, 40, -1)
        with rasterio.open(folder / "maps" / f"{name}.tif") as found:
            np.testing.assert_array_equal(np.moveaxis(found.read(), 0, -1), values)
            assert found.transform == where["transform"] and found.crs.to_epsg() == 32632
            assert found.descriptions == (
                ("guidance",) if name == "guidance" else tuple(f"material {i}" for i in (1, 2, 3))
            )
        assert np.argwhere(np.isnan(values).any(-1)).tolist() == [[2, 3]]
    assert "abundances.tif, guidance.tif" in (folder / "maps" / "report.md").read_text()


def test_without_rasterio_a_geotiff_is_one_line_and_an_envi_cube_loses_its_place_aloud(here, folder, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "rasterio", None)
    (folder / "valley.tif").write_bytes(b"II*")
    done = here("unmix", "valley.tif", *QUICK, cwd=folder)
    assert done.returncode == 1 and "pip install 'mixtura[geotiff]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    header = folder / "cube.hdr"
    header.write_text(header.read_text() + "map info = {UTM, 1, 1, 500000, 5000000, 30, 30, 32, North, WGS-84}\n")
    done = here("unmix", "cube.hdr", *QUICK, "--steps", 2, "--out", "maps", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "map info) is not carried over: that needs rasterio" in done.stdout
    assert not (folder / "maps" / "abundances.tif").exists()


def test_a_batch_goes_on_past_a_bad_cube_and_says_which(here, folder):  # noqa: F811
    (folder / "cut.npy").write_bytes((folder / "cube.npy").read_bytes()[:-100])
    done = here("unmix", "cut.npy", "cube.npy", *QUICK, "--out", "all", cwd=folder)
    assert done.returncode == 1
    assert "cut.npy is no NumPy file of numbers, or was cut short" in done.stderr
    assert "1 of 2 cubes were not unmixed: cut.npy" in done.stderr
    assert [path.name for path in (folder / "all").iterdir()] == ["cube"]


def test_bad_pixels_and_channels_are_left_out_where_that_is_asked_for(here, folder, scene):  # noqa: F811
    data = scene.cube.copy()
    data[:, :, 20:23] = np.nan
    data[4, 5, 60] = np.inf
    data[6, 7, 1] = -0.1
    np.save(folder / "holes.npy", data)
    done = here("unmix", "holes.npy", *QUICK, cwd=folder)
    assert done.returncode == 1 and "3 channels are never finite (20-22); --skip-bad takes them as blank" in done.stderr
    done = here("unmix", "holes.npy", *QUICK, "--skip-bad", cwd=folder)
    assert "holes.npy: 1 value is negative, the least -0.1; --clip-negative takes them as 0" in done.stderr
    done = here("unmix", "holes.npy", *QUICK, "--skip-bad", "--clip-negative", cwd=folder)
    assert done.returncode == 0, done.stderr
    shares = np.load(folder / "holes-unmixed" / "abundances.npy")
    assert np.argwhere(np.isnan(shares).any(-1)).tolist() == [[4, 5]]


def test_a_run_that_fails_while_writing_leaves_what_stood_there(here, folder, monkeypatch):  # noqa: F811
    assert here("unmix", "cube.npy", *QUICK, "--out", "maps", cwd=folder).returncode == 0
    before = (folder / "maps" / "report.md").read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device", "unmixed.png")

    monkeypatch.setattr("mixtura.cli.unmix_picture.draw", full)
    done = here("unmix", "cube.npy", *QUICK, "--seed", 5, "--out", "maps", cwd=folder)
    assert done.returncode == 1
    assert (folder / "maps" / "report.md").read_text() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(here, folder):  # noqa: F811
    before = sorted(folder.iterdir())
    done = here("unmix", "cube.hdr", *QUICK, "--dry-run", cwd=folder)
    assert done.returncode == 0 and "would learn 3 spectra from 1,200 pixels" in done.stdout
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.hdr", "--endmembers", 3], "gone.hdr does not exist"),
        (["cube.hdr", "--endmembers", 1], "--endmembers must be at least 2, got 1"),
        (["cube.hdr", "--endmembers", 91], "--endmembers must be at most the number of channels, 90, got 91"),
        (["cube.hdr", "--endmembers", 3, "--sample", 10], "--sample must be at least 1000, got 10"),
        (["cube.hdr", "--endmembers", 3, "--lam", -1], "--lam must be at least 0, got -1"),
        (["cube.hdr", "--endmembers", 3, "--variable", "Y"], "variable and rows are of .mat files"),
        (["cube.hdr", "--endmembers", 3, "--out", "."], ". holds other files, which would be lost"),
        (["cube.hdr", "--endmembers", 3, "--out", "thesis"], "thesis holds other files, which would be lost"),
        (["cube.hdr", "cube.npy", "--endmembers", 3], "two cubes are named cube"),
        (["zero.npy", "--endmembers", 3], "zero.npy: all 90 channels are constant"),
        (["lies.hdr", "--endmembers", 3], "lies.hdr promises 31 lines x 40 samples x 90 bands"),
        (
            ["nan.npy", "--endmembers", 3],
            "nan.npy: 1 pixel is NaN or infinite, in channel 2; --skip-bad leaves them out",
        ),
    ],
)
def test_errors_are_one_line_that_names_the_cause(here, folder, scene, arguments, message):  # noqa: F811
    (folder / "thesis").mkdir()
    for name in ("report.md", "chapter.tex"):  # a report of one's own is no sign that the rest may go
        (folder / "thesis" / name).write_text("years of work")
    np.save(folder / "zero.npy", np.zeros((5, 5, 90)))
    (folder / "lies.hdr").write_text((folder / "cube.hdr").read_text().replace("lines = 30", "lines = 31"))
    (folder / "lies.img").write_bytes((folder / "cube.img").read_bytes())
    data = scene.cube[:5].copy()
    data[0, 0, 2] = np.nan
    np.save(folder / "nan.npy", data)
    done = here("unmix", *arguments, cwd=folder)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (folder / "thesis" / "chapter.tex").exists()
