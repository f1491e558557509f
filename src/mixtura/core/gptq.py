"""Calibrated rounding: columns are rounded one after another, and what each lost is made up by those still free.

Shapes: O outputs, I inputs. With inputs X of shape (T, I), H = 2 X^T X is the Hessian of the layer's squared error in
every row of the weight.

Source: GPTQ (2210.17323), Algorithm 1; the elimination it speeds up is Optimal Brain Surgeon's (Frantar and Alistarh
2022, 2208.11580, eq. 2-3).
"""

import torch
from torch import Tensor

from mixtura.core.quantize import Quantized, check, group_parameters, round_to, values

__all__ = ["NonFiniteHessian", "gptq"]


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
) -> Quantized:
    """Round a matrix so that its products with the calibration inputs change least.

    Args:
        weight: shape (O, I); computed in float32, or float64 if it comes so.
        hessian: X^T X up to a positive factor, shape (I, I). An input that was never active has a zero row; its weights are
            rounded to nearest, since nothing is known of their effect.
        bits: 1, 2, 3, 4 or 8.
        group_size: inputs a group; its grid is computed when the first of its columns is reached, from the weights as
            they are then. Columns are handled in blocks of one group.
        symmetric: grids without zero points.
        damping: added to the diagonal, as a share of its mean.
        intra_block: pass errors on inside a block too. ``False`` compensates between blocks only, which is what MC-MoE's
            released code does at 3 bits and less.
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
    left = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
    upper = inverse_factor(hessian, damping).to(left.dtype)
    codes = torch.empty_like(left, dtype=torch.uint8)
    scales, zeros = [], []
    for first in range(0, n, group_size):
        last = first + group_size
        block = left[:, first:last]
        factor = upper[first:last, first:last]
        scale, zero = group_parameters(block.float(), bits, symmetric=symmetric)
        scales.append(scale)
        zeros.append(zero)
        errors = torch.empty_like(block)
        grid = scale.to(left.dtype)
        for i in range(group_size):
            column = block[:, i]
            codes[:, first + i] = round_to(column, grid, zero, bits)
            rounded = values(codes[:, first + i], grid, zero, bits).to(left.dtype)
            errors[:, i] = (column - rounded) / factor[i, i]
            if intra_block:
                block[:, i:] -= errors[:, i, None] * factor[i, None, i:]
        left[:, last:] -= errors @ upper[first:last, last:]
    zero_points = [zero for zero in zeros if zero is not None]
    return Quantized(
        codes, torch.stack(scales, -1), torch.stack(zero_points, -1) if zero_points else None, bits, group_size
    )


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float64.

    Row i of it, divided by its diagonal, is how an error in column i spreads to the columns after it once those before
    it are fixed.
    """
    damped = hessian.double().clone()
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
    spread: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return spread
