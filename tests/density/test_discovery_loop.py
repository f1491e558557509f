import numpy as np
import pytest
import torch
from torch import nn

from mixtura.density import CategoryDiscovery, DiscoveryLoop, discovery_accuracy
from mixtura.density.discovery_loop import hold_out


def noisy(x, generator):
    """A view: the thing and noise of its own."""
    return x + 0.3 * torch.randn(x.shape, generator=generator)


def groups(k=4, known=2, n=200, width=6, seed=0):
    """Things around k points, half of the known classes labelled."""
    rng = np.random.default_rng(seed)
    t = rng.integers(k, size=n)
    X = rng.normal(size=(k, width))[t] * 3 + 0.3 * rng.normal(size=(n, width))
    return torch.from_numpy(X).float(), np.where((t < known) & (rng.random(n) < 0.5), t, -1), t


def loop(seed=0, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))
    options = {"epochs": 6, "warmup": 2, "every": 2, "batch_size": 50, "seed": seed} | options
    return DiscoveryLoop(net, noisy, CategoryDiscovery(rounds=6, anneal=2, n_init=1, pca=4), **options)


def test_the_loop_finds_the_classes_and_says_what_it_found_on_the_way():
    things, y, t = groups()
    found = loop().fit(things, y)
    assert [turn.epoch for turn in found.turns_] == [2, 4]
    assert len(found.losses_) == 6 * 4 and all(np.isfinite(found.losses_))
    labels = found.discovery.labels_
    assert (labels[y >= 0] == y[y >= 0]).all()
    assert discovery_accuracy(t[y < 0], found.predict(things)[y < 0], [0, 1]).all > 0.85
    np.testing.assert_allclose(np.linalg.norm(found.embed(things), axis=1), 1, rtol=1e-5)


def test_without_weight_no_prototypes_are_made_and_the_first_epochs_agree_with_those_of_the_loop():
    things, y, _ = groups()
    plain, full = loop(prototype_weight=0.0).fit(things, y), loop().fit(things, y)
    assert plain.turns_ == []
    assert plain.losses_[:8] == full.losses_[:8]  # the warm-up: two epochs of four batches
    assert plain.losses_[8] < full.losses_[8]  # the contrast with prototypes comes on top


def test_the_same_seed_gives_the_same_encoder_to_the_bit_and_another_seed_another():
    things, y, _ = groups()
    one, two, other = (loop(seed=s, epochs=3).fit(things, y) for s in (0, 0, 1))
    assert one.losses_ == two.losses_ and one.losses_ != other.losses_
    assert (one.embed(things) == two.embed(things)).all()


def test_no_loss_depends_on_the_labels_of_held_out_things():
    things, y, _ = groups()
    one = loop(prototype_weight=0.0).fit(things, y)
    without = loop(prototype_weight=0.0, held_out=0.0).fit(things, np.where(one.held_out_, -1, y))
    assert one.held_out_.any() and one.losses_ == without.losses_


def test_holding_out_takes_the_share_of_every_class_and_leaves_two():
    y = np.array([0] * 50 + [1] * 3 + [2] * 2 + [-1] * 9)
    held = hold_out(y, 0.2, 0)
    assert [int(held[y == c].sum()) for c in (0, 1, 2, -1)] == [10, 1, 0, 0]
    assert not hold_out(y, 0.0, 0).any()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"sup_weight must be between 0 and 1, got 1\.5"):
        loop(sup_weight=1.5)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        loop(temperature=0)
    with pytest.raises(ValueError, match="held_out must be at least 0 and below 1, got 1"):
        loop(held_out=1)
    with pytest.raises(ValueError, match="batch_size must be between 2 and inf, got 1"):
        loop(batch_size=1)
    with pytest.raises(ValueError, match="labels and things must be as many, at least 2, got 3 and 200"):
        loop().fit(groups()[0], [0, 0, -1])
    with pytest.raises(ValueError, match="labels has no labelled thing"):
        loop().fit(groups()[0], np.full(200, -1))
