"""Features from pairs: the latent that pairs share, up to rotation; what must not matter; bad input."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from mixtura.density import ContrastiveModel


def shared(pairs=3000, f=8, r=2, seed=0):
    """Pairs that share Gaussian latents, and the loadings."""
    rng = np.random.default_rng(seed)
    B = rng.normal(size=(f, r))
    z = rng.normal(size=(pairs, 1, r))
    return z @ B.T + rng.normal(size=(pairs, 2, f)), B


def test_a_matrix_finds_the_space_that_pairs_share():
    pairs, B = shared(100_000)
    model = ContrastiveModel("linear", views="pairs", dim=2, epochs=4, batch_size=2048, lr=0.03).fit(pairs)
    weights = model.transform(np.eye(8)) - model.transform(np.zeros((1, 8)))
    # That of (B B' + noise)^-1 B, which under even noise is the space of B.
    assert np.degrees(subspace_angles(weights, B)).max() < 5


def test_finding_the_other_view_learns_the_space_too():
    pairs, B = shared(10_000)
    model = ContrastiveModel("linear", views="pairs", loss="infonce", dim=2, epochs=5, lr=0.02).fit(pairs)
    weights = model.transform(np.eye(8)) - model.transform(np.zeros((1, 8)))
    assert np.degrees(subspace_angles(weights, B)).max() < 15


def test_the_same_seed_gives_the_same_features_and_the_callers_chance_is_left_alone():
    pairs, _ = shared(200)
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    one, other = (ContrastiveModel(views="pairs", dim=3, epochs=2, seed=1).fit(pairs) for _ in range(2))
    assert torch.rand(1) == want
    np.testing.assert_array_equal(one.transform(pairs[:, 0]), other.transform(pairs[:, 0]))


def test_units_do_not_matter_under_jitter_and_a_row_alone_is_as_in_a_batch():
    X = np.random.default_rng(0).normal(size=(100, 4))
    one, other = (ContrastiveModel(dim=3, epochs=2).fit(x) for x in (X, 1000 * X + 7))
    np.testing.assert_allclose(other.transform(1000 * X + 7), one.transform(X), atol=1e-4)  # float32 inside
    np.testing.assert_allclose(one.transform(X[:1]), one.transform(X)[:1], atol=1e-6)


def test_views_and_encoders_of_ones_own_are_taken_and_their_module_is_not_touched():
    X, net = np.random.default_rng(0).normal(size=(50, 4)), torch.nn.Linear(4, 2)
    before = net.weight.clone()
    model = ContrastiveModel(net, views=lambda x, g: x + torch.randn(x.shape, generator=g), epochs=2).fit(X)
    assert torch.equal(net.weight, before) and model.transform(X).shape == (50, 2)
    assert ContrastiveModel(lambda f: torch.nn.Linear(f, 3), epochs=1).fit(X).transform(X).shape == (50, 3)


def test_a_saved_model_answers_the_same_to_the_bit(tmp_path):
    X = np.random.default_rng(0).normal(size=(50, 4))
    model = ContrastiveModel(dim=2, epochs=1).fit(X)
    model.save(tmp_path / "m")
    np.testing.assert_array_equal(ContrastiveModel.load(tmp_path / "m").transform(X), model.transform(X))
    with pytest.raises(TypeError, match="parameter encoder is a Linear, which cannot be saved without pickle"):
        ContrastiveModel(torch.nn.Linear(4, 2), epochs=1).fit(X).save(tmp_path / "no")


@pytest.mark.parametrize(
    ("options", "X", "message"),
    [
        (
            {"encoder": "cnn"},
            np.eye(3),
            r"encoder must be one of \['mlp', 'linear'\], a module or a callable, got 'cnn'",
        ),
        ({"views": "crop"}, np.eye(3), "views must be 'jitter', 'pairs' or a callable, got 'crop'"),
        ({"views": "pairs"}, np.eye(3), r"views='pairs' needs X of shape \(pairs, 2, features\), got \(3, 3\)"),
        ({"views": "pairs"}, np.ones((1, 2, 3)), "a contrast needs at least 2 rows, got n_samples = 1"),
        ({"loss": "hinge"}, np.eye(3), "loss must be one of"),
        ({"batch_size": 1}, np.eye(3), "batch_size must be a whole number >= 2, got 1"),
        ({}, np.full((3, 2), np.nan), "X contains 6 missing"),
    ],
)
def test_bad_input_is_named(options, X, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveModel(**options).fit(X)
