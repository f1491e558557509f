"""Layers with fewer multiply-adds than entries: a mask beside every weight, and the three shapes that spend what it saves.

The forward pass multiplies by the mask (:mod:`~mixtura.core.masks`), so a sparse layer is sparse under any optimizer; where the
weight is known to be masked already, since nobody wrote to it, it spares the product. The backward pass does **not** multiply:
the gradient reaches every entry, as RigL's growth needs. :class:`~mixtura.core.sparse_training.MaskOptimizer` keeps that
gradient from the optimizer.

- `SparseLinear`, `SparseConv2d`: a masked layer.
- `ParallelSparse`: the sum over branches of the layer's own shape, each with a norm or an activation of its own.
- `FactorizedSparse`: V sigma(U x), both masked.
- `DopedSparse`: a masked layer plus a dense product of low rank, V U x.

Shapes: O outputs, I inputs of a matrix; a convolution's matrix has I = channels times kernel, or that over its groups.
Source: Saxena et al. 2023 (2303.11525), sec. 2.3.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.core.masks import PREFIX, Masked, draw_mask, mask_parameter, masked, masked_parameters

__all__ = [
    "ACTIVATIONS",
    "PREFIX",
    "Between",
    "DopedSparse",
    "FactorizedSparse",
    "Masked",
    "ParallelSparse",
    "SparseConv2d",
    "SparseLinear",
    "draw_mask",
    "mask_parameter",
    "masked",
    "masked_parameters",
]

Norm = Literal["batch", "rms", "none"]
Layer = nn.Linear | nn.Conv2d

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "none": lambda x: x}
)


class _HasMask:
    """What both masked layers share."""

    weight: Tensor
    mask_weight: Tensor
    _settled: tuple[int, ...] = ()

    @property
    def mask(self) -> Tensor:
        """Bool, of the weight's shape; True where the weight is active."""
        return self.mask_weight

    @property
    def density(self) -> float:
        """Share of active weights."""
        return float(self.mask_weight.float().mean())

    def set_mask(self, mask: Tensor) -> None:
        """Take a mask and put inactive weights to zero.

        Raises:
            ValueError: a mask of another shape.
        """
        if mask.shape != self.weight.shape:
            raise ValueError(f"mask must have the weight's shape {tuple(self.weight.shape)}, got {tuple(mask.shape)}")
        with torch.no_grad():
            self.mask_weight.copy_(mask)
            self.weight.mul_(self.mask_weight)
        self.settle()

    def settle(self) -> None:
        """Remember weight and mask as they are: inactive weights are zero, until somebody writes to either."""
        self._settled = self._state()

    def effective(self) -> Tensor:
        """The weight with zeros where it is inactive; its gradient reaches every entry."""
        if hasattr(self.mask_weight, "placements"):
            # Cut by a MaskOptimizer, which keeps the weight masked; in a forward pass the weight is whole and the mask is not.
            return self.weight
        if self._settled and not torch.compiler.is_compiling() and self._settled == self._state():
            return self.weight
        return masked(self.weight, self.mask_weight)

    def _state(self) -> tuple[int, ...]:
        if self.weight.is_inference() or self.mask_weight.is_inference():
            return ()  # such tensors do not count what is written to them
        # The identities too: a copy of the layer begins its counts anew.
        return id(self.weight), self.weight._version, id(self.mask_weight), self.mask_weight._version


class SparseLinear(_HasMask, nn.Linear):
    """A linear layer, (..., I) -> (..., O), with a mask on its weight; all active at first.

    Example:
        >>> layer = SparseLinear(8, 4)
        >>> layer.set_mask(draw_mask((4, 8), 16))
        >>> layer.density, layer.to_sparse_csr().values().numel()
        (0.5, 16)
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.register_buffer(f"{PREFIX}weight", torch.ones_like(self.weight, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective(), self.bias)

    def to_sparse_semi_structured(self) -> Tensor:
        """The weight (O, I) in the form of hardware that skips two zeros of every four, for ``F.linear(x, found, layer.bias)``.

        Raises:
            ValueError: more than two active of some four neighbours, or a layer that is not on a CUDA device. Types and sizes
                that the device's kernels do not take are told by torch.
        """
        if self.in_features % 4 or bool((self.mask_weight.view(self.out_features, -1, 4).sum(-1) > 2).any()):
            raise ValueError(
                "the mask has more than 2 active of some 4 neighbours; draw it with n_m=(2, 4) and train so"
            )
        if self.weight.device.type != "cuda":
            raise ValueError(
                f"2:4 products are for CUDA devices of capability 8.0 and later, and the layer is on {self.weight.device}; "
                "move it there first, or take to_sparse_csr"
            )
        return torch.sparse.to_sparse_semi_structured(self.weight.detach() * self.mask_weight)

    def to_sparse_csr(self) -> Tensor:
        """The weight (O, I) in compressed rows, with 32-bit indices, which the engine behind :mod:`torch.sparse` takes as they
        are (it copies longer ones at every product). One row x is quickest as a vector: ``layer.to_sparse_csr() @ x``."""
        rows = (self.weight.detach() * self.mask_weight).to_sparse_csr()
        return torch.sparse_csr_tensor(
            rows.crow_indices().int(), rows.col_indices().int(), rows.values(), rows.shape, check_invariants=False
        )


class SparseConv2d(_HasMask, nn.Conv2d):
    """A convolution, (B, channels, height, width), with a mask on its weight; all active at first."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer(f"{PREFIX}weight", torch.ones_like(self.weight, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(input, self.effective(), self.bias)
        return found


@dataclass(frozen=True, kw_only=True)
class Between:
    """What stands inside a transformed layer: a norm, then an activation.

    Attributes:
        norm: ``batch`` (over all but the features), ``rms`` (over the features) or ``none``.
        activation: one of :data:`ACTIVATIONS`.
    """

    norm: Norm = "batch"
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "rms", "none"):
            raise ValueError(f"norm must be 'batch', 'rms' or 'none', got {self.norm!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")

    @property
    def linear(self) -> bool:
        """Whether the layer around it is one linear map when it is evaluated: a batch norm alone is affine then."""
        return self.activation == "none" and self.norm != "rms"

    def module(self, features: int, layer: Layer) -> nn.Module:
        """The norm for ``features`` outputs of a layer of this kind."""
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        if self.norm == "none":
            return nn.Identity()
        if isinstance(layer, nn.Conv2d):
            if self.norm == "rms":
                raise ValueError("norm='rms' is for linear layers; give norm='batch' or 'none' for convolutions")
            return nn.BatchNorm2d(features, **place)
        return nn.RMSNorm(features, eps=1e-6, **place) if self.norm == "rms" else _BatchNorm(features, **place)


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm over all axes but the last, (..., features): its parent takes the second for the features."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.reshape(-1, input.shape[-1])).view(input.shape)


class ParallelSparse(nn.Module):
    """Sum over branches of activation(norm(masked layer)), each branch of the shape of the layer it replaces.

    Drop-in for ``nn.Linear`` and ``nn.Conv2d``. All weights are active at first.

    Args:
        layer: gives shape, stride, padding, bias, device and type; its weights are not used.
        branches: number of them.
        between: what each branch ends in.
    Raises:
        ValueError: a linear ``between``: the branches would be one layer.
    """

    def __init__(self, layer: Layer, branches: int, between: Between) -> None:
        super().__init__()
        if branches > 1 and between.linear:
            raise ValueError("branches without an activation or a norm over features are one layer; give activation")
        self.between = between
        # A norm takes a bias away again.
        bias = layer.bias is not None and between.norm == "none"
        self.layers = nn.ModuleList(_same(layer, bias=bias) for _ in range(branches))
        self.norms = nn.ModuleList(between.module(layer.weight.shape[0], layer) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.between.activation]
        parts = (activation(norm(layer(x))) for layer, norm in zip(self.layers, self.norms, strict=True))
        return _sum(parts)

    def extra_repr(self) -> str:
        return f"activation={self.between.activation}"


class FactorizedSparse(nn.Module):
    """V activation(norm(U x)), U and V masked: (..., I) -> (..., O), or a k x k convolution U and a 1 x 1 convolution V.

    Args:
        layer: gives shape, stride, padding, bias, device and type; its weights are not used.
        rank: outputs of U.
        between: what stands between U and V.
    """

    def __init__(self, layer: Layer, rank: int, between: Between) -> None:
        super().__init__()
        self.between = between
        self.u = _same(layer, bias=layer.bias is not None and between.norm == "none", outputs=rank)
        self.norm = between.module(rank, layer)
        self.v = _pointwise(layer, rank, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.v(ACTIVATIONS[self.between.activation](self.norm(self.u(x))))
        return found

    def extra_repr(self) -> str:
        return f"activation={self.between.activation}"


class DopedSparse(nn.Module):
    """A masked layer plus V U x, dense and of low rank, with nothing between U and V.

    Args:
        layer: gives shape, stride, padding, bias, device and type; its weights are not used.
        rank: outputs of U; 0 leaves the masked layer alone.
    """

    def __init__(self, layer: Layer, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.sparse = _same(layer, bias=layer.bias is not None)
        self.u = _same(layer, bias=False, outputs=rank, sparse=False) if rank else None
        self.v = _pointwise(layer, rank, sparse=False) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.sparse(x)
        return y if self.u is None or self.v is None else y + self.v(self.u(x))

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _same(layer: Layer, *, bias: bool, outputs: int = 0, sparse: bool = True) -> nn.Module:
    """A layer of the same kind and geometry, with another number of outputs if one is given."""
    place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Conv2d):
        kind: Any = SparseConv2d if sparse else nn.Conv2d
        return kind(  # type: ignore[no-any-return]
            layer.in_channels,
            outputs or layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=bias,
            padding_mode=layer.padding_mode,
            **place,
        )
    kind = SparseLinear if sparse else nn.Linear
    return kind(layer.in_features, outputs or layer.out_features, bias=bias, **place)  # type: ignore[no-any-return]


def _pointwise(layer: Layer, inputs: int, *, sparse: bool) -> nn.Module:
    """The layer that maps ``inputs`` features, position by position, to the outputs of ``layer``."""
    place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    # A doped layer has its bias on the sparse part.
    bias = layer.bias is not None and sparse
    if isinstance(layer, nn.Conv2d):
        kind: Any = SparseConv2d if sparse else nn.Conv2d
        return kind(inputs, layer.out_channels, 1, bias=bias, **place)  # type: ignore[no-any-return]
    kind = SparseLinear if sparse else nn.Linear
    return kind(inputs, layer.out_features, bias=bias, **place)  # type: ignore[no-any-return]
