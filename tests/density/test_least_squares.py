"""LSMR against the dense solution and scipy's."""

import numpy as np
import torch
from scipy.sparse.linalg import lsmr as scipy_lsmr

from mixtura.density.least_squares import lsmr


def problem(m: int = 30, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(m, n, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    return a, torch.randn(m, generator=draw, dtype=torch.float64)


def solve(a: torch.Tensor, b: torch.Tensor, **options):
    return lsmr(lambda x: a @ x, lambda y: a.mT @ y, b, **options)


def test_the_least_squares_solution_is_found():
    a, b = problem()
    found = solve(a, b, tol=1e-13)
    torch.testing.assert_close(found.x, torch.linalg.lstsq(a, b).solution, rtol=1e-8, atol=1e-8)
    r = b - a @ found.x
    assert found.converged and float((a.mT @ r).norm() / (a.norm() * r.norm())) < 1e-12


def test_after_as_many_iterations_it_stands_where_scipys_stands():
    a, b = problem()
    for iterations in (1, 3, 7):
        found = solve(a, b, tol=0.0, max_iterations=iterations)
        want = scipy_lsmr(a.numpy(), b.numpy(), atol=0, btol=0, conlim=0, maxiter=iterations)
        # Lanczos vectors lose their orthogonality to rounding at another place in either program.
        np.testing.assert_allclose(found.x.numpy(), want[0], rtol=1e-6)
        assert not found.converged
        # scipy's second and third norms are ||r|| and ||A^T r||, its fifth an estimate of ||A||.
        np.testing.assert_allclose(found.residual, want[4] / (want[3] * want[5]), rtol=1e-6)


def test_a_consistent_system_and_a_zero_right_hand_side_end_at_once():
    a, b = problem()
    x = torch.ones(12, dtype=torch.float64)
    torch.testing.assert_close(solve(a, a @ x, tol=1e-12).x, x, rtol=1e-6, atol=1e-6)
    none = solve(a, torch.zeros_like(b))
    assert none.converged and none.iterations == 0 and not none.x.any()
