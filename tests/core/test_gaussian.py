"""Gaussian components against SciPy and closed forms."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from mixtura.core.gaussian import COVARIANCES, Gaussians, LostRank

each_kind = pytest.mark.parametrize("covariance", COVARIANCES)


def mixture(covariance: str, *, n_components: int = 3, n_features: int = 4, seed: int = 0) -> Gaussians:
    """A mixture with random weights, means and well-conditioned covariances."""
    rng = np.random.default_rng(seed)
    c, f = n_components, n_features
    root = rng.normal(size=(c, f, f))
    full = root @ root.transpose(0, 2, 1) / f + 0.3 * np.eye(f)
    sigma = {
        "full": full,
        "tied": full[0],
        "diag": np.diagonal(full, axis1=1, axis2=2),
        "spherical": full[:, 0, 0],
    }[covariance]
    return Gaussians.build(
        torch.from_numpy(rng.dirichlet(np.full(c, 4.0))),
        torch.from_numpy(rng.normal(scale=2, size=(c, f))),
        torch.from_numpy(sigma.copy()),
        covariance,
    )


def samples(n: int = 50, n_features: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=2, size=(n, n_features)))


@each_kind
def test_log_densities_equal_scipys(covariance):
    found, x = mixture(covariance), samples()
    want = np.stack(
        [
            multivariate_normal(mean, sigma).logpdf(x)
            for mean, sigma in zip(found.means.numpy(), found.full_covariances().numpy(), strict=True)
        ],
        axis=1,
    )
    # scipy inverts by eigenvalues, we by Cholesky: 1e-9 leaves both their rounding.
    np.testing.assert_allclose(found.log_joint(x) - found.weights.log(), want, rtol=1e-9)
    np.testing.assert_allclose(
        found.score_samples(x), np.logaddexp.reduce(want + np.log(found.weights.numpy()), 1), rtol=1e-9
    )


def test_features_in_units_of_1e150_and_1e_minus_150_have_the_density_of_their_logarithms():
    plain = mixture("full", n_features=2)
    scale = torch.tensor([1e150, 1e-150], dtype=torch.float64)
    scaled = Gaussians.build(
        plain.weights, plain.means * scale, plain.covariances * scale[:, None] * scale, plain.covariance
    )
    x = samples(n_features=2)
    np.testing.assert_allclose(scaled.log_joint(x * scale), plain.log_joint(x), rtol=1e-9)
    np.testing.assert_allclose(
        plain.mapped(scale, torch.zeros(2, dtype=torch.float64)).log_joint(x * scale), plain.log_joint(x), rtol=1e-9
    )


@each_kind
def test_a_moved_mixture_has_the_density_of_a_built_one(covariance):
    plain = mixture(covariance)
    scale = torch.tensor([2.0, 0.5, 3.0, 1.0] if covariance != "spherical" else [2.0] * 4, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0, 5.0], dtype=torch.float64)
    moved = plain.mapped(scale, shift)
    built = Gaussians.build(moved.weights, moved.means, moved.covariances, covariance)
    x = samples()
    torch.testing.assert_close(moved.log_joint(x), built.log_joint(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.score_samples(x * scale + shift) + scale.log().sum(), plain.score_samples(x))


@each_kind
def test_samples_have_the_mixtures_moments(covariance):
    found, n = mixture(covariance, n_features=3), 60_000
    x, component = found.sample(n, generator=torch.Generator().manual_seed(0))
    mean, cov = found.moments()
    # Five standard errors; a Gaussian mixture's fourth moments are below 3 times the squared variances here.
    spread = cov.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * spread / n**0.5).all()
    assert ((x.T.cov(correction=0) - cov).abs() < 5 * (3 / n) ** 0.5 * torch.outer(spread, spread)).all()
    share = component.bincount(minlength=3) / n
    assert ((share - found.weights).abs() < 5 * (found.weights / n).sqrt()).all()


def test_variance_of_four_samples_with_spread_two():
    x, _ = Gaussians.build([1.0], [[0.0]], [[4.0]], "diag").sample(40_000, generator=torch.Generator().manual_seed(0))
    assert abs(x.std() - 2.0) < 0.036  # five standard errors: 5 * 2 / sqrt(2 * 40_000) = 0.035


@each_kind
def test_marginal_times_conditional_is_the_joint(covariance):
    found, x = mixture(covariance), samples(5)
    for row in x:
        known = found.marginal([2, 0]).score_samples(row[None, [2, 0]])
        rest = found.condition([2, 0], row[[2, 0]]).score_samples(row[None, [1, 3]])
        torch.testing.assert_close(known + rest, found.score_samples(row[None]), rtol=1e-10, atol=1e-10)


def test_a_weight_of_zero_makes_no_nan():
    found = Gaussians.build([1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0], "spherical")
    x = torch.tensor([[0.5]], dtype=torch.float64)
    assert found.score_samples(x).isfinite().all()
    assert found.responsibilities(x)[0, 1] < 1e-300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [[0.0]], [[1.0]], "round"), r"covariance must be one of .*'spherical'.*got 'round'"),
        (([1.0], [[0.0]], [1.0], "diag"), r"diag covariances must have shape \(1, 1\), got \(1,\)"),
        (([0.5, 0.4], [[0.0], [1.0]], [1.0, 1.0], "spherical"), "sum to 1"),
        (([1.0], [0.0], [1.0], "spherical"), "means must have shape"),
        (([0.5, 0.5], [[0.0]], [1.0], "spherical"), r"weights must have shape \(1,\)"),
    ],
)
def test_wrong_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Gaussians.build(*arguments)


def test_a_lost_rank_names_component_and_feature():
    twice = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    twice[1, 2, 2] = 0.0
    with pytest.raises(LostRank, match=r"component 1 .* feature 2") as caught:
        Gaussians.build([0.5, 0.5], torch.zeros(2, 3), twice, "full")
    assert (caught.value.component, caught.value.feature) == (1, 2)
    with pytest.raises(LostRank, match=r"component 0 .* feature 1"):
        Gaussians.build([1.0], torch.zeros(1, 2), [[1.0, 0.0]], "diag")


@pytest.mark.parametrize("features", [[], [0, 0], [4], [-1]], ids=str)
def test_features_that_are_none_are_named(features):
    with pytest.raises(ValueError, match="features must be different numbers from 0 to 3"):
        mixture("full").marginal(features)


def test_no_draw_is_refused_by_its_own_name():
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        mixture("full").sample(0)
