"""Kronecker algebra against the dense matrices it stands for, on 400 points."""

import numpy as np
import pytest
import torch

from mixtura.density.grid_equations import Linear, Poisson
from mixtura.density.grid_problem import build_problem
from mixtura.density.kronecker import (
    along,
    along_all,
    collapse,
    diagonal_sums,
    expand,
    factor_axis,
    grid_log_determinant,
    toeplitz,
)
from mixtura.density.log_joint import whiten_grid
from mixtura.density.spectral_mixture import SpectralMixture1D

JITTER = 1e-4  # so that the dense oracle of condition 1e4 is itself good to 1e-9
X, Y = torch.linspace(0, 1, 20, dtype=torch.float64), torch.linspace(0, 2, 20, dtype=torch.float64)
KERNELS = (SpectralMixture1D("gaussian", 4, 6.0, log_scale=3.0), SpectralMixture1D("student", 4, 3.0, log_scale=0.5))


@pytest.fixture(scope="module")
def dense():
    """Axis matrices by the definition, and their Kronecker product, 400 x 400."""
    with torch.no_grad():
        found = {}
        for order in (0, 1, 2):
            for i, (kernel, x) in enumerate(zip(KERNELS, (X, Y), strict=True)):
                found[i, order] = kernel(x[:, None] - x[None, :], order)
        for i in (0, 1):
            found[i, "jittered"] = found[i, 0] + JITTER * torch.eye(20, dtype=torch.float64)
        found["C"] = torch.kron(found[0, "jittered"], found[1, "jittered"])
        return found


def field(seed: int = 0) -> torch.Tensor:
    return torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def axes() -> list:
    with torch.no_grad():
        return [factor_axis(kernel(x - x[0]), JITTER) for kernel, x in zip(KERNELS, (X, Y), strict=True)]


def test_a_toeplitz_matrix_is_the_covariance_and_its_odd_derivative(dense):
    with torch.no_grad():
        for i, (kernel, x) in enumerate(zip(KERNELS, (X, Y), strict=True)):
            for order in (0, 1, 2):
                column = kernel(x - x[0], order)
                torch.testing.assert_close(toeplitz(column, odd=order == 1), dense[i, order], rtol=1e-12, atol=1e-12)


def test_log_determinant_and_quadratic_form_equal_the_dense_ones(dense):
    u = field()
    torch.testing.assert_close(
        grid_log_determinant(axes()), torch.linalg.slogdet(dense["C"]).logabsdet, rtol=1e-9, atol=0
    )
    want = u.reshape(-1) @ torch.linalg.solve(dense["C"], u.reshape(-1))
    whitened = u
    for i, axis in enumerate(axes()):
        whitened = along(whitened, torch.linalg.inv(axis.root), i)
    torch.testing.assert_close(whitened.square().sum(), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("orders", [(2, 0), (0, 2), (1, 1), (1, 2)])
def test_conditional_derivatives_equal_the_dense_ones(dense, orders):
    u = field()
    want = torch.kron(dense[0, orders[0]], dense[1, orders[1]])
    covariance = [dense[i, "jittered"] if order == 0 else dense[i, order] for i, order in enumerate(orders)]
    want = torch.kron(*covariance) @ torch.linalg.solve(dense["C"], u.reshape(-1))
    equation = Linear({orders: 1.0, (0, 0): 1.0})
    problem = build_problem(equation, [X, Y], None, lambda x, y: 0 * x)
    with torch.no_grad():
        whitened = whiten_grid(KERNELS, problem, JITTER)
        got = whitened.fields(whitened.whiten(u), [orders])[orders]
    torch.testing.assert_close(got.reshape(-1), want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_a_whitened_field_comes_back_and_its_norm_is_the_prior(dense):
    problem = build_problem(Poisson(), [X, Y], None, lambda x, y: 0 * x)
    u = field(1)
    with torch.no_grad():
        whitened = whiten_grid(KERNELS, problem, JITTER)
        z = whitened.whiten(u)
        torch.testing.assert_close(whitened.field(z), u, rtol=1e-10, atol=1e-10)
    want = u.reshape(-1) @ torch.linalg.solve(dense["C"], u.reshape(-1))
    torch.testing.assert_close(z.square().sum(), want, rtol=1e-9, atol=0)


def test_in_the_turned_basis_only_two_coordinates_of_an_axis_reach_its_ends():
    problem = build_problem(Poisson(), [X, Y], None, lambda x, y: 0 * x)
    with torch.no_grad():
        factors = whiten_grid(KERNELS, problem, JITTER).factors
    for axis in factors:
        assert float(axis[0][[0, -1], 2:].abs().max()) < 1e-12 * float(axis[0].abs().max()) * 20


@pytest.mark.parametrize("odd", [False, True])
def test_summing_along_diagonals_is_the_adjoint_of_building_a_toeplitz_matrix(odd: bool):
    column = torch.randn(7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 7, dtype=torch.float64)
    (toeplitz(column, odd=odd) * weight).sum().backward()
    torch.testing.assert_close(diagonal_sums(weight, odd=odd), column.grad, rtol=1e-12, atol=1e-12)


def test_expand_is_every_kronecker_product_and_collapse_its_adjoint():
    draw = torch.Generator().manual_seed(0)
    factors = [
        {p: torch.randn(4, 4, generator=draw, dtype=torch.float64) for p in (1, 2)} | {0: None},
        {p: torch.randn(5, 5, generator=draw, dtype=torch.float64) for p in (0, 2)},
        {p: torch.randn(3, 3, generator=draw, dtype=torch.float64) for p in (0, 1)},
    ]
    keys = [(0, 0, 0), (1, 2, 1), (2, 0, 0), (1, 0, 1)]
    x = torch.randn(4, 5, 3, generator=draw, dtype=torch.float64)
    found = expand(x, factors, keys)
    for key in keys:
        matrices = [
            f[p] if f[p] is not None else torch.eye(4, dtype=torch.float64) for f, p in zip(factors, key, strict=True)
        ]
        want = torch.kron(torch.kron(matrices[0], matrices[1]), matrices[2]) @ x.reshape(-1)
        torch.testing.assert_close(found[key].reshape(-1), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(along_all(x, matrices).reshape(-1), want, rtol=1e-12, atol=1e-12)
    fields = {key: torch.randn(4, 5, 3, generator=draw, dtype=torch.float64) for key in keys}
    there = sum(float((found[key] * fields[key]).sum()) for key in keys)
    assert float((x * collapse(fields, factors)).sum()) == pytest.approx(there, rel=1e-12)


def test_a_covariance_that_is_not_positive_definite_says_what_to_raise():
    with pytest.raises(ValueError, match=r"axis with 3 points is not positive definite at jitter=0; raise jitter"):
        factor_axis(torch.tensor(np.ones(3)), 0.0)
