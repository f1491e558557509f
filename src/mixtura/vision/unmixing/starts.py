"""What is known before unmixing: the noise of each channel, how many materials, and pixels that may be pure.

Shapes: P pixels, L channels, M endmembers.
Source: VCA: Nascimento and Dias 2005 (IEEE TGRS 43(4), algorithm 1); noise by regression and HySime: Bioucas-Dias and Nascimento
2008 (IEEE TGRS 46(8), secs. III and IV).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["estimate_count", "estimate_noise", "second_moment", "vca", "whitening"]

BLOCK = 8192
EPSILON = 1e-6  # of the mean power: what the regression on the other channels is regularised with
LEAST_NOISE = 5  # noise below the median over this number is taken to be that: nothing is trusted without limit


def second_moment(X: Any) -> np.ndarray:
    """Mean of y y' over the pixels, shape (L, L), float64, summed block by block."""
    total_LL = np.zeros((X.shape[1], X.shape[1]))
    for y_PL in _blocks(X):
        total_LL += y_PL.T @ y_PL
    return total_LL / len(X)


def estimate_noise(X: Any, *, moment: np.ndarray | None = None) -> np.ndarray:
    """Standard deviation of each channel's noise, shape (L,): what is left of it after regression on all others.

    Args:
        X: shape (P, L), P well above L.
        moment: the second moment of X, where it is known.
    Returns:
        In the units of X. A channel that is 0 throughout has 0.
    Source:
        Bioucas-Dias and Nascimento 2008, sec. III; the residual's variance is one over the diagonal of the inverse moment.
    """
    s_LL = second_moment(np.asarray(X)) if moment is None else moment
    trace = float(np.trace(s_LL)) / len(s_LL)
    if trace <= 0:
        return np.zeros(len(s_LL))
    inverse_LL = np.linalg.inv(s_LL + EPSILON * trace * np.eye(len(s_LL)))
    sigma_L = np.sqrt(np.maximum(1 / np.diag(inverse_LL) - EPSILON * trace, 0))
    return np.where(np.diag(s_LL) > 0, sigma_L, 0.0)


def whitening(X: Any, *, moment: np.ndarray | None = None) -> np.ndarray:
    """Factor of each channel, shape (L,), that gives its noise unit deviation: a spoiled channel hardly counts.

    Noise is taken to be at least a fifth of the median, so that no channel decides alone; a channel without noise counts as
    the median one.
    """
    sigma_L = estimate_noise(X, moment=moment)
    seen = sigma_L[sigma_L > 0]
    if not len(seen):
        return np.ones(len(sigma_L))
    typical = float(np.median(seen))
    return 1 / np.where(sigma_L > 0, np.maximum(sigma_L, typical / LEAST_NOISE), typical)


def vca(X: Any, k: int, *, seed: int = 0, factors: np.ndarray | None = None) -> np.ndarray:
    """Positions of k pixels that span the others best: vertex component analysis, shape (k,).

    Args:
        X: shape (P, L). It has to hold nearly pure pixels; where it does not, the spectra found are mixtures.
        k: at least 2, at most L and P.
        seed: of the directions.
        factors: of the channels, shape (L,), such as :func:`whitening`; equal where None.
    Raises:
        ValueError: k out of its range.
    Example:
        >>> corners = np.eye(3)
        >>> X = np.concatenate([np.full((5, 3), 1 / 3), corners])
        >>> sorted(vca(X, 3).tolist())
        [5, 6, 7]
    """
    P, L = X.shape
    if not 2 <= k <= min(P, L):
        raise ValueError(f"k must be between 2 and {min(P, L)}, the smaller of pixels and channels, got {k}")
    f_L = np.ones(L) if factors is None else factors
    rng = np.random.default_rng(seed)
    mean_L = np.zeros(L)
    moment_LL = np.zeros((L, L))
    for y_PL in _blocks(X):
        y_PL = y_PL * f_L
        mean_L += y_PL.sum(0) / P
        moment_LL += y_PL.T @ y_PL / P
    axes_LK = np.linalg.eigh(moment_LL)[1][:, ::-1][:, :k]
    centred_LL = moment_LL - np.outer(mean_L, mean_L)
    spread_LK = np.linalg.eigh(centred_LL)[1][:, ::-1][:, :k]
    power = float(np.trace(moment_LL))
    inside = float(np.trace(spread_LK.T @ centred_LL @ spread_LK) + mean_L @ mean_L)
    signal, noise = max(inside - k / L * power, 1e-300), max(power - inside, 1e-300)
    high = 10 * np.log10(signal / noise) > 15 + 10 * np.log10(k)  # decibels, the paper's rule
    if high:  # projective: each pixel is divided by its brightness along the mean
        z_PK = np.concatenate([(y_PL * f_L) @ axes_LK for y_PL in _blocks(X)])
        brightness_P = z_PK @ z_PK.mean(0)
        bright = brightness_P > 1e-6 * np.abs(brightness_P).max()
        z_PK = np.where(bright[:, None], z_PK / np.where(bright, brightness_P, 1.0)[:, None], 0.0)
    else:
        z_PK = np.concatenate([(y_PL * f_L - mean_L) @ spread_LK[:, : k - 1] for y_PL in _blocks(X)])
        far = float(np.linalg.norm(z_PK, axis=1).max())
        z_PK = np.concatenate([z_PK, np.full((P, 1), far if far > 0 else 1.0)], 1)
    found_KK = np.zeros((k, k))
    found_KK[-1, 0] = 1.0
    chosen: list[int] = []
    for i in range(k):
        w_K = rng.normal(size=k)
        direction_K = w_K - found_KK @ (np.linalg.pinv(found_KK) @ w_K)
        reach_P = np.abs(z_PK @ direction_K)
        reach_P[chosen] = -1.0
        chosen.append(int(reach_P.argmax()))
        found_KK[:, i] = z_PK[chosen[-1]]
    return np.array(chosen)


def estimate_count(X: Any) -> int:
    """How many materials the pixels hold, by HySime: directions in which the signal has more power than the noise costs.

    Spoiled channels look like signals of their own to it, so leave them out first.

    Args:
        X: shape (P, L), P well above L, white or coloured noise.
    """
    y_PL = np.asarray(X, dtype=np.float64)
    s_LL = second_moment(y_PL)
    trace = float(np.trace(s_LL)) / len(s_LL)
    inverse_LL = np.linalg.inv(s_LL + EPSILON * trace * np.eye(len(s_LL)))
    residual_PL = y_PL @ (inverse_LL / np.diag(inverse_LL))
    noise_LL = np.diag((residual_PL**2).mean(0))
    signal = y_PL - residual_PL
    axes_LL = np.linalg.eigh(signal.T @ signal / len(y_PL))[1]
    cost_L = -np.einsum("li,lm,mi->i", axes_LL, s_LL, axes_LL) + 2 * np.einsum(
        "li,lm,mi->i", axes_LL, noise_LL, axes_LL
    )
    return int((cost_L < 0).sum())


def _blocks(X: Any) -> Iterator[np.ndarray]:
    for start in range(0, len(X), BLOCK):
        yield np.asarray(X[start : start + BLOCK], dtype=np.float64)
