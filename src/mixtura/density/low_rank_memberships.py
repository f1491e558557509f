"""Membership matrices as products of thin nonnegative factors: fast, without any N x N matrix, and without a guarantee.

With Z_b = U_b U_b' and U_b >= 0 of r columns, semidefiniteness and nonnegativity hold by themselves. The two equalities
go into an augmented Lagrangian, whose inner minimisation is a bounded quasi-Newton method. An evaluation takes
B N (2 F + 4) r multiplications, memory is B N (F + 20 r) numbers.

A stationary point need not be the optimum, and products of nonnegative factors (completely positive matrices) are not all
matrices that are semidefinite and nonnegative: where groups overlap, the best factors can lie above the optimum (by 0.7 %
for 30 samples in two groups of one shape, at r = 4 and at r = 8). Three things help: several starts of which the best is
finished, blocks that trade places where another's cost suits them better (a trade keeps every constraint), and a lower
bound from outside (:mod:`mixtura.density.exact_memberships`).

Shapes: B blocks, N samples, r columns of a factor, F features.
Source: nonnegative Burer-Monteiro factors for the k-means program (2305.18436), here for several blocks; Nocedal and
Wright, algorithm 17.4 (augmented Lagrangian).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor

from mixtura.density.membership_program import MembershipProgram

__all__ = ["LowRank", "solve_low_rank"]

PENALTY = 10.0  # first; at 1 the first rounds wander twice as long to no better end
INNER_STEPS, MEMORY = 50, 20  # of the quasi-Newton method; more steps a round cost time and gain nothing
SCREENED = 1e-2  # infeasibility at which starts are compared
NOISE = 0.01  # added to a given start, in units of a typical entry, so that zeros can move


@dataclass(frozen=True)
class LowRank:
    """Factors and their multipliers.

    Attributes:
        factors: U, shape (B, N, r), >= 0.
        prices: dual variable v of the row sums in the units of the costs, shape (N,).
        residual: largest of the root mean square error of the row sums and the errors of the traces.
        rounds: of the augmented Lagrangian.
        converged: whether ``residual`` is below the tolerance.
    """

    factors: np.ndarray
    prices: np.ndarray
    residual: float
    rounds: int
    converged: bool


@dataclass(frozen=True)
class _State:
    """Where the augmented Lagrangian stands, in scaled variables: V = U / sqrt(K / N) has entries of order one."""

    v: Tensor  # (B, N, r)
    y: Tensor  # (N,)
    t: Tensor  # (B,)
    penalty: float
    residual: float
    rounds: int


def solve_low_rank(
    program: MembershipProgram,
    *,
    rank: int,
    rng: np.random.RandomState,
    start: np.ndarray | None = None,
    n_starts: int = 3,
    tol: float = 1e-5,
    max_rounds: int = 100,
) -> LowRank:
    """A local minimum of the program over factors.

    Args:
        program: to be solved.
        rank: r, columns of each block's factor.
        rng: source of chance.
        start: factors to go on from, shape (B, N, <= r); a random start otherwise.
        n_starts: random starts, of which the one with the lowest Lagrangian at a loose tolerance is finished.
        tol: infeasibility at which it ends.
        max_rounds: most rounds of multipliers.
    """
    step = _Lagrangian(program, rank)
    if start is not None:
        state = step.begin(_padded(start, rank, program, rng))
    else:
        begun = []
        for _ in range(n_starts):
            shape = (program.n_blocks, program.n_samples, rank)
            # Half of the rows start near zero in a block: from there fewer runs end in bad minima than from even ones.
            v_BNr = np.abs(rng.standard_normal(shape)) * (rng.random_sample((*shape[:2], 1)) < 0.5) + NOISE
            state = step.begin(torch.from_numpy(v_BNr))
            if n_starts > 1:
                state = step.proceed(state, SCREENED, max_rounds)
            begun.append(state)
        state = min(begun, key=step.lagrangian)
    state = step.proceed(state, tol, max_rounds)
    factors_BNr = (step.unit**0.5 * state.v).cpu().numpy()
    prices_N = (-step.scale * state.y).cpu().numpy()
    return LowRank(factors_BNr, prices_N, state.residual, state.rounds, state.residual < tol)


class _Lagrangian:
    """The augmented Lagrangian of a program and its minimisation."""

    def __init__(self, program: MembershipProgram, rank: int) -> None:
        self.program, self.rank = program, rank
        # Scaled so that the objective is of the order of N, and rows weigh against it alike in all units.
        spread = float((program.diagonal - program.diagonal.min()).mean())
        self.scale = spread if spread > 0 else 1.0
        self.unit = program.n_clusters / program.n_samples
        self.diagonal = program.diagonal * (self.unit / self.scale)
        self.traced = program.n_samples / program.n_clusters  # weight of a trace against a row sum

    def begin(self, v_BNr: Tensor) -> _State:
        """The first state from factors of any size, which are scaled to the right traces."""
        v_BNr = v_BNr.to(self.diagonal.device)
        squares_B = v_BNr.square().sum((1, 2), keepdim=True)
        v_BNr = v_BNr * (self.program.trace / (self.unit * squares_B)).sqrt()
        zeros = torch.zeros(self.program.n_samples + self.program.n_blocks, dtype=v_BNr.dtype, device=v_BNr.device)
        y_N, t_B = zeros.split([self.program.n_samples, self.program.n_blocks])
        return _State(v_BNr, y_N, t_B, PENALTY, np.inf, 0)

    def proceed(self, state: _State, tol: float, max_rounds: int) -> _State:
        """Rounds until the infeasibility is below ``tol``."""
        while state.residual >= tol and state.rounds < max_rounds:
            state = self._round(state)
        return state

    def lagrangian(self, state: _State) -> float:
        """Objective and priced infeasibility: to first order the objective of a feasible point nearby."""
        return self._value(state.v, replace(state, penalty=0.0))[0]

    def _round(self, state: _State) -> _State:
        shape = state.v.shape

        def function(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient_BNr = self._value(torch.from_numpy(flat).to(state.v.device).view(shape), state)
            return value, gradient_BNr.reshape(-1).cpu().numpy()

        flat = state.v.reshape(-1).cpu().numpy()
        found = minimize(
            function,
            flat,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * flat.size,
            options={"maxcor": MEMORY, "maxiter": INNER_STEPS, "maxfun": 2 * INNER_STEPS, "ftol": 1e-12, "gtol": 1e-6},
        )
        v_BNr = self._traded(torch.from_numpy(found.x).to(state.v.device).view(shape))
        rows_N, traces_B = self._infeasibility(v_BNr)
        residual = max(float(rows_N.square().mean().sqrt()), float(traces_B.abs().max()))
        return _State(
            v_BNr,
            state.y + state.penalty * rows_N,
            state.t + state.penalty * self.traced * traces_B,
            state.penalty * (2 if residual > 0.5 * state.residual else 1),
            residual,
            state.rounds + 1,
        )

    def _value(self, v_BNr: Tensor, state: _State) -> tuple[float, Tensor]:
        """Augmented Lagrangian and its gradient."""
        y_BNF, unit = self.program.whitened, self.unit
        sums_Br = v_BNr.sum(1)
        row_sums_BN = (v_BNr @ sums_Br.unsqueeze(-1)).squeeze(-1)
        projected_BFr = y_BNF.mT @ v_BNr
        rows_N = unit * row_sums_BN.sum(0) - 1
        traces_B = unit * v_BNr.square().sum((1, 2)) - self.program.trace
        pull = state.penalty * self.traced
        value = (
            (self.diagonal * row_sums_BN).sum()
            - unit / self.scale * projected_BFr.square().sum()
            + ((state.y + state.penalty / 2 * rows_N) * rows_N).sum()
            + ((state.t + pull / 2 * traces_B) * traces_B).sum()
        )
        price_BN = self.diagonal + unit * (state.y + state.penalty * rows_N)
        gradient_BNr = price_BN.unsqueeze(-1) * sums_Br.unsqueeze(1) + price_BN.unsqueeze(1) @ v_BNr
        gradient_BNr -= (2 * unit / self.scale) * (y_BNF @ projected_BFr)
        gradient_BNr += (2 * unit) * (state.t + pull * traces_B)[:, None, None] * v_BNr
        return float(value), gradient_BNr

    def _infeasibility(self, v_BNr: Tensor) -> tuple[Tensor, Tensor]:
        row_sums_N = (v_BNr @ v_BNr.sum(1).unsqueeze(-1)).sum((0, 2))
        return self.unit * row_sums_N - 1, self.unit * v_BNr.square().sum((1, 2)) - self.program.trace

    def _traded(self, v_BNr: Tensor) -> Tensor:
        """The blocks in the order in which they cost least: a group found under another's shape moves to its own."""
        row_sums_BN = (v_BNr @ v_BNr.sum(1).unsqueeze(-1)).squeeze(-1)
        cost_GB = row_sums_BN @ self.program.diagonal.mT
        for b, y_NF in enumerate(self.program.whitened):
            cost_GB[:, b] -= (y_NF.mT @ v_BNr).square().sum((1, 2))
        cost = cost_GB.cpu().numpy()
        groups, blocks = linear_sum_assignment(cost)
        if cost[groups, blocks].sum() >= np.trace(cost) - 1e-9 * np.abs(cost).max():
            return v_BNr
        return v_BNr[np.argsort(blocks)]


def _padded(start: np.ndarray, rank: int, program: MembershipProgram, rng: np.random.RandomState) -> Tensor:
    """A start with as many columns as asked for and a little noise."""
    shape = (program.n_blocks, program.n_samples, rank)
    if start.ndim != 3 or start.shape[:2] != shape[:2] or start.shape[2] > rank:
        raise ValueError(f"start must have shape {shape[:2]} and at most rank={rank} columns, got {start.shape}")
    v_BNr = np.zeros(shape)
    v_BNr[:, :, : start.shape[2]] = start
    typical = (program.trace / program.n_samples / rank) ** 0.5
    return torch.from_numpy(v_BNr + NOISE * typical * np.abs(rng.standard_normal(shape)))
