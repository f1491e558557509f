"""Group-wise integer quantization of weight matrices: rows are outputs, groups run along the inputs.

Shapes: O outputs, I inputs, G groups a row (G = I / group_size).

- 2 bits and more, asymmetric (default): scale s = (max - min) / (2^b - 1) over a range that includes zero, zero point
  z = round(-min / s), code q = clamp(round(w / s) + z), value (q - z) s.
- 2 bits and more, symmetric: s = max|w| / (2^(b-1) - 1), code q = round(w / s) + 2^(b-1).
- 1 bit: code 1 where w >= 0, value ±s with s the mean of |w| over the group (MC-MoE 2410.06270; Rastegari et al. 2016,
  1603.05279, eq. 6).

Scales are rounded to float16, in which they are stored, before the codes are chosen: what is measured is what is saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.core.packing import WIDTHS

__all__ = ["Quantized", "clipped_parameters", "group_parameters", "nearest", "round_to", "split"]

SMALLEST = 6e-8  # smallest positive float16; a group of zeros would otherwise divide by zero
CLIPS = tuple(1.0 - 0.02 * i for i in range(11))  # 1.00, 0.98, ..., 0.80 (MixLLM 2412.14590, sec. 3)


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        codes: uint8, shape (O, I).
        scale: float32 holding float16 values, shape (O, G).
        zero: uint8, shape (O, G); ``None`` where the grid is symmetric (and for 1 bit).
        bits: width of a code.
        group_size: inputs a group.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """The values, float32, shape (O, I)."""
        grouped = _grouped(self.codes, self.group_size).float()
        return _values(grouped, self.scale[..., None], _zero(self.zero), self.bits).flatten(-2)


def nearest(
    weight: Tensor,
    bits: int,
    group_size: int = 128,
    *,
    symmetric: bool = False,
    clip: bool = False,
    hessian: Tensor | None = None,
) -> Quantized:
    """Round every weight to the nearest value of its group's grid.

    Args:
        weight: shape (O, I).
        bits: 1, 2, 3, 4, 6 or 8.
        group_size: inputs a group; divides I.
        symmetric: grid around zero, without zero points.
        clip: try narrower ranges (1.00 to 0.80 of each group's) and keep the one with the smallest error.
        hessian: H = X^T X up to a factor, shape (I, I); the clip search then minimises (w - ŵ)^T H_gg (w - ŵ) instead of
            the squared error of the weights.
    Raises:
        ValueError: an unknown width, a group size that does not divide I, a weight that is not finite.
    Example:
        >>> nearest(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), bits=2, group_size=4).dequantize()
        tensor([[0., 1., 2., 3.]])
    """
    check(weight, bits, group_size)
    grouped = _grouped(weight.float(), group_size)
    if not clip or bits == 1:
        scale, zero = group_parameters(grouped, bits, symmetric=symmetric)
    else:
        scale, zero = clipped_parameters(grouped, bits, symmetric=symmetric, hessian=hessian)
    codes = round_to(grouped, scale[..., None], _zero(zero), bits)
    return Quantized(codes.flatten(-2), scale, zero, bits, group_size)


def split(matrix: Quantized, rows: Sequence[int]) -> list[Quantized]:
    """A quantized matrix cut into parts of so many rows each."""
    sizes = list(rows)
    zeros = [None] * len(sizes) if matrix.zero is None else torch.split(matrix.zero, sizes)
    parts = zip(torch.split(matrix.codes, sizes), torch.split(matrix.scale, sizes), zeros, strict=True)
    return [Quantized(codes, scale, zero, matrix.bits, matrix.group_size) for codes, scale, zero in parts]


def group_parameters(
    grouped: Tensor, bits: int, *, symmetric: bool = False, clip: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of groups.

    Args:
        grouped: weights, shape (..., group_size).
        bits: 1, 2, 3, 4, 6 or 8.
        symmetric: no zero points.
        clip: share of the range that is kept.
    Returns:
        Scale, float32 holding float16 values, shape (...); zero point, uint8, the same shape, or None.
    """
    if bits == 1:
        return _stored(grouped.abs().mean(-1)), None
    if symmetric:
        return _stored(clip * grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)), None
    low, high = clip * grouped.amin(-1).clamp(max=0), clip * grouped.amax(-1).clamp(min=0)
    scale = _stored((high - low) / (2**bits - 1))
    return scale, (-low / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)


def clipped_parameters(
    grouped: Tensor, bits: int, *, symmetric: bool = False, hessian: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of groups whose range, of 1.00, 0.98, ..., 0.80 of the whole, gives the smallest error.

    Args:
        grouped: weights, shape (O, G, group_size).
        bits: 2, 3, 4, 6 or 8.
        symmetric: no zero points.
        hessian: shape (I, I), as in :func:`nearest`; without it the error is that of the weights.
    Returns:
        As :func:`group_parameters`, shape (O, G).
    """
    n_groups, size = grouped.shape[-2:]
    blocks = None
    if hessian is not None:
        # The diagonal blocks H_gg, shape (G, size, size): groups are rounded apart, so only they matter.
        blocks = hessian.float().view(n_groups, size, n_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    best_error = torch.full(grouped.shape[:-1], torch.inf, device=grouped.device)
    best_scale, best_zero = group_parameters(grouped, bits, symmetric=symmetric)
    for clip in CLIPS:
        scale, zero = group_parameters(grouped, bits, symmetric=symmetric, clip=clip)
        codes = round_to(grouped, scale[..., None], _zero(zero), bits)
        off = grouped - _values(codes.float(), scale[..., None], _zero(zero), bits)
        weighed = off if blocks is None else torch.einsum("ogi,gij->ogj", off, blocks)
        error = (off * weighed).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def round_to(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes of the nearest grid values, uint8; ``scale`` and ``zero`` broadcast against ``weight``."""
    if bits == 1:
        return (weight >= 0).to(torch.uint8)
    middle = 2 ** (bits - 1) if zero is None else zero
    return ((weight / scale).round() + middle).clamp(0, 2**bits - 1).to(torch.uint8)


def check(weight: Tensor, bits: int, group_size: int) -> None:
    """Raise a ValueError that names what is wrong with the arguments of a quantizer."""
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (O, I), got {tuple(weight.shape)}")
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {list(WIDTHS)}, got {bits}")
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"group_size={group_size} must divide the width {weight.shape[1]}")
    if not weight.isfinite().all():
        row, column = (~weight.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"weight[{row}, {column}] is {weight[row, column].item()}; only finite weights can be quantized"
        )


def values(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Grid values of codes; ``scale`` and ``zero`` broadcast against ``codes``."""
    return _values(codes.float(), scale, zero, bits)


def _values(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    if bits == 1:
        return (2 * codes - 1) * scale
    return (codes - (2 ** (bits - 1) if zero is None else zero.float())) * scale


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    # The count of groups by hand: no rows at all leave it open.
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // group_size, group_size)


def _zero(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else zero[..., None]


def _stored(scale: Tensor) -> Tensor:
    return scale.clamp(min=SMALLEST).half().float()
