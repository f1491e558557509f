"""The rivals of the equation claim solve what they can solve, and their derivatives are those of their networks."""

import numpy as np
import pytest
import torch

from mixtura.claims import _equation_rivals as rivals
from mixtura.claims import multiscale_pde as claim

SLOW = rivals.LineProblem(0.0, 2.0, 40, lambda x: -9 * np.sin(3 * x), (0.0, float(np.sin(6.0))))
BENT = rivals.LineProblem(
    0.0, 2.0, 40, lambda x: -9 * np.sin(3 * x) + np.sin(3 * x) * (np.sin(3 * x) ** 2 - 1), SLOW.ends, reaction=True
)
AT = np.linspace(0, 2, 77)


@pytest.mark.parametrize("sigma", [None, 0.7])
def test_value_slope_and_bend_of_a_network_are_those_of_autograd(sigma):
    network = rivals.LineNetwork(SLOW, rivals.NetworkBudget(width=6, layers=3, features=4), sigma, seed=0)
    x = torch.linspace(0, 2, 5, dtype=torch.float64, requires_grad=True)
    value, slope, bend = network(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(slope, first, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(bend, second, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("problem", [SLOW, BENT], ids=["linear", "reaction"])
def test_classical_methods_reach_their_orders(problem):
    np.testing.assert_allclose(rivals.chebyshev(problem)(AT), np.sin(3 * AT), atol=1e-10)
    np.testing.assert_allclose(rivals.finite_differences(problem)(AT), np.sin(3 * AT), atol=1e-2)


def test_chebyshev_answers_at_its_own_points():
    ends = rivals.chebyshev(SLOW)(np.array([0.0, 2.0]))
    np.testing.assert_allclose(ends, SLOW.ends, atol=1e-12)


@pytest.mark.parametrize("problem", [SLOW, BENT], ids=["linear", "reaction"])
def test_a_network_solves_a_slow_problem_and_the_seed_decides(problem):
    budget = rivals.NetworkBudget(width=20, layers=3, features=10, adam=200, lbfgs=150)
    found = rivals.train_network(problem, budget, seed=1)(AT)
    assert np.linalg.norm(found - np.sin(3 * AT)) < 1e-2 * np.linalg.norm(np.sin(3 * AT))
    short = rivals.NetworkBudget(width=20, layers=3, adam=5, lbfgs=2)
    first, again, other = (rivals.train_network(problem, short, seed=s)(AT) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_random_features_solve_a_fast_problem_where_the_plain_network_does_not():
    fast = rivals.LineProblem(0.0, 1.0, 120, lambda x: -3600 * np.sin(60 * x), (0.0, float(np.sin(60.0))))
    at = np.linspace(0, 1, 201)
    budget = rivals.NetworkBudget(width=30, layers=3, features=30, adam=200, lbfgs=100)
    errors = [
        np.linalg.norm(rivals.train_network(fast, budget, sigma=sigma)(at) - np.sin(60 * at)) for sigma in (None, 3.0)
    ]
    assert errors[1] < 0.2 * errors[0]


def test_a_rival_gets_the_same_equation_and_points_as_the_solver():
    for name in ("P2", "A1"):
        line = claim.Line.of(name)
        x = line.solver.grids[0]
        assert line.rival.points == len(x) == {"P2": 300, "A1": 400}[name]
        np.testing.assert_array_equal(line.rival.source(x), line.solver.source)
        assert line.rival.reaction == (name == "A1")
        assert line.rival.ends == pytest.approx((line.truth[0], line.truth[-1]), abs=1e-12)
        assert line.error(line.truth) == 0.0


def test_finite_differences_lose_a_quarter_of_a_wave_with_four_points_a_period():
    line = claim.Line.of("P1")
    assert 0.15 < line.error(rivals.finite_differences(line.rival)(line.between)) < 0.5


def test_the_papers_problems_in_two_dimensions_give_an_error_and_a_time():
    with pytest.warns(UserWarning, match="use a finer grid"):
        found = claim.paper_plane("T1", 16, 1)
    assert set(found) == {"error_T1", "seconds_T1"} and np.isfinite(list(found.values())).all()
