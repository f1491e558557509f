"""Libraries of spectra, and scenes that are what they say they are."""

import importlib.util

import numpy as np
import pytest

from mixtura.data.spectra import library, made_up_library, synthesize_scene
from mixtura.data.texts import MissingData


def test_a_scene_without_noise_is_its_mixture_and_its_shares_sum_to_one():
    scene = synthesize_scene(made_up_library(), 4, (20, 30), snr_db=np.inf, seed=1)
    assert scene.cube.shape == (20, 30, 180) and scene.abundances.shape == (20, 30, 4)
    np.testing.assert_allclose(scene.cube, scene.abundances @ scene.endmembers, atol=1e-6)
    np.testing.assert_allclose(scene.abundances.sum(-1), 1, atol=1e-12)


def test_noise_has_the_power_that_is_asked_for_where_nothing_was_clipped():
    clean, noisy = (synthesize_scene(made_up_library(), 4, 60, snr_db=s, seed=2) for s in (np.inf, 30))
    error, signal = (noisy.cube - clean.cube).astype(float), clean.cube.astype(float)
    # 650,000 draws: the power is known to 0.01 dB; clipping at 0 takes a little.
    assert 10 * np.log10((signal**2).mean() / (error**2).mean()) == pytest.approx(30, abs=0.2)


def test_spoiled_channels_are_of_three_kinds_and_the_others_are_untouched():
    kwargs = {"snr_db": np.inf, "seed": 4}
    clean = synthesize_scene(made_up_library(), 3, 32, **kwargs)
    scene = synthesize_scene(made_up_library(), 3, 32, outlier_channels=9, **kwargs)
    assert scene.outliers.sum() == 9 and scene.blank.sum() == 3
    np.testing.assert_array_equal(scene.cube[..., ~scene.outliers], clean.cube[..., ~scene.outliers])
    assert (scene.cube[..., scene.blank] == 0).all()
    assert (np.abs(scene.cube - clean.cube)[..., scene.outliers].max((0, 1)) > 0.01).all()


def test_purity_bounds_the_largest_share_and_the_seed_decides():
    a, b, c = (synthesize_scene(made_up_library(), 3, 24, purity=0.7, seed=s) for s in (0, 0, 1))
    assert a.abundances.max() <= 0.7 + 1e-9 and a.abundances.max() > 0.69
    np.testing.assert_array_equal(a.cube, b.cube)
    assert np.abs(a.cube - c.cube).max() > 0.01


def test_some_regions_are_sharp_and_some_are_mixed():
    most = synthesize_scene(made_up_library(), 5, 40, seed=0).abundances.max(-1)
    assert (most > 0.95).mean() > 0.1 and (most < 0.5).mean() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 1}, "must be at least 2, got k=1"),
        ({"k": 3, "purity": 0.2}, "purity must be above 1/k = 0.333"),
        ({"k": 3, "outlier_channels": 180}, "outlier_channels must be from 0 to 179, got 180"),
        ({"k": 30}, "30 materials were asked for, and 24 made-up curves, seed 0 has 24 spectra"),
        ({"k": 3, "kinds": ["soil"]}, r"got \['soil'\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthesize_scene(made_up_library(), **arguments)


def test_a_usgs_folder_is_read_without_its_deleted_channels(tmp_path):
    def write(name, title, values):
        (tmp_path / name).write_text("\n".join([title, *(f" {v:.7E}" for v in values)]) + "\n")

    write("waves.txt", "splib07a Wavelengths ASD 0.35-2.5 microns", [0.4, 0.5, 0.6])
    write("bandpass.txt", "splib07a Bandpass (FWHM) ASD", [0.01, 0.01, 0.01])
    write("a.txt", "splib07a Record=1: Alunite GDS84", [0.2, -1.23e34, 0.4])
    write("b.txt", "splib07a Record=2: Kaolinite CM9", [0.1, 0.5, 0.3])
    (tmp_path / "readme.txt").write_text("about\nthese files\n")
    found = library(tmp_path)
    assert found.names == ("Alunite GDS84", "Kaolinite CM9") and found.kinds == ("Alunite", "Kaolinite")
    np.testing.assert_allclose(found.spectra, [[0.2, 0.4], [0.1, 0.3]])
    np.testing.assert_allclose(found.wavelengths, [0.4, 0.6])
    write("b.txt", "splib07a Record=2: Kaolinite CM9", [0.1, 0.5])
    with pytest.raises(ValueError, match=r"one spectrometer, got lengths \[2, 3\]"):
        library(tmp_path)


def test_a_folder_that_is_missing_says_so(tmp_path):
    with pytest.raises(MissingData, match="gone is no folder"):
        library(tmp_path / "gone")
    with pytest.raises(ValueError, match="holds 0 spectra and no wavelength file"):
        library(tmp_path)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingData, match=r"pip install 'mixtura\[spectra\]'"):
        library()


@pytest.mark.skipif(importlib.util.find_spec("earthlib") is None, reason="needs earthlib: pip install earthlib")
def test_the_measured_spectra_are_reflectances_and_simulated_ones_say_so():
    found = library()
    assert found.spectra.shape == (7261, 180) == (len(found.kinds), len(found.wavelengths))
    assert found.wavelengths[0] == 0.4 and found.wavelengths[-1] == pytest.approx(2.45)
    assert found.spectra.min() >= 0 and found.spectra.max() < 1.1
    assert found.kinds.count("canopy (simulated)") == 2000 and found.kinds.count("soil") == 4185
    assert found.spectra[:, 0].mean() < found.spectra[:, 80].mean()  # soils and leaves are darkest in the blue
