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


def both(low: torch.Tensor, high: torch.Tensor, group: int):
    """Stored parts of rows of 4 and of 8 bits."""
    (_, four), (_, (codes, scale, _)) = stored(low, 4, group), stored(high, 8, group)
    return four, (codes, scale)


def slow(x: torch.Tensor, low, high, place: torch.Tensor, group: int, precise: bool = False) -> torch.Tensor:
    seen = digits(x, group) if precise else x
    out = torch.empty(len(seen), len(place))
    places = place.split([len(low[0]), len(high[0])])
    rows_product(seen, *low, places[0], 4, group, out)
    rows_product(seen, *high, None, places[1], 8, group, out)
    return out[: len(x)] + out[len(x) :] if precise else out


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 8, 13, 17])
@pytest.mark.parametrize(
    ("low", "high", "groups", "group"), [(1, 0, 1, 32), (0, 5, 2, 64), (7, 3, 3, 64), (10, 33, 2, 96), (3, 1, 1, 512)]
)
def test_the_kernel_equals_the_slow_way(rows: int, low: int, high: int, groups: int, group: int, precise: bool):
    x = draw(rows, groups * group, seed=rows)
    if (reason := native.why_not_int8(x, group)) is not None:
        pytest.skip(reason)
    parts = both(draw(low, groups * group, seed=1), draw(high, groups * group, seed=2), group)
    place = torch.randperm(low + high, generator=torch.Generator().manual_seed(3)).int()
    want = slow(x, *parts, place, group, precise)
    got = native.int8_mixed(x, *parts, place, group, precise=precise)
    # The integers are the same; float32 sums of up to 3 groups of 8 lanes each may differ in the last digits. What the integers
    # miss is rounded from a float32 difference, where a tie may tip: by 2^-15 of the largest input.
    share = 2e-4 if precise else 3e-6
    torch.testing.assert_close(got, want, rtol=0, atol=share * float(want.abs().max()) if rows else 0)


@pytest.mark.parametrize("rows", [1, 9])
def test_integer_sums_are_exact_at_the_extremes(rows: int):
    """Largest codes against largest integers, all of one sign: where 16 bits would overflow first."""
    group = 512
    if (reason := native.why_not_int8(torch.zeros(1, group), group)) is not None:
        pytest.skip(reason)
    signs = torch.ones(group)
    signs[::2] = -1
    four, eight = torch.full((2, group), 15, dtype=torch.uint8), torch.zeros(3, group, dtype=torch.uint8)
    eight[0] = 255  # 127 everywhere
    eight[1] = torch.where(
        signs > 0, 255, 1
    )  # each of the sign of its input; the third row is -128, which clamping can leave
    one = torch.ones(3, 1).half().view(torch.int16)
    zero = torch.tensor([[0], [15]], dtype=torch.uint8)
    parts = (pack(four[:, None], 4).flatten(1), one[:2], zero), (eight, one)
    whole = torch.cat([four.double() - zero, eight.double() - 128])
    for x in (torch.ones(rows, group), signs.expand(rows, -1)):
        got = native.int8_mixed(x, *parts, torch.arange(5).int(), group)
        integers, scale = activations(x, group)
        assert integers.abs().eq(127).all()
        want = (integers.flatten(1).double() @ whole.T) * scale.double()
        assert torch.allclose(got.double(), want, rtol=1e-6, atol=0)


def test_the_result_does_not_depend_on_the_number_of_threads():
    if (reason := native.why_not_int8(torch.zeros(1, 64), 32)) is not None:
        pytest.skip(reason)
    parts, place, before = both(draw(11, 64), draw(4, 64), 32), torch.randperm(15).int(), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(native.int8_mixed(draw(5, 64), *parts, place, 32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_two_digits_keep_fifteen_bits():
    x = draw(4, 128)
    integers, scale = activations(digits(x, 64), 64)
    both = (integers * scale[..., None]).flatten(1)
    largest = x.abs().max()
    assert (both[:4] + both[4:] - x).abs().max() < largest * 2.0**-15


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("kernel", [True, False])
def test_no_input_that_is_not_finite_is_hidden_and_zeros_give_zeros(bad: float, precise: bool, kernel: bool):
    x = draw(3, 64)
    x[0, 40], x[2] = bad, 0
    if kernel and (reason := native.why_not_int8(x, 32)) is not None:
        pytest.skip(reason)
    parts, place = both(draw(3, 64), draw(2, 64), 32), torch.arange(5).int()
    run = native.int8_mixed if kernel else slow
    out = run(x, *parts, place, 32, precise=precise)
    assert out[0].isnan().all() and out[1].isfinite().all() and out[2].eq(0).all()


@pytest.mark.parametrize(
    ("x", "group", "reason"),
    [
        (torch.zeros(1, 64).double(), 32, "float64"),
        (torch.zeros(1, 48), 48, "groups of 32 a <= 512 codes, got 48"),
        (torch.zeros(1, 64, device="meta"), 32, "runs on the CPU"),
    ],
)
def test_the_kernel_says_what_it_cannot_multiply(x: torch.Tensor, group: int, reason: str):
    assert re.search(reason, native.why_not_int8(x, group) or "")
