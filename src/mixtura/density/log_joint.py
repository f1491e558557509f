"""How well a field, a kernel and an equation go together: the log joint, and its gradient in the kernel.

L = log N(vec U | 0, C) + lambda_b log N(boundary | 1/tau_1) + log N(0 | residual, 1/tau_2), constants left out:

    -1/2 sum_i (M / M_i) log |K_i| - 1/2 vec(U)^T C^-1 vec(U)
    + lambda_b (N_b/2 log tau_1 - tau_1/2 ||boundary gap||^2) + M/2 log tau_2 - tau_2/2 ||H(U)||^2

U is kept whitened, U = (S_1 (x) ... (x) S_D) z with K_i = S_i S_i^T, so that the prior is half of z.z.

Letters: M grid points in all, M_i on axis i. Source: 2311.04465, eq. 10-14.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.density.grid_equations import Field, Linearised, left_hand_side, linearise
from mixtura.density.grid_problem import GridProblem
from mixtura.density.kronecker import (
    AxisCovariance,
    Orders,
    along,
    along_all,
    diagonal_sums,
    expand,
    factor_axis,
    grid_log_determinant,
    toeplitz,
)
from mixtura.density.spectral_mixture import SpectralMixture1D

__all__ = ["Precisions", "Whitened", "kernel_gradient", "linearised_at", "log_joint", "plain_log_joint", "whiten_grid"]


@dataclass(frozen=True)
class Precisions:
    """Learned precisions of boundary and equation, as logarithms."""

    log_boundary: float = 0.0
    log_equation: float = 0.0


@dataclass(frozen=True)
class Whitened:
    """The covariances of a grid and every matrix that turns z into a derivative of the field.

    Attributes:
        axes: factored covariances.
        columns: for each axis, order -> first column of the Toeplitz matrix k^(order); they carry autograd.
        factors: for each axis, order -> K^(order) S^-T; order 0 is S itself.
    """

    axes: tuple[AxisCovariance, ...]
    columns: tuple[dict[int, Tensor], ...]
    factors: tuple[dict[int, Tensor], ...]

    def field(self, z: Tensor) -> Tensor:
        """U = S z on the grid."""
        return along_all(z, [factors[0] for factors in self.factors])

    def fields(self, z: Tensor, keys: Sequence[Orders]) -> dict[Orders, Tensor]:
        """The field and its derivatives on the grid."""
        return expand(z, self.factors, keys)

    def whiten(self, u: Tensor) -> Tensor:
        """z = S^-1 U."""
        for i, axis in enumerate(self.axes):
            u = _solved(axis.whiten, u, i)
        return u


def whiten_grid(kernels: Sequence[SpectralMixture1D], problem: GridProblem, jitter: float) -> Whitened:
    """Factor the covariance of every axis and whiten the derivatives that the problem needs.

    One column a matrix: on a uniform axis all of them are Toeplitz. In more than one dimension each axis is turned to
    the basis in which its boundary conditions and its waves stand apart.
    """
    axes, columns, factors = [], [], []
    for i, (kernel, x) in enumerate(zip(kernels, problem.axes, strict=True)):
        orders = sorted({key[i] for key in problem.all_orders()})
        column = {order: kernel(x - x[0], order) for order in orders}
        with torch.no_grad():
            axis = factor_axis(column[0], jitter)
            matrices = {o: axis.whitened(toeplitz(column[o], odd=o % 2 == 1)) for o in orders if o > 0}
            matrices[0] = axis.root
            if len(problem.axes) > 1:
                axis = axis.turned_to(_pins(problem, matrices, i), list(matrices.values()))
                assert axis.rotation is not None
                matrices = {o: matrix @ axis.rotation for o, matrix in matrices.items()}
        axes.append(axis)
        columns.append(column)
        factors.append(matrices)
    return Whitened(tuple(axes), tuple(columns), tuple(factors))


def _pins(problem: GridProblem, matrices: Mapping[int, Tensor], axis: int) -> Tensor:
    """The functionals of one axis that the conditions on its faces ask for, shape (n, M_axis)."""
    asked = {(c.orders[axis], *c.face[1:]) for c in problem.conditions if c.face is not None and c.face[0] == axis}
    rows = [
        matrices[order][ats[0]] - (matrices[order][ats[1]] if len(ats) == 2 else 0) for order, *ats in sorted(asked)
    ]
    return torch.stack(rows) if rows else matrices[0][:0]


def log_joint(
    whitened: Whitened,
    problem: GridProblem,
    z: Tensor,
    fields: Mapping[Orders, Tensor],
    residual: Tensor,
    precisions: Precisions,
    boundary_weight: float,
) -> float:
    """L at a whitened field, whose derivatives and residual (source subtracted) are at hand already."""
    gap = sum(float(c.gap(fields[c.orders]).square().sum()) for c in problem.conditions)
    boundary = 0.5 * problem.n_conditions * precisions.log_boundary - 0.5 * _exp(precisions.log_boundary) * gap
    m = residual.numel()
    equation = 0.5 * m * precisions.log_equation
    equation -= 0.5 * _exp(precisions.log_equation) * float(residual.square().sum())
    prior = -0.5 * float(grid_log_determinant(whitened.axes)) - 0.5 * float(z.square().sum())
    return prior + boundary_weight * boundary + equation


def plain_log_joint(
    kernels: Sequence[SpectralMixture1D],
    problem: GridProblem,
    u: Tensor,
    log_tau_boundary: Tensor,
    log_tau_equation: Tensor,
    *,
    boundary_weight: float,
    jitter: float,
) -> Tensor:
    """L of a field given by its values, written as in the paper and differentiable in everything: what L means.

    Args:
        u: shape (M_1, ..., M_D).
        log_tau_boundary, log_tau_equation: scalars.
    """
    covariances, derivatives = [], []
    for i, (kernel, x) in enumerate(zip(kernels, problem.axes, strict=True)):
        d = x[:, None] - x[None, :]
        covariance = kernel(d) + jitter * torch.eye(len(x), dtype=x.dtype, device=x.device)
        lower = torch.linalg.cholesky(covariance)
        covariances.append(AxisCovariance(lower))
        orders = {key[i] for key in problem.all_orders()} - {0}
        derivatives.append({0: None, **{o: torch.cholesky_solve(kernel(d, o).mT, lower).mT for o in orders}})
    inverse = u
    for i, axis in enumerate(covariances):
        inverse = _solved(axis.solve, inverse, i)
    fields = expand(u, derivatives, problem.all_orders())
    residual = _residual(problem, fields)
    gap = torch.stack([c.gap(fields[c.orders]).square().sum() for c in problem.conditions] or [u.new_zeros(())]).sum()
    boundary = 0.5 * problem.n_conditions * log_tau_boundary - 0.5 * log_tau_boundary.exp() * gap
    equation = 0.5 * u.numel() * log_tau_equation - 0.5 * log_tau_equation.exp() * residual.square().sum()
    prior = -0.5 * grid_log_determinant(covariances) - 0.5 * (u * inverse).sum()
    return prior + boundary_weight * boundary + equation


def kernel_gradient(
    whitened: Whitened,
    problem: GridProblem,
    u: Tensor,
    near: Linearised,
    fields: Mapping[Orders, Tensor],
    precisions: Precisions,
    boundary_weight: float,
) -> None:
    """Add -dL/d(kernel parameters) at fixed field and precisions to the parameters' ``grad``.

    By the envelope theorem that is the gradient of the profiled -L where field and precisions are optimal. Written out:
    with A = C^-1 U, W = K_i^-1 U and D = K^(p) K^-1 the conditional derivative,

        dL/dK_i = -1/2 (M/M_i) K_i^-1 + 1/2 A W^T - D^T G W'^T,   dL/dK_i^(p) = G W'^T,

    G being the gradient of L in the derivative and W' the field with every other axis already differentiated. Toeplitz
    matrices have one free column, so each matrix is summed along its diagonals.

    Args:
        near: the equation linearised at the field; its residual has the source subtracted.
    """
    pulls = _pulls(problem, near, fields, precisions, boundary_weight)
    inverse_u = u
    for i, axis in enumerate(whitened.axes):
        inverse_u = _solved(axis.solve, inverse_u, i)
    leaves: list[Tensor] = []
    gradients: list[Tensor] = []
    for i, axis in enumerate(whitened.axes):
        own = _solved(axis.solve, u, i)
        share = u.numel() // len(axis.lower)
        in_k = -0.5 * share * axis.inverse() + 0.5 * _contract(inverse_u, own, i)
        for order in {key[i] for key in pulls} - {0}:
            matrix = toeplitz(whitened.columns[i][order].detach(), odd=order % 2 == 1)
            in_order = torch.zeros_like(in_k)
            for key, pull in pulls.items():
                if key[i] == order:
                    others = _others(whitened, own, key, i)
                    in_order += _contract(pull, others, i)
                    # G is taken through D^T as a field, before the contraction makes it a matrix.
                    back = _solved(axis.solve, along(pull, matrix.mT, i), i)
                    in_k -= _contract(back, others, i)
            leaves.append(whitened.columns[i][order])
            gradients.append(-diagonal_sums(in_order, odd=order % 2 == 1))
        leaves.append(whitened.columns[i][0])
        gradients.append(-diagonal_sums(in_k))
    torch.autograd.backward(leaves, gradients)


def _pulls(
    problem: GridProblem,
    near: Linearised,
    fields: Mapping[Orders, Tensor],
    precisions: Precisions,
    boundary_weight: float,
) -> dict[Orders, Tensor]:
    """dL/d(derivative of the field), for every derivative; the field itself depends on no kernel."""
    tau = _exp(precisions.log_equation)
    pulls = {key: -tau * c * near.residual for key, c in near.coefficients.items() if any(key)}
    for c in problem.conditions:
        if any(c.orders):
            gap = c.gap(fields[c.orders])
            pull = c.spread(-boundary_weight * _exp(precisions.log_boundary) * gap, problem.shape)
            pulls[c.orders] = pulls[c.orders] + pull if c.orders in pulls else pull
    return pulls


def _others(whitened: Whitened, own: Tensor, key: Orders, axis: int) -> Tensor:
    """``own`` differentiated along every other axis as ``key`` says."""
    for j, order in enumerate(key):
        if j != axis and order > 0:
            matrix = toeplitz(whitened.columns[j][order].detach(), odd=order % 2 == 1)
            own = along(_solved(whitened.axes[j].solve, own, j), matrix, j)
    return own


def _contract(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """sum over all other axes of a b^T: (M_axis, M_axis)."""
    a_2 = a.movedim(axis, 0).reshape(a.shape[axis], -1)
    b_2 = b.movedim(axis, 0).reshape(b.shape[axis], -1)
    return a_2 @ b_2.mT


def _solved(solve: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """A solve of (M_axis, n) applied along one axis."""
    moved = x.movedim(axis, 0)
    return solve(moved.reshape(moved.shape[0], -1)).reshape(moved.shape).movedim(0, axis)


def _residual(problem: GridProblem, fields: Mapping[Orders, Tensor]) -> Tensor:
    field = Field(len(problem.axes), fields.__getitem__)
    return left_hand_side(problem.equation, field, problem.coordinates) - problem.source


def linearised_at(problem: GridProblem, fields: Mapping[Orders, Tensor]) -> Linearised:
    """The problem's equation near a field, source subtracted."""
    near = linearise(problem.equation, {key: fields[key] for key in problem.orders}, problem.coordinates)
    return Linearised(near.residual - problem.source, near.coefficients)


def _exp(log_precision: float) -> float:
    return math.exp(log_precision)
