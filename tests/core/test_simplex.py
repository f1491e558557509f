import itertools
import math

import pytest
import torch
from scipy import stats

from mixtura.core.simplex import dirichlet_log_density, entropy, project, sample_dirichlet, temper


def nearest_by_enumeration(x):
    """Projection onto every face of the simplex; the nearest feasible one wins."""
    best = None
    for size in range(1, len(x) + 1):
        for support in itertools.combinations(range(len(x)), size):
            p = torch.zeros_like(x)
            p[list(support)] = x[list(support)] - (x[list(support)].sum() - 1) / size
            if p.min() >= 0 and (best is None or (p - x).norm() < (best - x).norm()):
                best = p
    return best


def test_the_projection_is_the_nearest_point_of_any_face():
    g = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        for x in torch.randn(20, 5, generator=g, dtype=torch.float64) * scale:
            torch.testing.assert_close(project(x), nearest_by_enumeration(x))


def test_the_projection_satisfies_the_optimality_conditions_with_ties_too():
    x = (torch.randn(200, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3).round() / 2
    p = project(x)
    torch.testing.assert_close(p.sum(-1), torch.ones(200).double())
    assert p.min() >= 0
    shift = ((x - p) * (p > 0)).sum(-1) / (p > 0).sum(-1)  # one multiplier for all positive entries
    torch.testing.assert_close((x - p - shift[:, None]) * (p > 0), torch.zeros_like(p), atol=1e-12, rtol=0)
    assert ((x - shift[:, None] <= 1e-12) | (p > 0)).all()  # the others would be pushed below zero


def test_the_projection_leaves_the_simplex_alone_and_ignores_a_shift():
    p = torch.tensor([0.2, 0.0, 0.8], dtype=torch.float64)
    torch.testing.assert_close(project(p), p)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(project(x + 7.0), project(x))


def test_gradients_agree_with_finite_differences():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project, x)
    weights = torch.rand(5, dtype=torch.float64) + 0.1
    weights = (weights / weights.sum()).requires_grad_()
    alpha = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(dirichlet_log_density, (weights, alpha))


def test_the_log_density_is_that_of_scipy():
    alpha, g = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64), torch.Generator().manual_seed(0)
    for weights in sample_dirichlet(alpha, 10, generator=g):
        want = stats.dirichlet.logpdf((weights / weights.sum()).numpy(), alpha.numpy())
        assert float(dirichlet_log_density(weights, alpha)) == pytest.approx(want, rel=1e-9)


def test_samples_have_the_moments_of_the_distribution():
    alpha, n = torch.tensor([0.5, 2.0, 2.5], dtype=torch.float64), 40_000
    x = sample_dirichlet(alpha, n, generator=torch.Generator().manual_seed(0))
    mean = alpha / alpha.sum()
    variance = mean * (1 - mean) / (alpha.sum() + 1)
    assert (x.mean(0) - mean).abs().max() < 5 * float((variance / n).sqrt().max())  # five standard errors
    # The standard error of a variance is below variance * sqrt(kurtosis / n), kurtosis below 10 here.
    assert ((x.var(0) - variance) / variance).abs().max() < 5 * math.sqrt(10 / n)
    torch.testing.assert_close(x.sum(-1), torch.ones(n).double())


def test_a_tiny_concentration_gives_corners_and_not_nan():
    x = sample_dirichlet(torch.full((4,), 1e-4), 100, generator=torch.Generator().manual_seed(0))
    assert x.isfinite().all()
    assert x.max(-1).values.mean() > 0.99


def test_the_same_seed_gives_the_same_samples():
    draw = [sample_dirichlet(torch.ones(3), 5, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*draw)


def test_entropy_from_corner_to_middle_and_temperature_between_them():
    assert float(entropy(torch.tensor([1.0, 0.0, 0.0]))) == 0
    assert float(entropy(torch.full((3,), 1 / 3))) == pytest.approx(math.log(3))
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    torch.testing.assert_close(temper(p, 1.0), p)
    torch.testing.assert_close(temper(p, 0.5), p**2 / (p**2).sum())
    torch.testing.assert_close(temper(p, 1e-3), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(temper(p, 1e6)[:3], torch.full((3,), 1 / 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: temper(torch.ones(2), 0.0), "temperature must be > 0, got 0.0"),
        (lambda: sample_dirichlet(torch.tensor([1.0, 0.0]), 2), "concentration must be > 0"),
        (lambda: sample_dirichlet(torch.ones(2), -1), "n must be >= 0, got -1"),
        (lambda: project(torch.zeros(2, 0)), "at least one entry"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
