"""Streams: one pass over batches comes near the fit, whatever the scale and place of the first batch."""

import numpy as np
import pytest
import torch
from test_mixture import blobs

from mixtura.core.gaussian import COVARIANCES
from mixtura.core.sufficient import maximise, statistics
from mixtura.density import GaussianMixture
from mixtura.density.stream import implied_statistics

each_kind = pytest.mark.parametrize("covariance", COVARIANCES)


def stream(X, size=100, **more):
    model = GaussianMixture(3, random_state=0, **more)
    for rows in np.split(X, range(size, len(X), size)):
        model.partial_fit(rows)
    return model


@each_kind
def test_a_stream_comes_near_the_fit(covariance):
    X, _ = blobs(6000, apart=5.0)
    whole = GaussianMixture(3, covariance=covariance, random_state=0).fit(X)
    assert stream(X, covariance=covariance).score(X) > whole.score(X) - 0.05


@each_kind
def test_batches_that_wander_give_what_the_formula_gives_in_plain_coordinates(covariance):
    # The frame moves with every batch here; the formula below knows no frame.
    rng = np.random.default_rng(0)
    batches = [blobs(150)[0] * (1 + i) + 20.0 * i * rng.normal(size=3) for i in range(5)]
    model = GaussianMixture(3, covariance=covariance, random_state=0, reg=1e-3).partial_fit(batches[0])
    kept, mixture = model.stream_, model.gaussians_
    mean = kept.statistics.mapped(kept.frame.scale, kept.frame.centre, covariance)
    for t, batch in enumerate(batches[1:], start=1):
        x, step = torch.from_numpy(batch), (t + 2) ** -0.6
        found = statistics(x, mixture.responsibilities(x), covariance)
        mean = mean.scaled(1 - step) + found.scaled(step / len(x))
        seen = np.concatenate(batches[: t + 1])
        floor = seen.var(0) if covariance != "spherical" else np.full(3, seen.var(0).mean())
        mixture = maximise(mean, covariance, torch.from_numpy(1e-3 * floor))
        model.partial_fit(batch)
        # Plain coordinates cancel: 1e-6 is what squares of a thousand leave.
        np.testing.assert_allclose(model.means_, mixture.means, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(model.covariances_, mixture.covariances, rtol=1e-6, atol=1e-5)


@each_kind
def test_units_of_the_stream_do_not_matter(covariance):
    X, _ = blobs(1000)
    want, got = stream(X, covariance=covariance), stream(X * 1e6 + 1e9, covariance=covariance)
    np.testing.assert_allclose((got.means_ - 1e9) / 1e6, want.means_, rtol=1e-5, atol=1e-6)


def test_the_place_and_scale_of_the_first_batch_do_not_matter():
    X, _ = blobs(8000, apart=5.0)
    first = np.random.default_rng(0).normal(size=(50, 3)) * 1e-3 + 500.0
    model = GaussianMixture(3, random_state=0)
    for rows in [first, *np.split(X, 80)] * 2:
        if rows is not first or not hasattr(model, "weights_"):
            model.partial_fit(rows)
    # What is left of the first batch fades as 1 / t; EM from a bad start may be a local maximum, but no nonsense.
    assert np.isfinite(model.means_).all() and (np.linalg.eigvalsh(model.covariances_) > 0).all()
    one = GaussianMixture(1).fit(X).score(X)
    assert model.score(X) > one


def test_a_constant_first_batch_is_survived():
    X, _ = blobs(3000)
    model = GaussianMixture(2, random_state=0).partial_fit(np.zeros((20, 3)))
    for rows in np.split(X, 30):
        model.partial_fit(rows)
    assert np.isfinite(model.covariances_).all()
    assert model.score(X) > GaussianMixture(1).fit(X).score(X) - 1.0


@each_kind
def test_implied_statistics_are_those_of_many_draws(covariance):
    found = GaussianMixture(3, covariance=covariance, random_state=0).fit(blobs(300)[0]).gaussians_
    implied = implied_statistics(found)
    x, _ = found.sample(200_000, generator=torch.Generator().manual_seed(0))
    # five standard errors of a mean over 200 000 draws
    scale = x.abs().amax(0)
    assert ((implied.first.sum(0) - x.mean(0)).abs() < 5 * x.std(0) / 200_000**0.5).all()
    total = {"full": implied.second.sum(0), "tied": implied.second}.get(covariance)
    if total is not None:
        assert ((total - x.T @ x / len(x)).abs() < 0.02 * torch.outer(scale, scale)).all()


def test_it_goes_on_after_a_fit_and_from_disk(tmp_path):
    X, _ = blobs(2000)
    model = GaussianMixture(3, random_state=0).fit(X[:1000])
    before = model.means_.copy()
    model.partial_fit(X[1000:1500])
    assert not np.array_equal(model.means_, before)
    assert np.abs(model.means_ - before).max() < 1.0
    model.save(tmp_path / "m")
    back = GaussianMixture.load(tmp_path / "m").partial_fit(X[1500:])
    np.testing.assert_array_equal(back.means_, model.partial_fit(X[1500:]).means_)


def test_labels_hold_in_a_stream():
    X, cloud = blobs(900)
    model = GaussianMixture(3, random_state=0)
    for rows in np.split(np.arange(900), 9):
        model.partial_fit(X[rows], np.where(rows % 3 == 0, cloud[rows], -1))
    assert (model.predict_class(X) == cloud).mean() > 0.9
    with pytest.raises(ValueError, match="class 7 has no component: the first batch had no label 7"):
        model.partial_fit(X[:10], np.full(10, 7))


def test_bad_batches_are_named():
    X, _ = blobs(100)
    with pytest.raises(ValueError, match="n_components=3 needs as many samples"):
        GaussianMixture(3).partial_fit(X[:2])
    model = GaussianMixture(3, random_state=0).partial_fit(X)
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        model.partial_fit(X[:, :2])
    with pytest.raises(ValueError, match="X contains 1 NaN"):
        model.partial_fit(np.where(np.arange(300).reshape(100, 3) == 5, np.nan, X))
