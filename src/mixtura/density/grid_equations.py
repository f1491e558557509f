"""Equations on a grid, written in the values of a field and its derivatives.

An equation says ``residual(field, *coordinates)``: the left-hand side at every point of the grid. The source is
subtracted by the solver. It may be nonlinear, but only point by point: what stands at one point may depend on the field
and its derivatives at that point, nowhere else.

Ready-made: ``Poisson``, ``Helmholtz``, ``AllenCahn``, ``Advection``, ``Linear``, ``Terms``. Anything callable as
``equation(field, *coordinates)`` will do as well.

Source: 2311.04465, sec. 5 (the equations), sec. 4.2 (derivatives as conditional means).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mixtura.density.kronecker import Orders

__all__ = [
    "Advection",
    "AllenCahn",
    "Field",
    "GridEquation",
    "Helmholtz",
    "Linear",
    "Linearised",
    "Poisson",
    "Term",
    "Terms",
    "left_hand_side",
    "linearise",
    "orders_of",
]


class Field:
    """A function on a grid: its values and, on request, its derivatives, all of shape (M_1, ..., M_D).

    Args:
        n_axes: D.
        provider: orders along each axis -> that derivative on the grid.
    """

    def __init__(self, n_axes: int, provider: Callable[[Orders], Tensor]) -> None:
        self.n_axes = n_axes
        self._provider = provider
        self._known: dict[Orders, Tensor] = {}

    @property
    def value(self) -> Tensor:
        """The function itself."""
        return self.at((0,) * self.n_axes)

    def d(self, axis: int | Sequence[int], order: int | Sequence[int] = 1) -> Tensor:
        """Derivative of an order along an axis, or a mixed one: ``d((0, 1), (1, 1))``.

        Raises:
            ValueError: no such axis, or a negative order.
        """
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        given = (order,) * len(axes) if isinstance(order, int) else tuple(order)
        if len(axes) != len(given):
            raise ValueError(f"axis and order must be as long as each other, got {axes} and {given}")
        orders = [0] * self.n_axes
        for a, p in zip(axes, given, strict=True):
            if not 0 <= a < self.n_axes:
                raise ValueError(f"axis must be between 0 and {self.n_axes - 1} on this grid, got {a}")
            orders[a] += p
        return self.at(tuple(orders))

    def at(self, orders: Orders) -> Tensor:
        """Derivative with the given order along each axis."""
        if len(orders) != self.n_axes or min(orders) < 0:
            raise ValueError(f"orders must be {self.n_axes} numbers >= 0, one an axis, got {tuple(orders)}")
        if orders not in self._known:
            self._known[orders] = self._provider(orders)
        return self._known[orders]

    def laplacian(self) -> Tensor:
        """Sum of the second derivatives along all axes."""
        return torch.stack([self.d(axis, 2) for axis in range(self.n_axes)]).sum(0)


@runtime_checkable
class GridEquation(Protocol):
    """What the solver needs of an equation; ``linear`` is True where the residual is linear in the field."""

    linear: bool

    def residual(self, field: Field, *coordinates: Tensor) -> Tensor:
        """Left-hand side on the grid."""


@dataclass(frozen=True)
class Poisson:
    """Laplacian of u; in one dimension u_xx."""

    linear: bool = field(default=True, init=False)

    def residual(self, field: Field, *coordinates: Tensor) -> Tensor:
        """u_xx + u_yy + ..."""
        return field.laplacian()


@dataclass(frozen=True)
class Helmholtz:
    """Laplacian of u plus wave_number^2 u; the wave number in radians per unit of length."""

    wave_number: float
    linear: bool = field(default=True, init=False)

    def residual(self, field: Field, *coordinates: Tensor) -> Tensor:
        """u_xx + u_yy + ... + k^2 u."""
        return field.laplacian() + self.wave_number**2 * field.value


@dataclass(frozen=True)
class AllenCahn:
    """Laplacian of u plus u (u^2 - 1)."""

    linear: bool = field(default=False, init=False)

    def residual(self, field: Field, *coordinates: Tensor) -> Tensor:
        """u_xx + u_yy + ... + u (u^2 - 1)."""
        u = field.value
        return field.laplacian() + u * (u.square() - 1)


@dataclass(frozen=True)
class Advection:
    """u_t + speed u_x with x as axis 0 and t as axis 1."""

    speed: float
    linear: bool = field(default=True, init=False)

    def residual(self, field: Field, *coordinates: Tensor) -> Tensor:
        """u_t + speed u_x."""
        if field.n_axes != 2:
            raise ValueError(f"Advection lives on two axes, x and t, got a grid with {field.n_axes}")
        return field.d(1) + self.speed * field.d(0)


@dataclass(frozen=True)
class Term:
    """coefficient * u^power * d^orders u.

    Attributes:
        orders: order of the derivative along each axis; all zero is u itself.
        coefficient: a number, or an array on the grid.
        power: u^power as a further factor, an integer >= 0; above 0 the equation is nonlinear.
    """

    orders: Orders
    coefficient: float | np.ndarray = 1.0
    power: int = 0


@dataclass(frozen=True)
class Terms:
    """A sum of terms, each a derivative times a coefficient and perhaps a power of u: what a problem file describes."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms must name at least one term, got none")
        for term in self.terms:
            if not isinstance(term.power, int) or term.power < 0:
                raise ValueError(f"power must be an integer >= 0, got {term.power!r}")

    @property
    def linear(self) -> bool:
        """Whether no term multiplies the field with itself."""
        return all(term.power == 0 for term in self.terms)

    def residual(self, field: Field, *coordinates: Tensor) -> Tensor:
        """The sum of the terms."""
        parts = []
        for term in self.terms:
            part = field.at(tuple(term.orders))
            if term.power:
                part = part * field.value**term.power
            coefficient = term.coefficient
            if isinstance(coefficient, np.ndarray):
                if coefficient.shape != tuple(part.shape):
                    raise ValueError(
                        f"the coefficient of the term with orders {tuple(term.orders)} has shape {coefficient.shape}, "
                        f"the grid has {tuple(part.shape)}"
                    )
                parts.append(torch.as_tensor(coefficient, dtype=part.dtype, device=part.device) * part)
            else:
                parts.append(float(coefficient) * part)
        return torch.stack(parts).sum(0)


def Linear(coefficients: Mapping[Orders, float | np.ndarray]) -> Terms:  # noqa: N802 (reads as an equation)
    """A linear equation from orders -> coefficient: ``Linear({(2,): 1.0, (0,): 4.0})`` is u_xx + 4 u.

    Raises:
        ValueError: no coefficient.
    """
    return Terms(tuple(Term(tuple(orders), coefficient) for orders, coefficient in coefficients.items()))


@dataclass(frozen=True)
class Linearised:
    """An equation near a field: residual + sum over keys of coefficients[key] * d^key (change)."""

    residual: Tensor
    coefficients: dict[Orders, Tensor]


def left_hand_side(equation: Any, field: Field, coordinates: Sequence[Tensor]) -> Tensor:
    """The residual of an equation given as an object or as a callable."""
    ask = equation.residual if hasattr(equation, "residual") else equation
    found = ask(field, *coordinates)
    shape = coordinates[0].shape
    if not isinstance(found, Tensor) or found.shape != shape:
        came = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the equation must give a tensor on the grid, of shape {tuple(shape)}, got {came}")
    return found


def orders_of(equation: Any, coordinates: Sequence[Tensor]) -> tuple[Orders, ...]:
    """Which derivatives an equation uses, found by evaluating it once on a random field.

    Raises:
        ValueError: the equation is not point by point (a mean, a shift, a sum over the grid), does not depend on the
            field, or gives something else than a tensor on the grid.
    """
    shape, like = coordinates[0].shape, coordinates[0]
    draw = torch.Generator().manual_seed(0)

    def noise(_: Orders) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(like.device)

    base = Field(len(shape), noise)
    left_hand_side(equation, base, coordinates)
    known = dict(base._known)
    found = linearise(equation, known, coordinates) if known else None
    if found is None or not found.coefficients:
        raise ValueError("the equation does not depend on the field, so there is nothing to solve for")
    # Central difference along a random direction against the diagonal derivative: they part where points are coupled.
    push = {key: torch.randn(shape, generator=draw, dtype=torch.float64).to(like.device) for key in known}
    step = 1e-5
    ends = [
        left_hand_side(
            equation,
            Field(len(shape), {key: known[key] + sign * step * push[key] for key in known}.__getitem__),
            coordinates,
        )
        for sign in (1, -1)
    ]
    measured = (ends[0] - ends[1]) / (2 * step)
    expected = torch.stack([c * push[key] for key, c in found.coefficients.items()]).sum(0)
    if float((measured - expected).norm()) > 1e-4 * float(expected.norm()):
        raise ValueError(
            "the equation couples different points of the grid (a mean, a shift or a sum over it); only equations that "
            "combine the field and its derivatives point by point are covered"
        )
    return tuple(sorted(found.coefficients))


def linearise(equation: Any, values: Mapping[Orders, Tensor], coordinates: Sequence[Tensor]) -> Linearised:
    """Residual at a field and its derivative with respect to each of the field's derivatives, point by point."""
    leaves = {key: value.detach().requires_grad_(True) for key, value in values.items()}
    n_axes = len(next(iter(values)))
    with torch.enable_grad():
        residual = left_hand_side(equation, Field(n_axes, leaves.__getitem__), coordinates)
        if not residual.requires_grad:
            return Linearised(residual, {})
        slopes = torch.autograd.grad(residual.sum(), list(leaves.values()), allow_unused=True)
    coefficients = {key: slope for key, slope in zip(leaves, slopes, strict=True) if slope is not None}
    return Linearised(residual.detach(), coefficients)
