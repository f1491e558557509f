"""Packed matrices and experts against the float values they stand for."""

import pytest
import torch
from tiny_models import tiny_model

from mixtura.core import native
from mixtura.core.quantize import nearest
from mixtura.lm.anatomy import find_moe
from mixtura.lm.compress.packed import PackedLinear, PackedMatrices, group_size_for
from mixtura.lm.compress.packed_experts import PackedExperts, why_not

WIDTHS = (1, 2, 3, 4, 8)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(bits: tuple[int, ...], out: int = 24, width: int = 64, group: int = 32):
    made = PackedMatrices(bits, out, width, group)
    plain = [nearest(draw(out, width, seed=j), b, group) for j, b in enumerate(bits)]
    for j, matrix in enumerate(plain):
        made.put(j, matrix)
    return made, plain


def test_stored_values_are_those_of_the_quantizer_to_the_bit():
    made, plain = packed((1, 2, 3, 4, 8, 2, 1))
    for j, matrix in enumerate(plain):
        torch.testing.assert_close(made.dequantize(j), matrix.dequantize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 40, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [True, False])
def test_products_of_every_size_and_type_equal_the_float_product(
    rows: int, dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
):
    if not kernel:
        monkeypatch.setattr(native, "why_not_packed", lambda *_: "switched off")
    made, plain = packed(WIDTHS)
    x = draw(rows, 64, seed=9).to(dtype)
    for j, matrix in enumerate(plain):
        want = x.double() @ matrix.dequantize().double().T
        got = made.product(j, x).double()
        # bfloat16 keeps 8 bits of each of the 64 products' factors and of the result.
        # The kernel rounds inputs at 2^-16 of their group's largest.
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4 if kernel else 1e-5
        assert (got - want).abs().max() < tolerance * want.abs().max()


def test_bytes_are_what_the_bits_say():
    for b in WIDTHS:
        made, _ = packed((b,), out=64, width=256, group=128)
        codes = 64 * 256 * b / 8
        groups = 64 * 2 * (2 if b == 1 else 3)  # a float16 scale, and a byte of zero point from 2 bits on
        assert made.nbytes == codes + groups


def test_casting_the_module_leaves_its_scales_alone():
    made, plain = packed((2, 3))
    for cast in (torch.bfloat16, torch.float64):
        made.to(cast)
        torch.testing.assert_close(made.dequantize(1), plain[1].dequantize(), rtol=1e-6, atol=1e-6)


def test_a_packed_linear_layer_keeps_its_bias_and_leading_dimensions():
    linear = torch.nn.Linear(64, 24)
    made = PackedLinear.of(linear, nearest(linear.weight.detach(), 4, 32))
    x = draw(2, 5, 64)
    want = x @ made.packed.dequantize(0).T + linear.bias
    # The kernel rounds inputs at 2^-16 of their group's largest.
    torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-4)


def test_group_sizes_divide():
    assert [group_size_for(width) for width in (576, 1536, 96, 128, 4096, 32)] == [96, 128, 96, 128, 128, 32]
    with pytest.raises(ValueError, match="width 100 has no divisor"):
        group_size_for(100)


@pytest.fixture
def experts():
    model = tiny_model("mixtral")
    block = find_moe(model)[0]
    bits = [3, 1, 2, 2]
    made = PackedExperts.like(block.experts, bits, up_group=32, down_group=32)
    for e, b in enumerate(bits):
        made.up.put(e, nearest(block.experts.gate_up_proj[e].detach(), b, 32))
        made.down.put(e, nearest(block.experts.down_proj[e].detach(), b, 32))
    return made, block.experts


def loop(made: PackedExperts, x, indices, weights):
    """Token by token, expert by expert, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for slot, e in enumerate(indices[t].tolist()):
            if e == made.num_experts:
                continue
            gate, up = (made.up.dequantize(e).double() @ x[t].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            out[t] += weights[t, slot].double() * (made.down.dequantize(e).double() @ inner)
    return out


@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_packed_experts_equal_a_loop_over_tokens_and_skip_the_sentinel(experts, tokens: int):
    made, _ = experts
    x = draw(tokens, 32, seed=4)
    indices = torch.randint(0, 5, (tokens, 2), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(2))
    weights[indices == 4] = float("nan")  # nobody may look at a skipped weight
    want = loop(made, x, indices, weights)
    # The kernel rounds inputs at 2^-16 of their group's largest, before each of the two products.
    torch.testing.assert_close(
        made(x, indices, weights).double(), want, rtol=1e-3, atol=2e-4 * float(want.abs().max()) if tokens else 0
    )


def test_only_experts_that_are_visited_are_unpacked(experts, monkeypatch):
    made, _ = experts
    touched = []
    product = PackedMatrices.product
    monkeypatch.setattr(PackedMatrices, "product", lambda self, j, x: touched.append(j) or product(self, j, x))
    made(draw(3, 32), torch.tensor([[2, 4], [2, 2], [4, 4]]), torch.ones(3, 2))
    assert set(touched) == {2}


def test_what_cannot_be_packed_says_why(experts):
    made, plain = experts
    assert why_not(plain) is None
    assert why_not(made) == "it is packed already"
    assert why_not(find_moe(tiny_model("gpt_oss"))[0].experts) is not None
    with pytest.raises(ValueError, match="must name a width for each of 4 experts, got 3"):
        PackedExperts.like(plain, [1, 2, 3], up_group=32, down_group=32)
