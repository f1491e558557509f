import numpy as np
import pytest
import torch

from mixtura.density import CategoryDiscovery, discovery_accuracy
from mixtura.density.known_classes import calibrate, calibrated_prior, within_covariance


def gaussians(k, known, *, each=60, d=8, apart=4.0, seed=0, labelled=0.5):
    """k unit balls whose centres are at least ``apart`` from each other; half of the rows of the first are labelled."""
    rng = np.random.default_rng(seed)
    centres = np.empty((0, d))
    while len(centres) < k:
        drawn = rng.normal(size=d) * apart * 0.9
        if not len(centres) or np.linalg.norm(centres - drawn, axis=1).min() >= apart:
            centres = np.vstack([centres, drawn])
    t = np.repeat(np.arange(k), each)
    X = rng.normal(size=(len(t), d)) + centres[t]
    return X, np.where((t < known) & (rng.random(len(t)) < labelled), t, -1), t


@pytest.mark.parametrize(("k", "initial"), [(6, 1), (6, 25), (12, 1), (12, 25)])
def test_the_number_of_separated_gaussians_is_found_from_few_and_from_many_clusters(k, initial):
    X, y, t = gaussians(k, 5, seed=k)
    found = CategoryDiscovery(initial, n_init=2).fit(X, y)
    assert abs(found.n_classes_ - k) <= 1
    score = discovery_accuracy(t[y < 0], found.labels_[y < 0], range(5))
    assert score.old > 0.97 and score.all > 0.88


def test_labelled_samples_keep_their_class_and_new_classes_get_fresh_numbers():
    X, y, t = gaussians(6, 3, seed=1)
    y = np.where(y >= 0, np.array([2, 7, 40])[np.maximum(y, 0)], -1)
    found = CategoryDiscovery().fit(X, y)
    assert (found.labels_[y >= 0] == y[y >= 0]).all()
    assert found.classes_.tolist() == [2, 7, 40, 41, 42, 43] and found.novel_classes_.tolist() == [41, 42, 43]
    np.testing.assert_allclose(found.predict_proba(X).sum(1), 1)
    assert (found.predict(X) == found.classes_[found.predict_proba(X).argmax(1)]).all()
    np.testing.assert_allclose(found.prototypes_[0], X[found.labels_ == 2].mean(0))
    assert discovery_accuracy(t, found.predict(X), [0, 1, 2]).all > 0.97


def test_one_elongated_class_stays_one_and_every_class_of_a_fully_labelled_table_stays():
    rng = np.random.default_rng(0)
    stretch = np.array([12.0, 1.0, 1.0])
    X = np.concatenate([rng.normal(size=(150, 3)) * stretch, rng.normal(size=(150, 3)) * stretch + [0, 9, 0]])
    t = np.repeat([0, 1], 150)
    y = np.where((t == 0) & (np.arange(300) % 2 == 0), 0, -1)
    assert CategoryDiscovery().fit(X, y).n_classes_ == 2
    assert CategoryDiscovery(3).fit(X, t).classes_.tolist() == [0, 1]


def test_the_same_seed_gives_the_same_result_to_the_bit():
    X, y, _ = gaussians(5, 2, seed=3)
    one, two = (CategoryDiscovery(2, rounds=6, anneal=2, seed=4).fit(X, y) for _ in range(2))
    assert (one.labels_ == two.labels_).all() and (one.means_ == two.means_).all() and one.temper_ == two.temper_
    assert [r.log_evidence for r in one.history_] == [r.log_evidence for r in two.history_]


def test_scale_and_order_of_samples_and_a_rotation_do_not_change_the_classes():
    X, y, _ = gaussians(5, 2, seed=5)
    plain = CategoryDiscovery(2).fit(X, y)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    moved = CategoryDiscovery(2).fit(1000 * X @ turn + 3, y)
    # Chance draws other starts, but the classes are far apart.
    assert plain.n_classes_ == moved.n_classes_ == 5
    assert discovery_accuracy(plain.labels_, moved.labels_, [0]).all > 0.99
    order = np.random.default_rng(1).permutation(len(X))
    again = CategoryDiscovery(2).fit(X[order], y[order])
    assert discovery_accuracy(plain.labels_[order], again.labels_, [0]).all > 0.99


def test_the_papers_rule_has_its_prior_and_never_touches_known_clusters():
    X, y, _ = gaussians(8, 4, seed=2)
    found = CategoryDiscovery(12, rule="paper").fit(X, y)
    assert found.temper_ == 1.0 and found.calibration_ is None
    assert {m.kind for r in found.history_ for m in r.moves} <= {"split", "merge"}
    assert all(min(m.clusters) >= 4 for r in found.history_ for m in r.moves)


def test_a_cap_on_new_classes_holds():
    X, y, _ = gaussians(8, 3, seed=2)
    found = CategoryDiscovery(1, max_novel=2).fit(X, y)
    assert found.n_novel_ == 2 and all(r.n_clusters <= 5 for r in found.history_)


def test_diagonal_covariances_find_axis_parallel_classes():
    X, y, _ = gaussians(6, 3, seed=4)
    found = CategoryDiscovery(2, covariance="diag", pca=None).fit(X * [1, 2, 3, 4, 5, 6, 7, 8], y)
    assert found.n_classes_ == 6 and found.covariances_.shape == (6, 8)
    assert found.score_samples(X).shape == (len(X),)


def test_the_temper_lies_between_halves_and_pairs_and_moves_with_the_margin():
    rng = np.random.default_rng(0)
    # Known classes of two lumps each: one Gaussian is a rough picture of them.
    lump = rng.integers(2, size=600)
    c = np.repeat([0, 1, 2], 200)
    X = torch.from_numpy(rng.normal(size=(600, 2)) + np.stack([9.0 * lump, 60.0 * c], 1))
    classes, g = torch.from_numpy(c), torch.Generator().manual_seed(0)
    prior = calibrated_prior(within_covariance(X, classes, 3, "full"), torch.zeros(2).double(), 0.01, 52.0)
    low, middle, high = (calibrate(X, classes, 3, prior, margin=m, generator=g) for m in (0.0, 0.5, 1.0))
    assert low.temper == pytest.approx(max(low.of_halves)) and low.temper > 1
    assert high.temper == pytest.approx(0.9 * min(high.of_pairs)) and high.temper > low.temper
    assert middle.temper == pytest.approx((low.temper + high.temper) / 2)
    found = CategoryDiscovery(4, pca=None).fit(X.numpy(), np.where(np.arange(600) % 2, c, -1))
    assert found.n_classes_ == 3
    assert (
        CategoryDiscovery(4, pca=None, calibration=None, shed=None).fit(X.numpy(), np.where(c < 2, c, -1)).temper_ == 1
    )


def test_held_out_samples_are_what_the_temper_is_learned_from():
    X, y, _ = gaussians(4, 2, seed=6)
    held = (y >= 0) & (np.arange(len(y)) % 2 == 0)
    collapsed = np.where(((y >= 0) & ~held)[:, None], 1e-3 * X, X)  # as a supervised loss does it, only more so
    with_held = CategoryDiscovery(calibration="heldout", rounds=0).fit(collapsed, y, held_out=held)
    without = CategoryDiscovery(calibration="heldout", rounds=0).fit(collapsed, y)
    assert with_held.calibration_ != without.calibration_


def test_more_dimensions_than_samples_are_reduced_with_a_warning(caplog):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20, 50)) + 20 * np.repeat([0, 1], 10)[:, None]
    found = CategoryDiscovery(1, pca=None).fit(X, np.where(np.arange(20) % 2, np.repeat([0, 1], 10), -1))
    assert "20 samples span fewer than 50 dimensions; reduced to 19" in caplog.text
    assert found.components_.shape == (19, 50)


def test_one_known_class_falls_back_to_no_temper_with_a_warning(caplog):
    X, y, _ = gaussians(3, 1, seed=0)
    assert CategoryDiscovery().fit(X, y).temper_ == 1.0
    assert "one known class tells of no pair" in caplog.text


X0, Y0 = np.arange(12.0).reshape(6, 2), np.array([0, 0, 1, 1, -1, -1])


@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({}, np.full(6, -1), "y has no labelled sample"),
        ({}, np.array([0, 0, 1, -1, -1, -1]), "class 1 has 1 labelled sample, and a class needs at least 2"),
        ({}, np.array([0, 0, -3, 1, 1, -1]), "y must be >= 0, or -1 for unlabelled, got -3 at position 2"),
        ({}, np.array([0.5, 0, 0, 1, 1, -1]), "whole numbers, -1 for unlabelled, got 0.5"),
        ({}, np.array(["a", "a", "b", "b", "", ""]), "number the classes first"),
        ({}, Y0[:4], "y has 4 labels and X has 6 samples"),
        ({"initial_novel": -1}, Y0, "initial_novel must be a whole number >= 0, got -1"),
        ({"max_novel": 1.5}, Y0, "max_novel must be a whole number >= 0, got 1.5"),
        ({"pca": 0}, Y0, "pca must be a whole number >= 1, got 0"),
        ({"rule": "bic"}, Y0, r"rule must be one of \['calibrated', 'paper'\], got 'bic'"),
        ({"calibration": "all"}, Y0, "calibration must be one of"),
        ({"covariance": "tied"}, Y0, "covariance must be one of"),
        ({"alpha": 0.0}, Y0, "alpha must be a number > 0, got 0.0"),
        ({"alpha": "auto"}, Y0, "alpha must be a number > 0, got 'auto'"),
        ({"nu0": 3.0}, Y0, "nu0 must be above 3 for 2 features"),
        ({"shed": 0.4}, Y0, "shed must be above 0.5 and at most 1, or None, got 0.4"),
        ({"margin": 1.1}, Y0, "margin must be between 0 and 1, got 1.1"),
        ({"rounds": -1}, Y0, "rounds must be a whole number >= 0, got -1"),
        ({"n_init": 0}, Y0, "n_init must be a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(options, y, message):
    with pytest.raises(ValueError, match=message):
        CategoryDiscovery(**options).fit(X0, y)


def test_missing_values_are_counted_and_the_first_is_named():
    X = X0.copy()
    X[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"X contains 1 missing \(NaN\) values, the first in row 3, column 1"):
        CategoryDiscovery().fit(X, Y0)
    with pytest.raises(ValueError, match=r"held_out must be boolean of shape \(6,\)"):
        CategoryDiscovery(calibration="heldout").fit(X0, Y0, held_out=[0, 1])
    with pytest.raises(ValueError, match="held_out has 0 samples of class 1"):
        held = np.array([True, True, False, False, False, False])
        CategoryDiscovery(calibration="heldout").fit(X0, Y0, held_out=held)


def test_few_rows_of_many_features_are_no_nearer_to_two_halves_than_all_rows():
    rng = np.random.default_rng(0)
    classes = torch.arange(3).repeat(1000)
    X = torch.from_numpy(rng.normal(size=(3, 48))[classes] * 2 + rng.normal(size=(3000, 48)))
    few = torch.where(torch.arange(3000) < 450, classes, -1)
    prior = calibrated_prior(within_covariance(X, few, 3, "full"), X.mean(0), 0.01, 98.0)
    g = torch.Generator().manual_seed(0)
    of_all = calibrate(X, classes, 3, prior, generator=g)
    of_few = calibrate(X, few, 3, prior, sizes=torch.full((3,), 1000), generator=g)
    # 150 rows counted as 1000, and nothing taken off, would say 6.9 and 5.4 where all rows say -0.4 and 2.3.
    assert max(of_all.of_halves) < 0 and max(of_few.of_halves) < 1
    np.testing.assert_allclose(of_few.of_pairs, of_all.of_pairs, atol=0.6)
