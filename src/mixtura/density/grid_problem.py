"""A problem on a uniform grid: axes, source and boundary data, checked once and turned into tensors.

Boundary data are linear conditions on the field at single points: a value or a derivative at a point of a face, the
difference between two faces (periodic), or a value at any point. An initial condition is the low face of the time axis.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtura.density.grid_equations import orders_of
from mixtura.density.kronecker import Orders

__all__ = ["Condition", "GridProblem", "build_problem", "mesh", "nyquist"]

log = logging.getLogger(__name__)

SIDES = ("low", "high")
FEWEST_POINTS = 8
# Of the spacing: linspace in float64 is uniform to 1e-12, a hand-typed table to perhaps 1e-6.
UNIFORM = 1e-4
LARGEST = 1e120


@dataclass(frozen=True)
class Condition:
    """Linear conditions of one kind: scale * (d^orders u at ``plus`` - the same at ``minus``) = target.

    Attributes:
        orders: derivative along each axis.
        plus, minus: positions in the flattened grid, int64, shape (n,); ``minus`` is None for a plain value.
        target: shape (n,), already times ``scale``.
        scale: brings derivatives to the unit of u: the spacing to the power of the order.
        face: (axis, position) of a face, (axis, position, position) of two that are compared; None for single points.
    """

    orders: Orders
    plus: Tensor
    minus: Tensor | None
    target: Tensor
    scale: float = 1.0
    face: tuple[int, ...] | None = None

    def gap(self, field: Tensor) -> Tensor:
        """scale * (field at plus - at minus) - target, shape (n,)."""
        return self.rows(field) - self.target

    def rows(self, field: Tensor) -> Tensor:
        """The left-hand side of the conditions, linear in the field."""
        flat = field.reshape(-1)
        found = flat[self.plus]
        if self.minus is not None:
            found = found - flat[self.minus]
        return self.scale * found

    def rows_of(self, matrix: Tensor) -> Tensor:
        """Rows of the conditions in one dimension, from the matrix whose rows are the field's points: (n, columns)."""
        found = matrix[self.plus]
        if self.minus is not None:
            found = found - matrix[self.minus]
        return self.scale * found

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """The adjoint of ``rows``: values (n,) back on the grid."""
        flat = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
        flat.index_add_(0, self.plus, self.scale * values)
        if self.minus is not None:
            flat.index_add_(0, self.minus, -self.scale * values)
        return flat.reshape(shape)


@dataclass(frozen=True)
class GridProblem:
    """Everything the solvers need, in float64 on one device."""

    axes: tuple[Tensor, ...]
    coordinates: tuple[Tensor, ...]  # each of the grid's shape, broadcast from an axis, not stored in full
    equation: Any
    linear: bool
    orders: tuple[Orders, ...]  # derivatives in the equation
    source: Tensor
    conditions: tuple[Condition, ...]

    @property
    def shape(self) -> torch.Size:
        """Points along each axis."""
        return self.source.shape

    @property
    def n_conditions(self) -> int:
        """Number of boundary conditions, N_b."""
        return sum(len(c.target) for c in self.conditions)

    def all_orders(self) -> tuple[Orders, ...]:
        """All derivatives that the equation or a condition needs, the field itself included."""
        zero = (0,) * len(self.axes)
        return tuple(sorted({zero, *self.orders, *(c.orders for c in self.conditions)}))

    def spacing(self, axis: int) -> float:
        """Distance of neighbouring points."""
        x = self.axes[axis]
        return float((x[-1] - x[0]) / (len(x) - 1))


def nyquist(axis: Tensor | np.ndarray) -> float:
    """Highest frequency that a uniform axis can tell from lower ones, in cycles per unit of length: 1 / (2 h)."""
    return (len(axis) - 1) / (2.0 * float(axis[-1] - axis[0]))


def mesh(axes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Coordinates on the grid, one tensor an axis, each of the grid's shape (a view, no memory)."""
    return torch.meshgrid(*axes, indexing="ij")


def build_problem(
    equation: Any,
    grids: Sequence[Any],
    source: Any = None,
    boundary: Any = None,
    *,
    allow_free: bool = False,
    device: str | torch.device = "cpu",
) -> GridProblem:
    """Check a problem and turn it into tensors.

    Args:
        equation: see :mod:`mixtura.density.grid_equations`.
        grids: one increasing, uniform array an axis, at least 8 points each; a single array is one axis.
        source: right-hand side on the grid: an array, a number, a callable of the coordinates, or None for 0.
        boundary: a mapping, or a callable of the coordinates that is the value on every face. Keys of the mapping:
            ``(axis, "low")`` or ``(axis, "high")`` -> value; ``(axis, side, order)`` -> derivative along the axis;
            ``axis`` -> ``"periodic"``; ``"points"`` -> (indices of shape (n, D), values of shape (n,)). A value is a
            number, an array of the face's shape, or a callable of the coordinates.
        allow_free: True allows a problem without any boundary data.
        device: where to compute.
    Raises:
        ValueError: what is wrong, with the axis or index.
    """
    axes = tuple(_axis(grid, i, device) for i, grid in enumerate(_listed(grids)))
    coordinates = mesh(axes)
    shape = coordinates[0].shape
    orders = orders_of(equation, coordinates)
    conditions = _conditions(boundary, axes, coordinates)
    if not conditions and not allow_free:
        raise ValueError(
            "boundary is missing: without it the equation has many solutions; give values on faces, periodic axes or "
            "points, or say allow_free=True"
        )
    return GridProblem(
        axes=axes,
        coordinates=coordinates,
        equation=equation,
        linear=bool(getattr(equation, "linear", False)),
        orders=orders,
        source=_values(source, coordinates, "source", shape),
        conditions=conditions,
    )


def _listed(grids: Any) -> list[Any]:
    if isinstance(grids, (np.ndarray, Tensor)) and grids.ndim == 1:
        return [grids]
    listed = list(grids)
    if not listed:
        raise ValueError("grids must name at least one axis, got none")
    if np.ndim(listed[0]) == 0:
        return [np.asarray(listed)]
    return listed


def _axis(grid: Any, number: int, device: Any) -> Tensor:
    x = np.asarray(grid.detach().cpu() if isinstance(grid, Tensor) else grid)
    if x.ndim != 1:
        raise ValueError(f"grids must hold 1-D arrays, one an axis; axis {number} has shape {x.shape}")
    _finite(x, f"grid of axis {number}")
    if len(x) < FEWEST_POINTS:
        raise ValueError(f"axis {number} has {len(x)} points; at least {FEWEST_POINTS} are needed")
    x = x.astype(np.float64)
    gaps = np.diff(x)
    spacing = (x[-1] - x[0]) / (len(x) - 1)
    if not spacing > 0:
        raise ValueError(f"axis {number} must increase, it goes from {x[0]:g} to {x[-1]:g}")
    off = np.abs(gaps - spacing)
    if off.max() > UNIFORM * spacing:
        at = int(off.argmax())
        raise ValueError(
            f"axis {number} is not uniform: the gap between points {at} and {at + 1} is {gaps[at]:g}, the mean gap "
            f"{spacing:g} (largest deviation {off.max():.3g}); covariances are Toeplitz on uniform axes only"
        )
    return torch.as_tensor(x, device=device)


def _values(given: Any, coordinates: Sequence[Tensor], name: str, shape: Sequence[int]) -> Tensor:
    """A number, an array, a callable of the coordinates or None as a tensor of ``shape``."""
    like = coordinates[0]
    if given is None:
        return torch.zeros(tuple(shape), dtype=torch.float64, device=like.device)
    if callable(given):
        given = given(*(c.cpu().numpy() for c in coordinates))
    array = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    if array.ndim == 0:
        array = np.full(tuple(shape), array)
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {array.shape}")
    _finite(array, name)
    return torch.tensor(array, dtype=torch.float64, device=like.device)


def _finite(array: np.ndarray, name: str) -> None:
    if array.dtype.kind not in "biuf":
        kind = "complex" if array.dtype.kind == "c" else str(array.dtype)
        where = ""
        if array.dtype.kind == "c":
            off = np.argwhere(array.imag != 0)
            where = f", first at index {tuple(map(int, off[0]))}" if len(off) else ""
        raise ValueError(f"{name} must be real numbers, got {kind}{where}; solve real and imaginary parts one by one")
    bad = ~np.isfinite(array)
    if bad.any():
        at = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(f"{name} has {int(bad.sum())} values that are NaN or infinite, the first at index {at}")
    large = np.abs(array) > LARGEST
    if large.any():
        at = tuple(map(int, np.argwhere(large)[0]))
        raise ValueError(
            f"{name} has a value beyond {LARGEST:g}, whose square leaves float64, at index {at}; use a larger unit"
        )


def _conditions(boundary: Any, axes: Sequence[Tensor], coordinates: Sequence[Tensor]) -> tuple[Condition, ...]:
    if boundary is None:
        return ()
    if callable(boundary):
        boundary = {(axis, side): boundary for axis in range(len(axes)) for side in SIDES}
    if not isinstance(boundary, Mapping):
        raise TypeError(f"boundary must be a mapping, a callable or None, got {type(boundary).__name__}")
    found: list[Condition] = []
    for key, given in boundary.items():
        if key == "points":
            found.append(_points(given, coordinates))
        elif isinstance(key, int) and given == "periodic":
            found += _periodic(key, axes, coordinates)
        else:
            found.append(_face(key, given, axes, coordinates))
    return tuple(found)


def _face(key: Any, given: Any, axes: Sequence[Tensor], coordinates: Sequence[Tensor]) -> Condition:
    axis, side, order = _face_key(key, len(axes))
    position = 0 if side == "low" else -1
    where = [c.select(axis, position) for c in coordinates]
    name = f"boundary at the {side} face of axis {axis}"
    target = _values(given, where, name, where[0].shape).reshape(-1)
    orders = tuple(order if i == axis else 0 for i in range(len(axes)))
    at = _face_index(axis, position, coordinates)
    scale = _spacing(axes[axis]) ** order
    return Condition(orders, at, None, scale * target, scale, (axis, position))


def _face_key(key: Any, n_axes: int) -> tuple[int, str, int]:
    if isinstance(key, tuple) and len(key) in (2, 3):
        axis, side, order = (*key, 0)[:3]
        if isinstance(axis, int) and 0 <= axis < n_axes and side in SIDES and isinstance(order, int) and order >= 0:
            return axis, side, order
    raise ValueError(
        f"boundary keys are (axis, 'low' or 'high'), (axis, side, order), axis -> 'periodic' or 'points', with axis "
        f"between 0 and {n_axes - 1}; got {key!r}"
    )


def _periodic(axis: int, axes: Sequence[Tensor], coordinates: Sequence[Tensor]) -> list[Condition]:
    """Value and first derivative agree at both ends; the last point is the first one again."""
    if not 0 <= axis < len(axes):
        raise ValueError(f"periodic axis must be between 0 and {len(axes) - 1}, got {axis}")
    low, high = (_face_index(axis, position, coordinates) for position in (0, -1))
    zero = torch.zeros(len(low), dtype=torch.float64, device=low.device)
    none = (0,) * len(axes)
    first = tuple(1 if i == axis else 0 for i in range(len(axes)))
    return [
        Condition(none, low, high, zero, 1.0, (axis, 0, -1)),
        Condition(first, low, high, zero, _spacing(axes[axis]), (axis, 0, -1)),
    ]


def _points(given: Any, coordinates: Sequence[Tensor]) -> Condition:
    shape = coordinates[0].shape
    index, values = given
    index = np.asarray(index)
    index = index[:, None] if index.ndim == 1 and len(shape) == 1 else index
    if index.ndim != 2 or index.shape[1] != len(shape) or index.dtype.kind not in "iu":
        raise ValueError(f"points must be integer indices of shape (n, {len(shape)}), got {index.dtype} {index.shape}")
    outside = (index < 0) | (index >= np.asarray(shape))
    if outside.any():
        raise ValueError(f"point {tuple(map(int, index[outside.any(1)][0]))} lies outside the grid {tuple(shape)}")
    flat = torch.as_tensor(np.ravel_multi_index(tuple(index.T), tuple(shape)), device=coordinates[0].device)
    where = [c.reshape(-1)[flat] for c in coordinates]
    return Condition((0,) * len(shape), flat, None, _values(values, where, "values of the points", flat.shape))


def _face_index(axis: int, position: int, coordinates: Sequence[Tensor]) -> Tensor:
    shape = coordinates[0].shape
    flat = torch.arange(shape.numel(), device=coordinates[0].device).reshape(shape)
    return flat.select(axis, position).reshape(-1)


def _spacing(axis: Tensor) -> float:
    return float((axis[-1] - axis[0]) / (len(axis) - 1))
