"""A linear layer whose output channels have one of two widths, multiplied in two steps and never unpacked as a whole.

Shapes: O outputs, I inputs, G groups of S inputs (I = G·S), M rows of activations.

The rows of each width stand together, low ones first; ``order`` says which output each of them is. Activations are rounded to
8-bit integers, a scale for every token and group, and meet the codes as integers; scales come after
(:mod:`mixtura.core.two_step`). With ``act_bits=None`` two such integers stand for an activation, which keeps 15 bits of it.

Buffers of each part: ``codes`` uint8 (rows, I·bits/8), every group of a row packed by itself; ``scale`` int16 (rows, G), the
bits of float16, so that no cast of the model touches them; ``zero`` uint8 (rows, G) where the grid is not symmetric.

Source: MixLLM (2412.14590), sec. 3.2 and 4.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from mixtura.core import native
from mixtura.core.packing import pack, packed_width, unpack
from mixtura.core.quantize import Quantized, values
from mixtura.core.two_step import digits, rows_product

__all__ = ["Backend", "MixedChannelLinear", "PackedRows"]

Backend = Literal["auto", "int8", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "int8", "reference")


class PackedRows(nn.Module):
    """Rows of one width: the low ones asymmetric, the high ones around zero."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, rows: int, in_features: int, *, bits: int, group_size: int, symmetric: bool):
        super().__init__()
        if in_features % group_size:
            raise ValueError(f"group_size={group_size} must divide the width {in_features}")
        self.bits, self.group_size = bits, group_size
        groups = in_features // group_size
        self.register_buffer("codes", torch.zeros(rows, packed_width(group_size, bits) * groups, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, groups, dtype=torch.int16))
        self.register_buffer("zero", None if symmetric else torch.zeros(rows, groups, dtype=torch.uint8))

    def put(self, matrix: Quantized) -> None:
        """Store a quantized matrix; its width, groups and kind of grid must be those announced."""
        mine, theirs = (
            (self.bits, self.group_size, self.zero is None),
            (matrix.bits, matrix.group_size, matrix.zero is None),
        )
        if mine != theirs or len(matrix.codes) != len(self.codes):
            raise ValueError(f"(bits, group size, symmetric) must be {mine} and rows {len(self.codes)}, got {theirs}")
        grouped = matrix.codes.unflatten(-1, (-1, self.group_size))
        self.codes.copy_(pack(grouped, self.bits).flatten(1))
        self.scale.copy_(matrix.scale.half().view(torch.int16))
        if self.zero is not None and matrix.zero is not None:
            self.zero.copy_(matrix.zero)

    def product(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        """Write the product with x (M, I) into the columns ``place`` of ``out`` (M, O)."""
        rows_product(x, self.codes, self.scale, self.zero, place, self.bits, self.group_size, out)

    def dequantize(self) -> Tensor:
        """The values, float32, shape (rows, I)."""
        grouped_OGB = self.codes.unflatten(-1, (self.scale.shape[1], -1))
        codes_OGS = unpack(grouped_OGB, self.bits, self.group_size)
        zero = None if self.zero is None else self.zero[..., None]
        return values(codes_OGS, self.scale.view(torch.float16).float()[..., None], zero, self.bits).flatten(1)

    def extra_repr(self) -> str:
        return f"rows={len(self.codes)}, bits={self.bits}, group={self.group_size}"


class MixedChannelLinear(nn.Module):
    """A linear layer with rows of two widths: (..., I) -> (..., O), in the type of the input.

    Args:
        in_features, out_features: I and O.
        n_high: rows of the larger width, 0 to O.
        low_bits, high_bits: the widths.
        act_bits: 8, or None to keep 15 bits of activations.
        group_size: S.
        bias: whether there is one.
        dtype: of the bias.

    Attributes:
        backend: ``"int8"``: 8-bit integer products of a C kernel; ``"reference"``: the same integers in float32, slow, on any
            device; ``"auto"``: the first where it can run.
    """

    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n_high: int,
        low_bits: int = 4,
        high_bits: int = 8,
        act_bits: int | None = 8,
        group_size: int = 128,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.act_bits = act_bits
        self.backend: Backend = "auto"
        self.low = PackedRows(out_features - n_high, in_features, bits=low_bits, group_size=group_size, symmetric=False)
        self.high = PackedRows(n_high, in_features, bits=high_bits, group_size=group_size, symmetric=True)
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls, low: Quantized, high: Quantized, is_high: Tensor, *, bias: Tensor | None = None, act_bits: int | None = 8
    ) -> "MixedChannelLinear":
        """The layer of two quantized parts.

        Args:
            low, high: the rows of each width, in the order of the outputs; the first asymmetric, the second symmetric.
            is_high: which outputs are of the second, bool, (O,).
            bias: (O,).
            act_bits: 8 or None.
        """
        made = cls(
            low.codes.shape[1],
            len(is_high),
            n_high=int(is_high.sum()),
            low_bits=low.bits,
            high_bits=high.bits,
            act_bits=act_bits,
            group_size=low.group_size,
            bias=bias is not None,
            dtype=torch.float32 if bias is None else bias.dtype,
        ).to(low.codes.device)
        made.low.put(low)
        made.high.put(high)
        made.order.copy_(torch.cat([(~is_high).nonzero()[:, 0], is_high.nonzero()[:, 0]]))
        if bias is not None and made.bias is not None:
            made.bias.data.copy_(bias.detach())
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        x_MI = x.reshape(-1, self.in_features)
        y_MO = self.product(x_MI)
        if self.bias is not None:
            y_MO = y_MO + self.bias
        return y_MO.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """x (M, I) times the weight transposed, without the bias: (M, O), float32."""
        if self._use_int8(x):
            low, high = self.low, self.high
            assert low.zero is not None
            return native.int8_mixed(
                x,
                (low.codes, low.scale, low.zero),
                (high.codes, high.scale),
                self.order,
                low.group_size,
                precise=self.act_bits is None,
            )
        seen = x if self.act_bits == 8 else digits(x, self.low.group_size)
        y_MO = torch.empty(len(seen), self.out_features, device=x.device)
        places = self.order.split([len(self.low.codes), len(self.high.codes)])
        for part, place in zip((self.low, self.high), places, strict=True):
            part.product(seen, place, y_MO)
        return y_MO if self.act_bits == 8 else y_MO[: len(x)] + y_MO[len(x) :]

    def why_not_int8(self, x: Tensor) -> str | None:
        """Reason why 8-bit integer products cannot run on an input, or None."""
        if (self.low.bits, self.high.bits) != (4, 8):
            return f"int8_mixed takes rows of 4 and 8 bits, got {self.low.bits} and {self.high.bits}"
        return native.why_not_int8(x, self.low.group_size)

    def weight(self) -> Tensor:
        """The values, float32, (O, I): for looking at, no product uses it."""
        both = torch.cat([self.low.dequantize(), self.high.dequantize()])
        return torch.empty_like(both).index_copy_(0, self.order.long(), both)

    @property
    def is_high(self) -> Tensor:
        """Which outputs have the larger width, bool, (O,)."""
        high = torch.zeros(self.out_features, dtype=torch.bool, device=self.order.device)
        high[self.order[len(self.low.codes) :].long()] = True
        return high

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and order; without the bias, which no quantizer touches."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    @property
    def bits(self) -> float:
        """Bits a weight, everything stored for it counted."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def _use_int8(self, x: Tensor) -> bool:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {self.backend!r}")
        if self.backend == "reference":
            return False
        reason = self.why_not_int8(x)
        if self.backend == "int8" and reason is not None:
            raise ValueError(f"backend 'int8' cannot run here: {reason}")
        return reason is None

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, high={len(self.high.codes)}, act_bits={self.act_bits}"
