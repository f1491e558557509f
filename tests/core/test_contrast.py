import math

import pytest
import torch
from torch.nn import functional as F

from mixtura.core.contrast import concentrations, info_nce, pair_logistic, prototype_contrast, supervised_contrast


def views(n=5, width=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2))
    return F.normalize(first, dim=-1), F.normalize(second, dim=-1)


def supervised_by_loops(first, second, labels, temperature):
    """Every view, every view of its class, one logarithm at a time."""
    z, y = [*first, *second], [*labels.tolist(), *labels.tolist()]
    total = 0.0
    for i in range(len(z)):
        below = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in range(len(z)) if k != i)
        positives = [k for k in range(len(z)) if k != i and y[k] == y[i]]
        total -= sum(math.log(math.exp(float(z[i] @ z[k]) / temperature) / below) for k in positives) / len(positives)
    return total / len(z)


def test_supervised_contrast_is_the_double_loop():
    first, second = views(6)
    labels = torch.tensor([0, 3, 0, 1, 3, 0])
    for temperature in (0.07, 0.5, 2.0):
        want = supervised_by_loops(first, second, labels, temperature)
        assert float(supervised_contrast(first, second, labels, temperature)) == pytest.approx(want, rel=1e-12)


def test_info_nce_is_the_supervised_loss_when_every_thing_is_its_own_class():
    first, second = views(7)
    own = torch.arange(7)
    assert float(info_nce(first, second, 0.2)) == pytest.approx(supervised_by_loops(first, second, own, 0.2), rel=1e-12)
    torch.testing.assert_close(info_nce(first, second, 0.2), supervised_contrast(first, second, own, 0.2))


def test_neither_loss_depends_on_the_order_of_things_or_of_views_or_on_a_rotation():
    first, second = views(6, width=5)
    labels = torch.tensor([0, 1, 1, 0, 2, 2])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    for loss in (info_nce, lambda a, b: supervised_contrast(a, b, labels)):
        torch.testing.assert_close(loss(second, first), loss(first, second))
        torch.testing.assert_close(loss(first @ turn, second @ turn), loss(first, second))
    torch.testing.assert_close(info_nce(first[order], second[order]), info_nce(first, second))
    torch.testing.assert_close(
        supervised_contrast(first[order], second[order], labels[order]), supervised_contrast(first, second, labels)
    )


def test_perfectly_apart_things_cost_nothing_and_equal_ones_the_logarithm_of_their_number():
    apart = torch.eye(4, dtype=torch.float64)
    assert float(info_nce(apart, apart, 0.01)) < 1e-12
    same = torch.ones(4, 3, dtype=torch.float64)
    assert float(info_nce(same, same)) == pytest.approx(math.log(7), rel=1e-12)
    assert float(supervised_contrast(same, same, torch.zeros(4).long())) == pytest.approx(math.log(7), rel=1e-12)


def test_gradients_agree_with_finite_differences():
    first, second = (v.requires_grad_() for v in views(4, width=3))
    labels, same = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 0, 1])
    prototypes = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, 0.5), (first, second))
    assert torch.autograd.gradcheck(lambda a, b: supervised_contrast(a, b, labels, 0.5), (first, second))
    assert torch.autograd.gradcheck(lambda a, b: pair_logistic(a, b, same), (first, second))
    assigned = torch.tensor([0, 2, 1, 2])
    assert torch.autograd.gradcheck(lambda a, c: prototype_contrast(a, c, assigned, 0.5), (first, prototypes))


def test_the_pair_loss_is_the_bernoulli_likelihood():
    first, second = (3 * v for v in views(8))
    same = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0])
    want = 0.0
    for a, b, t in zip(first, second, same.tolist(), strict=True):
        p = 1 / (1 + math.exp(-float(a @ b)))
        want -= math.log(p if t else 1 - p)
    assert float(pair_logistic(first, second, same)) == pytest.approx(want / 8, rel=1e-12)
    assert float(pair_logistic(first, second, same.bool())) == pytest.approx(want / 8, rel=1e-12)


def test_the_pair_loss_survives_huge_products():
    far = torch.full((2, 1), 1e4)
    assert float(pair_logistic(far, far, torch.tensor([1, 1]))) == 0.0
    assert float(pair_logistic(far, far, torch.tensor([0, 0]))) == pytest.approx(1e8)


def test_prototype_contrast_divides_by_each_prototypes_own_concentration():
    z, _ = views(5)
    prototypes, _ = views(3, seed=4)
    phi, assigned = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1])
    want = 0.0
    for row, c in zip(z, assigned.tolist(), strict=True):
        terms = [math.exp(float(row @ prototypes[k]) / float(phi[k])) for k in range(3)]
        want -= math.log(terms[c] / sum(terms))
    assert float(prototype_contrast(z, prototypes, assigned, phi)) == pytest.approx(want / 5, rel=1e-12)


def test_concentrations_have_the_temperature_as_mean_and_grow_with_the_spread():
    assigned = torch.arange(200) % 4
    distances = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)[assigned]
    phi = concentrations(distances, assigned, 4, temperature=0.07)
    assert float(phi.mean()) == pytest.approx(0.07)
    assert (phi[1:] >= phi[:-1]).all() and phi[0] < phi[-1]
    # The middle two are inside the percentiles and keep their ratio.
    assert float(phi[2] / phi[1]) == pytest.approx(1.5)


def test_a_prototype_with_one_embedding_counts_as_the_most_spread_and_all_alike_have_the_temperature():
    assigned = torch.tensor([0] * 10 + [1] * 10 + [2])
    distances = torch.cat([torch.full((10,), 0.5), torch.full((10,), 1.0), torch.zeros(1)]).double()
    phi = concentrations(distances, assigned, 4)
    assert phi[2] == phi[3] == phi.max() and phi.argmin() == 0
    alike = concentrations(torch.zeros(6), torch.tensor([0, 0, 1, 1, 2, 2]), 3, temperature=0.3)
    torch.testing.assert_close(alike, torch.full((3,), 0.3))


def test_bad_arguments_are_named():
    first, second = views(4)
    with pytest.raises(ValueError, match=r"share a shape \(things, width\), got \(4, 4\) and \(3, 4\)"):
        info_nce(first, second[:3])
    with pytest.raises(ValueError, match="at least 2 things in a batch, got 1"):
        info_nce(first[:1], second[:1])
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        info_nce(first, second, 0)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), got \(3,\)"):
        supervised_contrast(first, second, torch.zeros(3))
    with pytest.raises(ValueError, match=r"share a shape \(pairs, width\)"):
        pair_logistic(first, second[:2], torch.zeros(4))
    with pytest.raises(ValueError, match=r"same must have shape \(4,\)"):
        pair_logistic(first, second, torch.zeros(2))
    with pytest.raises(ValueError, match="same must hold 0 and 1"):
        pair_logistic(first, second, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="matrices of one width"):
        prototype_contrast(first, torch.zeros(3, 5, dtype=torch.float64), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"assigned must have shape \(4,\)"):
        prototype_contrast(first, torch.zeros(3, 4, dtype=torch.float64), torch.zeros(2).long())
    with pytest.raises(ValueError, match="assigned must lie between 0 and 2"):
        prototype_contrast(first, torch.zeros(3, 4, dtype=torch.float64), torch.tensor([0, 1, 3, 0]))
