"""The log joint maximised by profiling: field and precisions in closed form inside, one gradient step on the kernel outside.

For a linear equation the log joint is quadratic in the field, so the field is solved for exactly; the precisions then
have a closed form; and by the envelope theorem the gradient of what is left (a function of the kernel alone) is the
partial one. It reaches in tens of steps what joint gradient descent on everything reaches in 1e5.

- 1-D: LSMR preconditioned by the Cholesky factor of the normal equations; a handful of iterations restore what the
  factor of a matrix with a condition number beyond float64 loses.
- 2-D and more: LSMR with Kronecker products, warm started, preconditioned by the norms of the operator's columns in
  a basis where boundary and waves stand apart and derivatives are almost diagonal.
- Nonlinear equations: Gauss-Newton with a line search around either.

Not in the paper, whose algorithm is :mod:`mixtura.density.adam_solver`; the optimum is the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mixtura.core.progress import bar
from mixtura.density.grid_equations import Linearised
from mixtura.density.grid_problem import GridProblem
from mixtura.density.kronecker import Orders, collapse
from mixtura.density.least_squares import lsmr
from mixtura.density.log_joint import Precisions, Whitened, kernel_gradient, linearised_at, log_joint, whiten_grid
from mixtura.density.spectral_mixture import SpectralMixture1D

__all__ = ["Fit", "InnerOptions", "InnerState", "best_precisions", "inner_solve", "profile_fit", "profile_step"]

LOG_PRECISION_CAP = 30.0
NEWTON_STEPS = 10
HALVINGS = 12
ROUGH_ITERATIONS = 50  # of LSMR in a step that only serves the kernel's gradient, in more than one dimension


@dataclass
class Fit:
    """What a solver found: field, precisions, and the log joint of every step."""

    u: Tensor
    precisions: Precisions
    log_joint: float
    history: list[dict[str, float]] = field(default_factory=list)
    converged: bool = True
    inner_residual: float = 0.0


@dataclass(frozen=True)
class InnerState:
    """Field and precisions that are optimal for a kernel."""

    z: Tensor
    precisions: Precisions
    fields: dict[Orders, Tensor]
    near: Linearised
    log_joint: float
    converged: bool
    inner_residual: float  # of the last least squares: ||A^T r|| / (||A|| ||r||)

    def u(self) -> Tensor:
        """The field on the grid."""
        return self.fields[(0,) * self.z.dim()]


@dataclass(frozen=True, kw_only=True)
class InnerOptions:
    """How the field is solved for.

    Attributes:
        boundary_weight: lambda_b, > 0.
        tol: of the least squares, as ||A^T r|| / (||A|| ||r||).
        max_iterations: of LSMR, each time.
        repeats: of (solve, precisions).
    """

    boundary_weight: float = 200.0
    tol: float = 1e-10
    max_iterations: int = 1000
    repeats: int = 3


def inner_solve(
    whitened: Whitened,
    problem: GridProblem,
    options: InnerOptions,
    *,
    start: Tensor | None = None,
    precisions: Precisions | None = None,
) -> InnerState:
    """Field and precisions that maximise the log joint for a fixed kernel.

    Args:
        start: whitened field to start from, shape (M_1, ..., M_D); zeros without.
        precisions: to start from. Without, the equation's is 1 and the boundary's at its cap: where it starts low, an
            equation without a source has the trivial optimum u = 0 that ignores its boundary.
    """
    z = torch.zeros(problem.shape, dtype=torch.float64, device=problem.source.device) if start is None else start
    precisions = precisions or Precisions(log_boundary=LOG_PRECISION_CAP)
    keys = problem.all_orders()
    fields = whitened.fields(z, keys)
    near = linearised_at(problem, fields)
    solver = _dense_solver if len(problem.axes) == 1 else _iterative_solver
    solve = solver(whitened, problem, near, options) if problem.linear else None
    converged, residual = True, 0.0
    for _ in range(options.repeats):
        for _ in range(1 if problem.linear else NEWTON_STEPS):
            ask = solve or solver(whitened, problem, near, options)
            target, converged, residual = ask(z, near, fields, precisions)
            before = _energy(problem, z, near.residual, fields, precisions, options)
            z, near, fields = _searched(whitened, problem, z, target, before, near, fields, precisions, options)
            after = _energy(problem, z, near.residual, fields, precisions, options)
            if before - after <= 1e-9 * abs(before):
                break
        precisions = best_precisions(problem, near.residual, fields)
    value = log_joint(whitened, problem, z, fields, near.residual, precisions, options.boundary_weight)
    return InnerState(z, precisions, fields, near, value, converged, residual)


def best_precisions(problem: GridProblem, residual: Tensor, fields: dict[Orders, Tensor]) -> Precisions:
    """tau_1 = N_b / ||boundary gap||^2 and tau_2 = M / ||H||^2, capped at exp(30)."""
    gap = sum(float(c.gap(fields[c.orders]).square().sum()) for c in problem.conditions)
    return Precisions(
        _log_precision(problem.n_conditions, gap), _log_precision(residual.numel(), float(residual.square().sum()))
    )


def _log_precision(n: int, squares: float) -> float:
    if n == 0:
        return 0.0
    return min(LOG_PRECISION_CAP, math.log(n) - math.log(squares)) if squares > 0 else LOG_PRECISION_CAP


def _energy(
    problem: GridProblem,
    z: Tensor,
    residual: Tensor,
    fields: dict[Orders, Tensor],
    precisions: Precisions,
    options: InnerOptions,
) -> float:
    """What the inner solve minimises at fixed precisions."""
    gap = sum(float(c.gap(fields[c.orders]).square().sum()) for c in problem.conditions)
    weighted = options.boundary_weight * math.exp(precisions.log_boundary) * gap
    return 0.5 * (
        float(z.square().sum()) + weighted + math.exp(precisions.log_equation) * float(residual.square().sum())
    )


def _searched(
    whitened: Whitened,
    problem: GridProblem,
    z: Tensor,
    target: Tensor,
    before: float,
    near: Linearised,
    fields: dict[Orders, Tensor],
    precisions: Precisions,
    options: InnerOptions,
) -> tuple[Tensor, Linearised, dict[Orders, Tensor]]:
    """The first of the full step, half of it, ... that lowers the energy; z itself where none does."""
    keys = problem.all_orders()
    step = 1.0
    for _ in range(1 if problem.linear else HALVINGS):
        tried = z + step * (target - z) if step < 1 else target
        found = whitened.fields(tried, keys)
        there = linearised_at(problem, found)
        if _energy(problem, tried, there.residual, found, precisions, options) <= before:
            return tried, there, found
        step /= 2
    return z, near, fields


Solve = Callable[[Tensor, Linearised, dict[Orders, Tensor], Precisions], tuple[Tensor, bool, float]]


def _dense_solver(whitened: Whitened, problem: GridProblem, near: Linearised, options: InnerOptions) -> Solve:
    """1-D: the operator as a matrix, LSMR preconditioned by the Cholesky factor of its normal equations."""
    factors = whitened.factors[0]
    jacobian = torch.stack([c[:, None] * factors[key[0]] for key, c in near.coefficients.items()]).sum(0)
    gram = jacobian.mT @ jacobian
    rows = [c.rows_of(factors[c.orders[0]]) for c in problem.conditions]
    rows_NM = torch.cat(rows) if rows else gram[:0]
    targets_N = torch.cat([c.target for c in problem.conditions]) if rows else gram[:0, 0]

    def ask(
        z: Tensor, near: Linearised, fields: dict[Orders, Tensor], precisions: Precisions
    ) -> tuple[Tensor, bool, float]:
        root_tau = math.exp(0.5 * precisions.log_equation)
        root_weight = math.sqrt(options.boundary_weight) * math.exp(0.5 * precisions.log_boundary)
        lower = _preconditioner(gram, rows_NM, root_tau**2, root_weight**2)
        m, n = len(gram), len(rows_NM)

        def product(y: Tensor) -> Tensor:
            change = torch.linalg.solve_triangular(lower.mT, y[:, None], upper=True)[:, 0]
            return torch.cat([root_tau * (jacobian @ change), root_weight * (rows_NM @ change), change])

        def adjoint(y: Tensor) -> Tensor:
            equation, boundary, prior = y.split([m, n, m])
            back = root_tau * (jacobian.mT @ equation) + root_weight * (rows_NM.mT @ boundary) + prior
            return torch.linalg.solve_triangular(lower, back[:, None], upper=False)[:, 0]

        right = torch.cat([-root_tau * near.residual, -root_weight * (rows_NM @ z - targets_N), -z])
        found = lsmr(product, adjoint, right, tol=options.tol, max_iterations=options.max_iterations)
        change = torch.linalg.solve_triangular(lower.mT, found.x[:, None], upper=True)[:, 0]
        return z + change, found.converged, found.residual

    return ask


def _preconditioner(gram: Tensor, rows: Tensor, tau: float, weight: float) -> Tensor:
    """Cholesky factor of I + tau gram + weight rows^T rows, its diagonal raised as far as float64 needs."""
    normal = tau * gram
    normal.addmm_(rows.mT, rows, alpha=weight)
    normal.diagonal().add_(1.0)
    shift = len(gram) * torch.finfo(gram.dtype).eps * float(normal.diagonal().max())
    lower, info = torch.linalg.cholesky_ex(normal)
    while int(info) != 0:
        normal.diagonal().add_(shift)
        shift *= 4
        lower, info = torch.linalg.cholesky_ex(normal)
    return lower


def _iterative_solver(whitened: Whitened, problem: GridProblem, near: Linearised, options: InnerOptions) -> Solve:
    """2-D and more: LSMR for the change of z, preconditioned by column norms."""
    factors, shape, keys = whitened.factors, problem.shape, problem.all_orders()
    sizes = [problem.source.numel(), *(len(c.target) for c in problem.conditions), problem.source.numel()]

    def ask(
        z: Tensor, near: Linearised, fields: dict[Orders, Tensor], precisions: Precisions
    ) -> tuple[Tensor, bool, float]:
        root_tau = math.exp(0.5 * precisions.log_equation)
        root_weight = math.sqrt(options.boundary_weight) * math.exp(0.5 * precisions.log_boundary)
        scale = _column_norms(whitened, problem, near, root_tau, root_weight).reciprocal()

        def product(y: Tensor) -> Tensor:
            change = y.reshape(shape) * scale
            moved = whitened.fields(change, keys)
            equation = torch.stack([c * moved[key] for key, c in near.coefficients.items()]).sum(0)
            parts = [root_tau * equation.reshape(-1)]
            parts += [root_weight * c.rows(moved[c.orders]) for c in problem.conditions]
            return torch.cat([*parts, change.reshape(-1)])

        def adjoint(y: Tensor) -> Tensor:
            equation, *conditions, prior = y.split(sizes)
            back = {key: root_tau * c * equation.reshape(shape) for key, c in near.coefficients.items()}
            for c, part in zip(problem.conditions, conditions, strict=True):
                spread = c.spread(root_weight * part, shape)
                back[c.orders] = back[c.orders] + spread if c.orders in back else spread
            return (scale * (collapse(back, factors) + prior.reshape(shape))).reshape(-1)

        right = torch.cat(
            [
                -root_tau * near.residual.reshape(-1),
                *(-root_weight * c.gap(fields[c.orders]) for c in problem.conditions),
                -z.reshape(-1),
            ]
        )
        found = lsmr(product, adjoint, right, tol=options.tol, max_iterations=options.max_iterations)
        return z + found.x.reshape(shape) * scale, found.converged, found.residual

    return ask


def _column_norms(
    whitened: Whitened, problem: GridProblem, near: Linearised, root_tau: float, root_weight: float
) -> Tensor:
    """Norm of every column of the stacked operator, exact for coefficients that are constant on the grid.

    Coefficients that vary enter by their mean square: this is a preconditioner, any positive array is allowed.
    """
    squares = torch.ones(problem.shape, dtype=torch.float64, device=problem.source.device)
    keys = list(near.coefficients)
    for a in keys:
        for b in keys:
            mean = float((near.coefficients[a] * near.coefficients[b]).mean())
            squares += (
                root_tau**2
                * mean
                * _outer([(f[p] * f[q]).sum(0) for f, p, q in zip(whitened.factors, a, b, strict=True)])
            )
    for c in problem.conditions:
        sums = [f[p].square().sum(0) for f, p in zip(whitened.factors, c.orders, strict=True)]
        if c.face is None:
            # Single points are taken as their share of all points, spread evenly.
            share = len(c.target) / problem.source.numel()
        else:
            axis, *ats = c.face
            rows = whitened.factors[axis][c.orders[axis]][ats]
            sums[axis] = (rows[0] - rows[1] if len(ats) == 2 else rows[0]).square()
            share = 1.0
        squares += root_weight**2 * c.scale**2 * share * _outer(sums)
    return squares.clamp(min=1.0).sqrt()


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    found = vectors[0]
    for vector in vectors[1:]:
        found = found[..., None] * vector
    return found


def profile_step(
    kernels: Sequence[SpectralMixture1D],
    problem: GridProblem,
    options: InnerOptions,
    jitter: float,
    before: tuple[Tensor, Precisions] | None = None,
) -> InnerState:
    """One profile step: solve for field and precisions, and add the gradient of -L to the kernels' ``grad``.

    Args:
        before: field (not whitened) and precisions to start from.
    """
    whitened = whiten_grid(kernels, problem, jitter)
    with torch.no_grad():
        state = _solved_from(whitened, problem, options, before)
    kernel_gradient(whitened, problem, state.u(), state.near, state.fields, state.precisions, options.boundary_weight)
    return state


def profile_fit(
    kernels: Sequence[SpectralMixture1D],
    problem: GridProblem,
    *,
    n_steps: int,
    options: InnerOptions,
    jitter: float,
    lr: float = 0.05,
    weight_lr: float | None = None,
) -> Fit:
    """Maximise the log joint over kernels, field and precisions; the kernels end at the best step's parameters.

    In more than one dimension the steps solve for the field roughly, each going on where the last one stopped, and the
    best one is solved to ``options`` at the end.

    Args:
        n_steps: Adam steps on the kernels, >= 0.
        lr: Adam's rate for log-weights and log-scales, and for frequencies in units of their initial spacing.
        weight_lr: another rate for the weights, which linear ones need.
    """
    optimizer = torch.optim.Adam(_groups(kernels, lr, lr if weight_lr is None else weight_lr))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rough = options
    if len(problem.axes) > 1:
        rough = replace(options, repeats=1, max_iterations=min(options.max_iterations, ROUGH_ITERATIONS))
    best: InnerState | None = None
    kept: list[Tensor] = []
    history: list[dict[str, float]] = []
    before: tuple[Tensor, Precisions] | None = None
    with bar(desc="profile", unit="step", total=n_steps + 1) as shown:
        for step in range(n_steps + 1):
            optimizer.zero_grad(set_to_none=True)
            state = profile_step(kernels, problem, rough, jitter, before)
            before = (state.u(), state.precisions)
            history.append(_history(state, kernels))
            if best is None or state.log_joint > best.log_joint:
                best, kept = state, [p.detach().clone() for p in parameters]
            shown.set_postfix(L=f"{state.log_joint:.4g}")
            shown.update()
            if step < n_steps:
                optimizer.step()
    assert best is not None
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
        if rough is not options:
            whitened = whiten_grid(kernels, problem, jitter)
            best = _solved_from(whitened, problem, options, (best.u(), best.precisions))
            history.append(_history(best, kernels))
    return Fit(best.u(), best.precisions, best.log_joint, history, best.converged, best.inner_residual)


def _solved_from(
    whitened: Whitened, problem: GridProblem, options: InnerOptions, before: tuple[Tensor, Precisions] | None
) -> InnerState:
    if before is None:
        return inner_solve(whitened, problem, options)
    return inner_solve(whitened, problem, options, start=whitened.whiten(before[0]), precisions=before[1])


def _groups(kernels: Sequence[SpectralMixture1D], lr: float, weight_lr: float) -> list[dict[str, Any]]:
    """Parameter groups; a frequency moves by a share of the initial spacing, whatever the unit of length."""
    return [
        {"params": [p], "lr": {"frequency": lr * kernel.frequency_spacing, "raw_weight": weight_lr}.get(name, lr)}
        for kernel in kernels
        for name, p in kernel.named_parameters()
        if p.requires_grad
    ]


def _history(state: InnerState, kernels: Sequence[SpectralMixture1D]) -> dict[str, float]:
    return {
        "log_joint": state.log_joint,
        "residual": float(state.near.residual.square().mean().sqrt()),
        "inner_residual": state.inner_residual,
        "effective_components": sum(kernel.effective_components() for kernel in kernels) / len(kernels),
    }
