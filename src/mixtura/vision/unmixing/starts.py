"""What is known before unmixing: the noise of each channel, how many materials, pixels that may be pure, and where to start.

Where several processes hold shards of the pixels, sums are over all of them, and pixels count in the order of ranks.

Shapes: P pixels, L channels, M endmembers.
Source: VCA: Nascimento and Dias 2005 (IEEE TGRS 43(4), algorithm 1); noise by regression and HySime: Bioucas-Dias and Nascimento
2008 (IEEE TGRS 46(8), secs. III and IV).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mixtura.core.processes import ALONE, Processes
from mixtura.vision.unmixing.constrained import fcls
from mixtura.vision.unmixing.objective import FLOOR

__all__ = [
    "estimate_count",
    "estimate_noise",
    "mixed",
    "second_moment",
    "starting_point",
    "vca",
    "vca_spectra",
    "whitening",
]

BLOCK = 8192
START_SHARE = 1e-2  # mixed into the start: an update multiplies, and would keep a share of 0
EPSILON = 1e-6  # of the mean power: what the regression on the other channels is regularised with
LEAST_NOISE = 5  # noise below the median over this number is taken to be that: nothing is trusted without limit


def second_moment(X: Any, *, processes: Processes = ALONE) -> np.ndarray:
    """Mean of y y' over the pixels, shape (L, L), float64, summed block by block."""
    total_LL = np.zeros((X.shape[1], X.shape[1]))
    for y_PL in _blocks(X):
        total_LL += y_PL.T @ y_PL
    return _total(total_LL, processes) / _total(np.array([len(X)]), processes)


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


def vca(
    X: Any, k: int, *, seed: int = 0, factors: np.ndarray | None = None, processes: Processes = ALONE
) -> np.ndarray:
    """Positions of k pixels that span the others best: vertex component analysis, shape (k,).

    Args:
        X: shape (P, L). It has to hold nearly pure pixels; where it does not, the spectra found are mixtures.
        k: at least 2, at most L and P.
        seed: of the directions.
        factors: of the channels, shape (L,), such as :func:`whitening`; equal where None.
        processes: that hold the other shards; positions then count through all shards.
    Raises:
        ValueError: k out of its range.
    Example:
        >>> corners = np.eye(3)
        >>> X = np.concatenate([np.full((5, 3), 1 / 3), corners])
        >>> sorted(vca(X, 3).tolist())
        [5, 6, 7]
    """
    return _vertices(X, k, seed, factors, processes)[0]


def vca_spectra(
    X: Any, k: int, *, seed: int = 0, factors: np.ndarray | None = None, processes: Processes = ALONE
) -> np.ndarray:
    """What vertex component analysis takes for the spectra: those pixels without what lies outside the signal's subspace.

    The k axes of most power hold the signal (k - 1 axes of most spread where there is much noise) and a small share of the
    noise, so that a spectrum is much nearer the material's than the pixel is. It may have values a little below 0.

    Arguments as for :func:`vca`.

    Returns:
        Shape (k, L), float64, in the units of X.
    Source:
        Nascimento and Dias 2005, algorithm 1, its last lines.
    Example:
        >>> vca_spectra(np.repeat(np.eye(3), 5, axis=0), 3).round(9).sum(0).tolist()
        [1.0, 1.0, 1.0]
    """
    return _vertices(X, k, seed, factors, processes)[1]


def starting_point(
    X: np.ndarray, m: int, init: str, *, seed: int, M_init: Any = None, A_init: Any = None, processes: Processes = ALONE
) -> tuple[np.ndarray, np.ndarray]:
    """Spectra in the units of X, shape (M, L), and shares of these pixels, (P, M), to start from; float64.

    Args:
        X: shape (P, L), this process's shard.
        init: "vca-whitened", "vca" or "nmf-random".
        M_init, A_init: what was given, checked here; shares are of the shard.
    """
    factors = None
    with processes.together():
        spectra = None if M_init is None else _checked("M_init", M_init, (m, X.shape[1]))
        shares = None if A_init is None else _checked("A_init", A_init, (len(X), m))
    if init == "vca-whitened" and (spectra is None or shares is None):
        factors = whitening(X, moment=second_moment(X, processes=processes))
    counts = [int(n) for n in processes.gather(torch.tensor([len(X)]))]
    before = sum(counts[: processes.rank])
    rng = np.random.default_rng(seed)
    if spectra is None and init == "nmf-random":
        mean_L = _total(X.sum(0, dtype=np.float64), processes) / sum(counts)
        spectra = rng.uniform(0.1, 1.0, (m, X.shape[1])) * 2 * mean_L
        if shares is None:
            rng.bit_generator.advance(before * m)  # type: ignore[attr-defined]  # a number a share, shard after shard
            shares = rng.uniform(0.1, 1.0, (len(X), m))
            shares /= shares.sum(1, keepdims=True)
    elif spectra is None:
        mean_L = _total(X.sum(0, dtype=np.float64), processes) / sum(counts)
        found = vca_spectra(X, m, seed=seed, factors=factors, processes=processes)
        # An update multiplies, and would keep a value of 0: right in a blank channel only.
        spectra = np.where(mean_L > 0, np.maximum(found, START_SHARE * mean_L), 0.0)
    if shares is None:
        shares = mixed(fcls(X, spectra, weights=None if factors is None else factors**2))
    return spectra, shares.clip(FLOOR)


def mixed(shares: Any) -> Any:
    """Shares with a little of every endmember."""
    return (1 - START_SHARE) * shares + START_SHARE / shares.shape[1]


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


def _vertices(
    X: Any, k: int, seed: int, factors: np.ndarray | None, processes: Processes
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of :func:`vca` and spectra of :func:`vca_spectra`."""
    L = X.shape[1]
    counts = [int(n) for n in processes.gather(torch.tensor([len(X)]))]
    P, before = sum(counts), sum(counts[: processes.rank])
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
    mean_L, moment_LL = _total(mean_L, processes), _total(moment_LL, processes)
    axes_LK = np.linalg.eigh(moment_LL)[1][:, ::-1][:, :k]
    centred_LL = moment_LL - np.outer(mean_L, mean_L)
    spread_LK = np.linalg.eigh(centred_LL)[1][:, ::-1][:, :k]
    power = float(np.trace(moment_LL))
    inside = float(np.trace(spread_LK.T @ centred_LL @ spread_LK) + mean_L @ mean_L)
    signal, noise = max(inside - k / L * power, 1e-300), max(power - inside, 1e-300)
    high = 10 * np.log10(signal / noise) > 15 + 10 * np.log10(k)  # decibels, the paper's rule
    if high:  # projective: each pixel is divided by its brightness along the mean
        z_PK = np.concatenate([np.empty((0, k)), *((y_PL * f_L) @ axes_LK for y_PL in _blocks(X))])
        brightness_P = z_PK @ (_total(z_PK.sum(0), processes) / P)
        bright = brightness_P > 1e-6 * _largest(np.abs(brightness_P), processes)
        z_PK = np.where(bright[:, None], z_PK / np.where(bright, brightness_P, 1.0)[:, None], 0.0)
    else:
        ends = ((y_PL * f_L - mean_L) @ spread_LK[:, : k - 1] for y_PL in _blocks(X))
        z_PK = np.concatenate([np.empty((0, k - 1)), *ends])
        far = _largest(np.linalg.norm(z_PK, axis=1), processes)
        z_PK = np.concatenate([z_PK, np.full((len(X), 1), far if far > 0 else 1.0)], 1)
    found_KK = np.zeros((k, k))
    found_KK[-1, 0] = 1.0
    chosen: list[int] = []
    for i in range(k):
        w_K = rng.normal(size=k)
        direction_K = w_K - found_KK @ (np.linalg.pinv(found_KK) @ w_K)
        reach_P = np.abs(z_PK @ direction_K)
        reach_P[[at - before for at in chosen if 0 <= at - before < len(X)]] = -1.0
        chosen.append(_furthest(reach_P, before, processes))
        found_KK[:, i] = _rows(z_PK, chosen[-1:], before, processes)[0]
    at = np.array(chosen)
    shown_KL = _rows(X, at, before, processes) * f_L
    if high:
        return at, shown_KL @ axes_LK @ axes_LK.T / f_L
    return at, ((shown_KL - mean_L) @ spread_LK[:, : k - 1] @ spread_LK[:, : k - 1].T + mean_L) / f_L


def _checked(name: str, values: Any, shape: tuple[int, int]) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    if array.shape != shape or not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"{name} must be finite, >= 0 and of shape {shape}, got shape {array.shape}")
    return array


def _total(values: np.ndarray, processes: Processes) -> np.ndarray:
    return processes.sum(torch.from_numpy(values)).numpy()


def _largest(values_P: np.ndarray, processes: Processes) -> float:
    return max(
        float(part) for part in processes.gather(torch.tensor([float(values_P.max(initial=0.0))], dtype=torch.float64))
    )


def _furthest(reach_P: np.ndarray, before: int, processes: Processes) -> int:
    """Position of the largest value through all shards, the first of equal ones."""
    own = int(reach_P.argmax()) if len(reach_P) else 0
    reach = float(reach_P[own]) if len(reach_P) else -2.0
    found = [
        (float(part[0]), int(part[1]))
        for part in processes.gather(torch.tensor([reach, before + own], dtype=torch.float64))
    ]
    return max(found, key=lambda pair: pair[0])[1]


def _rows(values: np.ndarray, at: Any, before: int, processes: Processes) -> np.ndarray:
    """Rows at positions that count through all shards, float64: every process gives those that it holds."""
    rows = np.zeros((len(at), values.shape[1]))
    for i, position in enumerate(at):
        if 0 <= position - before < len(values):
            rows[i] = values[position - before]
    return _total(rows, processes)
