"""Abundances of known spectra: least squares under constraints, all pixels at once and exact.

- :func:`fcls`: shares >= 0 that sum to one. :func:`nnls_unmix`: >= 0 alone. Both by block principal pivoting, which ends at
  the optimum of every pixel and not near it.
- :func:`sunsal`: an l1 penalty in addition, by alternating directions.

Shapes: P pixels, L channels, M endmembers (up to about 30; a pixel costs M^3).
Source: block pivoting with Murty's rule as backup: Kim and Park 2011, SIAM J. Sci. Comput. 33(6), sec. 3 (its algorithm 2);
SUnSAL: Bioucas-Dias and Figueiredo 2010 (1002.4527), sec. 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtura.core.simplex import project

__all__ = ["batch_nnls", "fcls", "nnls_unmix", "sunsal"]

BLOCK = 8192  # pixels at once: a Gram matrix each
RIDGE = 1e-12  # of the mean diagonal, so that endmembers twice the same still have an answer
TRIES = 3  # full exchanges without progress before one variable at a time is exchanged


def batch_nnls(gram: Tensor, linear: Tensor) -> Tensor:
    """The minimiser of ``a Q a / 2 - b a`` over a >= 0, for each of P problems; float64.

    Args:
        gram: Q, symmetric and positive definite, shape (P, M, M) or (1, M, M) where all problems share it.
        linear: b, shape (P, M).
    Returns:
        Shape (P, M). Exact up to rounding: the conditions of optimality hold.
    Raises:
        ValueError: Q is not positive definite.
    Example:
        >>> batch_nnls(torch.eye(2).double()[None], torch.tensor([[1.0, -1.0]]).double())
        tensor([[1., 0.]], dtype=torch.float64)
    """
    n, m = linear.shape
    gram = gram.expand(n, m, m)
    if bool((torch.linalg.eigvalsh(gram[:1] if gram.stride(0) == 0 else gram)[:, 0] <= 0).any()):
        raise ValueError("gram must be positive definite, and an eigenvalue is not above 0")
    out = torch.zeros_like(linear)
    left = torch.arange(n, device=linear.device)
    free = torch.ones(n, m, dtype=torch.bool, device=linear.device)
    fewest = torch.full((n,), m + 1, device=linear.device)
    tries = torch.full((n,), TRIES, device=linear.device)
    eye = torch.eye(m, dtype=linear.dtype, device=linear.device)
    scale = linear.abs().amax(1, keepdim=True).clamp(min=1e-300)
    while len(left):
        q, b, f = gram[left], linear[left], free[left]
        both = f[:, :, None] & f[:, None, :]
        a = torch.linalg.solve(torch.where(both, q, eye), torch.where(f, b, 0.0))
        slope = torch.where(f, 0.0, (q @ a[..., None])[..., 0] - b)
        # Rounding must not keep a pixel going: what is below it counts as optimal.
        size = a.abs().amax(1, keepdim=True)
        wrong = (f & (a < -1e-12 * size)) | (~f & (slope < -1e-12 * scale[left]))
        count = wrong.sum(1)
        done = count == 0
        out[left[done]] = torch.where(f, a, 0.0)[done].clamp(min=0)
        better = count < fewest[left]
        tries[left] = torch.where(better, TRIES, tries[left] - 1)
        fewest[left] = torch.minimum(count, fewest[left])
        # The last wrong one alone: slow, and it cannot cycle.
        last = wrong & (wrong.flip(1).cumsum(1).flip(1) == 1)
        free[left] = f ^ torch.where((tries[left] >= 0)[:, None], wrong, last)
        left = left[~done]
    return out


def fcls(X: Any, endmembers: Any, *, weights: Any = None) -> np.ndarray:
    """Shares of each endmember in each pixel, >= 0 and summing to one, of least squared error.

    Args:
        X: shape (P, L).
        endmembers: shape (M, L), affinely independent.
        weights: of the squared error of each channel, shape (L,), >= 0; equal where None.
    Returns:
        Shape (P, M), float64.
    Raises:
        ValueError: shapes that do not fit (both are named), values that are not finite, a negative weight.
    Source:
        The constrained problem of Heinz and Chang 2001 (IEEE TGRS 39(3)). With the sum at one it equals, up to scale, NNLS with
        Q = (E - y)(E - y)' and b = 1, so that it needs no heavy row and no tolerance.
    Example:
        >>> fcls([[0.25, 0.75], [2.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]).round(9).tolist()
        [[0.25, 0.75], [1.0, 0.0]]
    """
    e_ML, w_L = _checked(X, endmembers, weights)
    if len(e_ML) == 1:
        return np.ones((len(X), 1))
    centre_L = e_ML.mean(0)  # the sum is one, so that a shift of everything changes nothing but the rounding
    e_ML = (e_ML - centre_L) * w_L
    gram_MM = e_ML @ e_ML.T
    stiff = gram_MM.diagonal().mean().clamp(min=1e-300)
    one = torch.ones(len(e_ML), dtype=torch.float64)
    parts = [torch.empty(0, len(e_ML), dtype=torch.float64)]  # of no pixels, no shares
    for y_PL in _blocks(X):
        y_PL = (y_PL - centre_L) * w_L
        b_PM, yy_P = y_PL @ e_ML.T, y_PL.square().sum(1)
        # Any multiple of 1 1' leaves the minimiser where the sum is one; this one makes Q positive definite.
        q_PMM = gram_MM - b_PM[:, :, None] - b_PM[:, None, :] + (yy_P + stiff)[:, None, None]
        size_P = q_PMM.diagonal(dim1=1, dim2=2).mean(1)
        q_PMM = q_PMM / size_P[:, None, None] + RIDGE * torch.eye(len(e_ML), dtype=torch.float64)
        a_PM = batch_nnls(q_PMM, one.expand(len(y_PL), -1))
        parts.append(a_PM / a_PM.sum(1, keepdim=True))
    return torch.cat(parts).numpy()


def nnls_unmix(X: Any, endmembers: Any, *, weights: Any = None) -> np.ndarray:
    """Amounts of each endmember in each pixel, >= 0, of least squared error; they need not sum to one.

    Arguments, errors and result as for :func:`fcls`.
    """
    e_ML, w_L = _checked(X, endmembers, weights)
    e_ML = e_ML * w_L
    gram_MM = e_ML @ e_ML.T
    gram_MM = gram_MM + RIDGE * gram_MM.diagonal().mean().clamp(min=1e-300) * torch.eye(len(e_ML)).double()
    parts = [batch_nnls(gram_MM[None], (y_PL * w_L) @ e_ML.T) for y_PL in _blocks(X)]
    return torch.cat(parts).numpy()


def sunsal(
    X: Any,
    endmembers: Any,
    lam: float = 0.0,
    *,
    sum_to_one: bool = False,
    weights: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> np.ndarray:
    """Abundances >= 0 that minimise squared error / 2 + lam times their sum (SUnSAL), shape (P, M).

    Args:
        X, endmembers, weights: as for :func:`fcls`.
        lam: weight of the l1 penalty, >= 0, in the units of X squared. Without effect where abundances sum to one, and refused.
        sum_to_one: whether they must.
        max_iter, tol: most steps; a step and a gap below ``tol`` in every abundance ends earlier.
    Raises:
        ValueError: as :func:`fcls`; lam < 0, or lam > 0 with ``sum_to_one``.
    """
    if not 0 <= lam < np.inf:
        raise ValueError(f"lam must be >= 0, got {lam}")
    if sum_to_one and lam > 0:
        raise ValueError(f"lam must be 0 with sum_to_one, since the l1 norm is then one for every answer, got {lam}")
    e_ML, w_L = _checked(X, endmembers, weights)
    e_ML = e_ML * w_L
    gram_MM = e_ML @ e_ML.T
    # Between the slowest and the fastest direction; any mu ends at the same point.
    values_M = torch.linalg.eigvalsh(gram_MM).clamp(min=1e-12 * float(gram_MM.trace()) + 1e-300)
    mu = float((values_M[0] * values_M[-1]).sqrt())
    inverse_MM = torch.linalg.inv(gram_MM + mu * torch.eye(len(e_ML)).double())
    parts = []
    for y_PL in _blocks(X):
        b_PM = (y_PL * w_L) @ e_ML.T - lam
        u_PM = ((b_PM + lam) @ inverse_MM).clamp(min=0)
        d_PM = torch.zeros_like(u_PM)
        for _ in range(max_iter):
            a_PM = (b_PM + mu * (u_PM + d_PM)) @ inverse_MM
            before_PM = u_PM
            u_PM = project(a_PM - d_PM) if sum_to_one else (a_PM - d_PM).clamp(min=0)
            d_PM = d_PM - (a_PM - u_PM)
            if float(torch.maximum((a_PM - u_PM).abs().max(), (u_PM - before_PM).abs().max())) < tol:
                break
        parts.append(u_PM)
    return torch.cat(parts).numpy()


def _checked(X: Any, endmembers: Any, weights: Any) -> tuple[Tensor, Tensor]:
    """Endmembers and square roots of the weights, float64; X is looked at by its shape only."""
    e_ML = np.asarray(endmembers, dtype=np.float64)
    shape = np.shape(X)
    if e_ML.ndim != 2 or len(shape) != 2 or shape[1] != e_ML.shape[1] or len(e_ML) == 0:
        raise ValueError(
            f"X (P, L) and endmembers (M, L) must have as many channels, got shapes {shape} and {e_ML.shape}"
        )
    if not np.isfinite(e_ML).all():
        raise ValueError(f"endmembers must be finite, got {int((~np.isfinite(e_ML)).sum())} values that are not")
    w_L = np.ones(e_ML.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if w_L.shape != e_ML.shape[1:] or not (np.isfinite(w_L).all() and (w_L >= 0).all()):
        raise ValueError(f"weights must be {e_ML.shape[1]} finite numbers >= 0, got shape {w_L.shape}")
    return torch.from_numpy(e_ML), torch.from_numpy(np.sqrt(w_L))


def _blocks(X: Any) -> Any:
    X = X if hasattr(X, "__array__") else np.asarray(X, dtype=np.float64)
    for start in range(0, len(X), BLOCK):
        y_PL = np.asarray(X[start : start + BLOCK], dtype=np.float64)
        if not np.isfinite(y_PL).all():
            raise ValueError(f"X must be finite, and {int((~np.isfinite(y_PL)).any(1).sum())} pixels are not")
        yield torch.from_numpy(y_PL)
