"""What is known before unmixing: pure pixels, noise, the number of materials, and the scores."""

import itertools

import numpy as np
import pytest

from mixtura.vision.unmixing.scores import abundance_rmse, match_endmembers, sad, spectral_angles
from mixtura.vision.unmixing.starts import (
    estimate_count,
    estimate_noise,
    starting_point,
    vca,
    vca_spectra,
    whitening,
)


def mixture(k: int = 4, pixels: int = 3000, channels: int = 40, noise: float = 0.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    spectra = rng.uniform(0.05, 1, (k, channels))
    shares = rng.dirichlet(np.ones(k), pixels)
    pure = rng.choice(pixels, k, replace=False)
    shares[pure] = np.eye(k)
    return shares @ spectra + noise * rng.normal(size=(pixels, channels)), spectra, pure


@pytest.mark.parametrize("seed", range(5))
def test_vca_finds_the_pure_pixels_where_there_are_some(seed: int):
    X, _, pure = mixture(seed=seed)
    assert sorted(vca(X, 4, seed=seed)) == sorted(pure)


def test_vca_in_much_noise_takes_the_other_projection_and_finds_spectra_near_the_true_ones():
    X, spectra, _ = mixture(noise=0.3, seed=3)
    angles = spectral_angles(X[vca(X, 4)], spectra)
    # 40 channels of noise of half the spread turn even a pure pixel by about 0.45.
    assert len(set(vca(X, 4))) == 4 and angles.min(0).mean() < 0.75


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_vca_spectra_are_its_pixels_within_the_signals_subspace_and_nearer_the_truth_for_it(noise: float):
    X, spectra, _ = mixture(noise=noise, seed=3)
    factors = np.random.default_rng(1).uniform(0.5, 2, 40)
    at = vca(X, 4, factors=factors)
    Y = X * factors
    # Much noise: axes of the spread around the mean, one fewer; else those of the power.
    centre, n = (Y.mean(0), 3) if noise == 0.3 else (np.zeros(40), 4)
    axes = np.linalg.svd(Y - centre, full_matrices=False)[2][:n]
    want = (centre + (Y[at] - centre) @ axes.T @ axes) / factors
    found = vca_spectra(X, 4, factors=factors)
    np.testing.assert_allclose(found, want, atol=1e-9)
    of_pixels, of_spectra = (spectral_angles(x, spectra).min(0).mean() for x in (X[at], found))
    assert of_spectra < 0.7 * of_pixels


def test_the_start_is_what_vca_takes_for_spectra_and_holds_no_zero_that_would_stay():
    X, _, _ = mixture(noise=0.1, seed=4)
    X = X.clip(0)
    X[:, 5] = 0.0
    factors = whitening(X)
    spectra, shares = starting_point(X, 4, "vca-whitened", seed=0)
    np.testing.assert_allclose(spectra, np.maximum(vca_spectra(X, 4, factors=factors), 0.01 * X.mean(0)), atol=1e-12)
    assert (spectra[:, np.arange(40) != 5] > 0).all() and (spectra[:, 5] == 0).all() and (shares > 0).all()


def test_brightness_of_a_pixel_does_not_make_it_pure():
    X, _, pure = mixture(seed=2)
    X = X * np.random.default_rng(0).uniform(0.3, 1.0, (len(X), 1))
    assert sorted(vca(X, 4)) == sorted(pure)


def test_noise_is_estimated_within_a_tenth_where_it_is_white_and_channel_by_channel_where_not():
    X, _, _ = mixture(noise=0.05, channels=60)
    # 3000 pixels, 60 channels: the deviation is known to about 1.3 %, and the regression takes 2 % of it.
    np.testing.assert_allclose(estimate_noise(X), 0.05, rtol=0.1)
    # What the others predict is itself noisy: a quiet channel among noisy ones seems up to a tenth louder.
    sigma = np.linspace(0.1, 0.2, 60)
    X = mixture(channels=60)[0] + sigma * np.random.default_rng(5).normal(size=(3000, 60))
    np.testing.assert_allclose(estimate_noise(X), sigma, rtol=0.15)


def test_whitening_neither_trusts_a_blank_channel_nor_a_noisy_one():
    X, _, _ = mixture(noise=0.05)
    X[:, 3] = 0.0
    X[:, 7] = np.random.default_rng(1).uniform(0, 1, len(X))
    factors = whitening(X)
    typical = np.median(factors)
    assert factors[3] == pytest.approx(typical, rel=0.1) and factors[7] < 0.3 * typical
    assert factors.max() <= 5.001 * typical


@pytest.mark.parametrize("k", [3, 6])
def test_the_number_of_materials_is_that_of_the_directions_above_the_noise(k: int):
    assert estimate_count(mixture(k, noise=0.01)[0]) == k


def test_k_out_of_its_range_is_named():
    with pytest.raises(ValueError, match="k must be between 2 and 40"):
        vca(mixture()[0], 41)


def test_matching_is_the_best_of_all_orders_and_angles_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    truth, found = rng.random((4, 20)), rng.random((4, 20))
    angles = spectral_angles(found, truth)
    by_hand = np.arccos(found[2] @ truth[1] / np.linalg.norm(found[2]) / np.linalg.norm(truth[1]))
    assert angles[2, 1] == pytest.approx(by_hand)
    best = min(itertools.permutations(range(4)), key=lambda order: sum(angles[order[j], j] for j in range(4)))
    assert tuple(match_endmembers(found, truth)) == best
    assert sad(3 * truth[::-1], truth) < 1e-7
    spoiled = truth.copy()
    spoiled[:, :3] = 50
    assert sad(spoiled, truth) > 0.5 and sad(spoiled, truth, bands=np.arange(3, 20)) < 1e-7


def test_rmse_refuses_unequal_shapes():
    assert abundance_rmse([[1, 0]], [[0, 0]]) == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2\) and \(2, 1\)"):
        abundance_rmse([[1, 0]], [[1], [0]])
