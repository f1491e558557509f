"""Factors: the maximum of the likelihood, Gaussian conditioning by brute force, what must not matter, bad input."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.decomposition import FactorAnalysis
from sklearn.exceptions import ConvergenceWarning

from mixtura.density import FactorModel, parallel_analysis
from mixtura.density.factor_model import closed_form


def factored(n=400, f=6, r=2, seed=0, noise=1.0, loading=1.0):
    rng = np.random.default_rng(seed)
    B = loading * rng.normal(size=(f, r))
    return rng.normal(size=(n, r)) @ B.T + np.sqrt(noise) * rng.normal(size=(n, f)) + rng.normal(size=f)


def climbed(X, r, unit):
    """The highest mean log likelihood that L-BFGS finds over loadings (and one noise variance), from several starts."""
    f = X.shape[1]
    S = np.cov(X.T, bias=True)

    def value(theta):
        B, noise = theta[: f * r].reshape(f, r), 1.0 if unit else np.exp(theta[-1])
        C = B @ B.T + noise * np.eye(f)
        inverse = np.linalg.inv(C)
        cost = (f * np.log(2 * np.pi) + np.linalg.slogdet(C)[1] + np.trace(inverse @ S)) / 2
        slope = inverse - inverse @ S @ inverse  # twice the gradient in C
        more = [] if unit else [noise * np.trace(slope) / 2]
        return cost, np.concatenate([(slope @ B).ravel(), more])

    rng = np.random.default_rng(0)
    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    starts = [0.5 * rng.normal(size=f * r + (not unit)) for _ in range(5)]
    return -min(minimize(value, start, jac=True, method="L-BFGS-B", options=options).fun for start in starts)


# Oracles.


@pytest.mark.parametrize("noise", ["unit", "isotropic"])
def test_the_closed_form_is_the_maximum_that_a_climb_over_the_likelihood_finds(noise):
    X = factored()
    model = FactorModel(2, noise=noise).fit(X)
    assert model.log_likelihood_ == pytest.approx(climbed(X, 2, noise == "unit"), abs=1e-6)
    assert model.score(X) == pytest.approx(model.log_likelihood_, abs=1e-10)


def test_one_noise_a_feature_reaches_scikit_learns_likelihood_and_posterior_means():
    X = factored(seed=1) * [1.0, 2.0, 0.5, 3.0, 1.0, 10.0]
    ours = FactorModel(2, noise="diagonal").fit(X)
    peer = FactorAnalysis(2, tol=1e-9, max_iter=20_000, svd_method="lapack").fit(X)
    assert ours.score(X) == pytest.approx(peer.score(X), abs=1e-4) and ours.score(X) > peer.score(X) - 1e-7
    np.testing.assert_allclose(ours.noise_variance_, peer.noise_variance_, rtol=1e-3)
    # Factors have no names and no signs: the part of x that they explain has.
    np.testing.assert_allclose(
        ours.transform(X) @ ours.loadings_.T, peer.transform(X) @ peer.components_, atol=2e-3 * X.std()
    )


@pytest.mark.parametrize("noise", ["unit", "isotropic", "diagonal"])
def test_density_and_posterior_are_gaussian_conditioning_by_brute_force(noise):
    X = factored(n=50)
    model = FactorModel(2, noise=noise).fit(X)
    B, psi = model.loadings_, np.diag(model.noise_variance_)
    C = B @ B.T + psi
    np.testing.assert_allclose(
        model.score_samples(X), multivariate_normal(model.mean_, C).logpdf(X), rtol=1e-10, atol=1e-10
    )
    joint = model.posterior(X)
    np.testing.assert_allclose(joint.mean, (X - model.mean_) @ np.linalg.inv(C) @ B, atol=1e-10)
    np.testing.assert_allclose(joint.covariance, np.eye(2) - B.T @ np.linalg.inv(C) @ B, atol=1e-10)


def test_draws_have_the_models_moments():
    model = FactorModel(2).fit(factored())
    X, z = model.sample(40_000)
    C = model.loadings_ @ model.loadings_.T + np.eye(6)
    # Five standard errors of a covariance entry, over 21 of them: one false alarm in 80,000.
    error = np.sqrt((np.outer(C.diagonal(), C.diagonal()) + C**2) / 40_000)
    assert (np.abs(np.cov(X.T) - C) < 5 * error).all() and np.abs(z.mean(0)).max() < 5 / 200


# What must not matter.


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_batches_and_more_batches_are_all_samples_together(tmp_path):
    X = 1000 + factored(n=3000)
    pd.DataFrame(X, columns=list("abcdef")).to_parquet(tmp_path / "x.parquet")
    whole = FactorModel(2).fit(X)
    grown = FactorModel(2)
    for batch in np.array_split(X, 7):
        grown.partial_fit(batch)
    for other in (FactorModel(2).fit(np.array_split(X, 3)), FactorModel(2).fit(tmp_path / "x.parquet"), grown):
        np.testing.assert_allclose(other.mean_, whole.mean_, rtol=1e-12)
        np.testing.assert_allclose(other.transform(X), whole.transform(X), atol=1e-8)
        assert other.n_samples_ == 3000
    assert list(FactorModel(2).fit(tmp_path / "x.parquet").feature_names_in_) == list("abcdef")


def test_units_do_not_matter_where_each_feature_has_its_noise():
    X, units = factored(), np.array([1e-3, 1.0, 1e3, 7.0, 1.0, 1.0])
    one, other = (FactorModel(2, noise="diagonal").fit(x) for x in (X, X * units))
    np.testing.assert_allclose(np.abs(other.transform(X * units)), np.abs(one.transform(X)), atol=1e-6)


def test_a_mean_known_to_be_zero_stays_there():
    X = factored() + 3
    model = FactorModel(2, center=False).fit(X)
    second = X.T @ X / len(X)
    want = closed_form(second, 2, unit=True)
    np.testing.assert_allclose(
        model.loadings_ @ model.loadings_.T, want.loadings @ want.loadings.T, rtol=1e-8, atol=1e-8
    )
    assert not model.mean_.any()


# Limits.


def test_noise_alone_has_no_loadings_under_known_noise_that_is_larger():
    X = 0.1 * np.random.default_rng(0).normal(size=(500, 4))
    model = FactorModel(2).fit(X)
    assert not model.loadings_.any() and not model.transform(X).any() and model.gap_ == pytest.approx(0.0)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_feature_that_is_a_factor_keeps_a_finite_likelihood():
    X = factored()
    X[:, 1] = X[:, 0]
    model = FactorModel(2, noise="diagonal").fit(X)
    assert np.isfinite(model.score_samples(X)).all() and model.noise_variance_[:2].max() < 1e-6


@pytest.mark.parametrize("unit", [True, False])
def test_parallel_analysis_counts_the_factors_that_are_there(unit):
    for r in (1, 3, 6):
        X = factored(n=2000, f=40, r=r, seed=r)
        covariance = np.cov(X.T, bias=True)
        assert parallel_analysis(covariance, 2000, unit=unit, random_state=0) == r
    assert FactorModel("auto").fit(factored(n=2000, f=20, r=3, seed=3)).n_factors_ == 3
    # Noise has no factor, and a model of factors needs one.
    assert parallel_analysis(np.eye(5), 1000, unit=unit, random_state=0) == 1


def test_fewer_samples_than_features_are_fitted():
    X = factored(n=5, f=12, r=2)
    assert np.isfinite(FactorModel(2, noise="isotropic").fit(X).score_samples(X)).all()
    assert FactorModel("auto").fit(X).n_factors_ >= 1


# Contract.


@pytest.mark.parametrize(
    ("options", "X", "message"),
    [
        ({"n_factors": 3}, np.eye(3), "n_factors must be below the n_features = 3 of X, got 3"),
        ({"n_factors": 0}, np.eye(3), "n_factors must be 'auto' or a whole number >= 1, got 0"),
        ({"noise": "white"}, np.eye(3), r"noise must be one of \['unit', 'isotropic', 'diagonal'\], got 'white'"),
        ({"max_iter": 0}, np.eye(3), "max_iter a whole number >= 1"),
        ({}, [[1.0, np.nan], [0.0, 1.0]], "1 NaN values, the first in row 0, column 1"),
        ({"device": "warp"}, np.eye(3), "device must be 'auto', 'cpu', 'cuda' or the like"),
        ({}, [np.zeros((0, 3))], "X has no samples"),
    ],
)
def test_bad_input_is_named(options, X, message):
    with pytest.raises(ValueError, match=message):
        FactorModel(**options).fit(X)


def test_too_few_steps_warn_with_what_to_try():
    with pytest.warns(ConvergenceWarning, match=r"did not converge in max_iter=1 .*Raise max_iter or tol"):
        FactorModel(2, noise="diagonal", max_iter=1).fit(factored())


def test_a_draw_of_none_is_refused():
    with pytest.raises(ValueError, match="n_samples must be a whole number >= 1, got 0"):
        FactorModel(1).fit(factored()).sample(0)
