"""Mixtures of Gaussians: scikit-learn's numbers step by step, what must not matter, limits, and bad input."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Peer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mixtura.core.gaussian import COVARIANCES
from mixtura.density import GaussianMixture
from mixtura.density.em import Collapsed

each_kind = pytest.mark.parametrize("covariance", COVARIANCES)
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def blobs(n=600, f=3, c=3, seed=0, apart=4.0):
    """Samples of c clouds of random shape; which cloud each is from."""
    rng = np.random.default_rng(seed)
    cloud = rng.integers(c, size=n)
    roots, means = rng.normal(size=(c, f, f)), rng.normal(scale=apart, size=(c, f))
    return means[cloud] + np.einsum("nij,nj->ni", roots[cloud], rng.normal(size=(n, f))), cloud


def start(X, c, covariance):
    """The same first mixture for ours and the peer: c samples, even weights, unit precisions."""
    f = X.shape[1]
    eye = np.eye(f)
    inverse = {"full": np.stack([eye] * c), "tied": eye, "diag": np.ones((c, f)), "spherical": np.ones(c)}
    return {
        "means_init": X[np.linspace(0, len(X) - 1, c).astype(int)],
        "weights_init": np.full(c, 1 / c),
        "precisions_init": inverse[covariance],
    }


# Oracles.


@each_kind
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_every_step_equals_scikit_learns(covariance, steps):
    X, _ = blobs()
    more = {**start(X, 3, covariance), "max_iter": steps, "tol": 0.0}
    ours = GaussianMixture(3, covariance=covariance, reg_unit="absolute", **more).fit(X)
    peer = Peer(3, covariance_type=covariance, **more).fit(X)
    np.testing.assert_allclose(ours.means_, peer.means_, rtol=1e-8)
    np.testing.assert_allclose(ours.covariances_, peer.covariances_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.weights_, peer.weights_, rtol=1e-8)
    # The peer's bound is that before its last step.
    np.testing.assert_allclose(ours.lower_bounds_[-2], peer.lower_bound_, rtol=1e-8)
    np.testing.assert_allclose(ours.score_samples(X), peer.score_samples(X), rtol=1e-8)
    np.testing.assert_allclose(ours.predict_proba(X), peer.predict_proba(X), rtol=1e-6, atol=1e-10)
    assert ours.bic(X) == pytest.approx(peer.bic(X), rel=1e-10)
    assert ours.aic(X) == pytest.approx(peer.aic(X), rel=1e-10)


@each_kind
def test_a_weight_of_two_is_the_sample_twice_and_a_weight_of_zero_is_none(covariance):
    X, _ = blobs(200)
    w = np.random.default_rng(1).integers(0, 4, size=200)
    more = {**start(X, 3, covariance), "covariance": covariance, "max_iter": 10, "tol": 0.0}
    weighted = GaussianMixture(3, **more).fit(X, sample_weight=w)
    repeated = GaussianMixture(3, **more).fit(np.repeat(X, w, axis=0))
    np.testing.assert_allclose(weighted.means_, repeated.means_, rtol=1e-8)
    np.testing.assert_allclose(weighted.covariances_, repeated.covariances_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(weighted.lower_bounds_, repeated.lower_bounds_, rtol=1e-10)


def test_a_known_variance_is_held_while_weights_and_means_take_the_steps_of_a_loop():
    X, _ = blobs(n=80)
    begin = start(X, 3, "spherical")
    begin.pop("precisions_init")
    ours = GaussianMixture(3, covariance="spherical", variance=2.5, tol=0.0, max_iter=4, **begin).fit(X)
    weights, means = begin["weights_init"], begin["means_init"]
    for _ in range(4):
        p = np.array([[w * np.exp(-((x - m) ** 2).sum() / 5) for w, m in zip(weights, means, strict=True)] for x in X])
        r = p / p.sum(1, keepdims=True)
        weights, means = r.mean(0), (r.T @ X) / r.sum(0)[:, None]
    np.testing.assert_allclose(ours.means_, means, rtol=1e-8)
    np.testing.assert_allclose(ours.weights_, weights, rtol=1e-8)
    np.testing.assert_allclose(ours.covariances_, 2.5, rtol=1e-12)
    assert ours.n_parameters() == 2 + 9
    for batch in np.array_split(X, 4):
        ours.partial_fit(batch)
    np.testing.assert_allclose(ours.covariances_, 2.5, rtol=1e-12)
    fresh = GaussianMixture(3, covariance="spherical", variance=2.5, random_state=0)
    for batch in np.array_split(X, 4):
        fresh.partial_fit(batch)
    np.testing.assert_allclose(fresh.covariances_, 2.5, rtol=1e-12)


def test_icl_is_bic_and_twice_the_entropy():
    X, _ = blobs(200, apart=1.0)
    model = GaussianMixture(3, random_state=0).fit(X)
    p = model.predict_proba(X)
    assert model.icl(X) == pytest.approx(model.bic(X) - 2 * np.sum(p * np.log(np.maximum(p, 1e-300))), rel=1e-9)


def test_draws_have_the_moments_and_repeat_with_the_seed():
    X, _ = blobs()
    model = GaussianMixture(3, random_state=0).fit(X)
    drawn, component = model.sample(20_000)
    # Five standard errors of a mean, 5 / sqrt(20000) = 0.035 spreads.
    assert (np.abs(drawn.mean(0) - X.mean(0)) < 0.036 * X.std(0)).all()
    assert set(component) == {0, 1, 2}
    np.testing.assert_array_equal(model.sample(5)[0], model.sample(5)[0])


# What must not matter.


@pytest.mark.parametrize("seed", range(20))
def test_the_likelihood_never_falls(seed):
    covariance = COVARIANCES[seed % 4]
    # No floor: with one, EM climbs a penalised likelihood. 400 samples keep three components from ending on a point.
    X, _ = blobs(400, f=2 + seed % 3, c=3, seed=seed, apart=1.5)
    model = GaussianMixture(3, covariance=covariance, max_iter=300, tol=0.0, reg=0.0, random_state=seed).fit(X)
    bounds = model.lower_bounds_
    assert len(bounds) == 301
    assert (np.diff(bounds) >= -1e-10 * np.abs(bounds[:-1])).all()


@each_kind
def test_order_of_samples_blocks_and_names_of_components_do_not_matter(covariance):
    X, _ = blobs(500)
    first = start(X, 3, covariance)
    more = {"covariance": covariance, "max_iter": 15, "tol": 0.0}
    want = GaussianMixture(3, **first, **more).fit(X)
    order = np.random.default_rng(0).permutation(500)
    turned = {**first, "means_init": first["means_init"][[2, 0, 1]]}
    for other, back in (
        (GaussianMixture(3, **first, **more).fit(X[order]), [0, 1, 2]),
        (GaussianMixture(3, **first, **more, block_size=7).fit(X), [0, 1, 2]),
        (GaussianMixture(3, **turned, **more).fit(X), [1, 2, 0]),
    ):
        np.testing.assert_allclose(other.means_[back], want.means_, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(other.lower_bounds_, want.lower_bounds_, rtol=1e-10)


@each_kind
def test_units_do_not_matter(covariance):
    X, _ = blobs(300)
    scale = np.array([1e-3, 1.0, 1e6]) if covariance != "spherical" else np.full(3, 1e6)
    plain = GaussianMixture(3, covariance=covariance, random_state=0).fit(X)
    scaled = GaussianMixture(3, covariance=covariance, random_state=0).fit(X * scale + 5 * scale)
    np.testing.assert_allclose(scaled.means_, plain.means_ * scale + 5 * scale, rtol=1e-8)
    assert scaled.lower_bound_ == pytest.approx(plain.lower_bound_ - np.log(scale).sum(), abs=1e-8)
    np.testing.assert_array_equal(scaled.labels_, plain.labels_)


def test_a_row_alone_gets_what_it_gets_in_a_batch():
    X, _ = blobs(50)
    model = GaussianMixture(3, random_state=0).fit(X)
    np.testing.assert_allclose([model.score_samples(x[None])[0] for x in X], model.score_samples(X), rtol=1e-12)


def test_probabilities_over_several_blocks_are_those_of_one():
    X, _ = blobs(n=100)
    model = GaussianMixture(3, random_state=0).fit(X)
    whole = model.predict_proba(X)
    model.block_size = 30
    np.testing.assert_allclose(model.predict_proba(X), whole, rtol=1e-10)


def test_labels_of_a_fit_are_those_it_predicts():
    X, _ = blobs(300, apart=1.0)
    for steps in (0, 1, 3, 100):
        model = GaussianMixture(3, max_iter=steps, random_state=0)
        np.testing.assert_array_equal(model.fit_predict(X), model.predict(X))


def test_restarts_are_different_and_the_best_is_kept():
    X, _ = blobs(400, c=8, f=2, apart=3.0)
    bounds = [GaussianMixture(8, init="random", random_state=s).fit(X).lower_bound_ for s in range(6)]
    assert len(set(np.round(bounds, 6))) > 1
    many = GaussianMixture(8, init="random", n_init=6, random_state=0).fit(X)
    assert many.lower_bound_ >= bounds[0]


def test_it_clones_searches_and_pipes():
    X, _ = blobs(150)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), GaussianMixture(random_state=0)),
        {"gaussianmixture__n_components": [1, 3]},
        cv=2,
    )
    assert search.fit(X).best_params_ == {"gaussianmixture__n_components": 3}


# Limits.


@each_kind
def test_one_component_is_the_sample_mean_and_covariance(covariance):
    X, _ = blobs(100)
    model = GaussianMixture(1, covariance=covariance, reg=0.0).fit(X)
    cov = np.cov(X.T, bias=True)
    want = {"full": cov[None], "tied": cov, "diag": np.diag(cov)[None], "spherical": [np.diag(cov).mean()]}[covariance]
    np.testing.assert_allclose(model.means_[0], X.mean(0), rtol=1e-12)
    np.testing.assert_allclose(model.covariances_, want, rtol=1e-10)


@each_kind
@pytest.mark.parametrize(
    "case", ["identical", "duplicates", "constant column", "fewer than features", "as many as features"]
)
def test_degenerate_samples_give_no_nan(covariance, case):
    rng = np.random.default_rng(0)
    X = {
        "identical": np.full((20, 3), 7.0),
        "duplicates": np.repeat(rng.normal(size=(4, 3)), 10, axis=0),
        "constant column": np.column_stack([rng.normal(size=40), np.full(40, 0.1), rng.normal(size=40)]),
        "fewer than features": rng.normal(size=(6, 20)),
        "as many as features": rng.normal(size=(5, 5)),
    }[case]
    model = GaussianMixture(2, covariance=covariance, random_state=0).fit(X)
    for found in (model.means_, model.covariances_, model.precisions_cholesky_, model.score_samples(X)):
        assert np.isfinite(found).all()
    assert (np.linalg.eigvalsh(model.gaussians_.full_covariances().numpy()) > 0).all()
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1.0)
    if case == "identical":
        np.testing.assert_allclose(model.means_, 7.0)


@each_kind
@pytest.mark.parametrize("scale", [1e150, 1e-150])
def test_values_of_1e150_and_1e_minus_150_are_fitted(covariance, scale):
    X, _ = blobs(200)
    want = GaussianMixture(3, covariance=covariance, random_state=0).fit(X)
    got = GaussianMixture(3, covariance=covariance, random_state=0).fit(X * scale)
    np.testing.assert_array_equal(got.predict(X * scale), want.labels_)
    np.testing.assert_allclose(got.score_samples(X * scale), want.score_samples(X) - 3 * np.log(scale), rtol=1e-8)
    assert np.isfinite(got.sample(10)[0]).all()


def test_one_column_of_1e150_beside_one_of_1e_minus_150():
    X, _ = blobs(200, f=2)
    scale = np.array([1e150, 1e-150])
    want = GaussianMixture(3, random_state=0).fit(X)
    got = GaussianMixture(3, random_state=0).fit(X * scale)
    np.testing.assert_array_equal(got.predict(X * scale), want.labels_)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_a_column_whose_squares_do_not_fit_is_named(scale):
    X, _ = blobs(50, f=2)
    table = pd.DataFrame(X * [1.0, scale], columns=["length", "mass"])
    with pytest.raises(ValueError, match=r"column 'mass' has values from .* their squares do not fit float64"):
        GaussianMixture(2).fit(table)


def test_float32_at_a_million_equals_float64():
    X, _ = blobs(2000)
    X = (X + 1e6).astype(np.float32)
    narrow = GaussianMixture(3, random_state=0).fit(X)
    wide = GaussianMixture(3, random_state=0, dtype="float64").fit(X)
    assert narrow.lower_bound_ == pytest.approx(wide.lower_bound_, abs=1e-3)
    assert (narrow.covariances_ > -1e9).all() and (np.diagonal(narrow.covariances_, axis1=1, axis2=2) > 0).all()


# Labels.


def test_all_labelled_is_class_wise_gaussians():
    X, y = blobs(300)
    model = GaussianMixture(3, reg=0.0).fit(X, y)
    for c in range(3):
        np.testing.assert_allclose(model.means_[c], X[y == c].mean(0), rtol=1e-10)
        np.testing.assert_allclose(model.covariances_[c], np.cov(X[y == c].T, bias=True), rtol=1e-8)
        assert model.weights_[c] == pytest.approx((y == c).mean())
    assert model.n_iter_ <= 3


def test_some_labels_name_the_components_and_hold():
    X, cloud = blobs(600, c=4, seed=3)
    y = np.where(np.random.default_rng(0).random(600) < 0.05, 10 + cloud, -1)
    y[cloud == 3] = -1
    model = GaussianMixture(4, random_state=0).fit(X, y)
    assert model.classes_.tolist() == [10, 11, 12]
    assert model.component_classes_.tolist() == [10, 11, 12, -1]
    assert (model.component_classes_[model.labels_][y >= 0] == y[y >= 0]).all()
    want = np.where(cloud == 3, -1, 10 + cloud)
    assert (model.predict_class(X) == want).mean() > 0.9


def test_a_label_against_all_evidence_still_holds():
    X, cloud = blobs(300, c=2, apart=8.0)
    y = np.full(300, -1)
    y[:40] = cloud[:40]
    y[0] = 1 - cloud[0]
    assert GaussianMixture(2, random_state=0).fit_predict(X, y)[0] == y[0]


def test_a_class_may_have_several_components():
    X, cloud = blobs(600, c=4, seed=5)
    y = np.where(np.arange(600) < 200, cloud // 2, -1)
    model = GaussianMixture(4, class_components={0: [0, 1], 1: [2, 3]}, random_state=0).fit(X, y)
    assert (model.predict_class(X) == cloud // 2).mean() > 0.95
    assert set(model.labels_[y == 0]) <= {0, 1}


def test_ten_percent_of_the_labels_lift_the_digits():
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    X, y = load_digits(return_X_y=True)
    Z = PCA(16, random_state=0).fit_transform(X)
    some = np.random.default_rng(0).random(len(y)) < 0.1
    labelled = GaussianMixture(10, reg=1e-3, random_state=0).fit(Z[some], y[some])
    semi = GaussianMixture(10, reg=1e-3, random_state=0).fit(Z, np.where(some, y, -1))
    before, after = ((m.predict_class(Z[~some]) == y[~some]).mean() for m in (labelled, semi))
    # The design's prototype went from .82 to .94.
    assert after > before + 0.05 and after > 0.9


def test_a_component_that_nothing_may_join_stays_empty():
    X, y = blobs(100, c=2)
    model = GaussianMixture(3).fit(X, y)
    assert model.weights_[2] < 1e-100 and np.isfinite(model.score_samples(X)).all()


# Collapse and convergence.


def test_a_component_without_samples_is_reseeded_from_the_worst_explained():
    X, _ = blobs(400, c=3, apart=6.0)
    first = start(X, 3, "full")
    first["means_init"] = np.vstack([X.mean(0), X[0], X[0] + 1e6])
    model = GaussianMixture(3, **first).fit(X)
    assert model.n_reseeded_ >= 1
    assert model.weights_.min() > 0.05
    assert model.lower_bound_ == pytest.approx(
        GaussianMixture(3, n_init=5, random_state=0).fit(X).lower_bound_, abs=0.05
    )


def test_a_covariance_without_rank_is_an_error_that_names_the_column():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(50, 2)), columns=["a", "b"])
    X["sum"] = X["a"]
    with pytest.raises(Collapsed, match=r"lost its rank: column '(a|sum)' .* Raise reg, use covariance='diag'"):
        GaussianMixture(2, reg=0.0, random_state=0).fit(X)
    with pytest.raises(ValueError, match="column constant is constant"):
        GaussianMixture(2, reg=0.0).fit(X.assign(constant=1.0))


def test_too_few_steps_warn_with_the_last_change_and_what_to_try():
    X, _ = blobs(300, apart=1.0)
    with pytest.warns(ConvergenceWarning, match=r"max_iter=1 steps: the last one changed .* Raise max_iter or tol"):
        GaussianMixture(3, max_iter=1, tol=1e-9, random_state=0).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        GaussianMixture(3, tol=1.0, random_state=0).fit(X)


# Bad input.

GOOD = np.arange(12.0).reshape(6, 2)


@pytest.mark.parametrize(
    ("X", "y", "w", "message"),
    [
        (np.array([[1.0, 2.0], [np.nan, np.inf], [3.0, np.nan]]), None, None,
         r"X contains 2 NaN and 1 infinite \(inf\) values, the first in row 1, column 0.*missing='expect'"),
        (GOOD[:1], None, None, r"1 sample"),
        (GOOD[:2], None, None, r"n_components=3 needs as many samples and at least 2, got n_samples = 2"),
        (GOOD, [0, 1, 2], None, "y has 3 labels and X has 6 samples"),
        (GOOD, [0, 1.5, 1, 1, 1, 1], None, r"y must hold whole numbers, -1 for unlabelled, got 1\.5 at position 1"),
        (GOOD, list("aabbab"), None, "y must hold whole numbers, -1 for unlabelled, got 'a'"),
        (GOOD, [0, 1, -2, 1, 1, 1], None, "y must be >= 0, or -1 for unlabelled, got -2 at position 2"),
        (GOOD, [0, 1, 2, 3, 4, 5], None, "y has 6 classes and there are n_components=3"),
        (GOOD, None, [1, 1], "sample_weight has 2 entries and X has 6 samples"),
        (GOOD, None, [1, 1, 1, 1, -1, 1], r"sample_weight must be finite and >= 0, got -1\.0 at position 4"),
        (GOOD, None, np.zeros(6), "sample_weight is zero for every sample"),
        (GOOD, None, [1, 0, 0, 0, 0, 2], "n_components=3 needs as many samples whose sample_weight is above 0, got 2"),
        (GOOD, None, np.ones((6, 1)), r"sample_weight must have shape \(samples,\), got \(6, 1\)"),
        (GOOD[:, 0], None, None, "Expected 2D array, got 1D array"),
        (pd.DataFrame({"a": [1.0, 2, 3], "kind": ["x", "y", "z"]}), None, None, "column 'kind' is no column of numbers: row 0"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_named(X, y, w, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(3).fit(X, y, sample_weight=w)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_components": 0}, "n_components must be a whole number >= 1, got 0"),
        ({"n_components": 2.5}, r"n_components must be a whole number >= 1, got 2\.5"),
        ({"covariance": "round"}, r"covariance must be one of .*got 'round'"),
        ({"tol": -1}, "tol must be a number >= 0, got -1"),
        ({"variance": 1.0}, "variance is for covariance='spherical'"),
        ({"variance": 0, "covariance": "spherical"}, "variance must be a number > 0, got 0"),
        ({"reg": np.nan}, "reg must be a number >= 0, got nan"),
        ({"init": "kmeans"}, r"init must be one of \['k-means\+\+', 'random'\], got 'kmeans'"),
        ({"missing": "drop"}, "missing must be one of"),
        ({"reg_unit": "m"}, "reg_unit must be one of"),
        ({"block_size": 0}, "block_size must be 'auto' or a whole number >= 1, got 0"),
        ({"device": "warp"}, "device must be 'auto', 'cpu', 'cuda' or the like, got 'warp'"),
        ({"dtype": "int8"}, "dtype must be None, float32 or float64, got 'int8'"),
        ({"distributed": "yes"}, "distributed must be True, False or 'auto'"),
        ({"distributed": True}, "start the script with torchrun"),
        ({"n_components": 2, "means_init": [[0.0, 1.0]]}, r"means_init must have shape \(2, 2\), got \(1, 2\)"),
        ({"weights_init": [0.5]}, "weights_init must be >= 0 and sum to 1"),
        ({"precisions_init": [[[1.0, 2.0], [2.0, 1.0]]]}, "precisions_init must be symmetric and positive definite"),
    ],
    ids=str,
)
def test_bad_parameters_are_named_in_fit_and_stored_before(parameters, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**parameters).fit(GOOD)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({0: [0]}, "class 1 has no component in class_components"),
        ({0: [0], 1: [0]}, "gives a component to two classes"),
        ({0: [0], 1: [7]}, r"class_components of class 1 must lie between 0 and 1, got \[7\]"),
    ],
)
def test_a_class_without_a_component_is_named(mapping, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(2, class_components=mapping).fit(GOOD, [0, 1, -1, -1, -1, -1])


def test_a_class_with_one_labelled_sample_warns_and_fits(caplog):
    X, _ = blobs(100, c=2)
    y = np.full(100, -1)
    y[:4] = [0, 1, 1, 1]
    model = GaussianMixture(2, random_state=0).fit(X, y)
    assert "class 0 has one labelled sample" in caplog.text
    assert model.labels_[0] == 0 and np.isfinite(model.covariances_).all()


def test_new_samples_are_checked_too():
    X, _ = blobs(50)
    model = GaussianMixture(2, random_state=0).fit(X)
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3 features"):
        model.predict(X[:, :2])
    X[7, 1] = np.nan
    with pytest.raises(ValueError, match="X contains 1 NaN values, the first in row 7, column 1"):
        model.score_samples(X)
    with pytest.raises(ValueError, match="n_samples must be a whole number >= 1, got 0"):
        model.sample(0)


def test_torch_tensors_and_devices_of_ones_own_are_taken():
    X, _ = blobs(60)
    a = GaussianMixture(2, random_state=0, device="auto").fit(torch.from_numpy(X))
    b = GaussianMixture(2, random_state=0).fit(X)
    np.testing.assert_allclose(a.means_, b.means_)
