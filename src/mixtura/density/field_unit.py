"""The unit in which a field is solved for: a power of ten that brings its size near 1.

Kernels start at variance 1 and the covariance's jitter is a share of that, so a field of size 1e5 would be held back by its
prior and one of size 1e-5 blurred. Solving for u / unit instead makes the answer the same in any unit of u; the log joint is
given back in the unit of the user.

Source: ours; the paper's solutions all have a size near 1, for which the unit is 1 and nothing is changed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixtura.density.grid_equations import Field, left_hand_side
from mixtura.density.grid_problem import GridProblem
from mixtura.density.log_joint import whiten_grid
from mixtura.density.profile_solver import InnerOptions, inner_solve
from mixtura.density.spectral_mixture import SpectralMixture1D

__all__ = ["InUnit", "in_unit", "log_joint_shift", "unit_of"]

TRIES = 12  # each brings a field nearer that its prior held back, or that an equation of tiny numbers did not reach
ROUGH_ITERATIONS = 50


@dataclass(frozen=True)
class InUnit:
    """An equation for v = u / unit: the left-hand side at unit * v, over the unit."""

    equation: Any
    unit: float

    def residual(self, field: Field, *coordinates: Tensor) -> Tensor:
        """Left-hand side on the grid."""
        whole = Field(field.n_axes, lambda orders: self.unit * field.at(orders))
        return left_hand_side(self.equation, whole, coordinates) / self.unit


def in_unit(problem: GridProblem, unit: float) -> GridProblem:
    """The problem for u / unit; a linear equation is its own."""
    if unit == 1.0:
        return problem
    return replace(
        problem,
        equation=problem.equation if problem.linear else InUnit(problem.equation, unit),
        source=problem.source / unit,
        conditions=tuple(replace(c, target=c.target / unit) for c in problem.conditions),
    )


def unit_of(kernels: Sequence[SpectralMixture1D], problem: GridProblem, options: InnerOptions, jitter: float) -> float:
    """The power of ten nearest to the root mean square of the solution, from rough solves with the kernels as they are."""
    unit = 1.0
    rough = replace(options, repeats=1, max_iterations=min(options.max_iterations, ROUGH_ITERATIONS))
    with torch.no_grad():
        for _ in range(TRIES):
            scaled = in_unit(problem, unit)
            size = float(inner_solve(whiten_grid(kernels, scaled, jitter), scaled, rough).u().square().mean().sqrt())
            power = round(math.log10(size)) if 0 < size < math.inf else 0
            if power == 0:
                break
            unit *= 10.0**power
    return unit


def log_joint_shift(problem: GridProblem, unit: float, boundary_weight: float) -> float:
    """What the log joint of u is above that of u / unit: densities of the field, the equation and the boundary."""
    counted = 2 * problem.source.numel() + boundary_weight * problem.n_conditions
    return -counted * math.log(unit)
