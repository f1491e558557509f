"""Clusters of different shapes without centroids: a membership program and the groups' covariances, in turn.

- Given the covariances, the program finds all groups at once; no centroid is estimated, so none can be a bad one.
- Given the membership matrices, the covariances follow in closed form.
- What is left of a start is in the first covariances. They come from the program of one shape for all, which needs no start.

Shapes: N samples, F features, K clusters.
Source: Likelihood adjusted semidefinite programs for clustering heterogeneous data (2209.15097): the lift to one membership
matrix a group and the alternation; the sketch after the same authors' sketch-and-lift.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from mixtura.core.gaussian import LOG_2PI, Gaussians
from mixtura.core.keeping import Keeping
from mixtura.density.group_shapes import SHAPES, group_covariances, shaped
from mixtura.density.inputs import as_matrix, device_of
from mixtura.density.labels import as_labels
from mixtura.density.membership_program import MembershipProgram, partition_factors
from mixtura.density.semidefinite import SOLVERS, SDPResult, check_size, not_converged, round_memberships, solve_program

__all__ = ["AdjustedSDPClustering", "Step"]

log = logging.getLogger(__name__)

METRICS = ("identity", "total")
MISSING = "; GaussianMixture takes missing values"
EXACT_UP_TO, SKETCH_ABOVE, SKETCH_ROWS = 300, 2000, 1000  # n K, n, n of solver="auto" and sketch=None


@dataclass(frozen=True)
class Step:
    """One turn of covariances and program.

    Attributes:
        value: objective of the program.
        log_likelihood: profile log likelihood of the labels with their covariances, nats.
        moved: labels that changed.
        residual: infeasibility of the program's answer.
        seconds: of wall clock.
    """

    value: float
    log_likelihood: float
    moved: int
    residual: float
    seconds: float


@dataclass(frozen=True)
class _Found:
    """The best partition of a run, in standardised coordinates."""

    labels: np.ndarray
    log_likelihood: float
    result: SDPResult | None
    gap: float
    history: list[Step]
    settled: bool
    unsolved: SDPResult | None


class AdjustedSDPClustering(Keeping, ClusterMixin, BaseEstimator):
    """Clusters of different Gaussian shapes by semidefinite programs that know their likelihood.

    Columns are centred and scaled inside, so units do not matter.

    Parameters
    ----------
    n_clusters : int, default=3
        Number of clusters K.
    covariance : {"auto", "full", "shrunk", "diag", "tied", "spherical"}, default="auto"
        Shapes of clusters. "shrunk" draws each towards what all share, by Ledoit and Wolf's weight; "auto" does so for
        clusters of fewer than three samples a column.
    reg : float, default=1e-3
        Variance added to every column, as a share of its own.
    init : {"sdp", "random"} or array-like of shape (N,), default="sdp"
        Labels from the program of one shape, drawn evenly, or given: whole numbers from 0 to K - 1.
    metric : {"identity", "total"}, default="identity"
        Of the program of one shape: distances of scaled columns, or those that the table's covariance makes round.
    solver : {"auto", "lowrank", "admm", "scs"}, default="auto"
        "auto" is the exact "admm" up to N K = 300 and "lowrank" above.
    rank : int, default=2
        Columns of a cluster's factor, for "lowrank".
    max_iter : int, default=20
        Most turns.
    tol : float, default=1e-5
        It ends when labels repeat, or the objective gains less, relative.
    certify : bool, default=False
        Whether to prove how near the last program's answer is to its optimum (``gap_``). Takes N x N matrices.
    sketch : int, bool or None, default=None
        Rows to cluster, of which the others are then told by likelihood; None does so above 2000 rows, with 1000; False
        never does.
    n_sketches : int, default=3
        Such samples; the one with the highest likelihood of all rows stays.
    device : str, default="cpu"
        "cpu", "cuda", "cuda:0", or "auto"; for "lowrank".
    seed : int, default=0
        Seed of everything that chance enters.

    Attributes
    ----------
    labels_ : ndarray of shape (N,)
    means_ : ndarray of shape (K, F)
    covariances_ : ndarray of shape (K, F, F)
    weights_ : ndarray of shape (K,)
        Of the groups that ``labels_`` makes.
    memberships_ : ndarray of shape (N, K)
        Row sums of the membership matrices, or of the sketch's rows the labels' indicators; rows sum to 1.
    objective_ : float
        Of the program that gave the labels.
    log_likelihood_ : float
        Profile log likelihood of the labels, in nats: the best over the turns.
    gap_ : float
        How much lower, at most, the program's optimum is, relative; NaN without ``certify``.
    n_iter_ : int
    history_ : list of Step

    Notes
    -----
    A turn of "lowrank" takes about 1000 evaluations of 2 N K F r multiplications and N K (F + 20 r) numbers; "admm" about 500
    rounds of K decompositions N x N. Memory of "admm", and of ``certify``: 6 K N^2 numbers.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> flat, tall = rng.normal(size=(2, 40, 2)) * [[[9, 0.1]], [[0.1, 9]]]
    >>> labels = AdjustedSDPClustering(2, init="random", solver="lowrank").fit_predict(np.r_[flat, tall])
    >>> int(max(np.sum(labels[:40] == 0), np.sum(labels[:40] == 1))) >= 37
    True
    """

    def __init__(
        self,
        n_clusters: int = 3,
        *,
        covariance: str = "auto",
        reg: float = 1e-3,
        init: Any = "sdp",
        metric: str = "identity",
        solver: str = "auto",
        rank: int = 2,
        max_iter: int = 20,
        tol: float = 1e-5,
        certify: bool = False,
        sketch: int | bool | None = None,
        n_sketches: int = 3,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.covariance = covariance
        self.reg = reg
        self.init = init
        self.metric = metric
        self.solver = solver
        self.rank = rank
        self.max_iter = max_iter
        self.tol = tol
        self.certify = certify
        self.sketch = sketch
        self.n_sketches = n_sketches
        self.device = device
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> Self:
        """Find the clusters.

        Parameters
        ----------
        X : array-like of shape (N, F)
        y : ignored

        Raises
        ------
        ValueError
            Values that are not finite, more clusters than samples, a parameter out of its range, given labels with an empty
            group, a covariance that is not positive definite (the group and its smallest eigenvalue are named), more samples
            than an exact solver can hold.
        ModuleNotFoundError
            ``solver="scs"`` without cvxpy.

        Warns
        -----
        ConvergenceWarning
            The turns ran out, or a program's rounds; with the residuals and what to try.
        """
        x_NF = as_matrix(self, X, reset=True, hint=MISSING, ensure_min_samples=2)
        self._check(len(x_NF))
        centre_F, scale_F = x_NF.mean(0), x_NF.std(0)
        scale_F = np.where(scale_F > 0, scale_F, 1.0)
        z_NF = (x_NF - centre_F) / scale_F
        rng = check_random_state(self.seed)
        rows = self._sketch_rows(len(z_NF))
        n = len(z_NF) if rows is None else rows
        check_size(self._solver(n), self.certify, n, self.n_clusters)
        if rows is None:
            found = self._run(z_NF, self._first_labels(z_NF, rng), rng)
        else:
            found = self._run_sketches(z_NF, rows, rng)
        self._adopt(found, z_NF, centre_F, scale_F)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Most probable cluster of each sample under the groups' Gaussians and shares, shape (N,).

        ``labels_`` are the program's, which knows no shares: where clusters overlap, the two may differ.
        """
        return self.predict_proba(X).argmax(1)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each cluster for each sample, shape (N, K), rows sum to 1."""
        return self._gaussians().responsibilities(self._entered(X)).numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        """Log density at each sample of the mixture that the groups make, shape (N,), in nats."""
        return self._gaussians().score_samples(self._entered(X)).numpy() - np.log(self.scale_).sum()

    @property
    def gaussians_(self) -> Gaussians:
        """The groups as a mixture of Gaussians: marginals, conditionals, samples."""
        return self._gaussians().mapped(torch.from_numpy(self.scale_), torch.from_numpy(self.centre_))

    def _check(self, n: int) -> None:
        for name, least in (("n_clusters", 1), ("rank", 1), ("max_iter", 1), ("n_sketches", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        for name in ("tol", "reg"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not 0 <= value < np.inf:
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        for name, known in (("covariance", SHAPES), ("metric", METRICS), ("solver", ("auto", *SOLVERS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if isinstance(self.init, str) and self.init not in ("sdp", "random"):
            raise ValueError(f"init must be 'sdp', 'random' or labels, got {self.init!r}")
        if self.n_clusters > n:
            raise ValueError(f"n_clusters={self.n_clusters} needs as many samples, got n_samples = {n}")
        sketch = self.sketch
        if sketch is not None and not isinstance(sketch, bool) and not self.n_clusters <= sketch <= n:
            raise ValueError(
                f"sketch must be None, False, True or between n_clusters={self.n_clusters} and {n}, got {sketch}"
            )

    def _sketch_rows(self, n: int) -> int | None:
        """Rows of a sketch, or None to take them all."""
        if self.sketch is None:
            return SKETCH_ROWS if n > SKETCH_ABOVE and isinstance(self.init, str) else None
        if self.sketch is False:
            return None
        rows = min(SKETCH_ROWS, n) if self.sketch is True else int(self.sketch)
        if not isinstance(self.init, str):
            raise ValueError("init with labels has no effect on a sketch, which starts on other rows; set sketch=False")
        return rows

    def _solver(self, n: int) -> str:
        if self.solver != "auto":
            return self.solver
        return "admm" if n * self.n_clusters <= EXACT_UP_TO else "lowrank"

    def _first_labels(self, z_NF: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
        n, k = len(z_NF), self.n_clusters
        if not isinstance(self.init, str):
            labels_N = as_labels(self.init, "init")
            if labels_N.shape != (n,) or not 0 <= labels_N.min() <= labels_N.max() < k:
                raise ValueError(f"init must hold {n} labels from 0 to {k - 1}, got {len(labels_N)} from {labels_N.min()} "
                                 f"to {labels_N.max()}")  # fmt: skip
            empty = np.flatnonzero(np.bincount(labels_N, minlength=k) == 0)
            if len(empty):
                raise ValueError(f"init leaves group {empty[0]} empty; every one of the {k} clusters needs a sample")
            return labels_N
        if self.init == "random":
            labels_N = np.r_[np.arange(k), rng.randint(k, size=n - k)]
            return rng.permutation(labels_N)
        metric_FF = None
        if self.metric == "total":
            metric_FF = z_NF.T @ z_NF / n + self.reg * np.eye(z_NF.shape[1])
        program = MembershipProgram.build(z_NF, metric_FF, k)
        # The first program always has one block: with equal shapes K blocks split a group among them in any way.
        result = self._solve(program, n, rng, start=None)
        return _without_empty(round_memberships(result, k, rng), z_NF, k)

    def _solve(
        self,
        program: MembershipProgram,
        n: int,
        rng: np.random.RandomState,
        start: SDPResult | np.ndarray | None,
        certified: bool = False,
    ) -> SDPResult:
        return solve_program(
            program, solver=self._solver(n), rank=self.rank, start=start, certified=certified,
            device=device_of(self.device), rng=rng,
        )  # fmt: skip

    def _run(self, z_NF: np.ndarray, labels_N: np.ndarray, rng: np.random.RandomState) -> _Found:
        """Turns from labels until they repeat."""
        n, k = len(z_NF), self.n_clusters
        shapes_KFF = self._shapes(z_NF, labels_N)
        if k == 1:
            return _Found(labels_N, self._likelihood(z_NF, labels_N), None, float("nan"), [], True, None)
        # Random labels say nothing of where groups are: the first program then starts anew.
        random = isinstance(self.init, str) and self.init == "random"
        start: SDPResult | np.ndarray | None = None if random else partition_factors(labels_N, k).numpy()
        best: tuple[float, np.ndarray, SDPResult, MembershipProgram] | None = None
        history: list[Step] = []
        settled, unsolved, last = False, None, np.inf
        while len(history) < self.max_iter and not settled:
            began = time.perf_counter()
            program = MembershipProgram.build(z_NF, shapes_KFF)
            result = self._solve(program, n, rng, start)
            unsolved = unsolved if result.converged else result
            found_N = _without_empty(round_memberships(result, k, rng), z_NF, k)
            moved, value = int((found_N != labels_N).sum()), result.value
            likelihood = self._likelihood(z_NF, found_N)
            history.append(Step(value, likelihood, moved, result.primal_residual, time.perf_counter() - began))
            if best is None or likelihood > best[0]:
                best = (likelihood, found_N, result, program)
            gained = abs(last - value) / max(abs(value), np.finfo(float).tiny)
            settled = len(history) > 1 and (moved == 0 or gained < self.tol)
            labels_N, last, start = found_N, value, result
            sums_NK = result.memberships
            free_KFF = group_covariances(z_NF, sums_NK, result.crossed(z_NF))
            shapes_KFF = shaped(free_KFF, z_NF, sums_NK, self.covariance, self.reg)
        assert best is not None
        likelihood, labels_N, kept, program = best
        gap = float("nan")
        if self.certify:
            proved = self._solve(program, n, rng, kept, certified=True)
            found_N = _without_empty(round_memberships(proved, k, rng), z_NF, k)
            if (better := self._likelihood(z_NF, found_N)) > likelihood:
                likelihood, labels_N, kept = better, found_N, proved
            gap = (kept.value - proved.lower_bound) / max(abs(kept.value), np.finfo(float).tiny)
        return _Found(labels_N, likelihood, kept, gap, history, settled, unsolved)

    def _run_sketches(self, z_NF: np.ndarray, rows: int, rng: np.random.RandomState) -> _Found:
        """Turns on some rows, of which the others are told; the best of several."""
        best: _Found | None = None
        for _ in range(self.n_sketches):
            chosen = rng.choice(len(z_NF), rows, replace=False)
            part_MF = z_NF[chosen]
            found = self._run(part_MF, self._first_labels(part_MF, rng), rng)
            means_KF, shapes_KFF = _means(part_MF, found.labels, self.n_clusters), self._shapes(part_MF, found.labels)
            for _ in range(2):  # told by the sketch's groups, then by those of all rows
                labels_N = _nearest(z_NF, means_KF, shapes_KFF)
                labels_N = _without_empty(labels_N, z_NF, self.n_clusters)
                likelihood = self._likelihood(z_NF, labels_N)
                if best is None or likelihood > best.log_likelihood:
                    best = replace(found, labels=labels_N, log_likelihood=likelihood)
                means_KF, shapes_KFF = _means(z_NF, labels_N, self.n_clusters), self._shapes(z_NF, labels_N)
        assert best is not None
        return best

    def _shapes(self, z_NF: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
        """Covariances of hard groups, by the same formula as those of membership matrices."""
        factors_KNF = partition_factors(labels_N, self.n_clusters).numpy()
        projected_KF = np.einsum("nf,knr->kf", z_NF, factors_KNF)
        memberships_NK = np.eye(self.n_clusters)[labels_N]
        free_KFF = group_covariances(z_NF, memberships_NK, projected_KF[:, :, None] * projected_KF[:, None, :])
        return shaped(free_KFF, z_NF, memberships_NK, self.covariance, self.reg)

    def _likelihood(self, z_NF: np.ndarray, labels_N: np.ndarray) -> float:
        """Profile log likelihood of hard groups with their covariances, in standardised coordinates."""
        program = MembershipProgram.build(z_NF, self._shapes(z_NF, labels_N))
        return -(program.partition_value(labels_N) + z_NF.size * LOG_2PI) / 2

    def _adopt(self, found: _Found, z_NF: np.ndarray, centre_F: np.ndarray, scale_F: np.ndarray) -> None:
        """Take over what a run found, in the units of the samples."""
        k, labels_N = self.n_clusters, found.labels
        self.labels_ = labels_N.astype(np.int64)
        self.centre_, self.scale_ = centre_F, scale_F
        self.weights_ = np.bincount(labels_N, minlength=k) / len(labels_N)
        self.means_ = _means(z_NF, labels_N, k) * scale_F + centre_F
        self.covariances_ = self._shapes(z_NF, labels_N) * scale_F[:, None] * scale_F
        whole = found.result is not None and len(found.result.memberships) == len(labels_N)
        self.memberships_ = found.result.memberships if whole and found.result is not None else np.eye(k)[labels_N]
        self.log_likelihood_ = found.log_likelihood - len(z_NF) * float(np.log(scale_F).sum())
        self.objective_ = (
            -2 * found.log_likelihood - z_NF.size * LOG_2PI if found.result is None else found.result.value
        )
        self.gap_, self.n_iter_, self.history_ = found.gap, max(len(found.history), 1), found.history
        if found.unsolved is not None:
            warnings.warn(not_converged(found.unsolved, self._solver(len(z_NF))), ConvergenceWarning, stacklevel=3)
        elif not found.settled:
            warnings.warn(
                f"the labels did not settle in max_iter={self.max_iter} turns: the last one moved {found.history[-1].moved}. "
                "The best likelihood on the way is kept; raise max_iter, or use fewer clusters",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _entered(self, X: Any) -> torch.Tensor:
        """New samples, checked, in standardised coordinates."""
        check_is_fitted(self, "weights_")
        x_NF = as_matrix(self, X, reset=False, hint=MISSING)
        return torch.from_numpy((x_NF - self.centre_) / self.scale_)

    def _gaussians(self) -> Gaussians:
        """The groups in standardised coordinates, where a factor exists in any units."""
        check_is_fitted(self, "weights_")
        means_KF = (self.means_ - self.centre_) / self.scale_
        sigma_KFF = self.covariances_ / self.scale_[:, None] / self.scale_
        return Gaussians.build(
            torch.from_numpy(self.weights_), torch.from_numpy(means_KF), torch.from_numpy(sigma_KFF), "full"
        )


def _means(z_NF: np.ndarray, labels_N: np.ndarray, n_clusters: int) -> np.ndarray:
    return np.stack([z_NF[labels_N == k].mean(0) for k in range(n_clusters)])


def _nearest(z_NF: np.ndarray, means_KF: np.ndarray, shapes_KFF: np.ndarray) -> np.ndarray:
    """The group under which each sample is likeliest, without shares: what one more sample adds to the profile."""
    uniform = torch.full((len(means_KF),), 1 / len(means_KF), dtype=torch.float64)
    gaussians = Gaussians.build(uniform, torch.from_numpy(means_KF), torch.from_numpy(shapes_KFF), "full")
    return gaussians.log_joint(torch.from_numpy(z_NF)).argmax(1).numpy()


def _without_empty(labels_N: np.ndarray, z_NF: np.ndarray, n_clusters: int) -> np.ndarray:
    """The labels with a sample in every group: the farthest from its group's mean moves into an empty one."""
    labels_N = labels_N.copy()
    for group in np.flatnonzero(np.bincount(labels_N, minlength=n_clusters) == 0):
        sizes_K = np.bincount(labels_N, minlength=n_clusters)
        apart_N = np.zeros(len(z_NF))
        for other in np.flatnonzero(sizes_K > 1):
            mine = labels_N == other
            apart_N[mine] = 1e-300 + ((z_NF[mine] - z_NF[mine].mean(0)) ** 2).sum(1)
        labels_N[apart_N.argmax()] = group
    return labels_N
