"""Missing values: the textbook's EM, a likelihood that never falls, and what is observed of a sample."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from test_mixture import blobs

from mixtura.core.gaussian import COVARIANCES, Gaussians
from mixtura.core.natural_form import Frame
from mixtura.core.sufficient import statistics
from mixtura.density import GaussianMixture
from mixtura.density.missing import GapPass

each_kind = pytest.mark.parametrize("covariance", COVARIANCES)


def holes(X, share=0.1, seed=0):
    gone = np.random.default_rng(seed).random(X.shape) < share
    return np.where(gone, np.nan, X)


def textbook(X, steps):
    """EM for one Gaussian with missing values, sample by sample (Little and Rubin, sec. 11.2.2)."""
    mean, cov = np.nanmean(X, 0), np.diag(np.nanvar(X, 0))
    for _ in range(steps):
        first, second = np.zeros(X.shape[1]), np.zeros((X.shape[1],) * 2)
        for x in X:
            o, m = np.flatnonzero(~np.isnan(x)), np.flatnonzero(np.isnan(x))
            filled, extra = x.copy(), np.zeros_like(cov)
            gain = cov[np.ix_(m, o)] @ np.linalg.inv(cov[np.ix_(o, o)])
            filled[m] = mean[m] + gain @ (x[o] - mean[o])
            extra[np.ix_(m, m)] = cov[np.ix_(m, m)] - gain @ cov[np.ix_(o, m)]
            first += filled
            second += np.outer(filled, filled) + extra
        mean = first / len(X)
        cov = second / len(X) - np.outer(mean, mean)
    return mean, cov


def test_one_component_equals_the_textbook():
    X = holes(blobs(80, c=1)[0], 0.2)
    X = X[~np.isnan(X).all(1)]
    mean, cov = textbook(X, 12)
    with pytest.warns(ConvergenceWarning):
        model = GaussianMixture(
            1, missing="expect", reg=0.0, tol=1e-30, max_iter=12, means_init=[np.nanmean(X, 0)],
            weights_init=[1.0], precisions_init=[np.diag(1 / np.nanvar(X, 0))],
        ).fit(X)  # fmt: skip
    np.testing.assert_allclose(model.means_[0], mean, rtol=1e-9)
    np.testing.assert_allclose(model.covariances_[0], cov, rtol=1e-8, atol=1e-10)


@each_kind
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_likelihood_never_falls(covariance):
    X = holes(blobs(300)[0])
    model = GaussianMixture(
        3, covariance=covariance, missing="expect", max_iter=60, tol=0.0, reg=0.0, random_state=0
    ).fit(X)
    assert (np.diff(model.lower_bounds_) >= -1e-10 * np.abs(model.lower_bounds_[:-1])).all()


@each_kind
def test_without_gaps_it_is_the_same_fit(covariance):
    X, _ = blobs(200)
    want = GaussianMixture(3, covariance=covariance, random_state=0).fit(X)
    got = GaussianMixture(3, covariance=covariance, random_state=0, missing="expect").fit(X)
    np.testing.assert_allclose(got.means_, want.means_, rtol=1e-10)


@each_kind
def test_complete_samples_through_the_gap_pass_have_the_slow_forms_statistics(covariance):
    X, _ = blobs(60)
    x = torch.from_numpy(X)
    fitted = GaussianMixture(3, covariance=covariance, random_state=0).fit(X).gaussians_
    frame = Frame.of(fitted)
    run = GapPass(frame.enter(fitted), frame)
    w = torch.linspace(0, 1, 60, dtype=torch.float64)
    logs = run.add(x, weights=w)
    torch.testing.assert_close(logs, fitted.score_samples(x))
    z = (x - frame.centre) / frame.scale
    want = statistics(z, fitted.responsibilities(x), covariance, weights=w, log_likelihood=logs)
    for name in ("weight", "first", "second", "log_likelihood"):
        torch.testing.assert_close(getattr(run.statistics(), name), getattr(want, name), rtol=1e-9, atol=1e-9)


def test_the_density_of_a_sample_with_a_gap_is_that_of_what_was_observed():
    X, _ = blobs(300)
    model = GaussianMixture(2, missing="expect", random_state=0).fit(holes(X))
    gap = np.array([[np.nan, 1.0, 2.0], [0.5, np.nan, np.nan], [np.nan, np.nan, np.nan]])
    want = [
        np.log(sum(
            w * multivariate_normal(m[seen], c[np.ix_(seen, seen)]).pdf(row[seen])
            for w, m, c in zip(model.weights_, model.means_, model.covariances_, strict=True)
        ))
        for row, seen in ((gap[0], [1, 2]), (gap[1], [0]))
    ]  # fmt: skip
    np.testing.assert_allclose(model.score_samples(gap), [*want, 0.0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(model.predict_proba(gap)[2], model.weights_)


def test_gaps_hardly_move_the_fit():
    X, _ = blobs(1500, apart=6.0)
    whole = GaussianMixture(3, random_state=0).fit(X)
    gaps = GaussianMixture(3, random_state=0, missing="expect").fit(holes(X))
    order = [int(np.linalg.norm(gaps.means_ - m, axis=1).argmin()) for m in whole.means_]
    assert sorted(order) == [0, 1, 2]
    # A determinant of three features from 500 samples has a relative error of sqrt(6 / 500) = 0.11; three of those.
    ratio = np.linalg.det(gaps.covariances_[order]) / np.linalg.det(whole.covariances_)
    assert (np.abs(np.log(ratio)) < 0.35).all()


def test_labels_constrain_samples_with_gaps():
    X, cloud = blobs(300)
    y = np.where(np.arange(300) < 60, cloud, -1)
    model = GaussianMixture(3, missing="expect", random_state=0).fit(holes(X), y)
    assert (model.labels_[:60] == cloud[:60]).all()


def test_a_column_of_gaps_and_infinity_are_refused():
    X = blobs(30)[0]
    X[:, 1] = np.nan
    with pytest.raises(ValueError, match=r"column 1 holds no value at all \(NaN in every row\)"):
        GaussianMixture(2, missing="expect").fit(X)
    X[:, 1] = 0.0
    X[3, 2] = np.inf
    with pytest.raises(ValueError, match=r"X contains 1 infinite \(inf\) values, the first in row 3, column 2"):
        GaussianMixture(2, missing="expect").fit(X)


def test_a_narrow_mixture_is_right_where_features_are_missing():
    found = Gaussians.build([1.0], [[0.0, 0.0]], [[[1.0, 0.999999], [0.999999, 1.0]]], "full")
    run = GapPass(found, Frame(torch.zeros(2).double(), torch.ones(2).double()))
    run.add(torch.tensor([[1.0, torch.nan]], dtype=torch.float64))
    # E[y | x] = r x, E[y^2 | x] = r^2 x^2 + 1 - r^2
    torch.testing.assert_close(run.statistics().second[0, 1, 1], torch.tensor(1.0).double(), rtol=1e-12, atol=0)
