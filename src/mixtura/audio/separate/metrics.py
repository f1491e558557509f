"""How well a source was recovered: the scores of BSS Eval and the scale-invariant ratio, in decibels, higher is better.

Shapes: N samples, n true sources, J taps of the filter that a source may have passed.
Source: Vincent, Gribonval and Févotte 2006, "Performance measurement in blind audio source separation", sec. III, version 3
(time-invariant filters of 512 taps); SI-SDR: Le Roux et al. 2018 (1811.02508), eq. 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SeparationScores", "bss_eval", "si_sdr"]


@dataclass(frozen=True)
class SeparationScores:
    """Scores of estimates, in dB, each of the estimates' leading shape.

    Attributes:
        sdr: target over everything that is not target.
        sir: target over what belongs to other sources.
        sar: sources over what belongs to none.
    """

    sdr: Tensor
    sir: Tensor
    sar: Tensor


def bss_eval(estimate: Tensor, sources: Tensor, *, taps: int = 512) -> SeparationScores:
    """SDR, SIR and SAR of estimates of the first source.

    The estimate is projected onto what filters of ``taps`` taps can make of the target, then of all sources. Those spaces are
    nested, so the scores need only the lengths of the projections, and no projected signal is ever built.

    Args:
        estimate: shape (..., N).
        sources: true sources, the target first, shape (..., n, N), none of them silent.
        taps: J, at most N.
    Raises:
        ValueError: shapes that do not match, or a silent source.
    """
    if sources.dim() != estimate.dim() + 1 or sources[..., 0, :].shape != estimate.shape:
        raise ValueError(
            f"sources must have the shape of estimate with one more dimension before the last, got {tuple(sources.shape)} "
            f"for {tuple(estimate.shape)}"
        )
    if not 1 <= taps <= estimate.shape[-1]:
        raise ValueError(f"taps must lie between 1 and the {estimate.shape[-1]} samples, got {taps}")
    if not bool((sources.abs().amax(-1) > 0).all()):
        raise ValueError("a source is silent; its scores are not defined")
    e, s = estimate.double(), sources.double()
    n, size = s.shape[-2], 1 << (s.shape[-1] + taps - 1).bit_length()
    spectra = torch.fft.rfft(s, size)
    # Correlation at lag t of sources i and j; negative lags stand at the end.
    lags = torch.fft.irfft(spectra[..., :, None, :].conj() * spectra[..., None, :, :], size)
    steps = torch.arange(taps)
    # (..., i, j, J, J): source i delayed by the row, j by the column.
    gram = lags[..., (steps[:, None] - steps[None, :]) % size]
    gram = gram.transpose(-3, -2).reshape(*e.shape[:-1], n * taps, n * taps)
    along = torch.fft.irfft(spectra.conj() * torch.fft.rfft(e, size)[..., None, :], size)[..., :taps].flatten(-2)
    whole = (e**2).sum(-1)
    half = _whitened(gram, along)
    # The target's block comes first, so its own factor is the corner of the whole one: one factor serves both projections.
    own, every = (half[..., :taps] ** 2).sum(-1), (half**2).sum(-1)
    return SeparationScores(_decibels(own, whole - own), _decibels(own, every - own), _decibels(every, whole - every))


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, (..., N) and (..., N) -> (...).

    Raises:
        ValueError: shapes that differ.
    Example:
        >>> target = torch.tensor([1.0, 0.0])
        >>> si_sdr(torch.tensor([5.0, 0.5]), target)
        tensor(20.)
    """
    if estimate.shape != target.shape:
        raise ValueError(
            f"estimate and target must share a shape, got {tuple(estimate.shape)} and {tuple(target.shape)}"
        )
    scale = (estimate * target).sum(-1, keepdim=True) / (target**2).sum(-1, keepdim=True)
    image = scale * target
    return _decibels((image**2).sum(-1), ((estimate - image) ** 2).sum(-1))


def _whitened(gram: Tensor, along: Tensor) -> Tensor:
    """Inner products with vectors of this Gram matrix, made those with an orthonormal basis of the same space."""
    # A hair on the diagonal: a band-limited source makes the matrix singular to working precision.
    ridge = 1e-10 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(gram.shape[-1]).to(gram)
    factor = torch.linalg.cholesky(gram + ridge)
    return torch.linalg.solve_triangular(factor, along[..., None], upper=False)[..., 0]


def _decibels(signal: Tensor, rest: Tensor) -> Tensor:
    tiny = torch.finfo(signal.dtype).tiny
    return 10 * (signal.clamp(min=tiny) / rest.clamp(min=tiny)).log10()
