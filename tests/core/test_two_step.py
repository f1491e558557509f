"""Integer products of codes and activations: against dequantized products in float64, and the C kernel against the slow way."""

import re

import pytest
import torch

from mixtura.core import native
from mixtura.core.packing import pack
from mixtura.core.quantize import nearest
from mixtura.core.two_step import activations, digits, rows_product


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: torch.Tensor, bits: int, group: int):
    """The matrix, and its codes, scales and zero points as they stand in memory."""
    matrix = nearest(weight, bits, group, symmetric=bits == 8)
    codes = pack(matrix.codes.unflatten(-1, (-1, group)), bits).flatten(1)
    return matrix, (codes, matrix.scale.half().view(torch.int16), matrix.zero)


@pytest.mark.parametrize("group", [16, 32, 96, 128])
def test_activations_are_rounded_to_the_nearest_of_255_values_of_their_group(group: int):
    x = draw(5, 2 * 96 if group == 96 else 256)
    integers, scale = activations(x, group)
    assert integers.abs().amax(-1).eq(127).all()
    off = x.view_as(integers) - integers * scale[..., None]
    # Half a step, and the rounding of the step itself.
    assert (off.abs() <= scale[..., None] * (0.5 + 1e-4)).all()


def test_groups_of_activations_know_nothing_of_each_other():
    x = draw(3, 64)
    bold = x.clone()
    bold[:, 32:] *= 1000
    (a, sa), (b, sb) = activations(x, 32), activations(bold, 32)
    assert torch.equal(a[:, 0], b[:, 0]) and torch.equal(sa[:, 0], sb[:, 0])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("width", "group"), [(64, 16), (96, 48), (192, 96), (256, 128)])
def test_scales_after_integers_equal_the_product_of_dequantized_factors(bits: int, width: int, group: int):
    matrix, parts = stored(draw(10, width, seed=1), bits, group)
    x, out = draw(7, width, seed=2), torch.full((7, 12), torch.nan)
    place = torch.randperm(12, generator=torch.Generator().manual_seed(3))[:10].int()
    rows_product(x, *parts, place, bits, group, out)
    integers, scale = activations(x, group)
    a = (integers.double() * scale.double()[..., None]).flatten(1)
    want = a @ matrix.dequantize().double().T
    # float32: one rounding a group, at most 16 groups.
    assert (out[:, place.long()].double() - want).abs().max() < 1e-5 * want.abs().max()
    assert out[:, sorted(set(range(12)) - set(place.tolist()))].isnan().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 8, 13, 17])
@pytest.mark.parametrize(("n_out", "groups", "group"), [(1, 1, 32), (7, 3, 64), (10, 2, 96), (33, 4, 128), (3, 1, 512)])
def test_the_kernel_equals_the_slow_way(bits: int, rows: int, n_out: int, groups: int, group: int):
    x = draw(rows, groups * group, seed=rows)
    if (reason := native.why_not_int8(x, bits, group)) is not None:
        pytest.skip(reason)
    _, parts = stored(draw(n_out, groups * group, seed=1), bits, group)
    place = torch.randperm(n_out, generator=torch.Generator().manual_seed(3)).int()
    want, got = torch.empty(rows, n_out), torch.empty(rows, n_out)
    rows_product(x, *parts, place, bits, group, want)
    rows_product(native.int8_round(x, group), *parts, place, bits, group, got)
    # The integers are the same; float32 sums of up to 4 groups of 8 lanes each may differ in the last digits.
    torch.testing.assert_close(got, want, rtol=0, atol=3e-6 * float(want.abs().max()) if rows else 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 9])
def test_integer_sums_are_exact_at_the_extremes(bits: int, rows: int):
    """Largest codes against largest integers, all of one sign: where 16 bits would overflow first."""
    group = 512
    x = torch.ones(rows, group)
    x[:, ::2] *= -1 if bits == 8 else 1
    if (reason := native.why_not_int8(x, bits, group)) is not None:
        pytest.skip(reason)
    top = torch.full((2, group), 2**bits - 1, dtype=torch.uint8)
    if bits == 8:
        top[0, ::2] = 1  # -127 against -127
        top[1] = 0  # -128, which clamping can leave
    one = torch.ones(2, 1).half().view(torch.int16)
    zero = torch.tensor([[0], [15]], dtype=torch.uint8) if bits == 4 else None
    out = torch.empty(rows, 2)
    rows_product(
        native.int8_round(x, group),
        pack(top[:, None], bits).flatten(1),
        one,
        zero,
        torch.arange(2).int(),
        bits,
        group,
        out,
    )
    integers, scale = activations(x, group)
    middle = torch.tensor([[0], [15]]) if bits == 4 else 128
    want = (integers.flatten(1).double() @ (top.double() - middle).T) * scale.double()
    assert torch.allclose(out.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [32, 96])
def test_the_kernel_rounds_activations_to_the_same_integers(group: int):
    x = draw(3, 192) * torch.logspace(-6, 6, 192)
    if (reason := native.why_not_int8(x, 4, group)) is not None:
        pytest.skip(reason)
    integers, scale = activations(x, group)
    got = native.int8_round(x, group)
    assert torch.equal(got.scale[:, :, 0], scale)
    assert torch.equal(got.sums[:, :, 0].long(), integers.long().sum(-1))
    # In steps of 32: sixteen of the first half of a group, sixteen of the second.
    order = torch.arange(group).view(2, -1, 16).transpose(0, 1).flatten()
    assert torch.equal(got.integers[:, :, 0], integers[..., order])


def test_two_digits_keep_fifteen_bits():
    x = draw(4, 128)
    integers, scale = activations(digits(x, 64), 64)
    both = (integers * scale[..., None]).flatten(1)
    largest = x.abs().max()
    assert (both[:4] + both[4:] - x).abs().max() < largest * 2.0**-15


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", [True, False])
def test_no_input_that_is_not_finite_is_hidden(bad: float, kernel: bool):
    x = draw(2, 64)
    x[0, 40] = bad
    if kernel and (reason := native.why_not_int8(x, 4, 32)) is not None:
        pytest.skip(reason)
    _, parts = stored(draw(3, 64), 4, 32)
    out = torch.empty(2, 3)
    rows_product(native.int8_round(x, 32) if kernel else x, *parts, torch.arange(3).int(), 4, 32, out)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("kernel", [True, False])
def test_a_token_of_zeros_gives_zeros(kernel: bool):
    if kernel and (reason := native.why_not_int8(torch.zeros(1, 64), 4, 32)) is not None:
        pytest.skip(reason)
    _, parts = stored(draw(3, 64), 4, 32)
    out, x = torch.full((1, 3), torch.nan), torch.zeros(1, 64)
    rows_product(native.int8_round(x, 32) if kernel else x, *parts, torch.arange(3).int(), 4, 32, out)
    assert out.eq(0).all()


@pytest.mark.parametrize(
    ("x", "bits", "group", "reason"),
    [
        (torch.zeros(1, 64).double(), 4, 32, "float64"),
        (torch.zeros(1, 64), 3, 32, "4 or 8 bits, got 3"),
        (torch.zeros(1, 48), 4, 48, "groups of 32 a <= 512 codes, got 48"),
        (torch.zeros(1, 64, device="meta"), 4, 32, "runs on the CPU"),
    ],
)
def test_the_kernel_says_what_it_cannot_multiply(x: torch.Tensor, bits: int, group: int, reason: str):
    assert re.search(reason, native.why_not_int8(x, bits, group) or "")
