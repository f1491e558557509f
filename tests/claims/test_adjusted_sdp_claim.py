"""What the claim measures."""

import itertools

import numpy as np

from mixtura.claims.adjusted_sdp import Row, draw, error


def test_the_error_is_that_under_the_best_of_all_namings():
    rng = np.random.default_rng(0)
    for _ in range(20):
        found, labels = rng.integers(4, size=15), rng.integers(3, size=15)
        found[:4], labels[:3] = np.arange(4), np.arange(3)
        # The fourth group's name, 3, is no class: its samples are wrong.
        want = min(np.mean(np.array(names)[found] != labels) for names in itertools.permutations(range(4)))
        assert abs(error(found, labels) - want) < 1e-12


def test_groups_are_drawn_from_the_covariances_that_are_returned():
    row = Row(n=60_000, f=3, k=2, apart=4.0, spread=1.0)
    X, labels, covariances = draw(row, (0,))
    for k in range(2):
        mine = X[labels == k]
        assert len(mine) == 30_000
        # Five standard errors: of a product of two coordinates at most sqrt(2) times the largest variance.
        bound = 5 * np.sqrt(2 / 30_000) * np.linalg.eigvalsh(covariances[k])[-1]
        assert np.abs(np.cov(mine.T) - covariances[k]).max() < bound
        assert abs(np.linalg.norm(mine.mean(0)) - 4.0) < 5 * np.sqrt(np.linalg.eigvalsh(covariances[k])[-1] / 30_000)
        assert np.all(np.abs(np.log(np.linalg.eigvalsh(covariances[k]))) <= 1.0)
