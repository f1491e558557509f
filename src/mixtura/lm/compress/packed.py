"""Packed matrices: codes of 1, 2, 3, 4 or 8 bits with group scales, multiplied without ever standing in float as a whole.

Shapes: O outputs, I inputs, G groups of S inputs (I = G·S), M rows of a product.

For weights (q - z)·s of a group the product with x is s·(q·x) - s·z·sum(x): codes are multiplied as they are, scales and zero
points are applied to outputs. On a CPU with a C compiler few rows are multiplied by ``core.native.packed``, which unpacks
in registers and rounds x to 16 bits. Codes are packed group by group, so that unpacking writes (G, O, S) in long runs.

Buffers of a width b with n matrices: ``codes_b`` uint8 (n, G·O·S·b/8), ``scale_b`` int16 (n, G, O), which holds the bits of
float16 so that no cast of the model touches them, ``zero_b`` uint8 (n, G, O) from 2 bits on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixtura.core import native
from mixtura.core.packing import pack, packed_width, unpack
from mixtura.core.quantize import Quantized

__all__ = ["PackedLinear", "PackedMatrices", "group_size_for"]

NATIVE_ROWS = 48  # up to here the C kernel is faster than a product with the unpacked matrix (measured: 40 to 56)
FEW_ROWS = (
    2  # without it: up to here torch's int8 kernel is faster than a batched product (measured on two Zen 4 cores)
)


def group_size_for(width: int, wanted: int = 128) -> int:
    """Largest divisor of ``width`` that is a multiple of 16 and at most ``wanted``.

    Raises:
        ValueError: there is none.
    """
    for size in range(min(wanted, width) // 16 * 16, 0, -16):
        if width % size == 0:
            return size
    raise ValueError(
        f"width {width} has no divisor that is a multiple of 16 and at most {wanted}, so it cannot be grouped"
    )


class PackedMatrices(nn.Module):
    """Several matrices of one shape, each with a width of its own."""

    def __init__(self, bits: Sequence[int], out_features: int, in_features: int, group_size: int):
        super().__init__()
        if in_features % group_size:
            raise ValueError(f"group_size={group_size} must divide the width {in_features}")
        self.bits = [int(b) for b in bits]
        self.out_features, self.in_features, self.group_size = out_features, in_features, group_size
        self.groups = in_features // group_size
        self.place = [self.bits[:j].count(b) for j, b in enumerate(self.bits)]
        for b in sorted(set(self.bits)):
            n = self.bits.count(b)
            self.register_buffer(
                f"codes_{b}", torch.zeros(n, packed_width(out_features * in_features, b), dtype=torch.uint8)
            )
            self.register_buffer(f"scale_{b}", torch.zeros(n, self.groups, out_features, dtype=torch.int16))
            if b > 1:
                self.register_buffer(f"zero_{b}", torch.zeros(n, self.groups, out_features, dtype=torch.uint8))

    def put(self, j: int, matrix: Quantized) -> None:
        """Store matrix j; its width and group size must be those announced."""
        b, place = self.bits[j], self.place[j]
        if (matrix.bits, matrix.group_size) != (b, self.group_size):
            raise ValueError(
                f"matrix {j} has {matrix.bits} bits in groups of {matrix.group_size}, expected {b} and {self.group_size}"
            )
        shape = (self.out_features, self.groups, self.group_size)
        by_group = matrix.codes.view(shape).transpose(0, 1).reshape(-1)
        getattr(self, f"codes_{b}")[place] = pack(by_group, b)
        getattr(self, f"scale_{b}")[place] = matrix.scale.half().T.contiguous().view(torch.int16)
        if b > 1:
            middle = torch.full_like(matrix.scale, 2 ** (b - 1), dtype=torch.uint8)
            getattr(self, f"zero_{b}")[place] = (middle if matrix.zero is None else matrix.zero).T

    def product(self, j: int, x: Tensor) -> Tensor:
        """x (M, I) times matrix j transposed: (M, O), in the type of x."""
        b = self.bits[j]
        if native.why_not_packed(x, b, self.groups, self.out_features) is None:
            if len(x) <= NATIVE_ROWS:
                return native.packed(x, *self._stored(j), b).to(x.dtype)
            return x @ native.packed_values(*self._stored(j), b, self.in_features).to(x.dtype).T
        codes_GOS, factor_GO, shift_GO = self._parts(j)
        x_GMS = x.view(len(x), self.groups, self.group_size).transpose(0, 1).contiguous()
        shift_MO = x_GMS.float().sum(-1).T @ shift_GO
        if len(x) <= FEW_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu" and b < 8:
            codes = codes_GOS.view(torch.int8)
            scale = factor_GO.bfloat16()
            y_MO = -shift_MO
            for g in range(self.groups):
                y_MO += torch._weight_int8pack_mm(x_GMS[g], codes[g], scale[g])
            return y_MO.to(x.dtype)
        if 2 * len(x) <= self.group_size:
            y_GMO = torch.bmm(x_GMS, codes_GOS.to(x.dtype).transpose(1, 2))
            return ((y_GMO * factor_GO[:, None]).sum(0) - shift_MO).to(x.dtype)
        return x @ self.dequantize(j).to(x.dtype).T

    def dequantize(self, j: int) -> Tensor:
        """Matrix j, float32, (O, I)."""
        codes_GOS, factor_GO, shift_GO = self._parts(j)
        values = codes_GOS.float().mul_(factor_GO[..., None]).sub_(shift_GO[..., None])
        return values.transpose(0, 1).reshape(self.out_features, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def _stored(self, j: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Packed codes, scales and zero points of matrix j."""
        b, place = self.bits[j], self.place[j]
        zero_GO = getattr(self, f"zero_{b}")[place] if b > 1 else None
        return getattr(self, f"codes_{b}")[place], getattr(self, f"scale_{b}")[place], zero_GO

    def _parts(self, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 (G, O, S), what multiplies them and what is taken off, float32 (G, O)."""
        b, (packed, stored_GO, zero_GO) = self.bits[j], self._stored(j)
        codes_GOS = unpack(packed, b, self.out_features * self.in_features).view(self.groups, self.out_features, -1)
        scale_GO = stored_GO.view(torch.float16).float()
        if zero_GO is None:
            return codes_GOS, 2 * scale_GO, scale_GO  # (2 q - 1) s
        return codes_GOS, scale_GO, scale_GO * zero_GO

    def extra_repr(self) -> str:
        return f"bits={self.bits}, out={self.out_features}, in={self.in_features}, group={self.group_size}"


class PackedLinear(nn.Module):
    """A linear layer with a packed weight: (..., I) -> (..., O)."""

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group_size: int, bias: bool, dtype: torch.dtype
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.packed = PackedMatrices([bits], out_features, in_features, group_size)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, matrix: Quantized) -> "PackedLinear":
        """The packed form of a linear layer whose weight was quantized."""
        made = cls(
            linear.in_features,
            linear.out_features,
            bits=matrix.bits,
            group_size=matrix.group_size,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
        ).to(linear.weight.device)
        made.packed.put(0, matrix)
        if linear.bias is not None and made.bias is not None:
            made.bias.data.copy_(linear.bias.data)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y = self.packed.product(0, x.reshape(-1, self.in_features))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)
