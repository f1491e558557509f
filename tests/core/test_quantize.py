"""Rounding: against brute force over the grid, GPTQ against elimination without blocks, in float64."""

import itertools

import pytest
import torch

from mixtura.core.gptq import NonFiniteHessian, gptq
from mixtura.core.quantize import group_parameters, nearest, split, values


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_weight_goes_to_the_nearest_value_of_its_grid(bits: int, symmetric: bool):
    weight = draw(5, 24)
    found = nearest(weight, bits, 8, symmetric=symmetric)
    codes = torch.arange(2**bits, dtype=torch.uint8)
    for row, group in itertools.product(range(5), range(3)):
        zero = None if found.zero is None else found.zero[row, group]
        grid = values(codes, found.scale[row, group], zero, bits)
        for i in range(8 * group, 8 * group + 8):
            got = found.dequantize()[row, i]
            # Ties between two grid points may go either way, by a rounding of the quotient.
            assert (got - weight[row, i]).abs() <= (grid - weight[row, i]).abs().min() + 1e-5


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    weight = torch.tensor([[1.0, -3.0, 0.0, 4.0]])
    found = nearest(weight, 1, 4)
    assert found.dequantize().tolist() == [[2.0, -2.0, 2.0, 2.0]]


@pytest.mark.parametrize("bits", [1, 3])
def test_parts_of_a_quantized_matrix_are_the_parts_of_its_values(bits: int):
    matrix = nearest(torch.randn(7, 32, generator=torch.Generator().manual_seed(0)), bits, 16)
    parts = split(matrix, [2, 1, 4])
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), matrix.dequantize())
    assert [part.bits for part in parts] == [bits] * 3


def test_zero_is_always_on_the_asymmetric_grid():
    found = nearest(draw(50, 8, seed=3) + 5.0, 2, 8)  # all weights positive: the range is stretched to zero
    zero = values(found.zero, found.scale, found.zero, 2)
    assert torch.equal(zero, torch.zeros_like(zero))


def test_a_group_of_zeros_stays_zero():
    assert nearest(torch.zeros(2, 8), 3, 8).dequantize().abs().max() == 0


def test_scales_are_what_float16_holds():
    found = nearest(draw(4, 32), 4, 16)
    assert torch.equal(found.scale, found.scale.half().float())


def test_the_clip_search_never_does_worse_on_what_it_minimises():
    weight, x = draw(6, 32), draw(100, 32, seed=1)
    weight[:, 5] *= 8  # an outlier to clip
    hessian = x.T @ x
    plain = weight - nearest(weight, 2, 16).dequantize()
    clipped = weight - nearest(weight, 2, 16, clip=True).dequantize()
    weighed = weight - nearest(weight, 2, 16, clip=True, hessian=hessian).dequantize()
    assert clipped.square().sum() < plain.square().sum()

    def block_error(off: torch.Tensor) -> torch.Tensor:
        return sum((x[:, g : g + 16] @ off[:, g : g + 16].T).square().sum() for g in (0, 16))

    assert block_error(weighed) < block_error(clipped)


def eliminate(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int, damping: float) -> torch.Tensor:
    """Optimal Brain Surgeon, one column after the other, the inverse shrunk by elimination; no blocks, no factor."""
    left = weight.double().clone()
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped)
    done = torch.zeros_like(left)
    for q in range(left.shape[1]):
        if q % group_size == 0:
            scale, zero = group_parameters(left[:, q : q + group_size].float(), bits)
        middle = zero.double() if zero is not None else None
        if bits == 1:
            done[:, q] = torch.where(left[:, q] >= 0, scale, -scale).double()
        else:
            done[:, q] = ((left[:, q] / scale.double()).round() + middle).clamp(0, 2**bits - 1).sub(
                middle
            ) * scale.double()
        step = (left[:, q] - done[:, q]) / inverse[q, q]
        left -= step[:, None] * inverse[q][None]
        inverse = inverse - inverse[:, q, None] * inverse[None, q] / inverse[q, q]
    return done


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [8, 24])
def test_gptq_equals_elimination_without_blocks_in_float64(bits: int, group_size: int):
    weight, x = draw(7, 24, dtype=torch.float64), draw(60, 24, seed=1, dtype=torch.float64)
    hessian = 2 * x.T @ x
    got = gptq(weight, hessian, bits, group_size, damping=0.01).dequantize()
    want = eliminate(weight, hessian, bits, group_size, damping=0.01)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_with_inputs_that_do_not_correlate_gptq_is_rounding_to_nearest(bits: int):
    weight = draw(6, 32)
    by_gptq, plain = gptq(weight, torch.eye(32), bits, 16), nearest(weight, bits, 16)
    assert torch.equal(by_gptq.codes, plain.codes) and torch.equal(by_gptq.scale, plain.scale)


@pytest.mark.parametrize("symmetric", [False, True])
def test_with_equal_inputs_a_clip_search_and_an_order_of_groups_change_no_code_of_gptq(symmetric: bool):
    weight = draw(6, 32)
    weight[:, 3] *= 6  # something to clip
    found = gptq(weight, torch.eye(32), 3, 8, symmetric=symmetric, clip=True, reorder=True)
    want = nearest(weight, 3, 8, symmetric=symmetric, clip=True, hessian=torch.eye(32))
    assert torch.equal(found.codes, want.codes) and torch.equal(found.scale, want.scale)
    assert not torch.equal(found.scale, nearest(weight, 3, 8, symmetric=symmetric).scale)


def test_groups_in_order_of_their_inputs_are_those_of_a_matrix_written_in_that_order():
    weight, x = draw(6, 32), draw(60, 32, seed=1) @ draw(32, 32, seed=2)
    x[:, 16:24] *= 5
    x[:, 8:16] *= 3
    found = gptq(weight, x.T @ x, 3, 8, reorder=True)
    x_G = (x * x).sum(0).view(4, 8).sum(1)
    columns = torch.arange(32).view(4, 8)[x_G.argsort(descending=True)].flatten()
    assert columns[:16].tolist() == [*range(16, 24), *range(8, 16)]
    want = gptq(weight[:, columns].contiguous(), x[:, columns].T @ x[:, columns], 3, 8)
    torch.testing.assert_close(found.dequantize()[:, columns], want.dequantize())
    plain = gptq(weight, x.T @ x, 3, 8)
    assert (x @ (found.dequantize() - weight).T).norm() < (x @ (plain.dequantize() - weight).T).norm()


def test_gptq_lies_between_rounding_and_the_best_of_all_roundings():
    generator = torch.Generator().manual_seed(0)
    best, ours, rounded = [], [], []
    for _ in range(60):
        x = torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
        weight = torch.randn(1, 4, generator=generator)
        found = gptq(weight, x.T @ x, 3, 4, damping=1e-6)
        grid = values(torch.arange(8, dtype=torch.uint8), found.scale[0, 0], found.zero[0, 0], 3)
        every = torch.cartesian_prod(grid, grid, grid, grid)
        best.append((x @ (every - weight).T).square().sum(0).min().item())
        ours.append((x @ (found.dequantize() - weight).T).square().sum().item())
        rounded.append((x @ (nearest(weight, 3, 4).dequantize() - weight).T).square().sum().item())
        assert ours[-1] >= best[-1] - 1e-4
    # Greedy elimination is not exact, and four columns leave it little room, but it closes a good part of the gap.
    assert sum(ours) - sum(best) < 0.75 * (sum(rounded) - sum(best))


def test_an_input_that_was_never_active_is_rounded_to_nearest():
    weight, x = draw(5, 16), draw(60, 16, seed=1)
    x[:, 3] = 0
    found = gptq(weight, x.T @ x, 3, 16)
    step = found.scale[:, 0]
    assert ((found.dequantize()[:, 3] - weight[:, 3]).abs() <= 0.5 * step + 1e-5).all()


def test_fewer_samples_than_inputs_are_enough():
    weight, x = draw(5, 32), draw(4, 32, seed=1)
    off = x @ (gptq(weight, x.T @ x, 2, 32).dequantize() - weight).T
    plain = x @ (nearest(weight, 2, 32).dequantize() - weight).T
    assert off.square().sum() < 0.5 * plain.square().sum()


def test_without_compensation_inside_a_block_one_block_is_rounding_to_nearest():
    weight, x = draw(5, 16), draw(60, 16, seed=1) @ draw(16, 16, seed=2)
    assert torch.equal(gptq(weight, x.T @ x, 2, 16, intra_block=False).codes, nearest(weight, 2, 16).codes)
    assert not torch.equal(gptq(weight, x.T @ x, 2, 8, intra_block=False).codes, nearest(weight, 2, 8).codes)


def test_bad_input_is_named():
    with pytest.raises(NonFiniteHessian, match="not finite"):
        gptq(draw(2, 8), torch.full((8, 8), float("nan")), 2, 8)
    with pytest.raises(ValueError, match=r"hessian must have shape \(8, 8\)"):
        gptq(draw(2, 8), torch.eye(4), 2, 8)
    with pytest.raises(ValueError, match="group_size=3 must divide the width 8"):
        nearest(draw(2, 8), 2, 3)
    with pytest.raises(ValueError, match="bits must be one of"):
        nearest(draw(2, 8), 7, 8)
    broken = draw(2, 8)
    broken[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"weight\[1, 2\] is inf"):
        nearest(broken, 2, 8)
