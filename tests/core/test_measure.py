"""Meters: what a block allocated shows in its peak."""

import sys

import pytest
import torch

from mixtura.core.measure import Meter, matmul_rate, resident_memory


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is reset on Linux only")
def test_the_peak_of_a_block_is_its_own():
    size = 200_000_000
    with Meter() as large:
        block = torch.ones(size, dtype=torch.uint8)
        del block
    with Meter() as small:
        pass
    # The allocator gives large blocks back at once; a tenth is left for everything else in the process.
    assert large.peak_bytes - small.peak_bytes > 0.9 * size
    assert small.peak_bytes <= 1.1 * resident_memory() + 1e7


def test_a_rate_is_plausible():
    # Between a slow phone core and a large server, in operations a second.
    assert 1e8 < matmul_rate(size=256, seconds=0.02) < 1e14
