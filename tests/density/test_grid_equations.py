"""Equations on a grid: residuals against calculus, linearisation against finite differences, and what is refused."""

import numpy as np
import pytest
import torch

from mixtura.density.grid_equations import (
    Advection,
    AllenCahn,
    Field,
    Helmholtz,
    Linear,
    Poisson,
    Term,
    Terms,
    linearise,
    orders_of,
)
from mixtura.density.grid_problem import mesh

X, T = mesh([torch.linspace(0, 1, 9, dtype=torch.float64), torch.linspace(0, 2, 11, dtype=torch.float64)])


def wave(orders: tuple[int, ...]) -> torch.Tensor:
    """Derivatives of sin(3 x) exp(-t / 2)."""
    p, q = orders
    sine = (torch.sin(3 * X), 3 * torch.cos(3 * X), -9 * torch.sin(3 * X), -27 * torch.cos(3 * X))[p]
    return sine * (-0.5) ** q * torch.exp(-T / 2)


U = wave((0, 0))
CASES = {
    "Poisson": (Poisson(), (-9 + 0.25) * U),
    "Helmholtz": (Helmholtz(2.0), (-9 + 0.25 + 4) * U),
    "AllenCahn": (AllenCahn(), (-9 + 0.25) * U + U**3 - U),
    "Advection": (Advection(7.0), -0.5 * U + 7 * wave((1, 0))),
    "Linear": (Linear({(1, 1): 2.0, (0, 0): X.numpy()}), 2 * wave((1, 1)) + X * U),
    "Terms": (Terms((Term((1, 0), 3.0, power=1), Term((0, 1)))), 3 * U * wave((1, 0)) + wave((0, 1))),
    "callable": (lambda u, x, t: u.d((0, 1), (1, 1)) + torch.exp(u.value) * x, wave((1, 1)) + torch.exp(U) * X),
}


@pytest.mark.parametrize("name", CASES)
def test_a_residual_is_what_the_equation_says(name: str):
    equation, want = CASES[name]
    ask = getattr(equation, "residual", equation)
    torch.testing.assert_close(ask(Field(2, wave), X, T), want)


@pytest.mark.parametrize("name", CASES)
def test_the_linearisation_equals_finite_differences(name: str):
    equation, _ = CASES[name]
    orders = orders_of(equation, (X, T))
    near = linearise(equation, {key: wave(key) for key in orders}, (X, T))
    draw = torch.Generator().manual_seed(0)
    push = {key: torch.randn(X.shape, generator=draw, dtype=torch.float64) for key in orders}
    step = 1e-6
    ends = [
        linearise(equation, {key: wave(key) + sign * step * push[key] for key in orders}, (X, T)).residual
        for sign in (1, -1)
    ]
    got = sum(near.coefficients[key] * push[key] for key in near.coefficients)
    torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=1e-7)


def test_the_derivatives_in_use_are_found():
    assert orders_of(Poisson(), (X, T)) == ((0, 2), (2, 0))
    assert orders_of(AllenCahn(), (X[:, 0],)) == ((0,), (2,))
    assert orders_of(Linear({(3, 1): 1.0}), (X, T)) == ((3, 1),)
    assert Linear({(2,): 1.0}).linear and not Terms((Term((0,), power=2),)).linear


def test_an_equation_that_couples_points_is_refused():
    for coupled in (lambda u, x, t: u.d(0) + u.value.mean(), lambda u, x, t: u.d(0) + u.value.roll(1, 0)):
        with pytest.raises(ValueError, match="couples different points of the grid"):
            orders_of(coupled, (X, T))


def test_what_is_no_equation_on_the_grid_is_refused():
    with pytest.raises(
        ValueError, match=r"must give a tensor on the grid, of shape \(9, 11\), got a tensor of shape \(\)"
    ):
        orders_of(lambda u, x, t: u.value.sum(), (X, T))
    with pytest.raises(ValueError, match="got float"):
        orders_of(lambda u, x, t: 1.0, (X, T))
    with pytest.raises(ValueError, match="does not depend on the field"):
        orders_of(lambda u, x, t: x, (X, T))
    with pytest.raises(ValueError, match="axis must be between 0 and 1 on this grid, got 2"):
        orders_of(lambda u, x, t: u.d(2), (X, T))
    with pytest.raises(ValueError, match="two axes, x and t, got a grid with 1"):
        orders_of(Advection(1.0), (X[:, 0],))
    with pytest.raises(ValueError, match=r"orders \(2, 0\) has shape \(3,\), the grid has \(9, 11\)"):
        orders_of(Linear({(2, 0): np.ones(3)}), (X, T))
    with pytest.raises(ValueError, match="power must be an integer >= 0, got -1"):
        Terms((Term((0,), power=-1),))
    with pytest.raises(ValueError, match="at least one term"):
        Linear({})
    with pytest.raises(ValueError, match="as long as each other"):
        Field(2, wave).d((0, 1), (1,))
    with pytest.raises(ValueError, match="orders must be 2 numbers >= 0"):
        Field(2, wave).at((1,))
