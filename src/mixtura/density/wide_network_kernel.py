"""The kernel of an infinitely wide network: dense, residual, convolutional or wide-residual, and its tangent kernel.

Shapes: N and M inputs, F features; images of I rows, J columns and Q channels are (N, I, J, Q), or flat rows of I*J*Q
numbers where ``image_shape`` says how to read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mixtura.density.network_covariance import (
    ACTIVATIONS,
    Activate,
    ActivationName,
    Affine,
    Branch,
    Covariance,
    Flatten,
    Layer,
    propagate,
)

__all__ = ["ARCHITECTURES", "WideNetworkKernel"]

Architecture = Literal["mlp", "resnet", "cnn", "wide_resnet"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
ON_IMAGES = ("cnn", "wide_resnet")
# Elementwise work on a block that stays in the second-level cache runs at a multiple of the speed of memory.
CACHED = 2**15


@dataclass(frozen=True)
class WideNetworkKernel:
    """Covariance of the outputs of a random network as its layers become infinitely wide; read-out variance 1, no read-out bias.

    Attributes:
        depth: hidden layers (mlp, cnn), residual blocks (resnet) or residual blocks a group (wide_resnet), >= 1.
        activation: ``"relu"`` or ``"erf"``.
        weight_variance: of each hidden weight times its fan-in, > 0.
        bias_variance: of each hidden bias, >= 0.
        architecture: ``"mlp"``: dense layers, each followed by the activation; ``"resnet"``: a dense layer, ``depth`` blocks
            x + dense(activation(x)), the activation; ``"cnn"``: 3x3 convolutions, stride 1, zero padding, each followed by
            the activation, then all positions flattened; ``"wide_resnet"``: a convolution and four groups of residual
            blocks with strides 1, 2, 2, 2, flattened.
        image_shape: (rows, columns, channels), for flat rows into a network on images.
        chunk: most numbers that one block of covariances holds, positions counted; bounds the memory beyond the result.
        device: where torch computes.
        dtype: ``"float64"``; ``"float32"`` only where an error of about 1e-6 of a variance is no harm.

    Source:
        Scale Mixtures of Neural Network Gaussian Processes (2107.01408), sec. 3 and its official architectures.
    Example:
        >>> kernel = WideNetworkKernel(depth=1)
        >>> kernel(np.eye(2)).round(4)         # ReLU: half the input variance, and 1 / (2 pi) of it across a right angle
        array([[0.25  , 0.0796],
               [0.0796, 0.25  ]])
    """

    depth: int = 4
    activation: ActivationName = "relu"
    weight_variance: float = 1.0
    bias_variance: float = 0.0
    architecture: Architecture = "mlp"
    image_shape: tuple[int, int, int] | None = None
    chunk: int = 2**22
    device: str = "cpu"
    dtype: Literal["float64", "float32"] = "float64"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be >= 1, got {self.depth}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {self.activation!r}")
        if not (self.weight_variance > 0 and math.isfinite(self.weight_variance)):
            raise ValueError(f"weight_variance must be > 0 and finite, got {self.weight_variance}")
        if not (self.bias_variance >= 0 and math.isfinite(self.bias_variance)):
            raise ValueError(f"bias_variance must be >= 0 and finite, got {self.bias_variance}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {list(ARCHITECTURES)}, got {self.architecture!r}")
        if self.image_shape is not None and not self.on_images:
            raise ValueError(f"image_shape has no effect on architecture={self.architecture!r}; leave it out")
        if self.image_shape is not None and (len(self.image_shape) != 3 or min(self.image_shape) < 1):
            raise ValueError(f"image_shape must be (rows, columns, channels), all >= 1, got {self.image_shape}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {self.chunk}")
        if self.dtype not in ("float64", "float32"):
            raise ValueError(f"dtype must be 'float64' or 'float32', got {self.dtype!r}")

    def __call__(self, X: Any, Y: Any = None) -> np.ndarray:
        """Covariance of the outputs at X with those at Y (X itself where None).

        Args:
            X: shape (N, F), or (N, I, J, Q) for networks on images.
            Y: shape (M, F) or (M, I, J, Q), or None.
        Returns:
            Shape (N, M).
        Raises:
            ValueError: a shape that the network cannot take, or inputs of different sizes.
        """
        right = None if Y is None else self.inputs(Y)
        return self.gram(self.inputs(X), right).cpu().numpy()

    def diag(self, X: Any) -> np.ndarray:
        """Variance of the output at each of X, shape (N,), without the matrix."""
        return self.variances(self.inputs(X)).cpu().numpy()

    def ntk(self, X: Any, Y: Any = None, readout_variance: float = 1.0) -> np.ndarray:
        """The neural tangent kernel, shape (N, M): inner products of the output's gradients in all weights.

        Weights are standard normal and their scale multiplies the layer, so both kernels are proportional to
        ``readout_variance``.

        Args:
            X, Y: as in a call.
            readout_variance: variance of the last layer's weights, > 0.
        """
        if not readout_variance > 0:
            raise ValueError(f"readout_variance must be > 0, got {readout_variance}")
        right = None if Y is None else self.inputs(Y)
        return readout_variance * self.tangents(self.inputs(X), right).cpu().numpy()

    @property
    def on_images(self) -> bool:
        """Whether the network takes images."""
        return self.architecture in ON_IMAGES

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The network up to its read-out."""
        return PROGRAMS[self.architecture](self.depth)

    def inputs(self, X: Any) -> Tensor:
        """X as a tensor (N, F) or (N, I, J, Q) of the kernel's dtype on its device, checked."""
        x = torch.as_tensor(np.asarray(X) if not isinstance(X, Tensor) else X)
        x = x.to(self.device, getattr(torch, self.dtype))
        if not self.on_images:
            if x.dim() != 2:
                raise ValueError(
                    f"X must have 2 dimensions (N, F) for {self.architecture!r}, got shape {tuple(x.shape)}"
                )
            return x
        if x.dim() == 4:
            if self.image_shape is not None and tuple(x.shape[1:]) != tuple(self.image_shape):
                raise ValueError(f"X holds images of shape {tuple(x.shape[1:])}, image_shape is {self.image_shape}")
            return x
        if x.dim() != 2:
            raise ValueError(
                f"X must have 4 dimensions (N, rows, columns, channels) or 2 with image_shape for {self.architecture!r}, "
                f"got shape {tuple(x.shape)}"
            )
        if self.image_shape is None:
            raise ValueError(
                f"architecture={self.architecture!r} cannot tell rows from columns in flat X of shape {tuple(x.shape)}; "
                "give image_shape=(rows, columns, channels)"
            )
        if math.prod(self.image_shape) != x.shape[1]:
            raise ValueError(
                f"image_shape {self.image_shape} has {math.prod(self.image_shape)} numbers, X has {x.shape[1]} a row"
            )
        return x.reshape(len(x), *self.image_shape)

    def gram(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        weight_variance: float | Tensor | None = None,
        bias_variance: float | Tensor | None = None,
    ) -> Tensor:
        """What a call computes, from and to tensors; other variances may be given, and a dense net is differentiable in them.

        With gradients the whole recursion is kept: about 6 * depth * N * M numbers.
        """
        variances = (
            self.weight_variance if weight_variance is None else weight_variance,
            self.bias_variance if bias_variance is None else bias_variance,
        )
        if any(isinstance(v, Tensor) and v.requires_grad for v in variances):
            k = propagate(self.layers, _products(x, x if y is None else y, False), self.activation, *variances)
            return k.cross if y is not None else k.cross.diagonal_scatter(k.left.flatten())
        return self._blocks(x, y, variances, tangent=False)

    def tangents(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The neural tangent kernel at read-out variance 1, from and to tensors."""
        return self._blocks(x, y, (self.weight_variance, self.bias_variance), tangent=True)

    def variances(self, x: Tensor) -> Tensor:
        """Diagonal of ``gram(x)``, shape (N,)."""
        if not len(x):
            return x.new_zeros(0)
        found = []
        # One row on the right keeps the unused crosswise part as small as the diagonal itself.
        for part in x.split(max(1, self.chunk // _positions(x))):
            variances = (self.weight_variance, self.bias_variance)
            k = propagate(self.layers, _products(part, part[:1], False), self.activation, *variances)
            found.append(k.left.flatten())
        return torch.cat(found)

    def _blocks(self, x: Tensor, y: Tensor | None, variances: tuple[Any, Any], *, tangent: bool) -> Tensor:
        others = x if y is None else y
        if others.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"X and Y must agree in all but their first dimension, got {x.shape[1:]} and {others.shape[1:]}"
            )
        out_NM = x.new_empty(len(x), len(others))
        positions = _positions(x)
        most = max(1, (self.chunk if self.on_images else min(self.chunk, CACHED)) // positions)
        columns = min(max(1, len(others)), most)
        rows = max(1, most // columns)
        for i in range(0, len(x), rows):
            # By symmetry only blocks that touch the lower triangle are computed.
            end = len(others) if y is not None else min(i + rows, len(x))
            for j in range(0, end, columns):
                block = out_NM[i : i + rows, j : min(j + columns, end)]
                left, right = x[i : i + rows], others[j : min(j + columns, end)]
                k = propagate(self.layers, _products(left, right, tangent), self.activation, *variances)
                block.copy_(k.tangent + k.cross if k.tangent is not None else k.cross)
                if y is None and i < j + columns and j < i + rows:
                    own = k.left + k.left_tangent if k.left_tangent is not None else k.left
                    # Row r of the block and column r + i - j are the same input.
                    same = block.diagonal(i - j)
                    same.copy_(own.flatten()[max(0, j - i) :][: len(same)])
        if y is None:
            _mirror(out_NM)
        return out_NM


def _mirror(square: Tensor) -> None:
    """Copy the lower triangle onto the upper one, in place, by blocks."""
    n, side = len(square), 512
    for i in range(0, n, side):
        for j in range(0, i, side):
            square[j : j + side, i : i + side] = square[i : i + side, j : j + side].T
        block = square[i : i + side, i : i + side]
        block.copy_(block.tril() + block.tril(-1).T)


def _products(x: Tensor, y: Tensor, tangent: bool) -> Covariance:
    """Second moments of the inputs: products over features or channels, divided by their number."""
    size = x.shape[-1]
    if x.dim() == 2:
        cross = x @ y.T / size
    else:
        cross = torch.einsum("nijq,mijq->nmij", x, y) / size
    left, right = (x.square().sum(-1) / size)[:, None], (y.square().sum(-1) / size)[None]
    # Data have no weights below them: their tangent kernel is zero.
    zero = (torch.zeros_like(cross), torch.zeros_like(left), torch.zeros_like(right)) if tangent else (None,) * 3
    return Covariance(cross, left, right, *zero)


def _positions(x: Tensor) -> int:
    return math.prod(x.shape[1:3]) if x.dim() == 4 else 1


def _mlp(depth: int) -> tuple[Layer, ...]:
    return (Affine(), Activate()) * depth


def _resnet(depth: int) -> tuple[Layer, ...]:
    return (Affine(), *(Branch((Activate(), Affine())),) * depth, Activate())


def _cnn(depth: int) -> tuple[Layer, ...]:
    return (*_mlp(depth), Flatten())


def _wide_resnet(depth: int) -> tuple[Layer, ...]:
    layers: list[Layer] = [Affine()]
    for stride in (1, 2, 2, 2):
        # The first block of a group changes the number of channels, so its shortcut is a convolution too.
        layers.append(Branch((Activate(), Affine(stride), Activate(), Affine()), (Affine(stride),)))
        layers += [Branch((Activate(), Affine(), Activate(), Affine()))] * (depth - 1)
    return (*layers, Flatten())


PROGRAMS: dict[str, Callable[[int], tuple[Layer, ...]]] = {
    "mlp": _mlp,
    "resnet": _resnet,
    "cnn": _cnn,
    "wide_resnet": _wide_resnet,
}
