"""Sound as frequencies over time: the short-time Fourier transform and back, a logarithmic frequency axis, masks.

Shapes: N samples, Q frequencies (n_fft / 2 + 1, from 0 to half the sample rate), L frames, M bands of a logarithmic axis.
Whatever stands before those dimensions is a batch.

Source: the logarithmic axis is that of Zhao et al. 2018 (1804.03160), as CLIPSep (2212.07065) uses it: its 21 places a
decade and a third are ``(21 ** u - 1) / 20``. The masks are those of Wang and Chen 2018 (1708.07524), sec. III.
"""

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MaskKind", "band_positions", "from_bands", "istft", "loudness_weight", "mask_targets", "stft", "to_bands"]

MaskKind = Literal["binary", "ratio"]
FLOOR = 1e-10  # added to magnitudes before a logarithm or a quotient
STRETCH = 20.0  # the highest frequency's slope over the lowest's, less one


def stft(wave: Tensor, n_fft: int, hop: int) -> Tensor:
    """Complex spectrum under a Hann window, (..., N) -> (..., Q, N // hop + 1).

    Frames are centred on multiples of ``hop``; beyond its ends the recording is silent, so it may have any length.

    Raises:
        ValueError: ``hop`` is not between 1 and ``n_fft / 2``, for which the inverse does not exist, or no sample came.
    Example:
        >>> stft(torch.zeros(2, 1000), 64, 16).shape
        torch.Size([2, 33, 63])
    """
    _check_frames(n_fft, hop)
    if wave.shape[-1] == 0:
        raise ValueError("wave holds no samples")
    rows_BN = wave.reshape(-1, wave.shape[-1])
    window = torch.hann_window(n_fft, dtype=wave.dtype, device=wave.device)
    found = torch.stft(rows_BN, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    return found.reshape(*wave.shape[:-1], *found.shape[-2:])


def istft(spectrum: Tensor, hop: int, length: int) -> Tensor:
    """The recording of ``length`` samples whose spectrum is nearest, (..., Q, L) -> (..., N); inverse of :func:`stft`.

    Example:
        >>> wave = torch.randn(100, generator=torch.Generator().manual_seed(0))
        >>> bool((istft(stft(wave, 32, 8), 8, 100) - wave).abs().max() < 1e-5)
        True
    """
    n_fft = 2 * (spectrum.shape[-2] - 1)
    _check_frames(n_fft, hop)
    rows = spectrum.reshape(-1, *spectrum.shape[-2:])
    window = torch.hann_window(n_fft, dtype=spectrum.real.dtype, device=spectrum.device)
    found = torch.istft(rows, n_fft, hop, window=window, length=length)
    return found.reshape(*spectrum.shape[:-2], length)


def band_positions(bands: int) -> Tensor:
    """Places of the bands on the linear axis, shape (M,), from 0 (its first frequency) to 1 (its last)."""
    u_M = torch.linspace(0, 1, bands, dtype=torch.float64)
    return ((1 + STRETCH) ** u_M - 1) / STRETCH


def to_bands(x: Tensor, bands: int, *, top: float = 1.0) -> Tensor:
    """Read a linear frequency axis at logarithmic places, (..., Q, L) -> (..., M, L), between neighbours linearly.

    Args:
        x: values on frequencies at equal distances, Q >= 2.
        bands: M >= 2.
        top: the frequency of the last band over the last one of ``x``; bands beyond ``x`` are 0.
    Raises:
        ValueError: fewer than two frequencies or bands, or ``top`` is not positive.
    Source:
        ``grid_sample`` with ``align_corners=True`` on the same places gives the same (tested).
    """
    _check_axis("x", x.shape[-2], "bands", bands)
    if not top > 0:
        raise ValueError(f"top must be > 0, got {top}")
    place_M = top * band_positions(bands)
    found = _read(x, place_M.clamp(max=1.0) * (x.shape[-2] - 1))
    # A hair of rounding must not lose the last band where both axes end together.
    return found * (place_M <= 1 + 1e-9).to(x)[:, None]


def from_bands(x: Tensor, frequencies: int, *, top: float = 1.0) -> Tensor:
    """Read bands at linear places, (..., M, L) -> (..., Q, L): the way back of :func:`to_bands` for smooth values.

    Args:
        x: values on bands, M >= 2.
        frequencies: Q >= 2.
        top: as for :func:`to_bands`; frequencies above the last band get its value.
    Raises:
        ValueError: as :func:`to_bands`.
    """
    _check_axis("x", x.shape[-2], "frequencies", frequencies)
    if not top > 0:
        raise ValueError(f"top must be > 0, got {top}")
    place_Q = (torch.linspace(0, 1, frequencies, dtype=torch.float64) / top).clamp(max=1.0)
    return _read(x, (STRETCH * place_Q + 1).log() / math.log(1 + STRETCH) * (x.shape[-2] - 1))


def mask_targets(sources: Tensor, mixture: Tensor, kind: MaskKind = "binary") -> Tensor:
    """What of each place of the mixture belongs to each source, (B, n, M, L) in [0, 1].

    Args:
        sources: magnitudes of the n sources, shape (B, n, M, L), >= 0.
        mixture: magnitude of their mixture, shape (B, M, L), >= 0.
        kind: ``"binary"`` is 1 where a source has more than half the mixture's magnitude; ``"ratio"`` is its share of the
            sum of all sources' magnitudes.
    Raises:
        ValueError: shapes that do not match, fewer than two sources, or an unknown kind.
    Example:
        >>> mask_targets(torch.tensor([[[[3.0]], [[1.0]]]]), torch.tensor([[[3.5]]]), "ratio").flatten()
        tensor([0.7500, 0.2500])
    """
    if sources.dim() != 4 or mixture.shape != (sources.shape[0], *sources.shape[2:]):
        raise ValueError(
            "sources must have shape (B, n, bands, frames) and mixture (B, bands, frames), got "
            f"{tuple(sources.shape)} and {tuple(mixture.shape)}"
        )
    if sources.shape[1] < 2:
        raise ValueError(f"a mixture has at least 2 sources, got {sources.shape[1]}")
    if kind == "binary":
        return (sources > 0.5 * mixture[:, None]).to(sources.dtype)
    if kind == "ratio":
        return (sources / (sources.sum(1, keepdim=True) + FLOOR)).clamp(0, 1)
    raise ValueError(f"kind must be 'binary' or 'ratio', got {kind!r}")


def loudness_weight(magnitude: Tensor) -> Tensor:
    """Weight of each place in a loss on masks: log(1 + magnitude), kept between 0.001 and 10 (CLIPSep, its code)."""
    return magnitude.log1p().clamp(1e-3, 10.0)


def _read(x: Tensor, place: Tensor) -> Tensor:
    """Values of ``x`` at fractional places of its second last axis."""
    low = place.floor().long().clamp(0, x.shape[-2] - 2)
    part = (place - low).to(x)[:, None]
    low = low.to(x.device)
    return torch.lerp(x.index_select(-2, low), x.index_select(-2, low + 1), part)


def _check_frames(n_fft: int, hop: int) -> None:
    if n_fft < 2 or n_fft % 2 or not 1 <= hop <= n_fft // 2:
        raise ValueError(f"n_fft must be even and hop between 1 and n_fft / 2, got n_fft={n_fft} and hop={hop}")


def _check_axis(name: str, have: int, wanted: str, count: int) -> None:
    if have < 2 or count < 2:
        raise ValueError(f"{name} must have at least 2 places and {wanted} be at least 2, got {have} and {count}")
