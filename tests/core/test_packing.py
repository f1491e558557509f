"""Packed codes: exact round trips and not a bit more than needed."""

import pytest
import torch

from mixtura.core.packing import WIDTHS, pack, packed_width, unpack


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [8, 16, 24, 136])
def test_codes_come_back_exactly_and_take_their_bits(bits: int, n: int):
    codes = torch.randint(0, 2**bits, (3, 5, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_in_every_place(bits: int):
    for place in range(8):
        for code in range(2**bits):
            codes = torch.zeros(8, dtype=torch.long)
            codes[place] = code
            assert unpack(pack(codes, bits), bits, 8).tolist() == codes.tolist()


def test_no_rows_are_fine():
    assert unpack(pack(torch.zeros(0, 8, dtype=torch.uint8), 3), 3, 8).shape == (0, 8)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 4\), got 0 to 4"):
        pack(torch.tensor([0, 4, 0, 0]), 2)
    with pytest.raises(ValueError, match=r"bits must be one of \[1, 2, 3, 4, 6, 8\], got 5"):
        packed_width(8, 5)
    with pytest.raises(ValueError, match="multiple of 8 long"):
        pack(torch.zeros(12, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="take 3 bytes, got 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 3, 8)
