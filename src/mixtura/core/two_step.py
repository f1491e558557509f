"""Products of quantized weights with quantized activations in two steps: integers first, scales after, group by group.

    y[m, o] = sum_g s_a[m, g] s_w[o, g] D[m, o, g],   D = sum_i q_a[m, g, i] (q_w[o, g, i] - z[o, g])

D is an exact integer, and no weight stands in float. The slow version here defines the meaning; `native.int8_mixed` does
the same in 8-bit integers where the machine has a C compiler.

Shapes: M rows of activations, O outputs, I inputs in G groups of S.
Source: MixLLM (2412.14590), sec. 4.2.
"""

import torch
from torch import Tensor

from mixtura.core.packing import unpack

__all__ = ["activations", "digits", "rows_product"]

LARGEST = 127  # of a signed 8-bit integer, kept symmetric


def activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Activations as integers in [-127, 127] with a scale for every row and group.

    Args:
        x: shape (M, I), floating point.
        group_size: S, divides I.
    Returns:
        Integers, int8, (M, G, S); what they stand for, float32, (M, G). A group that is not finite has the scale NaN.
    """
    x_MGS = x.float().unflatten(-1, (-1, group_size))  # type: ignore[no-untyped-call]
    largest_MG = x_MGS.abs().amax(-1)
    finite_MG = largest_MG.isfinite()
    # A product with the reciprocal, as in the kernel: the same integers to the last.
    up_MG = torch.where(finite_MG & (largest_MG > 2.0**-100), LARGEST / largest_MG, 0.0)
    scale_MG = torch.where(up_MG > 0, largest_MG / LARGEST, 0.0).masked_fill(~finite_MG, torch.nan)
    integers_MGS = torch.where(finite_MG[..., None], x_MGS * up_MG[..., None], 0.0).round().to(torch.int8)
    return integers_MGS, scale_MG


def digits(x: Tensor, group_size: int) -> Tensor:
    """x and what 8-bit integers miss of it, shape (2 M, I): the sum of both products has the precision of 15 bits."""
    integers_MGS, scale_MG = activations(x, group_size)
    rest_MGS = x.float().view_as(integers_MGS) - integers_MGS * scale_MG[..., None]
    return torch.cat([x.float(), rest_MGS.flatten(1)])


def rows_product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    place: Tensor,
    bits: int,
    group_size: int,
    out: Tensor,
) -> None:
    """Write the product of x with rows of packed codes into the columns ``place`` of ``out``.

    Args:
        x: activations, (M, I).
        codes: every group of every row packed by itself, uint8, (O, I·bits/8).
        scale: (O, G), int16 that holds the bits of float16.
        zero: zero points, uint8, (O, G); None for a grid around zero, whose codes are integers plus 2^(bits-1).
        place: column of each row, int32, (O,).
        bits: width of a code.
        group_size: S.
        out: float32, (M, N), contiguous.
    """
    integers_MGS, scale_MG = activations(x, group_size)
    y_MO = out.new_zeros(len(x), len(scale))
    size = group_size * bits // 8
    for g in range(scale.shape[1]):
        codes_OS = unpack(codes[:, g * size : (g + 1) * size], bits, group_size).float()
        codes_OS -= 2 ** (bits - 1) if zero is None else zero[:, g, None].float()
        # float32 holds every integer below 2^24, and the sums stay below 512 * 255 * 127.
        whole_MO = integers_MGS[:, g].float() @ codes_OS.T
        y_MO += whole_MO * (scale_MG[:, g, None] * scale[:, g].view(torch.float16).float())
    out[:, place.long()] = y_MO
