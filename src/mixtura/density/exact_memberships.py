"""Membership matrices by a method that converges to the optimum, and lower bounds that prove how near an answer is.

The dual program, max 1'v + trace 1't over v, t, S >= 0 (semidefinite) and N >= 0 (entrywise) with sym(v) + t_b I + S_b +
N_b = C_b, is solved by alternating directions: v and t by the inverse of their normal matrix, N by clipping, v and t again,
S by an eigenvalue decomposition a block. A round takes B decompositions of N^3 each, memory 6 B N^2 numbers.

Shapes: B blocks, N samples.
Source: Sun, Toh and Yang 2015, A convergent 3-block semiproximal ADMM for conic programming, algorithm ADMM3c (the second
update of v is what makes three blocks converge); steps of the golden ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import eigh

from mixtura.density.membership_program import MembershipProgram, lower_bound, symmetric_sum

__all__ = ["Certificate", "Exact", "certify", "solve_exactly", "why_not_exact"]

GOLDEN = 1.618
CHECKED = 20  # rounds between looks at the residuals
BALANCE, APART = 1.25, 3.0  # factor of the penalty where primal and dual residuals are further apart
MOST_BYTES = 4e9


@dataclass(frozen=True)
class Exact:
    """Where alternating directions ended.

    Attributes:
        blocks: Z, shape (B, N, N); feasible to ``primal_residual``.
        prices: v in the units of the costs, shape (N,).
        slack: N in the units of the costs, shape (B, N, N), >= 0.
        primal_residual, dual_residual: relative.
        iterations: rounds.
        converged: whether both residuals and the duality gap are below the tolerance.
    """

    blocks: np.ndarray
    prices: np.ndarray
    slack: np.ndarray
    primal_residual: float
    dual_residual: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Certificate:
    """A proof of how low the objective can be.

    Attributes:
        bound: no feasible point has an objective below.
        prices: v that gives it, in the units of the costs, shape (N,).
        slack: N that gives it, likewise, shape (B, N, N), >= 0.
        blocks: where the rounds that made it ended, shape (B, N, N): near the optimum, not feasible.
    """

    bound: float
    prices: np.ndarray
    slack: np.ndarray
    blocks: np.ndarray


def why_not_exact(n_samples: int, n_blocks: int) -> str | None:
    """Reason why N x N matrices are too much here, or None: what it would take, and what to do instead."""
    needed = 8 * 6 * n_blocks * n_samples**2
    if needed <= MOST_BYTES:
        return None
    return (
        f"{n_samples} samples and {n_blocks} blocks would take {needed / 1e9:.0f} GB and rounds of {n_blocks} "
        f"decompositions of {n_samples} x {n_samples}; solver='lowrank' without certify forms no such matrix, and a sketch "
        "works on some of the samples"
    )


def solve_exactly(
    program: MembershipProgram,
    *,
    start: np.ndarray | None = None,
    prices: np.ndarray | None = None,
    slack: np.ndarray | None = None,
    tol: float = 1e-5,
    max_iter: int = 5000,
) -> Exact:
    """The optimum of the program.

    Args:
        program: to be solved.
        start: Z to go on from, shape (B, N, N).
        prices, slack: v and N to go on from, shapes (N,) and (B, N, N).
        tol: of primal residual, dual residual, duality gap and negativity, relative.
        max_iter: most rounds.
    """
    rounds = _Rounds(program.costs(), program.trace, program.n_clusters)
    rounds.begin(start, prices, slack)
    primal, dual, converged, done = np.inf, np.inf, False, 0
    while done < max_iter and not converged:
        for _ in range(min(CHECKED, max_iter - done)):
            rounds.step()
            done += 1
        primal, dual, gap = rounds.residuals()
        converged = max(primal, dual, gap) < tol
        rounds.balance(primal, dual)
    return Exact(rounds.Z, rounds.prices(), rounds.slack(), primal, dual, done, converged)


def certify(
    program: MembershipProgram,
    value: float,
    factors: np.ndarray,
    prices: np.ndarray,
    *,
    goal: float = 5e-4,
    max_iter: int = 100,
) -> Certificate:
    """The best lower bound that some rounds from an answer give.

    Args:
        program: the program.
        value: objective of the answer.
        factors: of the answer, shape (B, N, r).
        prices: its v, shape (N,).
        goal: relative gap at which it ends.
        max_iter: most rounds.
    """
    costs_BNN = program.costs()
    rounds = _Rounds(costs_BNN, program.trace, program.n_clusters)
    rounds.begin(factors @ factors.transpose(0, 2, 1), prices, None)
    best, done = Certificate(-np.inf, prices, rounds.slack(), rounds.Z), 0
    while done < max_iter and value - best.bound > goal * abs(value):
        for _ in range(min(CHECKED, max_iter - done)):
            rounds.step()
            done += 1
        v_N, n_BNN = rounds.prices(), rounds.slack()
        if (bound := lower_bound(costs_BNN, program.trace, v_N, n_BNN)) > best.bound:
            best = Certificate(bound, v_N, n_BNN, rounds.Z)
        primal, dual, _ = rounds.residuals()
        rounds.balance(primal, dual)
    return replace(best, blocks=rounds.Z)


class _Rounds:
    """State of alternating directions on costs scaled to unit root mean square."""

    def __init__(self, costs: np.ndarray, trace: float, n_clusters: int) -> None:
        self.unit = float(np.sqrt((costs**2).mean())) or 1.0
        self.C, self.trace = costs / self.unit, trace
        self.n_blocks, self.n = costs.shape[:2]
        # What |Z| / |S| is at an optimum with equal groups, within a factor of a few.
        self.sigma = 2.0 / self.n
        self.Z, self.N, self.S = (np.zeros_like(costs) for _ in range(3))
        self.v, self.t = np.zeros(self.n), np.zeros(self.n_blocks)
        self.few = np.zeros(self.n_blocks, dtype=bool)

    def begin(self, start: np.ndarray | None, prices: np.ndarray | None, slack: np.ndarray | None) -> None:
        """Take over an answer; unless given, slack goes to the entries off its support, and S is what is left."""
        if start is None:
            return
        self.Z = np.array(start, dtype=np.float64)
        if prices is None:
            return
        self.v = prices / self.unit
        rest_BNN = self.C - symmetric_sum(self.v)
        if slack is None:
            self.N = np.maximum(rest_BNN, 0) * (self.Z / self.Z.max() < 1e-6)
        else:
            self.N = slack / self.unit
        for b in range(self.n_blocks):
            rest_NN = rest_BNN[b] - self.N[b]
            self.t[b] = eigh(rest_NN, subset_by_index=[0, 0], eigvals_only=True, check_finite=False)[0]
            self.S[b] = rest_NN - self.t[b] * np.eye(self.n)

    def step(self) -> None:
        """One round: v and t, N, v and t again, S, Z."""
        self._prices()
        target_BNN = self.C - self._priced()
        self.N = np.maximum(target_BNN - self.S - self.Z / self.sigma, 0)
        self._prices()
        target_BNN = self.C - self._priced() - self.N
        for b in range(self.n_blocks):
            self.S[b], self.few[b] = _semidefinite(target_BNN[b] - self.Z[b] / self.sigma, bool(self.few[b]))
        self.Z += GOLDEN * self.sigma * (self.S - target_BNN)

    def residuals(self) -> tuple[float, float, float]:
        """Primal and dual infeasibility and duality gap, relative."""
        rows_N, traces_B = self._sums(self.Z)
        primal = max(
            float(np.linalg.norm(rows_N - 1)) / self.n**0.5,
            float(np.abs(traces_B - self.trace).max()) / self.trace,
            float(np.linalg.norm(np.minimum(self.Z, 0)) / (1 + np.linalg.norm(self.Z))),
        )
        rest_BNN = self._priced() + self.S + self.N - self.C
        dual = float(np.linalg.norm(rest_BNN) / (1 + np.linalg.norm(self.C)))
        value, bound = float((self.C * self.Z).sum()), float(self.v.sum() + self.trace * self.t.sum())
        return primal, dual, abs(value - bound) / (1 + abs(value) + abs(bound))

    def balance(self, primal: float, dual: float) -> None:
        """Move the penalty to where the larger residual falls faster."""
        if primal > APART * dual:
            self.sigma /= BALANCE
        elif dual > APART * primal:
            self.sigma *= BALANCE

    def prices(self) -> np.ndarray:
        """v in the units of the costs."""
        return self.v * self.unit

    def slack(self) -> np.ndarray:
        """N in the units of the costs."""
        return self.N * self.unit

    def _prices(self) -> None:
        rows_N, traces_B = self._sums(self.C - self.S - self.N)
        made_N, made_B = self._sums(self.Z)
        right_N = rows_N + (1 - made_N) / self.sigma
        right_B = traces_B + (self.trace - made_B) / self.sigma
        # The normal matrix [[B/2 (N I + 11'), 1 1_B'], [1_B 1', N I]]: a 2 x 2 system of the means, the rest is scaled.
        n, b = self.n, self.n_blocks
        v_mean = (right_N.mean() - b * right_B.mean() / n) / (b * (n - 1))
        t_mean = right_B.mean() / n - v_mean
        self.v = 2 / (b * n) * (right_N - right_N.mean()) + v_mean
        self.t = (right_B - right_B.mean()) / n + t_mean

    def _priced(self) -> np.ndarray:
        return symmetric_sum(self.v) + self.t[:, None, None] * np.eye(self.n)

    @staticmethod
    def _sums(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return blocks.sum((0, 2)), np.trace(blocks, axis1=1, axis2=2)


def _semidefinite(matrix: np.ndarray, few: bool) -> tuple[np.ndarray, bool]:
    """The nearest semidefinite matrix, and whether few eigenvalues were negative; then only those are computed next time."""
    if few:
        values, vectors = eigh(matrix, driver="evr", subset_by_value=(-np.inf, 0.0), check_finite=False)
    else:
        values, vectors = eigh(matrix, driver="evd", check_finite=False)
    below = values < 0
    kept = matrix - (vectors[:, below] * values[below]) @ vectors[:, below].T
    return (kept + kept.T) / 2, bool(below.sum() < len(matrix) / 8)
