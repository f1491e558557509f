"""Two-dimensional wavelet transforms of images, and their inverses, in tensors that gradients pass through.

Sub-bands come in the order of PyWavelets: approximation LL, then details along the height, the width and both (cH, cV, cD).
They are orthonormal: energy is kept. The Haar transform is sums and differences of the four pixels of a 2 x 2 square, so it
needs no convolution.

Shapes: ... any leading axes, H height, W width.
Source: Mallat 1989, "A theory for multiresolution signal decomposition"; bands and signs as in PyWavelets.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["haar2d", "ihaar2d", "iwavelet2d", "squares", "wavelet2d"]

MODES = ("zero", "periodization")


def squares(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixels of the 2 x 2 squares of ``x`` (..., H, W): upper left, upper right, lower left, lower right.

    Returns views of shape (..., ceil(H/2), ceil(W/2)); an odd edge is continued by zeros, as ``mode="zero"`` does.
    """
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]


def haar2d(x: Tensor, levels: int = 1) -> list[Tensor]:
    """Haar transform, finest level first; each level is that of the approximation of the one before.

    Args:
        x: images (..., H, W), floating.
        levels: at least 1.
    Returns:
        One tensor a level, (..., 4, H/2^l, W/2^l) rounded up: LL, cH, cV, cD. The LL of every level but the last can be
        had again from the level below it.
    Example:
        >>> haar2d(torch.ones(4, 4))[0][:, 0, 0]
        tensor([2., 0., 0., 0.])
    """
    _check(x, levels)
    found = []
    for _ in range(levels):
        bands = _transform(x)
        found.append(bands)
        x = bands[..., 0, :, :]
    return found


def ihaar2d(bands: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Invert one level of :func:`haar2d`.

    Args:
        bands: (..., 4, h, w): LL, cH, cV, cD.
        size: height and width to crop to, for images with an odd side; ``None`` keeps 2h and 2w.
    Returns:
        images (..., 2h, 2w), or (..., *size).
    """
    if bands.dim() < 3 or bands.shape[-3] != 4:
        raise ValueError(f"bands must have shape (..., 4, h, w), got {tuple(bands.shape)}")
    x = _invert(bands)
    return x if size is None else x[..., : size[0], : size[1]]


def wavelet2d(x: Tensor, wavelet: str = "db2", levels: int = 1, mode: str = "periodization") -> list[Tensor]:
    """Transform by any orthogonal wavelet of PyWavelets, finest level first.

    Args:
        x: images (..., H, W), floating; with ``mode="periodization"`` both sides even at every level.
        wavelet: its name in PyWavelets: ``"haar"``, ``"db2"``, ``"sym4"``, ...
        levels: at least 1.
        mode: how the border continues: ``"periodization"`` halves the sides exactly and is orthonormal, ``"zero"`` adds
            (taps - 2) / 2 coefficients a side.
    Returns:
        One tensor a level, (..., 4, h, w): LL, cH, cV, cD.
    Raises:
        ValueError: an unknown wavelet or mode, a wavelet that is not orthogonal, an odd side.
        ImportError: PyWavelets, which has the filters, is missing.
    """
    _check(x, levels)
    _check_mode(mode)
    low, high = _filters(wavelet)
    found = []
    for _ in range(levels):
        if mode == "periodization" and (x.shape[-2] % 2 or x.shape[-1] % 2):
            raise ValueError(
                f"mode 'periodization' halves even sides only, got {tuple(x.shape[-2:])}; pad, or use 'zero'"
            )
        rows = _analyse(x, low, high, -2, mode)
        bands = [part for row in rows for part in _analyse(row, low, high, -1, mode)]
        found.append(torch.stack((bands[0], bands[2], bands[1], bands[3]), -3))
        x = bands[0]
    return found


def iwavelet2d(bands: Tensor, wavelet: str = "db2", mode: str = "periodization") -> Tensor:
    """Invert one level of :func:`wavelet2d`: (..., 4, h, w) -> (..., H, W)."""
    _check_mode(mode)
    low, high = _filters(wavelet)
    ll, ch, cv, cd = bands.unbind(-3)
    upper, lower = _synthesise(ll, cv, low, high, -1, mode), _synthesise(ch, cd, low, high, -1, mode)
    return _synthesise(upper, lower, low, high, -2, mode)


def _transform(x: Tensor) -> Tensor:
    found: Tensor = _Haar.apply(x)  # type: ignore[no-untyped-call]
    return found


def _invert(bands: Tensor) -> Tensor:
    found: Tensor = _Inverse.apply(bands)  # type: ignore[no-untyped-call]
    return found


class _Haar(torch.autograd.Function):
    """One level, (..., H, W) -> (..., 4, h, w). Orthonormal, so that its gradient is its inverse and nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        height, width = ctx.size = x.shape[-2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2))
        rows = x.reshape(*x.shape[:-2], -1, 2, x.shape[-1])
        # Whole rows first: only the second of the two stages then reads every other pixel. Their means and what is left, not
        # their sums and differences, so that no pass is needed to halve the result.
        both = torch.lerp(rows[..., 0, :], rows[..., 1, :], 0.5)
        apart = rows[..., 0, :] - both
        out = x.new_empty(*both.shape[:-2], 4, both.shape[-2], both.shape[-1] // 2)
        for ll, cv, part in ((0, 2, both), (1, 3, apart)):
            torch.add(part[..., ::2], part[..., 1::2], out=out[..., ll, :, :])
            torch.sub(part[..., ::2], part[..., 1::2], out=out[..., cv, :, :])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        height, width = ctx.size
        return _invert(gradient)[..., :height, :width]


class _Inverse(torch.autograd.Function):
    """(..., 4, h, w) -> (..., 2h, 2w)."""

    @staticmethod
    def forward(ctx: Any, bands: Tensor) -> Tensor:
        ll, ch, cv, cd = bands.unbind(-3)
        *lead, height, width = ll.shape
        out = bands.new_empty(*lead, height, 2, 2 * width)
        both, apart = bands.new_empty(2, *lead, height, 2 * width)
        for part, low, high in ((both, ll, cv), (apart, ch, cd)):
            torch.add(low, high, out=part[..., ::2])
            torch.sub(low, high, out=part[..., 1::2])
        torch.lerp(both, apart, 0.5, out=out[..., 0, :])
        torch.sub(both, out[..., 0, :], out=out[..., 1, :])
        return out.flatten(-3, -2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _transform(gradient)


def _analyse(x: Tensor, low: Tensor, high: Tensor, dim: int, mode: str) -> tuple[Tensor, Tensor]:
    taps = len(low)
    x = x.movedim(dim, -1)
    lead, n = x.shape[:-1], x.shape[-1]
    rows = x.reshape(-1, 1, n)
    if mode == "periodization":
        index = (torch.arange(n + taps - 2, device=x.device) - taps // 2 + 1) % n
        rows = rows[..., index]
    else:
        rows = F.pad(rows, (taps - 2, taps - 2 + n % 2))
    filters = torch.stack((low, high)).flip(1)[:, None].to(rows)
    out = F.conv1d(rows, filters, stride=2)
    return tuple(out[:, i].reshape(*lead, -1).movedim(-1, dim) for i in (0, 1))  # type: ignore[return-value]


def _synthesise(a: Tensor, d: Tensor, low: Tensor, high: Tensor, dim: int, mode: str) -> Tensor:
    taps = len(low)
    a, d = a.movedim(dim, -1), d.movedim(dim, -1)
    lead, n = a.shape[:-1], a.shape[-1]
    rows = torch.stack((a.reshape(-1, n), d.reshape(-1, n)), 1)
    filters = torch.stack((low, high)).flip(1)[:, None].to(rows)
    out = F.conv_transpose1d(rows, filters, stride=2)[:, 0]
    if mode == "periodization":  # the transpose of gathering around the circle is adding around it
        index = (torch.arange(out.shape[-1], device=a.device) - taps // 2 + 1) % (2 * n)
        out = torch.zeros(len(out), 2 * n, dtype=out.dtype, device=a.device).index_add(1, index, out)
    else:
        out = out[:, taps - 2 : out.shape[-1] - (taps - 2)]
    return out.reshape(*lead, -1).movedim(-1, dim)


@cache
def _filters(wavelet: str) -> tuple[Tensor, Tensor]:
    try:
        import pywt
    except ImportError as error:
        raise ImportError(
            "wavelets take their filters from PyWavelets; install it with: pip install PyWavelets"
        ) from error
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"wavelet must be a discrete one of PyWavelets, such as 'haar' or 'db2', got {wavelet!r}")
    found = pywt.Wavelet(wavelet)
    if not found.orthogonal:
        raise ValueError(f"wavelet must be orthogonal, and {wavelet!r} is not; use 'db2' or 'sym4'")
    return torch.tensor(found.dec_lo, dtype=torch.float64), torch.tensor(found.dec_hi, dtype=torch.float64)


def _check(x: Tensor, levels: int) -> None:
    if x.dim() < 2:
        raise ValueError(f"x must have shape (..., H, W), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating, got {x.dtype}; convert it with x.float() / 255")
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
