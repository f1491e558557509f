"""Starts: centres far apart, Lloyd steps, and mixtures of the groups they make."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from test_mixture import blobs

from mixtura.density import kmeans_plus_plus, lloyd
from mixtura.density.starts import initial_mixture, start_means


def test_the_second_centre_is_drawn_by_squared_distance():
    # From the sample at 0 the others are at 1 and 3: probabilities 1/10 and 9/10 of one draw. The best of 2 draws is
    # taken (2 + log 2 rounded down), and the one at 3 leaves less: 1 - (1/10)^2 = 0.99.
    X = np.array([[0.0], [1.0], [3.0]])
    n = 2000
    rng = np.random.RandomState(0)
    far = np.mean([kmeans_plus_plus(X, 2, first=X[:1], random_state=rng)[1, 0] == 3.0 for _ in range(n)])
    assert abs(far - 0.99) < 5 * (0.99 * 0.01 / n) ** 0.5


def test_given_centres_come_first_and_weights_of_zero_are_never_drawn():
    X, _ = blobs(100)
    w = np.where(np.arange(100) < 50, 1.0, 0.0)
    found = kmeans_plus_plus(X, 6, first=X[60:62], sample_weight=w, random_state=0)
    np.testing.assert_array_equal(found[:2], X[60:62])
    assert all((X[:50] == centre).all(1).any() for centre in found[2:])


def test_fewer_different_samples_than_clusters_repeat():
    assert kmeans_plus_plus(np.ones((5, 2)), 3, random_state=0).tolist() == [[1.0, 1.0]] * 3


def test_too_many_clusters_are_an_error():
    with pytest.raises(ValueError, match="n_clusters must be between the 0 given and 3, with the 3 samples, got 4"):
        kmeans_plus_plus(np.ones((3, 1)), 4)


def test_lloyd_equals_scikit_learns_k_means():
    X, _ = blobs(300, c=4)
    centres, labels = lloyd(X, X[:4], steps=300)
    peer = KMeans(4, init=X[:4], n_init=1, tol=0.0, max_iter=300).fit(X)
    np.testing.assert_allclose(centres, peer.cluster_centers_, rtol=1e-8)
    np.testing.assert_array_equal(labels, peer.labels_)


def test_lloyd_holds_samples_to_what_they_may_join_and_keeps_an_empty_cluster():
    X, _ = blobs(50)
    allowed = np.ones((50, 3), dtype=bool)
    allowed[:20] = [False, True, False]
    allowed[20:] = [True, True, False]
    centres, labels = lloyd(X, X[:3], allowed=allowed)
    assert (labels[:20] == 1).all() and not (labels == 2).any()
    np.testing.assert_array_equal(centres[2], X[2])


def test_means_of_classes_start_among_their_samples():
    X, cloud = blobs(300, c=3)
    classes = np.where(np.arange(300) < 100, cloud, -1)
    classes[cloud == 2] = -1
    means = start_means(
        X, 4, "k-means++", classes=classes, class_components={0: [0], 1: [1, 2]}, sample_weight=None,
        random_state=np.random.RandomState(0),
    )  # fmt: skip
    np.testing.assert_allclose(means[0], X[classes == 0].mean(0))
    assert all((X[classes == 1] == mean).all(1).any() for mean in means[1:3])
    assert (X[classes < 0] == means[3]).all(1).any()


def test_a_group_of_one_sample_starts_as_wide_as_the_others_not_flat():
    X, cloud = blobs(200, c=2)
    labels = cloud.copy()
    labels[0] = 2
    means = np.stack([X[labels == c].mean(0) for c in range(3)])
    found = initial_mixture(X, labels, means, "full", floor=0.0, sample_weight=None)
    widths = torch.linalg.eigvalsh(found.covariances)
    assert widths[2].min() > 0.1 * widths[:2].min()
    assert found.weights[2] == pytest.approx(1 / 200)
