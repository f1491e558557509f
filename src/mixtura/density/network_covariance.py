"""Covariances of infinitely wide networks, layer by layer: dual activations, dense and convolutional layers, tangents.

A network is a list of layers; each maps the covariance of its inputs to that of its outputs (and, where asked, the neural
tangent kernel along with it). Dense nets carry one number a pair of inputs; convolutional nets one a pair and position,
since without pooling only covariances at the same position are ever needed.

Shapes: N and M inputs, F features, I x J image positions. ``...`` is nothing for dense nets and (I, J) for images.
Source: Lee et al. 2018 (1711.00165) for the recursion, Cho and Saul 2009 (ReLU), Williams 1996 (erf), Novak et al. 2019
(1810.05148) for images, Jacot et al. 2018 (1806.07572) for tangents, in the parametrisation where weights are standard
normal and their scale multiplies the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.core import native

__all__ = [
    "ACTIVATIONS",
    "Activate",
    "Affine",
    "Branch",
    "Covariance",
    "Flatten",
    "Layer",
    "dual",
    "dual_own",
    "propagate",
]

ActivationName = Literal["relu", "erf"]
ACTIVATIONS: tuple[ActivationName, ...] = ("relu", "erf")

KERNEL = 3  # sides of a convolution


@dataclass(frozen=True)
class Affine:
    """A dense layer, or a 3x3 convolution with zero padding, with Gaussian weights and biases.

    Attributes:
        stride: of the convolution; dense layers have none.
    """

    stride: int = 1


@dataclass(frozen=True)
class Activate:
    """The pointwise non-linearity."""


@dataclass(frozen=True)
class Branch:
    """The sum of two chains of layers with independent weights over the same input; an empty chain is the identity."""

    main: tuple[Layer, ...]
    shortcut: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Flatten:
    """All positions of an image as one vector: the read-out then averages their covariances."""


Layer = Affine | Activate | Branch | Flatten


@dataclass(frozen=True)
class Covariance:
    """Second moments of a layer's values, and tangent kernels where they are wanted.

    Attributes:
        cross: covariance of the N inputs with the M, shape (N, M, ...).
        left: each of the N with itself, shape (N, 1, ...).
        right: each of the M with itself, shape (1, M, ...).
        tangent, left_tangent, right_tangent: the neural tangent kernel in the same shapes, or None.
    """

    cross: Tensor
    left: Tensor
    right: Tensor
    tangent: Tensor | None = None
    left_tangent: Tensor | None = None
    right_tangent: Tensor | None = None


def propagate(
    layers: Sequence[Layer],
    k: Covariance,
    activation: ActivationName,
    weight_variance: float | Tensor,
    bias_variance: float | Tensor,
) -> Covariance:
    """Covariance after ``layers``, given that of their input.

    Args:
        layers: applied in order.
        k: second moments of the input, already divided by its number of features or channels.
        activation: ``"relu"`` or ``"erf"``.
        weight_variance: of every hidden weight times its fan-in.
        bias_variance: of every hidden bias.
    Returns:
        The record in the shapes of the output. Differentiable in the variances where no tangents are carried.
    """
    rest = list(layers)
    while rest:
        if run := _relu_run(rest, k, activation, weight_variance, bias_variance):
            k, rest = _relu_layers(k, run, float(weight_variance), float(bias_variance)), rest[2 * run :]
            continue
        layer = rest.pop(0)
        if isinstance(layer, Affine):
            k = _affine(k, layer.stride, weight_variance, bias_variance)
        elif isinstance(layer, Activate):
            k = _activate(k, activation)
        elif isinstance(layer, Branch):
            main = propagate(layer.main, k, activation, weight_variance, bias_variance)
            k = _added(main, propagate(layer.shortcut, k, activation, weight_variance, bias_variance))
        else:
            k = _each(k, lambda t: t.mean((-2, -1)))
    return k


def _relu_run(
    layers: Sequence[Layer], k: Covariance, activation: ActivationName, weight: float | Tensor, bias: float | Tensor
) -> int:
    """How many of the next layers are dense with a ReLU and can be taken in one pass; 0 where none can."""
    learned = any(isinstance(v, Tensor) and v.requires_grad for v in (weight, bias))
    if activation != "relu" or k.cross.dim() != 2 or k.tangent is not None or learned:
        return 0
    if native.why_not_relu_layers(k.cross) is not None:
        return 0
    run = 0
    for first, second in zip(layers[::2], layers[1::2], strict=False):
        if not (isinstance(first, Affine) and isinstance(second, Activate)):
            break
        run += 1
    return run


def _relu_layers(k: Covariance, n_layers: int, weight: float, bias: float) -> Covariance:
    left, right = k.left, k.right
    deviations = []
    for _ in range(n_layers):
        left, right = weight * left + bias, weight * right + bias
        deviations.append((left.sqrt()[:, 0], right.sqrt()[0]))
        left, right = dual_own("relu", left)[0], dual_own("relu", right)[0]
    lefts, rights = (torch.stack(side) for side in zip(*deviations, strict=True))
    return Covariance(native.relu_layers(k.cross, lefts, rights, weight, bias), left, right)


def dual(activation: ActivationName, cross: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)] for Gaussian (u, v) with these variances and covariance.

    Args:
        activation: phi, ``"relu"`` or ``"erf"``.
        cross: covariance, shape (N, M, ...).
        left: variance of u, shape (N, 1, ...), >= 0.
        right: variance of v, shape (1, M, ...), >= 0.
    Returns:
        Two tensors in the shape of ``cross``.
    Source:
        ReLU: Cho and Saul 2009, eq. 3 and 6 (n = 1, 0), halved as for one-sided activations. erf: Williams 1996, eq. 11.
    Example:
        >>> one = torch.ones(1, 1)
        >>> [round(float(t), 4) for t in dual("relu", 0 * one, one, one)]    # 1 / (2 pi) and 1 / 4
        [0.1592, 0.25]
    """
    value = _value(activation, cross, left, right)
    if activation == "relu":
        return value, _cosine(cross, left, right).asin_().add_(math.pi / 2).div_(2 * math.pi)
    product = (1 + 2 * left) * (1 + 2 * right)
    return value, (4 / math.pi) / (product - 4 * cross.square()).sqrt_()


def _value(activation: ActivationName, cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The first result of :func:`dual`: roots are taken of vectors and the rest in place, since here is where time goes."""
    if activation == "relu" and native.why_not_relu_layers(cross) is None:
        return native.relu_layers(cross, left.sqrt().transpose(0, 1), right.sqrt())
    if activation == "relu":
        cosine = _cosine(cross, left, right)
        sine = torch.addcmul(torch.ones((), dtype=cross.dtype, device=cross.device), cosine, cosine, value=-1).sqrt_()
        # pi - arccos c = pi / 2 + arcsin c
        value = cosine.asin().add_(math.pi / 2).mul_(cosine).add_(sine)
        return value.mul_(left.sqrt() / (2 * math.pi)).mul_(right.sqrt())
    sine = cross * (2 / (1 + 2 * left).sqrt())
    return sine.div_((1 + 2 * right).sqrt()).clamp_(-1.0, 1.0).asin_().mul_(2 / math.pi)


def _cosine(cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Correlations, a new tensor. Rounding can carry them past 1, and a zero vector has no direction at all."""
    tiny = math.sqrt(torch.finfo(cross.dtype).tiny)
    return (cross / left.sqrt().clamp(min=tiny)).div_(right.sqrt().clamp(min=tiny)).clamp_(-1.0, 1.0)


def dual_own(activation: ActivationName, variance: Tensor) -> tuple[Tensor, Tensor]:
    """E[phi(u)^2] and E[phi'(u)^2] for Gaussian u, exactly: no arccosine of almost 1.

    Args:
        activation: phi.
        variance: of u, any shape, >= 0.
    """
    if activation == "relu":
        return variance / 2, torch.full_like(variance, 0.5)
    value = (2 / math.pi) * (2 * variance / (1 + 2 * variance)).asin()
    return value, (4 / math.pi) / (1 + 4 * variance).sqrt()


class _Dual(torch.autograd.Function):
    """The first result of :func:`dual` with its closed-form gradient.

    Autograd through the arccosine gives infinity times zero, which is NaN, wherever an input meets itself.
    """

    @staticmethod
    def forward(ctx: Any, cross: Tensor, left: Tensor, right: Tensor, activation: ActivationName) -> Tensor:
        if not any(ctx.needs_input_grad):
            return _value(activation, cross, left, right)
        value, slope = dual(activation, cross, left, right)
        ctx.save_for_backward(cross, left, right, slope)
        ctx.activation = activation
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        cross, left, right, slope = ctx.saved_tensors
        if ctx.activation == "relu":
            # dT/dk = sqrt(k'/k) sin t / (4 pi), and sqrt(k k') sin t = sqrt(k k' - c^2).
            sine = (left * right - cross.square()).clamp(min=0).sqrt() / (4 * math.pi)
            tiny = torch.finfo(cross.dtype).tiny
            by_left, by_right = sine / left.clamp(min=tiny), sine / right.clamp(min=tiny)
        else:
            # T = (2/pi) asin(u), du/dk = -u / (1 + 2k), and the slope in the covariance is du/dc times the same factor.
            by_left, by_right = -slope * cross / (1 + 2 * left), -slope * cross / (1 + 2 * right)
        return (
            grad * slope,
            (grad * by_left).sum_to_size(left.shape),
            (grad * by_right).sum_to_size(right.shape),
            None,
        )


def _activate(k: Covariance, activation: ActivationName) -> Covariance:
    left, left_slope = dual_own(activation, k.left)
    right, right_slope = dual_own(activation, k.right)
    if k.tangent is None or k.left_tangent is None or k.right_tangent is None:
        cross = _Dual.apply(k.cross, k.left, k.right, activation)  # type: ignore[no-untyped-call]
        return Covariance(cross, left, right)
    cross, slope = dual(activation, k.cross, k.left, k.right)
    return Covariance(cross, left, right, k.tangent * slope, k.left_tangent * left_slope, k.right_tangent * right_slope)


def _affine(k: Covariance, stride: int, weight: float | Tensor, bias: float | Tensor) -> Covariance:
    through = _each(k, lambda t: weight * (t if t.dim() == 2 else _box_mean(t, stride)))
    found = replace(through, cross=through.cross + bias, left=through.left + bias, right=through.right + bias)
    if through.tangent is None or through.left_tangent is None or through.right_tangent is None:
        return found
    # A layer's own weights and biases add its covariance to the tangent of those below.
    return replace(
        found,
        tangent=through.tangent + found.cross,
        left_tangent=through.left_tangent + found.left,
        right_tangent=through.right_tangent + found.right,
    )


def _box_mean(maps: Tensor, stride: int) -> Tensor:
    """Sum over 3x3 neighbours divided by 9, zeros outside, shape (N, M, I, J) -> (N, M, I', J').

    Padding as "SAME" has it: the output has ceil(side / stride) positions, and an odd zero goes to the far end.
    """
    n, m, *sides = maps.shape
    pads: list[int] = []
    for side in reversed(sides):
        total = max((math.ceil(side / stride) - 1) * stride + KERNEL - side, 0)
        pads += [total // 2, total - total // 2]
    flat = F.pad(maps.reshape(n * m, 1, *sides), pads)
    mean = F.avg_pool2d(flat, KERNEL, stride)
    return mean.reshape(n, m, *mean.shape[-2:])


def _added(a: Covariance, b: Covariance) -> Covariance:
    parts: dict[str, Any] = {}
    for name in ("cross", "left", "right", "tangent", "left_tangent", "right_tangent"):
        one, other = getattr(a, name), getattr(b, name)
        parts[name] = None if one is None else one + other
    return Covariance(**parts)


def _each(k: Covariance, change: Any) -> Covariance:
    names = ("cross", "left", "right", "tangent", "left_tangent", "right_tangent")
    parts: dict[str, Any] = {name: None if (t := getattr(k, name)) is None else change(t) for name in names}
    return Covariance(**parts)
