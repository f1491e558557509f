import itertools
import math

import numpy as np
import pytest

from mixtura.density.discovery_scores import discovery_accuracy, estimate_classes_by_labels


def best_by_enumeration(y, labels):
    """Share of right rows under the best one-to-one matching, over all of them."""
    classes, clusters = sorted(set(y)), sorted(set(labels))
    targets = classes + [None] * len(clusters)
    return max(
        np.mean([dict(zip(clusters, mates, strict=True))[c] == t for c, t in zip(labels, y, strict=True)])
        for mates in set(itertools.permutations(targets, len(clusters)))
    )


def test_the_accuracy_is_the_best_of_all_matchings():
    rng = np.random.default_rng(0)
    for clusters in (2, 3, 4):
        y, labels = rng.integers(0, 3, 25).tolist(), rng.integers(0, clusters, 25).tolist()
        assert discovery_accuracy(y, labels, [0]).all == pytest.approx(best_by_enumeration(y, labels))


def test_names_of_clusters_do_not_matter_and_extra_clusters_are_errors():
    y = np.repeat([0, 1, 2], 10)
    assert discovery_accuracy(y, (y + 5) * 7, [0, 1]).all == 1.0
    split = np.where(np.arange(30) >= 26, 9, y)  # four rows of class 2 in a cluster of their own
    found = discovery_accuracy(y, split, [0, 1])
    assert found.old == 1.0 and found.new == pytest.approx(0.6) and found.all == pytest.approx(26 / 30)


def test_old_and_new_share_one_matching():
    # Cluster 0 holds old class 0 (6 rows) and new class 1 (5 rows): only one of them may have it.
    y = np.array([0] * 6 + [1] * 5)
    found = discovery_accuracy(y, np.zeros(11, int), [0])
    assert found.old == 1.0 and found.new == 0.0
    assert math.isnan(discovery_accuracy(y, y, [0, 1]).new)


def test_counting_by_labels_finds_separated_classes_and_takes_the_least_of_equals():
    rng = np.random.default_rng(0)
    t = np.repeat(np.arange(4), 40)
    X = rng.normal(size=(160, 2)) + 12 * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])[t]
    assert estimate_classes_by_labels(X, np.where(np.arange(160) % 2, t, -1), range(2, 8)) == 4
    # With one class labelled two clusters agree as well as four: the count of labelled rows sees no others.
    assert estimate_classes_by_labels(X, np.where(t == 0, 0, -1), range(2, 5)) == 2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="as long as each other and not empty"):
        discovery_accuracy([0, 1], [0], [0])
    with pytest.raises(ValueError, match="no labelled row"):
        estimate_classes_by_labels(np.zeros((3, 1)), [-1, -1, -1], [1])
    with pytest.raises(ValueError, match="between 1 and the 3 rows"):
        estimate_classes_by_labels(np.zeros((3, 1)), [0, 0, -1], [4])
