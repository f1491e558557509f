"""Covariances from membership matrices are those of groups; shrinkage is Ledoit and Wolf's."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from mixtura.density.group_shapes import _shrinkage, group_covariances, shaped
from mixtura.density.membership_program import partition_factors


def of_partition(X, labels, k):
    factors = partition_factors(labels, k).numpy()
    projected = np.einsum("nf,knr->kfr", X, factors)
    return group_covariances(X, np.eye(k)[labels], projected @ projected.transpose(0, 2, 1))


def test_a_hard_partition_gives_the_groups_own_covariances():
    rng = np.random.default_rng(0)
    X, labels = rng.normal(size=(50, 4)) + 3, np.arange(50) % 3
    for group, sigma in enumerate(of_partition(X, labels, 3)):
        np.testing.assert_allclose(sigma, np.cov(X[labels == group].T, bias=True), atol=1e-12)


def test_shrinkage_towards_a_ball_is_that_of_scikit_learn():
    X = np.random.default_rng(1).normal(size=(12, 9)) * np.linspace(1, 3, 9)
    sigma = np.cov(X.T, bias=True)
    want = ledoit_wolf(X)[1]
    assert 0.05 < want < 0.95
    assert abs(_shrinkage(sigma, X, np.ones(12), np.trace(sigma) / 9 * np.eye(9)) - want) < 1e-12


def test_what_each_kind_allows():
    rng = np.random.default_rng(2)
    X, labels = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 3)), np.arange(60) % 2
    X[labels == 1] *= [1, 3, 0.5]  # so that each differs from what both share by more than its error
    free, members = of_partition(X, labels, 2), np.eye(2)[labels]
    kinds = {
        kind: shaped(free, X, members, kind, 0.0) for kind in ("full", "tied", "diag", "spherical", "shrunk", "auto")
    }
    np.testing.assert_array_equal(kinds["full"], free)
    np.testing.assert_array_equal(kinds["auto"], free)
    np.testing.assert_allclose(kinds["tied"][0], free.mean(0))
    np.testing.assert_allclose(kinds["diag"][1], np.diag(np.diag(free[1])))
    np.testing.assert_allclose(kinds["spherical"][1], np.trace(free[1]) / 3 * np.eye(3))
    between = (kinds["shrunk"][0] - free[0]) / (free.mean(0) - free[0])
    assert between.min() > 0 and between.max() < 1 and np.ptp(between) < 1e-9
    np.testing.assert_allclose(shaped(free, X, members, "full", 0.5) - free, np.stack([0.5 * np.eye(3)] * 2))


def test_auto_shrinks_groups_of_few_samples_alone():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(40, 4))
    labels = (np.arange(40) < 8).astype(int)
    free, members = of_partition(X, labels, 2), np.eye(2)[labels]
    found = shaped(free, X, members, "auto", 0.0)
    np.testing.assert_array_equal(found[0], free[0])
    assert np.abs(found[1] - free[1]).max() > 1e-3


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_group_of_hardly_a_sample_takes_the_shape_of_all(size: int):
    X = np.random.default_rng(4).normal(size=(20, 3))
    labels = (np.arange(20) < size).astype(int)
    free, members = of_partition(X, labels, 2), np.eye(2)[labels]
    pooled = np.tensordot(members.mean(0), free, 1)
    np.testing.assert_allclose(shaped(free, X, members, "shrunk", 0.0)[1], pooled, atol=1e-12)
