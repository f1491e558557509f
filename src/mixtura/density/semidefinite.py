"""Membership programs solved and certified: thin factors for speed, alternating directions for the exact optimum.

Neither knows what a cluster is for; :mod:`mixtura.density.adjusted_clustering` does.

Shapes: N samples, F features, K clusters, B blocks (K, or one for all), r columns of a factor.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state

from mixtura.density.exact_memberships import certify, solve_exactly, why_not_exact
from mixtura.density.inputs import device_of
from mixtura.density.low_rank_memberships import solve_low_rank
from mixtura.density.membership_program import MembershipProgram, lower_bound
from mixtura.density.starts import kmeans_plus_plus, lloyd

__all__ = [
    "SOLVERS",
    "SDPResult",
    "check_size",
    "kmeans_sdp",
    "round_memberships",
    "solve_membership_sdp",
    "solve_program",
]

SOLVERS = ("lowrank", "admm", "scs")
CERTIFIED = 1e-3  # relative gap below which an answer is taken as the optimum
RESTARTS = 3  # most, of thin factors from a certificate's matrices
ROUNDING_STARTS, ROUNDING_STEPS = 10, 50  # of k-means on the factor of one block


@dataclass(frozen=True)
class SDPResult:
    """An answer to a membership program.

    Attributes:
        factors: U with Z_b = U_b U_b', shape (B, N, r); None where ``blocks`` are there.
        blocks: Z, shape (B, N, N); None where ``factors`` are there.
        prices: dual variable v of the row sums, shape (N,).
        slack: dual variable N of the signs, shape (B, N, N); None for ``"lowrank"`` without a certificate. With ``prices``
            it is what :func:`membership_lower_bound` takes to prove ``lower_bound``.
        value: objective.
        lower_bound: no feasible point is below; NaN where no certificate was asked for.
        gap: (value - lower_bound) / |value|; NaN likewise.
        primal_residual: infeasibility of the equalities; relative for ``blocks``.
        dual_residual: relative; NaN for ``factors``.
        iterations: rounds of the solver.
        seconds: of wall clock, certificate included.
        converged: whether the solver met its tolerance.
    """

    factors: np.ndarray | None
    blocks: np.ndarray | None
    prices: np.ndarray
    slack: np.ndarray | None
    value: float
    lower_bound: float
    gap: float
    primal_residual: float
    dual_residual: float
    iterations: int
    seconds: float
    converged: bool

    @property
    def memberships(self) -> np.ndarray:
        """Row sums of each block, shape (N, B); for K blocks, rows sum to one."""
        if self.factors is not None:
            return np.einsum("bnr,br->nb", self.factors, self.factors.sum(1))
        assert self.blocks is not None
        return self.blocks.sum(2).T

    def crossed(self, X: np.ndarray) -> np.ndarray:
        """X' Z_b X, shape (B, F, F)."""
        if self.factors is not None:
            projected_BFr = np.einsum("nf,bnr->bfr", X, self.factors)
            return projected_BFr @ projected_BFr.transpose(0, 2, 1)
        assert self.blocks is not None
        return X.T @ self.blocks @ X


def solve_membership_sdp(
    X: Any,
    covariances: Any = None,
    n_clusters: int | None = None,
    *,
    solver: str = "lowrank",
    rank: int = 2,
    tol: float = 1e-5,
    max_iter: int | None = None,
    start: SDPResult | np.ndarray | None = None,
    n_starts: int = 3,
    certify: bool = False,
    device: str = "cpu",
    seed: Any = 0,
) -> SDPResult:
    """The membership matrices of least cost for groups of given shapes.

    Args:
        X: samples, shape (N, F), finite.
        covariances: one a cluster, shape (K, F, F); or one metric for all, shape (F, F), which makes one block of trace K;
            None is the identity for all.
        n_clusters: K; needed for one block.
        solver: ``"lowrank"`` (fast, local), ``"admm"`` (exact, N x N matrices), ``"scs"`` (exact, needs cvxpy).
        rank: columns of a block's factor a cluster; for ``"lowrank"``.
        tol: infeasibility at which it ends, and the duality gap for the exact solvers.
        max_iter: most rounds; 100 for ``"lowrank"``, 5000 for ``"admm"``, 50,000 for ``"scs"`` by default.
        start: an earlier result, or factors, to go on from.
        n_starts: random starts of ``"lowrank"`` without ``start``.
        certify: whether to prove how low the objective can be. Where ``"lowrank"`` is further above than 1e-3, it starts
            again from the certificate's matrices, at most three times, with up to 2 K columns a block.
        device: for ``"lowrank"``: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        seed: number or RandomState.
    Returns:
        The answer; ``memberships`` are its row sums.
    Raises:
        ValueError: as :meth:`MembershipProgram.build`; an unknown solver; more samples than an exact solver or a certificate
            can hold (what it would take is said).
        ModuleNotFoundError: ``"scs"`` without cvxpy.
    Warns:
        ConvergenceWarning: the rounds ran out; with the residuals.
    Example:
        >>> X = np.array([[0.0], [0.1], [5.0], [5.1]])
        >>> found = solve_membership_sdp(X, np.full((2, 1, 1), 0.01), solver="admm")
        >>> found.memberships.argmax(1)[[0, 2]].tolist() == found.memberships.argmax(1)[[1, 3]].tolist()
        True
    """
    if not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}")
    program = MembershipProgram.build(X, covariances, n_clusters)
    found = solve_program(
        program, solver=solver, rank=rank, tol=tol, max_iter=max_iter, start=start, n_starts=n_starts, certified=certify,
        device=device_of(device), rng=check_random_state(seed),
    )  # fmt: skip
    if not found.converged:
        warnings.warn(not_converged(found, solver), ConvergenceWarning, stacklevel=2)
    return found


def check_size(solver: str, certified: bool, n_samples: int, n_blocks: int) -> None:
    """Raise a ValueError where the N x N matrices of an exact solver or of a certificate are too much; it says what to take."""
    if (solver != "lowrank" or certified) and (reason := why_not_exact(n_samples, n_blocks)):
        raise ValueError(f"solver={solver!r}{' with certify' if certified else ''}: {reason}")


def not_converged(found: SDPResult, solver: str) -> str:
    """What a warning says of an answer short of its tolerance."""
    dual = "" if np.isnan(found.dual_residual) else f", dual residual {found.dual_residual:.1e}"
    gap = "" if np.isnan(found.gap) else f", gap {found.gap:.1e}"
    return (
        f"solver={solver!r} did not converge in {found.iterations} rounds: primal residual {found.primal_residual:.1e}{dual}"
        f"{gap}. Raise max_iter or tol, or check that no group is about to lose its samples"
    )


def solve_program(
    program: MembershipProgram,
    *,
    solver: str,
    rng: np.random.RandomState,
    rank: int = 2,
    tol: float = 1e-5,
    max_iter: int | None = None,
    start: SDPResult | np.ndarray | None = None,
    n_starts: int = 3,
    certified: bool = False,
    device: str = "cpu",
) -> SDPResult:
    """As :func:`solve_membership_sdp`, for a program that is built; convergence is reported, not warned of."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {list(SOLVERS)}, got {solver!r}")
    check_size(solver, certified, program.n_samples, program.n_blocks)
    if program.n_samples < 2:
        raise ValueError("X must have at least 2 samples, got n_samples = 1")
    began = time.perf_counter()
    if solver == "lowrank":
        columns = rank * round(program.trace)
        found = _low_rank(program, columns, start, rng, n_starts, tol, max_iter or 100, device, certified)
    elif solver == "admm":
        found = _exact(program, start, tol, max_iter or 5000, certified)
    else:
        found = _conic(program, tol, max_iter or 50_000, certified)
    return replace(found, seconds=time.perf_counter() - began)


def _low_rank(
    program: MembershipProgram,
    columns: int,
    start: SDPResult | np.ndarray | None,
    rng: np.random.RandomState,
    n_starts: int,
    tol: float,
    max_rounds: int,
    device: str,
    certified: bool,
) -> SDPResult:
    factors = None
    if start is not None:
        factors = _as_factors(start, program.trace)
        columns = max(columns, factors.shape[2])
    moved = MembershipProgram(program.whitened.to(device), program.diagonal.to(device), program.trace)
    found = solve_low_rank(
        moved, rank=columns, rng=rng, start=factors, n_starts=n_starts, tol=tol, max_rounds=max_rounds
    )
    value, rounds, bound = program.value(found.factors), found.rounds, float("nan")
    prices, slack = found.prices, None
    if certified:
        bound = -np.inf
        for left in reversed(range(RESTARTS + 1)):
            proof = certify(program, value, found.factors, found.prices)
            if proof.bound > bound:
                bound, prices, slack = proof.bound, proof.prices, proof.slack
            if value - bound <= CERTIFIED * abs(value) or left == 0:
                break
            columns = max(columns, min(2 * columns, 2 * program.n_clusters))
            begin = _leading_factors(proof.blocks, columns)
            again = solve_low_rank(moved, rank=columns, rng=rng, start=begin, tol=tol, max_rounds=max_rounds)
            rounds += again.rounds
            if again.converged and program.value(again.factors) < value:
                found, value = again, program.value(again.factors)
            elif columns >= 2 * program.n_clusters:
                break
    gap = (value - bound) / max(abs(value), np.finfo(float).tiny)
    return SDPResult(
        found.factors,
        None,
        prices,
        slack,
        value,
        bound,
        gap,
        found.residual,
        float("nan"),
        rounds,
        0.0,
        found.converged,
    )


def _exact(
    program: MembershipProgram, start: SDPResult | np.ndarray | None, tol: float, max_iter: int, certified: bool
) -> SDPResult:
    blocks = prices = slack = None
    if isinstance(start, SDPResult):
        prices, slack = start.prices, start.slack
        blocks = start.blocks if start.factors is None else start.factors @ start.factors.transpose(0, 2, 1)
    elif start is not None:
        blocks = start @ start.transpose(0, 2, 1)
    found = solve_exactly(program, start=blocks, prices=prices, slack=slack, tol=tol, max_iter=max_iter)
    return _of_blocks(
        program, found.blocks, found.prices, found.slack, certified,
        residuals=(found.primal_residual, found.dual_residual), iterations=found.iterations, converged=found.converged,
    )  # fmt: skip


def _conic(program: MembershipProgram, tol: float, max_iter: int, certified: bool) -> SDPResult:
    """The program in cvxpy's words, solved by SCS: slow, general, and another's code."""
    try:
        import cvxpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "solver='scs' needs cvxpy and scs, which are not installed; pip install 'mixtura[sdp]', or take solver='admm'"
        ) from error
    n, costs_BNN = program.n_samples, program.costs()
    unit = float(np.sqrt((costs_BNN**2).mean())) or 1.0
    blocks = [cvxpy.Variable((n, n), PSD=True) for _ in costs_BNN]
    rows = sum(block @ np.ones(n) for block in blocks) == np.ones(n)
    constraints = [rows, *(block >= 0 for block in blocks), *(cvxpy.trace(block) == program.trace for block in blocks)]
    objective = sum(
        cvxpy.sum(cvxpy.multiply(cost / unit, block)) for cost, block in zip(costs_BNN, blocks, strict=True)
    )
    problem = cvxpy.Problem(cvxpy.Minimize(objective), constraints)
    problem.solve(solver=cvxpy.SCS, eps=tol, max_iters=max_iter)
    z_BNN = np.stack([block.value for block in blocks])
    prices = -unit * np.asarray(rows.dual_value)
    slack_BNN = np.stack([unit * np.maximum(bound.dual_value, 0) for bound in constraints[1 : 1 + len(blocks)]])
    primal = float(np.sqrt(((z_BNN.sum((0, 2)) - 1) ** 2).mean()))
    return _of_blocks(
        program, z_BNN, prices, slack_BNN, certified,
        residuals=(primal, float("nan")), iterations=problem.solver_stats.num_iters,
        converged=problem.status == cvxpy.OPTIMAL,
    )  # fmt: skip


def _of_blocks(
    program: MembershipProgram,
    blocks: np.ndarray,
    prices: np.ndarray,
    slack: np.ndarray,
    certified: bool,
    *,
    residuals: tuple[float, float],
    iterations: int,
    converged: bool,
) -> SDPResult:
    costs_BNN = program.costs()
    value, bound = float((costs_BNN * blocks).sum()), float("nan")
    if certified:
        bound = lower_bound(costs_BNN, program.trace, prices, slack)
    gap = (value - bound) / max(abs(value), np.finfo(float).tiny)
    return SDPResult(None, blocks, prices, slack, value, bound, gap, *residuals, iterations, 0.0, converged)


def _as_factors(start: SDPResult | np.ndarray, trace: float) -> np.ndarray:
    if isinstance(start, SDPResult):
        if start.factors is not None:
            return start.factors
        assert start.blocks is not None
        return _leading_factors(start.blocks, round(trace))
    return np.asarray(start, dtype=np.float64)


def _leading_factors(blocks: np.ndarray, columns: int) -> np.ndarray:
    """Nonnegative factors near semidefinite blocks, shape (B, N, columns): the leading ones, turned to their positive side."""
    found = []
    for block in blocks:
        values, vectors = np.linalg.eigh((block + block.T) / 2)
        lead = vectors[:, ::-1][:, :columns] * np.sqrt(np.maximum(values[::-1][:columns], 0))
        found.append(np.maximum(lead * np.where(lead.sum(0) < 0, -1, 1), 0))
    return np.stack(found)


def round_memberships(found: SDPResult, n_clusters: int, rng: np.random.RandomState) -> np.ndarray:
    """Labels from an answer, shape (N,): the block with the largest row sum, or k-means on the factor of one block.

    Args:
        found: the answer.
        n_clusters: K.
        rng: source of chance.
    """
    if n_clusters == 1:
        return np.zeros(len(found.memberships), dtype=np.int64)
    if found.memberships.shape[1] > 1:
        return found.memberships.argmax(1)
    if found.factors is not None:
        left_Nr, _, _ = np.linalg.svd(found.factors[0], full_matrices=False)
        left_NK = left_Nr[:, :n_clusters]
    else:
        assert found.blocks is not None
        left_NK = np.linalg.eigh(found.blocks[0])[1][:, ::-1][:, :n_clusters]
    best, best_spread = np.zeros(len(left_NK), dtype=np.int64), np.inf
    for _ in range(ROUNDING_STARTS):
        centres_KK = kmeans_plus_plus(left_NK, n_clusters, random_state=rng)
        centres_KK, labels_N = lloyd(left_NK, centres_KK, steps=ROUNDING_STEPS)
        spread = float(((left_NK - centres_KK[labels_N]) ** 2).sum())
        if spread < best_spread:
            best, best_spread = labels_N, spread
    return best


def kmeans_sdp(X: Any, n_clusters: int, *, seed: Any = 0, **options: Any) -> np.ndarray:
    """Labels by the relaxation of k-means, shape (N,): one shape for all groups, no start to choose.

    Args:
        X: shape (N, F).
        n_clusters: K.
        seed: number or RandomState.
        options: of :func:`solve_membership_sdp`, such as ``solver``.
    Source:
        Peng and Wei 2007, Approximating k-means-type clustering via semidefinite programming, eq. 9-13.
    Example:
        >>> labels = kmeans_sdp([[0.0], [0.1], [5.0], [5.1]], 2)
        >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
        True
    """
    rng = check_random_state(seed)
    return round_memberships(solve_membership_sdp(X, None, n_clusters, seed=rng, **options), n_clusters, rng)
