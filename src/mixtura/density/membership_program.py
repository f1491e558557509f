"""Clustering as a linear program over membership matrices: its costs, its constraints, and bounds on its optimum.

A group G of n samples is the matrix Z = 1_G 1_G' / n. With centroids profiled out, twice the negative log likelihood of a
partition under the groups' covariances is linear in these matrices,

    sum_k <C_k, Z_k>,   C_k[i, j] = log det S_k + 1/2 (x_i - x_j)' S_k^-1 (x_i - x_j),

and the program minimises it over Z_k that are positive semidefinite, entrywise >= 0, of trace 1, with (sum_k Z_k) 1 = 1.
With one common shape a single matrix of trace K says the same: the k-means relaxation.

Shapes: N samples, F features, B blocks (K clusters, or one block for all), r columns of a factor.
Source: Likelihood adjusted semidefinite programs (2209.15097), abstract, re-derived from the likelihood; Peng and Wei 2007
(one block).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from mixtura.core.gaussian import LostRank, precisions_cholesky, whiten
from mixtura.data.tables import non_finite

__all__ = ["MembershipProgram", "lower_bound", "membership_lower_bound", "partition_factors", "symmetric_sum"]


@dataclass(frozen=True)
class MembershipProgram:
    """The program of a table and the shapes of its groups; no N x N matrix is formed until ``costs`` is asked for.

    Attributes:
        whitened: samples in each block's metric, shape (B, N, F).
        diagonal: log det S_b + |whitened|^2, shape (B, N); <C_b, U U'> = diagonal' U U' 1 - |whitened' U|^2.
        trace: of each block; B * trace = K.
    Example:
        >>> program = MembershipProgram.build(torch.tensor([[0.0], [2.0]]), n_clusters=1)
        >>> program.costs()[0].tolist()
        [[0.0, 2.0], [2.0, 0.0]]
    """

    whitened: Tensor
    diagonal: Tensor
    trace: float

    @classmethod
    def build(
        cls, X: Tensor | np.ndarray, covariances: Tensor | np.ndarray | None = None, n_clusters: int | None = None
    ) -> MembershipProgram:
        """From samples and shapes, checked.

        Args:
            X: shape (N, F), finite.
            covariances: one a cluster, shape (K, F, F); or one metric for all, shape (F, F); the identity by default.
            n_clusters: K; may be left out where there is a covariance for each.
        Raises:
            ValueError: values that are not finite, shapes that do not match, more clusters than samples, or a covariance
                that is not positive definite (the group and the smallest eigenvalue are named).
        """
        x_NF = torch.as_tensor(X, dtype=torch.float64)
        if x_NF.dim() != 2 or 0 in x_NF.shape:
            raise ValueError(f"X must have shape (samples, features), got {tuple(x_NF.shape)}")
        if problem := non_finite(x_NF.numpy()):
            raise ValueError(f"X must be finite: {problem}")
        n, f = x_NF.shape
        shapes = torch.eye(f, dtype=torch.float64) if covariances is None else torch.as_tensor(covariances).double()
        one_block = shapes.dim() == 2
        if one_block:
            shapes = shapes[None]
            if n_clusters is None:
                raise ValueError("n_clusters must be given where there is no covariance for each cluster")
        k = len(shapes) if n_clusters is None else n_clusters
        if tuple(shapes.shape) != (1 if one_block else k, f, f):
            raise ValueError(f"covariances must have shape ({k}, {f}, {f}) or ({f}, {f}), got {tuple(shapes.shape)}")
        if not 1 <= k <= n:
            raise ValueError(f"n_clusters must be between 1 and n_samples={n}, got {k}")
        try:
            upper_BFF = precisions_cholesky(shapes, "full")
        except LostRank as error:
            least = float(torch.linalg.eigvalsh(shapes[error.component])[0])
            raise ValueError(
                f"the covariance of group {error.component} is not positive definite: its smallest eigenvalue is "
                f"{least:.3g}; raise reg, use fewer clusters, or another kind of covariance"
            ) from error
        # Costs depend on differences only; around the mean their sums do not cancel.
        centre_BF = x_NF.mean(0).expand(len(shapes), f)
        parts = [whiten(x_NF, centre_BF, upper_BFF, "full", b) for b in range(len(shapes))]
        whitened_BNF = torch.stack([y_NF for y_NF, _ in parts])
        log_det_B = torch.stack([-2 * half for _, half in parts])
        diagonal_BN = log_det_B[:, None] + whitened_BNF.square().sum(-1)
        return cls(whitened_BNF, diagonal_BN, k / len(shapes))

    @property
    def n_blocks(self) -> int:
        """B."""
        return len(self.whitened)

    @property
    def n_samples(self) -> int:
        """N."""
        return self.whitened.shape[1]

    @property
    def n_clusters(self) -> int:
        """K."""
        return round(self.n_blocks * self.trace)

    def costs(self) -> np.ndarray:
        """The matrices C_b, shape (B, N, N): 8 B N^2 bytes."""
        c_BN = self.diagonal.numpy()
        half_BNN = (c_BN[:, :, None] + c_BN[:, None, :]) / 2
        half_BNN -= (self.whitened @ self.whitened.mT).numpy()
        return half_BNN

    def value(self, factors: Tensor | np.ndarray) -> float:
        """sum_b <C_b, U_b U_b'> of factors U, shape (B, N, r), in B N (F + 2) r multiplications."""
        u_BNr = torch.as_tensor(factors, dtype=torch.float64)
        sums_BN = (u_BNr @ u_BNr.sum(1).unsqueeze(-1)).squeeze(-1)
        return float((self.diagonal * sums_BN).sum() - (self.whitened.mT @ u_BNr).square().sum())

    def partition_value(self, labels: np.ndarray) -> float:
        """The objective of a hard partition, labels in [0, K), shape (N,): twice its negative profile log likelihood.

        The constant N F log 2 pi is left out. An empty group adds nothing.
        """
        factors_KN1 = partition_factors(labels, self.n_clusters)
        if self.n_blocks == 1:
            return self.value(factors_KN1.squeeze(-1).mT.unsqueeze(0))
        return self.value(factors_KN1)


def partition_factors(labels: np.ndarray, n_clusters: int) -> Tensor:
    """The factors 1_G / sqrt(n) of a hard partition, shape (K, N, 1); zeros for an empty group."""
    one_hot_NK = torch.nn.functional.one_hot(torch.as_tensor(labels).long(), n_clusters).double()
    return (one_hot_NK / one_hot_NK.sum(0).clamp(min=1).sqrt()).mT.unsqueeze(-1).contiguous()


def symmetric_sum(v: np.ndarray) -> np.ndarray:
    """(v 1' + 1 v') / 2, shape (N, N): what a price v of the row sums adds to a cost."""
    return (v[:, None] + v) / 2


def membership_lower_bound(
    X: np.ndarray,
    covariances: np.ndarray | None,
    v: np.ndarray,
    N: np.ndarray | None = None,
    n_clusters: int | None = None,
) -> float:
    """A number that the optimum of the program is never below, whatever ``v`` and ``N`` are.

    Args:
        X, covariances, n_clusters: as :meth:`MembershipProgram.build` takes them.
        v: prices of the row sums, shape (N,), any numbers.
        N: slack of each entry, shape (B, N, N), >= 0; its symmetric part counts. Zeros by default.
    Raises:
        ValueError: as :meth:`MembershipProgram.build`, shapes that do not match, numbers that are not finite, or an ``N``
            with entries below zero: a bound from those would be none.
    Source:
        Weak duality: for feasible Z, sum <C_k, Z_k> = sum <C_k - N_k - sym(v), Z_k> + sum <N_k, Z_k> + 1'v, the second
        sum is >= 0, and <M, Z> >= lambda_min(M) tr Z.
    Example:
        >>> round(membership_lower_bound(np.array([[0.0], [2.0]]), None, np.array([2.0, 2.0]), n_clusters=1), 6)
        2.0
    """
    program = MembershipProgram.build(X, covariances, n_clusters)
    v_N = np.asarray(v, dtype=np.float64)
    shape = (program.n_blocks, program.n_samples, program.n_samples)
    n_BNN = np.zeros(shape) if N is None else np.asarray(N, dtype=np.float64)
    if v_N.shape != shape[1:2]:
        raise ValueError(f"v must have shape {shape[1:2]}, got {v_N.shape}")
    if n_BNN.shape != shape:
        raise ValueError(f"N must have shape {shape}, got {n_BNN.shape}")
    if not np.isfinite(v_N).all() or not np.isfinite(n_BNN).all():
        raise ValueError("v and N must be finite, got NaN or infinity")
    if n_BNN.min() < 0:
        raise ValueError(f"N must be >= 0, got {n_BNN.min():.3g}; a slack below zero gives no bound")
    return lower_bound(program.costs(), program.trace, v_N, n_BNN)


def lower_bound(costs: np.ndarray, trace: float, v: np.ndarray, N: np.ndarray) -> float:
    """As :func:`membership_lower_bound`, from formed costs, unchecked; lowered by what rounding may have added."""
    total, n = float(v.sum()), len(v)
    for cost_NN, slack_NN in zip(costs, N, strict=True):
        rest_NN = cost_NN - (slack_NN + slack_NN.T) / 2 - symmetric_sum(v)
        least = eigh(rest_NN, subset_by_index=[0, 0], eigvals_only=True, check_finite=False)[0]
        # An eigenvalue is exact to a few units in the last place of the norm.
        total += trace * (least - 8 * np.finfo(float).eps * n**0.5 * np.linalg.norm(rest_NN))
    return float(total)
