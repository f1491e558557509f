"""Covariances on a grid as Kronecker products: one small matrix an axis, the large one never formed.

A product kernel on a grid M_1 x ... x M_D has the covariance C = K_1 (x) ... (x) K_D. Everything the solver needs of C
(log-determinant, solves, whitening, conditional derivatives) is a product with one M_i x M_i matrix along one axis, so
time is O(sum M_i^3 + M sum M_i) and memory O(sum M_i^2 + M) with M = prod M_i. Nothing is approximated.

Source: 2311.04465, sec. 4.2; mode products as in Kolda and Bader 2009, sec. 2.5.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "AxisCovariance",
    "Orders",
    "along",
    "along_all",
    "collapse",
    "diagonal_sums",
    "expand",
    "factor_axis",
    "grid_log_determinant",
    "toeplitz",
]

Orders = tuple[int, ...]  # order of the derivative along each axis


def along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """``matrix`` applied along one axis of ``x``: (M_1, ..., M_D) with M_axis columns -> its rows there.

    Example:
        >>> along(torch.ones(2, 3), torch.ones(5, 3), 1).shape
        torch.Size([2, 5])
    """
    if axis == x.dim() - 1:
        return x @ matrix.mT
    return torch.tensordot(matrix, x, dims=([1], [axis])).movedim(0, axis)


def along_all(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """One matrix along each axis, which is (A_1 (x) ... (x) A_D) vec(x); ``None`` leaves an axis as it is."""
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            x = along(x, matrix, axis)
    return x


def toeplitz(column: Tensor, *, odd: bool = False) -> Tensor:
    """The M x M matrix k(x_i - x_j) on a uniform grid from its first column k(0), k(h), ...; ``odd`` where k is odd."""
    n = len(column)
    lag = torch.arange(n, device=column.device)
    distance = lag[:, None] - lag[None, :]
    matrix = column[distance.abs()]
    return matrix * distance.sign().to(column.dtype) if odd else matrix


def diagonal_sums(matrix: Tensor, *, odd: bool = False) -> Tensor:
    """Gradient with respect to a Toeplitz column from that with respect to the matrix: the adjoint of ``toeplitz``.

    Entry j sums the two diagonals j below and j above the main one, the one above negated where k is odd.
    """
    n = len(matrix)
    lag = torch.arange(n, device=matrix.device)
    distance = lag[:, None] - lag[None, :]
    values = matrix * distance.sign().to(matrix.dtype) if odd else matrix
    sums = torch.zeros(n, dtype=matrix.dtype, device=matrix.device)
    return sums.index_add_(0, distance.abs().reshape(-1), values.reshape(-1))


@dataclass(frozen=True)
class AxisCovariance:
    """Covariance of one axis, factored: K + jitter I = L L^T = S S^T with S = L Q.

    Attributes:
        lower: L, shape (M, M).
        rotation: Q, orthogonal; None is the identity.
    """

    lower: Tensor
    rotation: Tensor | None = None

    @property
    def root(self) -> Tensor:
        """S, shape (M, M)."""
        return self._turned(self.lower)

    def solve(self, x: Tensor) -> Tensor:
        """(K + jitter I)^-1 x for x of shape (M, n)."""
        return torch.cholesky_solve(x, self.lower)

    def whitened(self, matrix: Tensor) -> Tensor:
        """matrix S^-T, shape (n, M): applied to z it is matrix (K + jitter I)^-1 u for u = S z."""
        return self._turned(torch.linalg.solve_triangular(self.lower, matrix.mT, upper=False).mT)

    def whiten(self, x: Tensor) -> Tensor:
        """S^-1 x for x of shape (M, n)."""
        found = torch.linalg.solve_triangular(self.lower, x, upper=False)
        return found if self.rotation is None else self.rotation.mT @ found

    def log_determinant(self) -> Tensor:
        """log |K + jitter I|, scalar."""
        return 2 * self.lower.diagonal().log().sum()

    def inverse(self) -> Tensor:
        """(K + jitter I)^-1, for the trace in a gradient only: solutions go through ``solve``."""
        return torch.cholesky_inverse(self.lower)

    def turned_to(self, rows: Tensor, operators: Sequence[Tensor]) -> "AxisCovariance":
        """The same covariance in a basis of few couplings: what a boundary asks of the axis, then waves.

        The first coordinates span ``rows`` (n, M), functionals of L^-1 u; the others do not see them. In those, the sum
        of the operators' Gram matrices, each at norm 1, is diagonal. With the end points as rows they are like sine
        waves, in which derivatives are almost diagonal up to the boundary, so that the diagonal of the normal equations
        is a good preconditioner. Only meant for a covariance that is not turned yet.

        Args:
            operators: matrices K^(order) L^-T, of shape (M, M).
        """
        full = torch.linalg.qr(rows.mT, mode="complete").Q
        rest = full[:, len(rows) :]
        gram = torch.zeros(rest.shape[1], rest.shape[1], dtype=rest.dtype, device=rest.device)
        for operator in operators:
            seen = operator @ rest
            own = seen.mT @ seen
            gram += own / own.norm()
        waves = torch.linalg.eigh(gram).eigenvectors
        return AxisCovariance(self.lower, torch.cat([full[:, : len(rows)], rest @ waves], 1))

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix if self.rotation is None else matrix @ self.rotation


def factor_axis(column: Tensor, jitter: float) -> AxisCovariance:
    """Factor the covariance of a uniform axis from its first column.

    Raises:
        ValueError: the matrix is not positive definite in float64.
    """
    matrix = toeplitz(column)
    matrix.diagonal().add_(jitter)
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise ValueError(
            f"the covariance of an axis with {len(column)} points is not positive definite at jitter={jitter:g}; "
            "raise jitter, or start from rougher kernels (smoother ones need more jitter)"
        )
    return AxisCovariance(lower)


def grid_log_determinant(axes: Sequence[AxisCovariance]) -> Tensor:
    """log |C| of the whole grid: sum_i (M / M_i) log |K_i|."""
    sizes = [len(axis.lower) for axis in axes]
    total = math.prod(sizes)
    return torch.stack([total // n * axis.log_determinant() for n, axis in zip(sizes, axes, strict=True)]).sum()


def expand(x: Tensor, factors: Sequence[Mapping[int, Tensor | None]], keys: Iterable[Orders]) -> dict[Orders, Tensor]:
    """Every product (F_1[p_1] (x) ... (x) F_D[p_D]) x that ``keys`` asks for, common products computed once.

    Args:
        x: shape (M_1, ..., M_D).
        factors: for each axis, order -> matrix; ``None`` is the identity.
        keys: orders along each axis.
    """
    found: dict[Orders, Tensor] = {}

    def descend(y: Tensor, axis: int, asked: list[Orders]) -> None:
        if axis == len(factors):
            found[asked[0]] = y
            return
        for order in sorted({key[axis] for key in asked}):
            matrix = factors[axis][order]
            moved = y if matrix is None else along(y, matrix, axis)
            descend(moved, axis + 1, [key for key in asked if key[axis] == order])

    descend(x, 0, sorted(set(keys)))
    return found


def collapse(fields: Mapping[Orders, Tensor], factors: Sequence[Mapping[int, Tensor | None]]) -> Tensor:
    """The adjoint of ``expand``: the sum over the keys of (F_1[p_1] (x) ... (x) F_D[p_D])^T fields[p]."""

    def ascend(axis: int, asked: list[Orders]) -> Tensor:
        if axis == len(factors):
            return fields[asked[0]]
        parts = []
        for order in sorted({key[axis] for key in asked}):
            part = ascend(axis + 1, [key for key in asked if key[axis] == order])
            matrix = factors[axis][order]
            parts.append(part if matrix is None else along(part, matrix.mT, axis))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    return ascend(0, sorted(fields))
