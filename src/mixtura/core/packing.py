"""Codes of a few bits in bytes, without a wasted bit.

Layout of a row of n codes: planes of a width that divides 8. 1, 2, 4 and 8 bits are one plane; 3 bits are a plane of
the two low bits followed by a plane of the high bit, n·3/8 bytes in all; 6 bits are a plane of the four low bits followed
by one of the two high bits. Within a plane of w bits, byte b holds in its bits [w·f, w·(f+1)) the code number
f·(n·w/8) + b, so that unpacking writes runs of neighbouring columns.
"""

import torch
from torch import Tensor

__all__ = ["PLANES", "WIDTHS", "pack", "packed_width", "unpack"]

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
WIDTHS = tuple(PLANES)


def packed_width(n: int, bits: int) -> int:
    """Bytes of a row of n codes.

    Raises:
        ValueError: an unknown width, or an n that does not fill whole bytes in every plane.
    """
    if bits not in PLANES:
        raise ValueError(f"bits must be one of {list(WIDTHS)}, got {bits}")
    narrowest = 8 // min(PLANES[bits])
    if n % narrowest:
        raise ValueError(
            f"a row of {bits}-bit codes must be a multiple of {narrowest} long to fill whole bytes, got {n}"
        )
    return n * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: integers in [0, 2**bits), any integer type, shape (..., n).
        bits: 1, 2, 3, 4, 6 or 8.
    Returns:
        Bytes, uint8, shape (..., n·bits/8).
    Raises:
        ValueError: a code out of range, an unknown width, or a row that does not fill whole bytes.
    Example:
        >>> pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]), 1)
        tensor([129], dtype=torch.uint8)
    """
    packed_width(codes.shape[-1], bits)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"codes must lie in [0, {2**bits}), got {int(codes.min())} to {int(codes.max())}")
    codes = codes.to(torch.uint8)
    planes, low = [], 0
    for width in PLANES[bits]:
        fields = ((codes >> low) & (2**width - 1)).unflatten(-1, (8 // width, -1)).unbind(-2)
        packed = fields[0].clone()
        for f, field in enumerate(fields[1:], 1):
            packed |= field << (f * width)
        planes.append(packed)
        low += width
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Codes of packed rows, the inverse of :func:`pack`.

    Args:
        packed: bytes, uint8, shape (..., n·bits/8).
        bits: 1, 2, 3, 4, 6 or 8.
        n: codes a row.
    Returns:
        uint8, shape (..., n).
    """
    if packed.shape[-1] != packed_width(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_width(n, bits)} bytes, got {packed.shape[-1]}")
    codes = torch.empty(*packed.shape[:-1], n, dtype=torch.uint8, device=packed.device)
    low, first = 0, 0
    for width in PLANES[bits]:
        size = n * width // 8
        _spread(packed[..., first : first + size], width, low, codes)
        low, first = low + width, first + size
    return codes


def _spread(plane: Tensor, width: int, low: int, codes: Tensor) -> None:
    """Write the fields of a plane into the bits of ``codes`` from ``low`` on; the first plane overwrites."""
    fields = codes.unflatten(-1, (8 // width, -1))  # type: ignore[no-untyped-call]
    mask = 2**width - 1
    if plane.shape[-1] % 8 == 0 and plane.is_contiguous() and plane.storage_offset() % 8 == 0:
        # Eight bytes at a time: bits that a shift carries over from a neighbour are masked away.
        plane, fields = plane.view(torch.int64), fields.view(torch.int64)
        mask *= 0x0101010101010101
        mask -= (mask >> 63) << 64  # as a signed number
    for f in range(8 // width):
        part = (plane >> (f * width)) & mask if f else plane & mask
        if low:
            fields[..., f, :] |= part << low
        else:
            fields[..., f, :] = part
