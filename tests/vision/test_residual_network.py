"""Residual networks and their sparse forms of equal cost."""

import pytest
import torch

from mixtura.core.flops import count_flops
from mixtura.core.isoflop import IsoFlop, convert, widen
from mixtura.core.sparse_layers import masked_parameters
from mixtura.vision import ResidualNetwork

IMAGE = torch.zeros(1, 1, 28, 28)


def test_multiply_adds_are_those_of_its_formula():
    w = 8
    stem, first = 784 * 9 * w, 784 * 9 * 2 * w * w
    second = 196 * (9 * (2 * w * w + 4 * w * w) + 2 * w * w)
    third = 49 * (9 * (8 * w * w + 16 * w * w) + 8 * w * w)
    assert count_flops(ResidualNetwork(w), IMAGE).total == stem + first + second + third + 4 * w * 10


@pytest.mark.parametrize("member", ["wide", "parallel", "factorized", "doped"])
@pytest.mark.parametrize("s", [0.0, 0.5, 0.75, 0.9])
def test_every_sparse_form_costs_the_same(member: str, s: float):
    want = count_flops(ResidualNetwork(8), IMAGE).total
    transform = IsoFlop(member, s)
    if member == "wide":
        made = widen(lambda w: ResidualNetwork(w), transform, width=8, example_input=IMAGE)
    else:
        made = convert(ResidualNetwork(8), transform, example_input=IMAGE, fresh=True)
    assert abs(count_flops(made, IMAGE).total / want - 1) < 0.001
    assert made(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_shortcuts_are_masked_and_stem_and_head_are_not():
    made = widen(lambda w: ResidualNetwork(w), IsoFlop("wide", 0.5), width=8, example_input=IMAGE)
    names = set(masked_parameters(made))
    assert "blocks.1.shortcut.0.weight" in names and not {"stem.weight", "head.weight"} & names


def test_a_number_below_one_is_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 0, 10, 1, 3 and 1"):
        ResidualNetwork(0)
