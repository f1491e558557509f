"""Clusters of different shapes are told apart by their likelihood, whatever the units, the order and the start."""

import numpy as np
import pytest
from heterogeneous import error, groups
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from mixtura.density import AdjustedSDPClustering, kmeans_sdp

LOW = {"solver": "lowrank"}


@pytest.fixture(scope="module")
def crossed():
    """Two groups of the same mean: each is wide where the other is flat."""
    rng = np.random.default_rng(0)
    widths = np.array([9, 9, 9, 0.2, 0.2, 0.2]) ** 0.5
    labels = np.arange(300) % 2
    return rng.normal(size=(300, 6)) * np.where(labels[:, None] == 0, widths, widths[::-1]), labels


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_one_mean_and_two_shapes_are_found_from_random_labels(seed: int, crossed):
    X, labels = crossed
    assert error(AdjustedSDPClustering(2, init="random", seed=seed).fit(X).labels_, labels) <= 0.01


def test_centroids_and_one_shape_for_all_cannot_tell_them_apart(crossed):
    X, labels = crossed
    assert error(KMeans(2, n_init=10, random_state=0).fit_predict(X), labels) > 0.3
    assert error(kmeans_sdp(X, 2), labels) > 0.3
    assert error(AdjustedSDPClustering(2).fit(X).labels_, labels) <= 0.01


def test_units_shifts_turns_and_order_do_not_matter():
    X, labels, _ = groups(60, 3, 2, apart=6.0, spread=1.0, seed=0)
    plain = AdjustedSDPClustering(2, **LOW).fit(X)
    assert error(plain.labels_, labels) < 0.05
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    for changed in (X + 1e6, X * 1000, X * [1e-3, 1.0, 1e6], X @ turn):
        assert error(AdjustedSDPClustering(2, **LOW).fit(changed).labels_, plain.labels_) == 0
    order = np.random.default_rng(2).permutation(60)
    assert error(AdjustedSDPClustering(2, **LOW).fit(X[order]).labels_, plain.labels_[order]) == 0
    scaled = AdjustedSDPClustering(2, **LOW).fit(X * 1000)
    assert abs(scaled.log_likelihood_ - plain.log_likelihood_ + X.size * np.log(1000)) < 1e-6 * X.size


def test_exact_and_thin_solvers_give_the_same_clusters():
    X, labels, _ = groups(60, 2, 2, apart=4.0, spread=1.0, seed=1)
    exact, thin = (AdjustedSDPClustering(2, solver=solver).fit(X) for solver in ("admm", "lowrank"))
    assert error(exact.labels_, thin.labels_) == 0 and error(exact.labels_, labels) < 0.1
    assert abs(exact.objective_ - thin.objective_) < 2e-3 * abs(exact.objective_)
    np.testing.assert_allclose(exact.memberships_.sum(1), 1.0, atol=1e-3)
    assert AdjustedSDPClustering(2)._solver(150) == "admm" and AdjustedSDPClustering(2)._solver(151) == "lowrank"


def test_the_likelihood_is_that_of_the_groups_and_the_best_of_all_turns():
    X, _, _ = groups(90, 3, 3, apart=3.0, spread=1.0, seed=2)
    found = AdjustedSDPClustering(3, reg=0.0, **LOW).fit(X)
    total = 0.0
    for k in range(3):
        mine = X[found.labels_ == k]
        np.testing.assert_allclose(found.covariances_[k], np.cov(mine.T, bias=True), rtol=1e-9, atol=1e-9)
        total += multivariate_normal(mine.mean(0), np.cov(mine.T, bias=True)).logpdf(mine).sum()
    assert abs(found.log_likelihood_ - total) < 1e-8 * abs(total)
    scale = np.log(X.std(0)).sum() * len(X)
    assert found.log_likelihood_ == pytest.approx(max(step.log_likelihood for step in found.history_) - scale)
    assert found.n_iter_ == len(found.history_)


def test_new_samples_are_judged_by_the_groups_gaussians():
    X, _, _ = groups(90, 3, 3, apart=6.0, spread=1.0, seed=3)
    found = AdjustedSDPClustering(3, **LOW).fit(X)
    laws = [multivariate_normal(m, s) for m, s in zip(found.means_, found.covariances_, strict=True)]
    joint = np.stack([law.pdf(X[:9]) * w for law, w in zip(laws, found.weights_, strict=True)], 1)
    np.testing.assert_allclose(found.score_samples(X[:9]), np.log(joint.sum(1)), rtol=1e-9)
    np.testing.assert_allclose(found.predict_proba(X[:9]), joint / joint.sum(1, keepdims=True), atol=1e-9)
    assert (found.predict(X) == found.labels_).mean() > 0.97
    assert found.gaussians_.n_components == 3


def test_a_certificate_says_how_far_the_last_program_is_from_its_optimum():
    X, _, _ = groups(60, 2, 2, apart=4.0, spread=1.0, seed=4)
    found = AdjustedSDPClustering(2, certify=True, **LOW).fit(X)
    assert -1e-4 < found.gap_ < 2e-3  # an answer that is infeasible by 1e-5 can lie that much below the bound
    assert np.isnan(AdjustedSDPClustering(2, **LOW).fit(X).gap_)


def test_a_sketch_tells_the_rows_that_it_left_out():
    X, labels, _ = groups(600, 3, 3, apart=8.0, spread=1.0, seed=5)
    found = AdjustedSDPClustering(3, sketch=90, n_sketches=2).fit(X)
    assert error(found.labels_, labels) < 0.03
    assert found.memberships_.shape == (600, 3)
    assert AdjustedSDPClustering()._sketch_rows(2001) == 1000 and AdjustedSDPClustering()._sketch_rows(2000) is None


def test_the_same_seed_gives_the_same_clusters_and_a_start_of_ones_own_is_taken():
    X, labels, _ = groups(90, 3, 3, apart=3.0, spread=1.0, seed=6)
    one, two = (AdjustedSDPClustering(3, seed=4, **LOW).fit(X) for _ in range(2))
    np.testing.assert_array_equal(one.labels_, two.labels_)
    assert error(AdjustedSDPClustering(3, init=labels, **LOW).fit(X).labels_, labels) < 0.15


def test_one_cluster_and_repeated_samples_and_a_constant_column():
    X, _, _ = groups(30, 2, 1, apart=1.0, spread=1.0, seed=7)
    assert set(AdjustedSDPClustering(1).fit(X).labels_) == {0}
    twice = np.repeat([[0.0, 1.0, 7.0], [4.0, 1.5, 7.0], [0.0, 9.0, 7.0]], 8, 0)
    found = AdjustedSDPClustering(3, **LOW).fit(twice)
    assert error(found.labels_, np.repeat(np.arange(3), 8)) == 0
    assert np.isfinite(found.log_likelihood_)


@pytest.mark.parametrize("options", [{"covariance": "shrunk"}, {"covariance": "tied"}, {"covariance": "diag"},
                                     {"covariance": "spherical"}, {"metric": "total"}])  # fmt: skip
def test_every_shape_and_metric_finds_what_is_apart(options):
    X, labels, _ = groups(60, 3, 2, apart=10.0, spread=0.5, seed=8)
    assert error(AdjustedSDPClustering(2, **LOW, **options).fit(X).labels_, labels) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 31}, "n_clusters=31 needs as many samples, got n_samples = 30"),
        ({"n_clusters": 0}, "n_clusters must be a whole number >= 1, got 0"),
        ({"reg": -1.0}, "reg must be a number >= 0, got -1.0"),
        ({"covariance": "round"}, "covariance must be one of"),
        ({"metric": "cosine"}, "metric must be one of"),
        ({"solver": "simplex"}, "solver must be one of"),
        ({"init": "best"}, "init must be 'sdp', 'random' or labels, got 'best'"),
        ({"init": [0] * 30}, "init leaves group 1 empty"),
        ({"init": [0.5, 1] * 15}, "init must hold whole numbers, -1 for unlabelled, got 0.5 at position 0"),
        ({"init": [0, 1, 5] * 10}, "init must hold 30 labels from 0 to 1"),
        ({"init": [0, 1] * 9}, "init must hold 30 labels from 0 to 1, got 18"),
        ({"sketch": 1}, "sketch must be None, False, True or between n_clusters=2 and 30, got 1"),
        ({"sketch": 20, "init": [0, 1] * 15}, "init with labels has no effect on a sketch"),
        ({"device": "warp"}, "device must be 'auto', 'cpu', 'cuda' or the like, got 'warp'"),
    ],
)
def test_bad_input_is_named(options, message):
    X, _, _ = groups(30, 2, 2, apart=3.0, spread=1.0, seed=9)
    with pytest.raises(ValueError, match=message):
        AdjustedSDPClustering(**({"n_clusters": 2, "solver": "lowrank"} | options)).fit(X)


def test_what_is_not_finite_or_has_no_width_is_named():
    X, _, _ = groups(30, 2, 2, apart=3.0, spread=1.0, seed=10)
    X[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"X contains 1 missing \(NaN\) values, the first in row 3, column 1"):
        AdjustedSDPClustering(2).fit(X)
    X[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"1 infinite \(inf\) values, the first in row 3, column 1"):
        AdjustedSDPClustering(2).fit(X)
    flat = np.c_[np.arange(30.0), np.arange(30.0)]
    with pytest.raises(
        ValueError, match=r"covariance of group \d is not positive definite: its smallest eigenvalue is"
    ):
        AdjustedSDPClustering(2, reg=0.0, **LOW).fit(flat)


@pytest.mark.parametrize("options", [{"solver": "admm"}, {"certify": True}])
def test_what_is_too_large_for_a_proof_is_told_before_any_work(options):
    X = np.random.default_rng(0).normal(size=(20_000, 2))
    with pytest.raises(ValueError, match=r"would take 58 GB .* solver='lowrank' without certify .* a sketch"):
        AdjustedSDPClustering(3, sketch=False, **options).fit(X)


def test_labels_that_do_not_settle_are_told():
    X, _, _ = groups(90, 3, 3, apart=2.0, spread=1.0, seed=11)
    with pytest.warns(ConvergenceWarning, match=r"did not settle in max_iter=1 turns: the last one moved \d+"):
        AdjustedSDPClustering(3, max_iter=1, **LOW).fit(X)
