"""Abundances of known spectra against solvers that look at one pixel at a time."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from mixtura.vision.unmixing.constrained import batch_nnls, fcls, nnls_unmix, sunsal


def problem(seed: int, k: int, pixels: int = 60, channels: int = 30):
    """Spectra that are not far from each other, and pixels in and well outside of their hull."""
    rng = np.random.default_rng(seed)
    endmembers = 0.4 + 0.2 * rng.random((k, channels)).cumsum(1) / channels**0.5
    shares = rng.dirichlet(np.full(k, 0.4), pixels)
    return shares @ endmembers + 0.05 * rng.normal(size=(pixels, channels)), endmembers, shares


def heavy_row(X, endmembers, weights=None):
    """Constrained least squares by an own active set a pixel, with a heavy row for the sum."""
    w = np.ones(X.shape[1]) if weights is None else np.sqrt(weights)
    heavy = 1e5
    matrix = np.vstack([(endmembers * w).T, np.full(len(endmembers), heavy)])
    return np.array([nnls(matrix, np.append(x * w, heavy))[0] for x in X])


@pytest.mark.parametrize(("seed", "k"), [(0, 2), (1, 3), (2, 6), (3, 12)])
def test_fcls_is_that_of_an_active_set_a_pixel(seed: int, k: int):
    X, endmembers, _ = problem(seed, k)
    got = fcls(X, endmembers)
    # The heavy row lets the sum miss one by about 1e-10 of the fit's pull.
    np.testing.assert_allclose(got, heavy_row(X, endmembers), atol=1e-6)
    assert np.abs(got.sum(1) - 1).max() < 1e-12 and got.min() >= 0


def test_weights_of_channels_count_as_they_should():
    X, endmembers, _ = problem(4, 4)
    weights = np.random.default_rng(0).uniform(0, 3, X.shape[1])
    np.testing.assert_allclose(fcls(X, endmembers, weights=weights), heavy_row(X, endmembers, weights), atol=1e-6)
    spoiled = X.copy()
    spoiled[:, :5] = 100.0
    weights[:5] = 0
    np.testing.assert_allclose(
        fcls(spoiled, endmembers, weights=weights), fcls(X, endmembers, weights=weights), atol=1e-9
    )


def test_exact_mixtures_are_recovered_also_at_the_corners():
    _, endmembers, shares = problem(5, 5)
    shares[:5] = np.eye(5)
    np.testing.assert_allclose(fcls(shares @ endmembers, endmembers), shares, atol=1e-9)


@pytest.mark.parametrize(("seed", "k"), [(0, 1), (1, 3), (2, 9)])
def test_nnls_is_scipys_pixel_by_pixel(seed: int, k: int):
    X, endmembers, _ = problem(seed, k)
    X[:10] *= -1  # far from the cone
    np.testing.assert_allclose(nnls_unmix(X, endmembers), [nnls(endmembers.T, x)[0] for x in X], atol=1e-8)


def test_the_batch_solver_ends_at_the_optimality_conditions_of_hard_problems():
    rng = np.random.default_rng(0)
    root = torch.from_numpy(rng.normal(size=(300, 8, 9)) * rng.uniform(0.01, 3, (300, 8, 1)))
    gram = root @ root.mT
    linear = torch.from_numpy(rng.normal(size=(300, 8)))
    a = batch_nnls(gram, linear)
    slope = (gram @ a[..., None])[..., 0] - linear
    assert float(a.min()) >= 0 and float(slope.min()) > -1e-8
    assert float((a * slope).abs().max()) < 1e-7
    with pytest.raises(ValueError, match="gram must be positive definite"):
        batch_nnls(torch.zeros(1, 2, 2).double(), torch.ones(1, 2).double())


def test_sunsal_meets_the_two_problems_that_it_relaxes_and_the_conditions_of_its_own():
    X, endmembers, _ = problem(6, 4)
    np.testing.assert_allclose(sunsal(X, endmembers, max_iter=4000, tol=1e-8), nnls_unmix(X, endmembers), atol=1e-5)
    np.testing.assert_allclose(
        sunsal(X, endmembers, sum_to_one=True, max_iter=4000, tol=1e-8), fcls(X, endmembers), atol=1e-5
    )
    lam = 0.3
    a = sunsal(X, endmembers, lam, max_iter=4000, tol=1e-8)
    slope = a @ endmembers @ endmembers.T - X @ endmembers.T + lam
    assert slope.min() > -1e-5 and np.abs(a * slope).max() < 1e-5
    assert a.sum() < nnls_unmix(X, endmembers).sum()


def test_what_does_not_fit_is_named():
    X, endmembers, _ = problem(7, 3)
    with pytest.raises(ValueError, match=r"as many channels, got shapes \(60, 30\) and \(3, 29\)"):
        fcls(X, endmembers[:, 1:])
    X[4, 2] = np.nan
    with pytest.raises(ValueError, match="X must be finite, and 1 pixels are not"):
        nnls_unmix(X, endmembers)
    with pytest.raises(ValueError, match="lam must be 0 with sum_to_one"):
        sunsal(X, endmembers, 0.1, sum_to_one=True)
    with pytest.raises(ValueError, match="weights must be 30 finite numbers >= 0"):
        fcls(X, endmembers, weights=-np.ones(30))
