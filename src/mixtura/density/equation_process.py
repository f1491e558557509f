"""Solve an equation whose solution oscillates fast or mixes scales, by a Gaussian process with a learned spectrum.

The solution on a uniform grid is a Gaussian process; its power spectrum is a mixture whose frequencies, widths and
weights are learned; its derivatives are conditional means, so that "satisfies the equation and the boundary" is a
likelihood. Product kernels keep every covariance a Kronecker product: a million points need 1000 x 1000 matrices.

Time a step is O(sum M_i^3 + n_iterations M sum M_i), memory O(sum M_i^2 + M), for M = prod M_i points.

Source: 2311.04465.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mixtura.core.keeping import Keeping
from mixtura.density.adam_solver import adam_fit
from mixtura.density.field_unit import in_unit, log_joint_shift, unit_of
from mixtura.density.grid_equations import Field, left_hand_side
from mixtura.density.grid_problem import GridProblem, build_problem, nyquist
from mixtura.density.inputs import device_of
from mixtura.density.kronecker import along, factor_axis
from mixtura.density.profile_solver import Fit, InnerOptions, profile_fit
from mixtura.density.spectral_mixture import KINDS, STUDENT_ORDERS, Kind, SpectralComponent, SpectralMixture1D

__all__ = ["AliasingWarning", "MultiscaleSolver", "SpectralProcessSolver"]

SOLVERS = ("profile", "adam")
# Frequencies above this share of Nyquist have fewer than 2.2 points a period.
EDGE = 0.9
# Shares of a source's energy beyond the edge: a smooth source has none, white noise a tenth.
SOME, MOST = 0.01, 0.5


class AliasingWarning(UserWarning):
    """The grid is too coarse for what it shall carry."""


class SpectralProcessSolver(Keeping, BaseEstimator):
    """Solver of a differential equation on a uniform grid, with the spectrum of the solution learned.

    It is no regressor: ``fit`` takes an equation's grid, source and boundary instead of samples, so scikit-learn's
    ``check_estimator`` does not apply; ``clone``, ``get_params``, ``save`` and ``load`` do.

    Args:
        equation: :mod:`mixtura.density.grid_equations` or a callable ``residual(field, *coordinates)``.
        kind: ``"gaussian"`` or ``"student"`` bumps. The student kind (Matern-5/2 decay) has derivatives up to order 4.
        n_components: bumps an axis.
        max_frequency: largest initial frequency in cycles per unit of length; a number, one number an axis, or
            ``"nyquist"`` for the highest that the axis resolves. A tighter one is learned faster.
        learn_frequency: False with ``max_frequency=0`` is the plain squared-exponential or Matern process.
        log_scale: initial log-scale of every bump; None sets it from the spacing of the frequencies, which makes the
            answer independent of the unit of length. The paper starts at 0.
        boundary_weight: lambda_b > 0, the weight of the boundary likelihood (paper: 200, for advection 500).
        solver: ``"profile"`` (tens of steps) or ``"adam"`` (the paper's algorithm, 1e5 steps and more).
        n_steps: steps on the kernel (profile) or on everything (adam), >= 0.
        inner_tol, inner_iterations: of the least squares for the field (profile); iterations per solve.
        extra_trend: True adds a slow Matern-5/2 component an axis.
        jitter: added to the diagonal of every axis' covariance. More than about 1e-5 blurs fast oscillation.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``; always in float64.
        seed: kept for a common interface; the solver draws nothing.
    Attributes:
        grids_: list of arrays, one an axis. solution_: values on the grid.
        unit_: power of ten that the field was solved in; its variances and precisions are given in the unit of u.
        residual_: left-hand side less the source, on the grid.
        kernel_parameters_: one dict of arrays an axis. log_joint_: of the fit, in nats.
        tau_equation_, tau_boundary_: learned precisions. history_: log joint and residual of every step.
        n_iter_: steps taken. converged_: whether the field was solved for to ``inner_tol`` at the end.
    Example:
        >>> import numpy as np
        >>> from mixtura.density import Poisson, SpectralProcessSolver
        >>> x = np.linspace(0, 1, 60)
        >>> model = SpectralProcessSolver(Poisson(), n_steps=5, max_frequency=8.0)
        >>> model = model.fit([x], lambda x: -900 * np.sin(30 * x), lambda x: np.sin(30 * x))
        >>> bool(abs(model.predict(x) - np.sin(30 * x)).max() < 1e-2)
        True
    """

    def __init__(
        self,
        equation: Any = None,
        kind: Kind = "gaussian",
        n_components: int = 30,
        max_frequency: float | str | Sequence[float] = "nyquist",
        *,
        learn_frequency: bool = True,
        log_scale: float | None = None,
        boundary_weight: float = 200.0,
        solver: str = "profile",
        n_steps: int = 60,
        inner_tol: float = 1e-10,
        inner_iterations: int = 1000,
        extra_trend: bool = False,
        jitter: float = 1e-6,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.equation = equation
        self.kind = kind
        self.n_components = n_components
        self.max_frequency = max_frequency
        self.learn_frequency = learn_frequency
        self.log_scale = log_scale
        self.boundary_weight = boundary_weight
        self.solver = solver
        self.n_steps = n_steps
        self.inner_tol = inner_tol
        self.inner_iterations = inner_iterations
        self.extra_trend = extra_trend
        self.jitter = jitter
        self.device = device
        self.seed = seed

    def fit(self, grids: Any, source: Any = None, boundary: Any = None, *, allow_free: bool = False) -> Self:
        """Solve the equation on a grid.

        Args:
            grids: one increasing, uniform array an axis, at least 8 points each; a single array is one axis.
            source: right-hand side: array on the grid, number, callable of the coordinates, or None for 0.
            boundary: ``{(axis, "low" | "high"): value}``, ``{(axis, side, order): derivative}``, ``{axis: "periodic"}``,
                ``{"points": (indices, values)}``, all in one mapping; or one callable for all faces. An initial condition
                is the low face of the time axis.
            allow_free: True allows a problem without boundary data.
        Returns:
            self.
        Raises:
            ValueError: bad grid, source, boundary or parameter, named with what came; a derivative that the kernel does
                not have; a source that oscillates faster than the grid can carry.
        Warns:
            AliasingWarning: frequencies near or above what the grid resolves.
            ConvergenceWarning: the least squares for the field stopped before ``inner_tol``.
        """
        self._check_parameters()
        problem = build_problem(
            self.equation, grids, source, boundary, allow_free=allow_free, device=device_of(self.device)
        )
        self._check_orders(problem)
        _check_resolution(problem.source, "source", most=True)
        kernels = self._kernels(problem.axes)
        options = InnerOptions(
            boundary_weight=self.boundary_weight, tol=self.inner_tol, max_iterations=self.inner_iterations
        )
        self.unit_ = unit_of(kernels, problem, options, self.jitter)
        found = self._solve(kernels, in_unit(problem, self.unit_), options)
        shift = log_joint_shift(problem, self.unit_, self.boundary_weight)
        self.grids_ = [axis.cpu().numpy() for axis in problem.axes]
        self.solution_ = self.unit_ * found.u.cpu().numpy()
        self.kernel_parameters_ = [
            {name: p.detach().cpu().numpy() for name, p in kernel.named_parameters()} for kernel in kernels
        ]
        self.log_joint_ = found.log_joint + shift
        self.tau_equation_ = float(np.exp(found.precisions.log_equation)) / self.unit_**2
        self.tau_boundary_ = float(np.exp(found.precisions.log_boundary)) / self.unit_**2
        self.history_ = [row | {"log_joint": row["log_joint"] + shift} for row in found.history]
        self.residual_ = self._residual(problem)
        self.n_iter_ = self.n_steps
        self.converged_ = found.converged
        _check_resolution(found.u, "solution", most=False)
        if not found.converged:
            warnings.warn(
                f"the field was not solved for to inner_tol={self.inner_tol:g}: the last least squares stopped at "
                f"{found.inner_residual:.2g} after {self.inner_iterations} iterations; raise inner_iterations, or accept it "
                "where the residual in history_ is small enough",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def predict(self, *axes: Any) -> np.ndarray:
        """Solution on the grid that ``axes`` span, one 1-D array an axis; without axes, on the grid it was fitted on.

        The conditional mean k(x*, grid) C^-1 U; outside the fitted domain it returns to 0.
        """
        return self.derivative((0,) * len(self._fitted_grids()), *axes)

    def derivative(self, order_by_axis: int | Sequence[int], *axes: Any) -> np.ndarray:
        """Derivative of the solution, with an order for each axis, on the grid that ``axes`` span.

        Raises:
            ValueError: another number of axes or orders than the solver was fitted with, or an order the kernel lacks.
        """
        grids = self._fitted_grids()
        orders = (order_by_axis,) if isinstance(order_by_axis, int) else tuple(order_by_axis)
        given = axes or tuple(grids)
        for name, count in (("orders", len(orders)), ("axes", len(given))):
            if count != len(grids):
                raise ValueError(f"the solver was fitted on {len(grids)} axes, got {count} {name}")
        u = torch.as_tensor(self.solution_)
        with torch.no_grad():
            for i, (kernel, order) in enumerate(zip(self._fitted_kernels(), orders, strict=True)):
                x = torch.as_tensor(grids[i])
                at = torch.as_tensor(np.atleast_1d(np.asarray(given[i], dtype=np.float64)))
                cross = kernel(at[:, None] - x[None, :], order)
                u = along(u, factor_axis(kernel(x - x[0]), self.jitter).solve(cross.mT).mT, i)
        return u.numpy()

    def components_(self, axis: int = 0) -> list[SpectralComponent]:
        """Weight, frequency and scale of the bumps of one axis, heaviest first."""
        found = self._fitted_kernels()[axis].components()
        return [replace(part, weight=part.weight * self._variance_unit()) for part in found]

    def spectrum(self, frequencies: Any, axis: int = 0) -> np.ndarray:
        """Learned spectral density of one axis at frequencies in cycles per unit of length."""
        with torch.no_grad():
            density = self._fitted_kernels()[axis].spectrum(torch.as_tensor(np.asarray(frequencies)))
        return self._variance_unit() * density.numpy()

    def _variance_unit(self) -> float:
        """Unit of one axis' variance: their product over the axes is that of the field."""
        return float(self.unit_ ** (2 / len(self.grids_)))

    def effective_components(self, axis: int = 0) -> float:
        """exp(entropy) of the weights of one axis: how many bumps are left."""
        return self._fitted_kernels()[axis].effective_components()

    def _solve(self, kernels: Sequence[SpectralMixture1D], problem: GridProblem, options: InnerOptions) -> Fit:
        if self.solver == "adam":
            return adam_fit(
                kernels, problem, n_steps=self.n_steps, boundary_weight=self.boundary_weight, jitter=self.jitter
            )
        return profile_fit(kernels, problem, n_steps=self.n_steps, options=options, jitter=self.jitter)

    def _residual(self, problem: GridProblem) -> np.ndarray:
        device = problem.source.device
        field = Field(len(problem.axes), lambda orders: torch.as_tensor(self.derivative(orders), device=device))
        with torch.no_grad():
            return (left_hand_side(self.equation, field, problem.coordinates) - problem.source).cpu().numpy()

    def _kernels(self, axes: Sequence[Any]) -> list[SpectralMixture1D]:
        asked = self.max_frequency
        if isinstance(asked, str):
            frequencies = [nyquist(axis) for axis in axes]
        else:
            frequencies = [float(asked)] * len(axes) if np.ndim(asked) == 0 else [float(f) for f in asked]  # type: ignore
        if len(frequencies) != len(axes):
            raise ValueError(f"max_frequency must be one number or {len(axes)}, one an axis, got {len(frequencies)}")
        kernels = []
        for i, (axis, frequency) in enumerate(zip(axes, frequencies, strict=True)):
            limit = nyquist(axis)
            if frequency > limit * (1 + 1e-9):
                warnings.warn(
                    f"max_frequency={frequency:g} is above what axis {i} resolves, {limit:g} cycles per unit of length at "
                    f"{len(axis)} points: such components are aliases of lower ones; use at most that, or more points",
                    AliasingWarning,
                    stacklevel=4,
                )
            kernel = SpectralMixture1D(
                self.kind,
                self.n_components,
                frequency,
                learn_frequency=self.learn_frequency,
                log_scale=self.log_scale,
                trend=float(axis[-1] - axis[0]) if self.extra_trend else None,
            )
            kernels.append(kernel.to(axis.device))
        return kernels

    def _fitted_grids(self) -> list[np.ndarray]:
        check_is_fitted(self, "solution_")
        return self.grids_

    def _fitted_kernels(self) -> list[SpectralMixture1D]:
        kernels = []
        for grid, kept in zip(self._fitted_grids(), self.kernel_parameters_, strict=True):
            kernel = SpectralMixture1D(
                self.kind, self.n_components, 1.0, trend=float(grid[-1] - grid[0]) if self.extra_trend else None
            )
            kernel.load_state_dict({name: torch.as_tensor(value) for name, value in kept.items()})
            kernels.append(kernel)
        return kernels

    def _check_parameters(self) -> None:
        if self.equation is None:
            raise ValueError(
                "equation is missing: give Poisson(), Terms(...), or a callable residual(field, *coordinates)"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {list(KINDS)}, got {self.kind!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {list(SOLVERS)}, got {self.solver!r}")
        if isinstance(self.max_frequency, str) and self.max_frequency != "nyquist":
            raise ValueError(f"max_frequency must be 'nyquist' or a number, got {self.max_frequency!r}")
        for name in ("boundary_weight", "jitter", "inner_tol"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not 0 < value < np.inf:
                raise ValueError(f"{name} must be a number > 0, got {value!r}")
        for name, least in (("n_steps", 0), ("inner_iterations", 1), ("n_components", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    def _check_orders(self, problem: GridProblem) -> None:
        highest = max(order for key in problem.all_orders() for order in key)
        if self.kind == "gaussian" and not self.extra_trend:
            return
        if highest > STUDENT_ORDERS:
            raise ValueError(
                f"the equation has a derivative of order {highest}, a Matern-5/2 decay (kind='student' or extra_trend) has "
                f"{STUDENT_ORDERS}; use kind='gaussian' without extra_trend"
            )
        if highest > 2:
            warnings.warn(
                f"the equation has a derivative of order {highest}: processes with a Matern-5/2 decay have two, only their "
                "conditional mean has more; kind='gaussian' has all",
                UserWarning,
                stacklevel=3,
            )


# The name that a reader of the room's overview looks for.
MultiscaleSolver = SpectralProcessSolver


def _check_resolution(values: Tensor, name: str, *, most: bool) -> None:
    """Warn, or refuse, where values on a grid oscillate near the highest frequency it can carry."""
    for axis in range(values.dim()):
        share = _edge_share(values, axis)
        if share <= SOME:
            continue
        said = (
            f"{share:.0%} of the energy of the {name} along axis {axis} lies above {EDGE:.0%} of the highest frequency that "
            f"its {values.shape[axis]} points resolve; use a finer grid"
        )
        if most and share > MOST:
            raise ValueError(f"{said} (what it samples may be an alias of something faster)")
        warnings.warn(said, AliasingWarning, stacklevel=4)


def _edge_share(values: Tensor, axis: int) -> float:
    """Share of the energy along one axis above EDGE of Nyquist, tapered so that the ends do not leak."""
    n = values.shape[axis]
    moved = values.movedim(axis, -1)
    window = torch.hann_window(n, periodic=False, dtype=values.dtype, device=values.device)
    energy = torch.fft.rfft((moved - moved.mean(-1, keepdim=True)) * window).abs().square()
    energy = energy.reshape(-1, energy.shape[-1]).sum(0)
    total = float(energy.sum())
    return float(energy[int(np.ceil(EDGE * n / 2)) :].sum()) / total if total > 0 else 0.0
