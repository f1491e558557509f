"""The noise-invariant objective against loops over permutations and mixtures, its invariances, its limits."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixtura.audio import NoiseInvariantLoss
from mixtura.audio.separate import query_loss


def example(n: int = 2, batch: int = 3, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, n, 5, 4)
    query, noise = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    targets = (torch.rand(shape, generator=rng) > 0.5).double()
    return query, noise, targets, torch.rand(batch, 5, 4, generator=rng).double() + 0.1


def by_loops(query, noise, targets, weight, gamma=0.25, factor=0.1):
    """The loss as the paper writes it, one mixture, permutation and place at a time."""
    batch, n, bands, frames = query.shape
    total, masks = 0.0, 0.0
    for b in range(batch):
        found = []
        for order in itertools.permutations(range(n)):
            cost = 0.0
            for i in range(n):
                for m, t in itertools.product(range(bands), range(frames)):
                    p = min(
                        1.0,
                        1 / (1 + np.exp(-float(query[b, i, m, t])))
                        + 1 / (1 + np.exp(-float(noise[b, order[i], m, t]))),
                    )
                    p = min(max(p, 1e-6), 1 - 1e-6)
                    y = float(targets[b, i, m, t])
                    cost -= float(weight[b, m, t]) * (y * np.log(p) + (1 - y) * np.log(1 - p)) / (bands * frames)
            found.append(cost / n)
        total += min(found) / batch
        masks += sum(1 / (1 + np.exp(-float(v))) for v in noise[b].flatten()) / (batch * bands * frames)
    return total + factor * max(0.0, masks - gamma * n / 2)


@pytest.mark.parametrize("n", [2, 3])
def test_the_loss_equals_loops_over_mixtures_and_permutations(n: int):
    args = example(n)
    assert float(NoiseInvariantLoss()(*args)) == pytest.approx(by_loops(*args), abs=1e-6)


def test_hungarian_matching_equals_every_permutation():
    args = example(4)
    assert float(NoiseInvariantLoss(weight=0.0)(*args)) == pytest.approx(by_loops(*args, factor=0.0), abs=1e-6)


def test_the_best_assignment_is_each_mixtures_own():
    query, noise, targets, weight = example(batch=2)
    noise = torch.where(targets > 0, 4.0, -4.0).double()
    noise[1] = noise[1].flip(0)  # the second mixture's heads stand the other way round
    one = NoiseInvariantLoss(weight=0.0)
    apart = [float(one(query[b : b + 1], noise[b : b + 1], targets[b : b + 1], weight[b : b + 1])) for b in range(2)]
    assert float(one(query, noise, targets, weight)) == pytest.approx(np.mean(apart), abs=1e-12)


def test_noise_heads_may_change_places_and_so_may_query_and_target_together():
    query, noise, targets, weight = example()
    want = NoiseInvariantLoss()(query, noise, targets, weight)
    torch.testing.assert_close(NoiseInvariantLoss()(query, noise.flip(1), targets, weight), want)
    torch.testing.assert_close(NoiseInvariantLoss()(query.flip(1), noise, targets.flip(1), weight), want)
    other = NoiseInvariantLoss()(query.flip(1), noise, targets, weight)
    assert not torch.isclose(other, want, rtol=1e-3), "queries may not change places alone"


def test_below_gamma_the_hinge_has_no_gradient():
    query, noise, targets, weight = example()

    def gradient(gamma: float, factor: float, shift: float):
        n = (noise + shift).requires_grad_()
        NoiseInvariantLoss(gamma, factor)(query, n, targets, weight).backward()
        return n.grad

    assert torch.equal(gradient(0.25, 5.0, -4.0), gradient(0.25, 0.0, -4.0))
    assert not torch.allclose(gradient(0.25, 5.0, 0.0), gradient(0.25, 0.0, 0.0))


def test_silent_noise_heads_leave_the_loss_of_the_queries():
    query, noise, targets, weight = example()
    silent = torch.full_like(noise, -torch.inf)
    torch.testing.assert_close(
        NoiseInvariantLoss()(query, silent, targets, weight), query_loss(query, targets, weight), rtol=0, atol=1e-9
    )


def test_the_loss_of_queries_is_weighted_cross_entropy():
    query, _, targets, weight = example()
    want = (F.binary_cross_entropy(query.sigmoid(), targets, reduction="none") * weight[:, None]).mean()
    torch.testing.assert_close(query_loss(query, targets, weight), want)


def test_the_second_hinge_is_paid_where_queries_do_not_help():
    query, noise, targets, weight = example()
    useless = torch.full_like(query, -40.0)
    plain = NoiseInvariantLoss()(useless, noise, targets, weight)
    assert float(NoiseInvariantLoss(hinge=2.0, epsilon=0.1)(useless, noise, targets, weight) - plain) == pytest.approx(
        0.2
    )
    right = torch.where(targets > 0, 6.0, -6.0).double()
    quiet = torch.full_like(noise, -6.0)
    asked = NoiseInvariantLoss()(right, quiet, targets, weight)
    torch.testing.assert_close(NoiseInvariantLoss(hinge=2.0, epsilon=0.1)(right, quiet, targets, weight), asked)


def test_a_mask_at_its_edge_is_finite_with_its_gradient():
    query = torch.full((1, 2, 3, 3), 50.0, requires_grad=True)
    loss = NoiseInvariantLoss()(query, query.detach(), torch.zeros(1, 2, 3, 3), torch.ones(1, 3, 3))
    loss.backward()
    assert bool(loss.isfinite()) and bool(query.grad.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, n, t, w: (q[:, :1], n, t, w), "with n >= 2, got .3, 1, 5, 4."),
        (lambda q, n, t, w: (q, n[:, :1], t, w), "noise_logits must have the shape of query_logits"),
        (lambda q, n, t, w: (q, n, t[:, :1], w), "targets must have the shape of query_logits"),
        (lambda q, n, t, w: (q, n, t, w[:, :1]), "weight must have shape .3, 5, 4."),
    ],
)
def test_shapes_that_do_not_match_are_named(change, message: str):
    with pytest.raises(ValueError, match=message):
        NoiseInvariantLoss()(*change(*example()))


def test_a_negative_setting_is_named():
    with pytest.raises(ValueError, match="gamma must be >= 0, got -1"):
        NoiseInvariantLoss(gamma=-1)
