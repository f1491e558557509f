"""Cubes from disk: what another program wrote comes back; what contradicts itself is named."""

import numpy as np
import pytest
from scipy.io import savemat

from mixtura.data.spectra import made_up_library, synthesize_scene
from mixtura.vision.unmixing import Cube, SpectralUnmixing, read_cube
from mixtura.vision.unmixing import cubes as module
from mixtura.vision.unmixing.whole_cube import learn_from, survey, unmix_blocks

envi = pytest.importorskip("spectral.io.envi", reason="needs spectral: pip install spectral")


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(1, 1000, (7, 5, 6)).astype(np.uint16)


def written(path, data, **options):
    """An ENVI pair by the package spectral."""
    envi.save_image(str(path), data, force=True, **options)
    return path


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("byteorder", [0, 1])
def test_what_another_program_wrote_comes_back_in_any_order(tmp_path, data, interleave, byteorder, monkeypatch):
    path = written(tmp_path / "c.hdr", data, interleave=interleave, byteorder=byteorder, ext="dat")
    cube = read_cube(path)
    np.testing.assert_array_equal(cube.data, data)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 5 * 6 * 3)
    rows, blocks, held = zip(*cube.blocks(), strict=True)
    assert [(r.start, r.stop) for r in rows] == [(0, 3), (3, 6), (6, 7)]
    np.testing.assert_array_equal(np.concatenate(blocks), data.reshape(-1, 6))
    assert np.concatenate(held).all() and blocks[0].dtype == np.float32
    np.testing.assert_array_equal(read_cube(tmp_path / "c.dat").data, data)


def test_the_header_tells_wavelengths_bad_bands_and_what_is_no_data(tmp_path, data):
    data[2, 3] = 0
    meta = {
        "wavelength": [str(v) for v in range(400, 1000, 100)],
        "wavelength units": "Nanometers",
        "bbl": ["1", "0", "1", "1", "1", "1"],
        "data ignore value": "0",
    }
    cube = read_cube(written(tmp_path / "c.hdr", data, metadata=meta))
    np.testing.assert_allclose(cube.wavelengths, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert np.flatnonzero(cube.bad_bands).tolist() == [1]
    ((_, _, held),) = cube.blocks()
    assert np.flatnonzero(~held).tolist() == [2 * 5 + 3]


def test_a_pixel_that_lacks_data_in_one_channel_is_broken_and_not_negative(scene):
    data = scene.cube.copy()
    data[3, 4, 7] = -9999
    data[5, 5] = -9999
    seen = survey(Cube(data, ignore=-9999.0), sample=10_000)
    assert (seen.pixels, seen.empty, seen.broken, seen.negative) == (48 * 40 - 2, 1, 1, 0)
    assert np.flatnonzero(seen.broken_channels).tolist() == [7]
    data[data == -9999] = 0  # what blank channels hold as well, so it breaks no pixel
    seen = survey(Cube(data, ignore=0.0), sample=10_000)
    assert (seen.pixels, seen.empty, seen.broken) == (48 * 40 - 1, 1, 0)


def test_a_header_in_latin_1_is_read(tmp_path, data):
    path = written(tmp_path / "c.hdr", data, metadata={"wavelength": [str(v) for v in range(6)]})
    text = path.read_text() + "sensor temperature = { 21.5 °C }\n"
    path.write_text(text, encoding="latin-1")
    cube = read_cube(path)
    np.testing.assert_array_equal(cube.data, data)
    assert cube.meta["sensor temperature"] == ["21.5 °C"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "lines = 7",
            "lines = 9",
            "9 lines x 5 samples x 6 bands of 2 bytes, 540 in all, and c.img has 420; the file was cut",
        ),
        ("lines = 7", "lines = 6", "360 in all, and c.img has 420; the header is of another file"),
        ("header offset = 0", "header offset = 8", "428 in all, and c.img has 420"),
        ("data type = 12", "data type = 6", "data type must be one of 1, 2, .* got '6'"),
        ("interleave = bip", "interleave = tile", "interleave must be bsq, bil or bip, got 'tile'"),
        ("bands = 6", "bands = many", "bands must be a whole number, got 'many'"),
        ("bands = 6", "bands = 0", "bands must be at least 1, got 0"),
        ("bands = 6\n", "\n", "has no entry 'bands'"),
        ("ENVI", "SPAM", "is no ENVI header"),
    ],
)
def test_a_header_that_lies_or_is_none_is_named(tmp_path, data, old, new, message):
    path = written(tmp_path / "c.hdr", data, interleave="bip")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_cube(path)


def test_files_that_are_missing_or_of_another_kind_are_named(tmp_path, data):
    path = written(tmp_path / "c.hdr", data)
    (tmp_path / "c.img").unlink()
    with pytest.raises(FileNotFoundError, match="has no raw file beside it"):
        read_cube(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.hdr does not exist"):
        read_cube(tmp_path / "gone.hdr")
    with pytest.raises(ValueError, match="is a directory"):
        read_cube(tmp_path)
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(ValueError, match="no ENVI header stands beside it"):
        read_cube(tmp_path / "note.txt")
    np.save(tmp_path / "flat.npy", np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"must be a cube \(rows, columns, channels\), got shape \(3, 4\)"):
        read_cube(tmp_path / "flat.npy")
    whole = (tmp_path / "flat.npy").read_bytes()
    (tmp_path / "flat.npy").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="was cut short"):
        read_cube(tmp_path / "flat.npy")
    with pytest.raises(ValueError, match="6 channels and 2 wavelengths"):
        Cube(data, wavelengths=np.ones(2))


def test_the_layouts_of_mat_files_in_use_are_read(tmp_path, data):
    matrix = data.transpose(2, 1, 0).reshape(6, -1)  # down the columns of the image, as MATLAB counts
    savemat(tmp_path / "jasper.mat", {"Y": matrix, "nRow": 7, "nCol": 5, "SlectBands": np.arange(6)})
    np.testing.assert_array_equal(read_cube(tmp_path / "jasper.mat").data, data)
    savemat(tmp_path / "samson.mat", {"V": matrix.T, "nRow": 7, "nCol": 5})
    np.testing.assert_array_equal(read_cube(tmp_path / "samson.mat").data, data)
    savemat(tmp_path / "own.mat", {"scene": data, "wavelengths": np.arange(6.0)})
    own = read_cube(tmp_path / "own.mat")
    np.testing.assert_array_equal(own.data, data)
    np.testing.assert_array_equal(own.wavelengths, np.arange(6))
    savemat(tmp_path / "two.mat", {"a": data, "b": data + 1})
    with pytest.raises(ValueError, match=r"it has a \(7, 5, 6\), b \(7, 5, 6\); name one with --variable"):
        read_cube(tmp_path / "two.mat")
    np.testing.assert_array_equal(read_cube(tmp_path / "two.mat", variable="b").data, data + 1)
    with pytest.raises(ValueError, match="has no variable 'c'"):
        read_cube(tmp_path / "two.mat", variable="c")
    savemat(tmp_path / "bare.mat", {"Y": matrix})
    with pytest.raises(ValueError, match="nRow and nCol, which shape it, are missing"):
        read_cube(tmp_path / "bare.mat")
    np.testing.assert_array_equal(read_cube(tmp_path / "bare.mat", rows=7).data, data)
    with pytest.raises(ValueError, match="8 rows x 4 columns are 32 pixels"):
        read_cube(tmp_path / "bare.mat", rows=8)
    (tmp_path / "no.mat").write_bytes(b"MATLAB" * 50)
    with pytest.raises(ValueError, match="is no MATLAB file, or a damaged one"):
        read_cube(tmp_path / "no.mat")


@pytest.fixture(scope="module")
def scene():
    return synthesize_scene(made_up_library(channels=60), 3, (48, 40), snr_db=30, outlier_channels=6, seed=3)


def test_a_survey_by_blocks_sees_what_the_whole_array_shows(scene, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 40 * 60 * 4 * 5)
    data = scene.cube.copy()
    data[3, 4, 7] = np.nan
    data[5, 5] = -1.0
    data[0, 0, 2] = -0.5
    seen = survey(Cube(data, ignore=-1.0), sample=10_000)
    assert (seen.pixels, seen.empty, seen.broken, seen.negative) == (48 * 40 - 2, 1, 1, 1)
    assert np.flatnonzero(seen.broken_channels).tolist() == [7]
    flat = data.reshape(-1, 60)
    kept = flat[np.isfinite(flat).all(1) & (flat != -1).any(1)].clip(0).astype(np.float64)
    np.testing.assert_allclose(seen.moment, kept.T @ kept / len(kept), rtol=1e-5)
    assert (seen.blank == scene.blank).all() and len(seen.sample) == seen.pixels


def test_spectra_learned_from_a_sample_are_near_those_of_the_whole_and_blocks_do_not_matter(scene, monkeypatch):
    cube = Cube(scene.cube)
    whole = SpectralUnmixing(3, max_iter=150).fit(scene.cube.reshape(-1, 60))
    monkeypatch.setattr(module, "BLOCK_BYTES", 40 * 60 * 4 * 7)
    seen = survey(cube, sample=600, seed=1)
    assert 450 < len(seen.sample) < 750  # binomial, deviation 20
    model = learn_from(cube, seen, SpectralUnmixing(3, max_iter=150))
    assert len(model.abundances_) == len(seen.sample) + 7 * 3  # three spanning pixels a block of seven rows
    from mixtura.vision.unmixing import sad

    assert sad(model.endmembers_, whole.endmembers_, bands=~scene.outliers) < 0.03
    got, guide = [], []
    unmix_blocks(cube, model, lambda rows, a, h: (got.append(a), guide.append(h)))
    np.testing.assert_allclose(
        np.concatenate(got).reshape(-1, 3), model.transform(scene.cube.reshape(-1, 60)), atol=1e-5
    )
    assert np.concatenate(guide).shape == (48, 40)


def test_pixels_without_data_and_with_nan_come_out_as_nan_and_dead_channels_as_blank(scene):
    data = scene.cube.copy()
    data[1, 1] = 0
    data[2, 2, 5] = np.nan
    dead = np.zeros(60, dtype=bool)
    dead[9] = True
    data[:, :, 9] = np.nan
    cube = Cube(data, dead=dead)
    seen = survey(cube, sample=10_000)
    model = learn_from(cube, seen, SpectralUnmixing(3, max_iter=20))
    assert model.blank_channels_[9] and seen.broken == 1
    got = []
    unmix_blocks(cube, model, lambda rows, a, h: got.append(a))
    lost = np.isnan(np.concatenate(got)).any(-1)
    assert np.argwhere(lost).tolist() == [[2, 2]]
    with pytest.raises(ValueError, match="has 59 channels, and the spectra have 60"):
        unmix_blocks(Cube(data[:, :, 1:]), model, lambda *_: None)
