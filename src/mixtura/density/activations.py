"""Activations of a gate's slopes, and a test of one before it is used.

A temperature can be told from the size of a gate's slopes only where the activation is not homogeneous: with s(cz) =
c s(z) the whole gate can be scaled and nothing is seen. The paper's condition is that values, derivatives times inputs,
and constants are linearly independent functions; `activation_independence` measures by how much.

Source: 2401.13875, sec. 3 and 4 (first and second order independence).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "activation_independence", "activation_named"]


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative.

    Attributes:
        value, slope: of the same shape as what they are given.
        homogeneous: a constant c > 0 in front of the input can be taken outside (up to a power), so that a learned
            temperature cannot be told from the slopes.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    homogeneous: bool = False


def _gelu_slope(z: Tensor) -> Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _silu_slope(z: Tensor) -> Tensor:
    p = z.sigmoid()
    return p * (1 + z * (1 - p))


def _sigmoid_slope(z: Tensor) -> Tensor:
    p = z.sigmoid()
    return p * (1 - p)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, _gelu_slope),
    "identity": Activation(lambda z: z, torch.ones_like, homogeneous=True),
    "relu": Activation(F.relu, lambda z: (z > 0).to(z.dtype), homogeneous=True),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope),
    "silu": Activation(F.silu, _silu_slope),
    "softplus": Activation(F.softplus, torch.sigmoid),
    "square": Activation(torch.square, lambda z: 2 * z, homogeneous=True),
    "tanh": Activation(torch.tanh, lambda z: 1 - z.tanh().square()),
}


def activation_named(name: str) -> Activation:
    """An activation by name.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def activation_independence(
    activation: str,
    *,
    order: int = 1,
    slopes: tuple[float, ...] = (3.0,),
    interval: tuple[float, float] = (-1.0, 1.0),
) -> float:
    """How far an activation is from tying the temperature to the slopes: 0 tied, the larger the better.

    The smallest eigenvalue of the Gram matrix of 1 and, for every slope b, s = s(bx) and x s' (second order: also s^2,
    s x s', x^2 s'^2 and x^2 s''), each scaled to norm 1 in L2 of the interval.

    Args:
        activation: a name in `ACTIVATIONS`.
        order: 1 for as many experts as there are, 2 for more (2401.13875, definitions in sec. 3 and 4).
        slopes: the sizes of slope that are expected; different and not zero.
        interval: range of the input.
    Returns:
        Between 0 and 1, without unit. Below about 1e-8: dependent up to rounding. It says which of two
        activations is found more surely, not what one finds at a given number of samples.
    Raises:
        ValueError: an unknown activation, an order other than 1 and 2, equal or zero slopes, an empty interval.
    Example:
        >>> activation_independence("relu") < 1e-8 < activation_independence("gelu") < activation_independence("tanh")
        True
    """
    named = activation_named(activation)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if len(set(slopes)) < len(slopes) or not slopes or 0 in slopes:
        raise ValueError(f"slopes must be different and not zero, at least one, got {slopes}")
    if not interval[0] < interval[1]:
        raise ValueError(f"interval must rise, got {interval}")
    nodes, weight_Q = np.polynomial.legendre.leggauss(400)
    half = (interval[1] - interval[0]) / 2
    x = torch.from_numpy((interval[0] + interval[1]) / 2 + half * nodes)
    functions = [torch.ones_like(x)]
    for b in slopes:
        # b x s'(bx) is what the temperature's derivative adds, so x s' stands for both.
        functions += [named.value(b * x), x * named.slope(b * x)]
    if order == 2:
        functions += _second_order(named, x, slopes)
    f_MQ = torch.stack(functions) * torch.from_numpy(weight_Q).sqrt()
    f_MQ = f_MQ / f_MQ.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return max(0.0, float(torch.linalg.svdvals(f_MQ)[-1]) ** 2)


def _second_order(named: Activation, x: Tensor, slopes: tuple[float, ...]) -> list[Tensor]:
    """Products of two first-order functions of one slope, and second derivatives."""
    found = []
    for b in slopes:
        z = (b * x).requires_grad_()
        with torch.enable_grad():
            value, slope = named.value(z), named.slope(z)
            curvature = torch.zeros_like(z)
            if slope.requires_grad:
                curvature = torch.autograd.grad(slope.sum(), z)[0]
        s, ds = value.detach(), x * slope.detach()
        found += [s.square(), s * ds, ds.square()]
        # The second derivative of a piecewise linear function is no new function.
        found += [x.square() * curvature] if curvature.abs().max() > 0 else []
    return found
