"""The log joint against its definition, and the gradients of the profile against finite differences."""

import copy
import math

import pytest
import torch

from mixtura.density.adam_solver import adam_fit
from mixtura.density.grid_equations import AllenCahn, Linear, Poisson
from mixtura.density.grid_problem import build_problem
from mixtura.density.log_joint import (
    Precisions,
    kernel_gradient,
    linearised_at,
    log_joint,
    plain_log_joint,
    whiten_grid,
)
from mixtura.density.profile_solver import InnerOptions, inner_solve, profile_fit
from mixtura.density.spectral_mixture import SpectralMixture1D

WEIGHT, JITTER = 30.0, 1e-5


def line(equation, n: int = 24):
    """A problem in one dimension that no field solves exactly, so that no precision reaches its cap."""
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    rough = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = {(0, "low"): 0.0, (0, "high"): 1.0, (0, "low", 1): 2.0, "points": ([[5], [6], [6]], [0.3, 0.1, 0.4])}
    return build_problem(equation, [x], -30 * torch.sin(6 * x) + rough, ends)


def plane(equation, n: int = 9, m: int = 11):
    """The same in two dimensions, with a periodic axis."""
    x, y = torch.linspace(0, 1, n, dtype=torch.float64), torch.linspace(0, 2, m, dtype=torch.float64)
    rough = torch.randn(n, m, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return build_problem(equation, [x, y], rough, {(0, "low"): lambda x, y: y, 1: "periodic"})


def kernels(n: int, kind: str = "gaussian") -> list[SpectralMixture1D]:
    return [SpectralMixture1D(kind, 3, 3.0, log_scale=1.5 if kind == "gaussian" else 0.5, trend=1.0) for _ in range(n)]


PROBLEMS = {
    "line": lambda: line(Poisson()),
    "nonlinear line": lambda: line(AllenCahn()),
    "plane": lambda: plane(Poisson()),
    "nonlinear plane": lambda: plane(AllenCahn()),
    "mixed derivatives": lambda: plane(Linear({(1, 1): 2.0, (2, 0): 1.0, (0, 0): -1.0, (0, 1): 0.5})),
}
each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_kind = pytest.mark.parametrize("kind", ["gaussian", "student"])


@each_problem
@each_kind
def test_log_joint_and_its_gradient_in_the_kernel_equal_those_of_the_definition(name: str, kind: str):
    problem = PROBLEMS[name]()
    parts = kernels(len(problem.axes), kind)
    u = torch.randn(problem.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    precisions = Precisions(0.7, -1.2)
    logs = [torch.tensor(value, dtype=torch.float64) for value in (precisions.log_boundary, precisions.log_equation)]
    value = plain_log_joint(parts, problem, u, *logs, boundary_weight=WEIGHT, jitter=JITTER)
    (-value).backward()
    want = [p.grad.clone() for kernel in parts for p in kernel.parameters()]
    for kernel in parts:
        kernel.zero_grad()
    whitened = whiten_grid(parts, problem, JITTER)
    with torch.no_grad():
        z = whitened.whiten(u)
        fields = whitened.fields(z, problem.all_orders())
        near = linearised_at(problem, fields)
    got = log_joint(whitened, problem, z, fields, near.residual, precisions, WEIGHT)
    assert got == pytest.approx(float(value.detach()), rel=1e-8)
    kernel_gradient(whitened, problem, u, near, fields, precisions, WEIGHT)
    for p, expected in zip([p for kernel in parts for p in kernel.parameters()], want, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["line", "nonlinear line", "plane"])
def test_the_gradient_of_a_step_is_that_of_the_profiled_log_joint(name: str):
    problem = PROBLEMS[name]()
    options = InnerOptions(boundary_weight=WEIGHT, tol=1e-13, max_iterations=3000, repeats=60)
    parts = kernels(len(problem.axes))

    def profiled(shift: float, direction: list[torch.Tensor]) -> float:
        moved = copy.deepcopy(parts)
        with torch.no_grad():
            for p, v in zip([p for kernel in moved for p in kernel.parameters()], direction, strict=True):
                p += shift * v
            return inner_solve(whiten_grid(moved, problem, JITTER), problem, options).log_joint

    whitened = whiten_grid(parts, problem, JITTER)
    with torch.no_grad():
        state = inner_solve(whitened, problem, options)
    assert 0 < state.precisions.log_equation < 29 or state.precisions.log_equation < 0
    kernel_gradient(whitened, problem, state.u(), state.near, state.fields, state.precisions, WEIGHT)
    draw = torch.Generator().manual_seed(0)
    parameters = [p for kernel in parts for p in kernel.parameters()]
    direction = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in parameters]
    step = 1e-4
    measured = (profiled(step, direction) - profiled(-step, direction)) / (2 * step)
    got = -sum(float((p.grad * v).sum()) for p, v in zip(parameters, direction, strict=True))
    assert got == pytest.approx(measured, rel=1e-5)


def test_the_inner_solve_is_the_maximum_over_the_field():
    problem = line(Poisson())
    options = InnerOptions(boundary_weight=WEIGHT, tol=1e-13, repeats=60)
    parts = kernels(1)
    with torch.no_grad():
        state = inner_solve(whiten_grid(parts, problem, JITTER), problem, options)
    u = state.u().clone().requires_grad_()
    logs = [
        torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for value in (state.precisions.log_boundary, state.precisions.log_equation)
    ]
    value = plain_log_joint(parts, problem, u, *logs, boundary_weight=WEIGHT, jitter=JITTER)
    gradients = torch.autograd.grad(value, [u, *logs])
    # In units of what one term of the sum pulls with: the prior's pull C^-1 U is as large as the equation's.
    whitened = whiten_grid(parts, problem, JITTER)
    pull = whitened.axes[0].solve(state.u()[:, None]).norm()
    assert float(gradients[0].norm() / pull) < 1e-6
    assert abs(float(gradients[1])) < 1e-4 and abs(float(gradients[2])) < 1e-4


@pytest.mark.slow
def test_long_joint_adam_and_the_profile_agree_on_a_problem_of_60_points():
    n = 60
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    rough = 0.3 * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = {(0, "low"): 0.0, (0, "high"): 0.5, "points": ([[0], [n - 1]], [0.1, 0.6])}
    problem = build_problem(Linear({(2,): 1e-2, (0,): 1.0}), [x], -torch.sin(10 * x) + rough, ends)
    # The kernel is given and not too smooth: the optimum over field and precisions is one for both, and Adam gets there.
    ours, theirs = (SpectralMixture1D("gaussian", 3, 3.0, log_scale=5.0).requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        options = InnerOptions(boundary_weight=5.0, repeats=100)
        profile = inner_solve(whiten_grid([ours], problem, 1e-2), problem, options).log_joint
    adam = adam_fit([theirs], problem, n_steps=1000, boundary_weight=5.0, jitter=1e-2).log_joint
    assert adam == pytest.approx(profile, rel=1e-3)


def test_the_profile_starts_above_what_adam_has_after_a_hundred_steps_and_only_keeps_better_ones():
    x = torch.linspace(0, 1, 60, dtype=torch.float64)
    problem = build_problem(Poisson(), [x], -900 * torch.sin(30 * x), {(0, "low"): 0.0, (0, "high"): math.sin(30.0)})
    fits = [
        profile_fit([SpectralMixture1D("gaussian", 8, 10.0)], problem, n_steps=8, options=InnerOptions(), jitter=1e-6),
        adam_fit([SpectralMixture1D("gaussian", 8, 10.0)], problem, n_steps=100, boundary_weight=200.0, jitter=1e-6),
    ]
    assert fits[0].history[0]["log_joint"] > fits[1].log_joint
    for fit in fits:
        assert fit.log_joint == max(row["log_joint"] for row in fit.history)


def test_adam_ends_at_the_parameters_of_its_best_step():
    x = torch.linspace(0, 1, 30, dtype=torch.float64)
    problem = build_problem(Poisson(), [x], torch.sin(9 * x), {(0, "low"): 0.0, (0, "high"): 0.0})
    kernel = SpectralMixture1D("student", 4, 6.0)
    fit = adam_fit([kernel], problem, n_steps=20, boundary_weight=10.0, jitter=1e-6)
    logs = [
        torch.tensor(value, dtype=torch.float64) for value in (fit.precisions.log_boundary, fit.precisions.log_equation)
    ]
    again = plain_log_joint([kernel], problem, fit.u, *logs, boundary_weight=10.0, jitter=1e-6)
    assert float(again.detach()) == pytest.approx(fit.log_joint, rel=1e-12)
