"""Split and merge keep moments; the number of components comes out of the criteria."""

import numpy as np
import pytest
import torch
from test_mixture import blobs

from mixtura.core.gaussian import COVARIANCES
from mixtura.density import GaussianMixture, merge_components, select_components, split_component


def fitted(covariance="full"):
    return GaussianMixture(3, covariance=covariance, random_state=0).fit(blobs(300)[0]).gaussians_


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_a_split_keeps_the_moments_of_the_mixture(covariance):
    whole = fitted(covariance)
    halves = split_component(whole, 1)
    assert halves.n_components == 4
    (mean, cov), (want_mean, want_cov) = halves.moments(), whole.moments()
    torch.testing.assert_close(mean, want_mean, rtol=1e-10, atol=1e-10)
    if covariance == "diag":
        cov, want_cov = cov.diagonal(), want_cov.diagonal()
    torch.testing.assert_close(cov, want_cov, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_merging_the_halves_gives_the_whole_back(covariance):
    whole = fitted(covariance)
    back = merge_components(split_component(whole, 0), 0, 3)
    torch.testing.assert_close(back.means, whole.means, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(back.weights, whole.weights, rtol=1e-12, atol=0)
    if covariance != "spherical":  # a ball has no long axis to put the distance of the halves back into
        torch.testing.assert_close(back.covariances, whole.covariances, rtol=1e-9, atol=1e-9)


def test_a_merge_has_the_moments_of_both():
    whole = fitted()
    one = merge_components(whole, 2, 0)
    for got, want in zip(one.moments(), whole.moments(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_split_goes_along_the_axis_asked_for():
    whole = fitted()
    _, vectors = torch.linalg.eigh(
        torch.corrcoef(torch.from_numpy(np.zeros((0, 0)))) if False else whole.covariances[0]
    )
    axis = vectors[:, 0]
    halves = split_component(whole, 0, direction=axis)
    step = halves.means[0] - halves.means[3]
    assert abs(float(step @ axis) / float(step.norm())) == pytest.approx(1.0)


def test_components_that_are_none_are_named():
    whole = fitted()
    with pytest.raises(ValueError, match="component must be between 0 and 2, got 3"):
        split_component(whole, 3)
    with pytest.raises(ValueError, match="apart must be between 0 and 1, got 1"):
        split_component(whole, 0, apart=1.0)
    with pytest.raises(ValueError, match="must be different components, got 1 twice"):
        merge_components(whole, 1, 1)


@pytest.mark.parametrize("criterion", ["bic", "icl"])
@pytest.mark.parametrize("c", [1, 3, 5])
def test_the_number_of_clouds_is_found(c, criterion):
    rng = np.random.default_rng(c)
    X = 12.0 * rng.integers(c, size=(500, 1)) * [1.0, 0.3] + rng.normal(size=(500, 2))
    model, curve = select_components(X, range(1, 8), criterion, random_state=0)
    assert model.n_components == curve.best == c
    assert curve.n_components.tolist() == list(range(1, 8))
    assert getattr(curve, criterion).argmin() == c - 1


def test_the_curve_is_the_models_own_and_likelihood_grows():
    X, _ = blobs(300)
    model, curve = select_components(X, [2, 3, 4], random_state=0)
    i = int(np.flatnonzero(curve.n_components == model.n_components)[0])
    for name in ("bic", "aic", "icl"):
        assert getattr(curve, name)[i] == pytest.approx(getattr(model, name)(X))
    assert (np.diff(curve.log_likelihood) > -1e-3).all()


def test_a_split_finds_what_random_starts_miss():
    # 16 clouds in a grid: one k-means++ start often leaves one out, growing by the best split hardly ever.
    rng = np.random.default_rng(0)
    X = np.stack(np.divmod(rng.integers(16, size=2000), 4), 1) * 8.0 + rng.normal(size=(2000, 2))
    model, _ = select_components(X, range(1, 17), covariance="spherical", random_state=0)
    assert model.n_components == 16
    best = min(GaussianMixture(16, covariance="spherical", random_state=s).fit(X).bic(X) for s in range(3))
    assert model.bic(X) < best + 10


def test_patience_ends_the_search_and_labels_hold():
    X, cloud = blobs(400, c=3)
    y = np.where(np.arange(400) < 40, cloud % 2, -1)
    model, curve = select_components(X, range(2, 12), y=y, patience=2, random_state=0)
    assert len(curve.n_components) == int(np.flatnonzero(curve.n_components == curve.best)[0]) + 3
    assert (model.component_classes_[model.labels_[:40]] == y[:40]).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((range(1, 3), "mdl"), {}, r"criterion must be one of \['bic', 'aic', 'icl'\], got 'mdl'"),
        (([],), {}, r"n_components must be a range of numbers >= 1, got \[\]"),
        (([0, 1],), {}, "n_components must be a range of numbers >= 1"),
        (([1, 2],), {"means_init": [[0.0]]}, "means_init has no meaning where several numbers"),
        (([1, 2],), {"covariance": "round"}, "covariance must be one of"),
    ],
)
def test_bad_requests_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        select_components(blobs(30)[0], *arguments, **options)


def test_more_components_than_samples_end_the_search():
    X, _ = blobs(6)
    _, curve = select_components(X, range(1, 20), covariance="spherical", random_state=0)
    assert curve.n_components.max() <= 6
