"""Calibrated rounding: columns are rounded one after another, and what each lost is made up by those still free.

Shapes: O outputs, I inputs. With inputs X of shape (T, I), H = 2 X^T X is the Hessian of the layer's squared error in
every row of the weight.

Source: GPTQ (2210.17323), Algorithm 1; the elimination it speeds up is Optimal Brain Surgeon's (Frantar and Alistarh
2022, 2208.11580, eq. 2-3).
"""

import torch
from torch import Tensor

from mixtura.core.quantize import Quantized, check, clipped_parameters, group_parameters, round_to, values

__all__ = ["NonFiniteHessian", "gptq"]

SMALL = 256  # size below which a triangular inverse is not cut further


class NonFiniteHessian(ValueError):
    """The Hessian holds NaN or infinity, so its layer saw inputs that were not finite."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int = 128,
    *,
    symmetric: bool = False,
    damping: float = 0.01,
    intra_block: bool = True,
    clip: bool = False,
    reorder: bool = False,
) -> Quantized:
    """Round a matrix so that its products with the calibration inputs change least.

    Args:
        weight: shape (O, I); computed in float32, or float64 if it comes so.
        hessian: X^T X up to a positive factor, shape (I, I). An input that was never active has a zero row; its weights are
            rounded to nearest, since nothing is known of their effect.
        bits: 1, 2, 3, 4, 6 or 8.
        group_size: inputs a group; its grid is computed when the first of its columns is reached, from the weights as
            they are then. Columns are handled in blocks of one group.
        symmetric: grids without zero points.
        damping: added to the diagonal, as a share of its mean.
        intra_block: pass errors on inside a block too. ``False`` compensates between blocks only, which is what MC-MoE's
            released code does at 3 bits and less.
        clip: try narrower ranges for every group and keep the one with the smallest error on the inputs.
        reorder: round groups in descending order of their share of the diagonal, so that errors of what matters most can
            still be made up by the rest. Columns stay in their groups and groups in their places (MixLLM 2412.14590, sec. 3).
    Raises:
        NonFiniteHessian: the Hessian holds NaN or infinity.
        ValueError: shapes, width or group size that do not fit.
    """
    check(weight, bits, group_size)
    n = weight.shape[1]
    if hessian.shape != (n, n):
        raise ValueError(f"hessian must have shape ({n}, {n}) for a weight of width {n}, got {tuple(hessian.shape)}")
    if not hessian.isfinite().all():
        raise NonFiniteHessian("the Hessian is not finite; some input of this layer was NaN or infinite")
    if reorder:
        order_G = hessian.diagonal().double().view(-1, group_size).sum(1).argsort(descending=True, stable=True)
        columns = torch.arange(n, device=weight.device).view(-1, group_size)[order_G].flatten()
        found = gptq(
            weight[:, columns],
            hessian[columns][:, columns],
            bits,
            group_size,
            symmetric=symmetric,
            damping=damping,
            intra_block=intra_block,
            clip=clip,
        )
        back_G = order_G.argsort()
        return Quantized(
            found.codes[:, columns.argsort()],
            found.scale[:, back_G],
            None if found.zero is None else found.zero[:, back_G],
            bits,
            group_size,
        )
    # Transposed, so that a column of the weight is one stretch of memory.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    left_IO = weight.detach().T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    upper = inverse_factor(hessian, damping).to(dtype)
    codes_IO = torch.empty_like(left_IO, dtype=torch.uint8)
    scales, zeros = [], []
    for first in range(0, n, group_size):
        last = first + group_size
        block, factor = left_IO[first:last], upper[first:last, first:last]
        if clip and bits > 1:
            inner = hessian[first:last, first:last]
            found_OG = clipped_parameters(block.T.float()[:, None], bits, symmetric=symmetric, hessian=inner)
            scale, zero = found_OG[0][:, 0], None if found_OG[1] is None else found_OG[1][:, 0]
        else:
            scale, zero = group_parameters(block.T.float(), bits, symmetric=symmetric)
        scales.append(scale)
        zeros.append(zero)
        errors = torch.empty_like(block)
        grid = scale.to(dtype)
        for i, diagonal in enumerate(factor.diagonal().tolist()):
            codes = codes_IO[first + i] = round_to(block[i], grid, zero, bits)
            errors[i] = (block[i] - values(codes, grid, zero, bits).to(dtype)) / diagonal
            if intra_block:
                block[i:].addr_(factor[i, i:], errors[i], alpha=-1)
        left_IO[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    zero_points = [zero for zero in zeros if zero is not None]
    return Quantized(
        codes_IO.T.contiguous(),
        torch.stack(scales, -1),
        torch.stack(zero_points, -1) if zero_points else None,
        bits,
        group_size,
    )


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float64.

    Row i of it, divided by its diagonal, is how an error in column i spreads to the columns after it once those before
    it are fixed.
    """
    # Backwards, since H = R R^T with R upper triangular is the ordinary factorisation of H read from its last row, and
    # then H^-1 = U^T U with U = R^-1: one factorisation, one triangular inverse.
    damped = hessian.double().flip(0, 1)
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    diagonal += damping * diagonal[~dead].mean() if bool((~dead).any()) else 0.0
    # A nearly singular Hessian may still lose definiteness to rounding; more damping, never skipping.
    for _ in range(6):
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            break
        diagonal *= 1.1
        diagonal += 10 * damping * diagonal.mean() + 1e-12
    else:
        raise NonFiniteHessian("the Hessian is not positive definite even with strong damping")
    return _inverse(factor).flip(0, 1)


def _inverse(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, block by block: a third of the work of solving for a whole unit matrix."""
    n = len(lower)
    if n <= SMALL:
        unit = torch.eye(n, dtype=lower.dtype, device=lower.device)
        found: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return found
    half = n // 2
    first, second = lower[:half, :half], lower[half:, half:]
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse(first)
    inverse[half:, half:] = _inverse(second)
    # -C^-1 B A^-1 of [[A, 0], [B, C]]
    inverse[half:, :half] = -(inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]))
    return inverse
