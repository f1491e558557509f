"""The layer of two widths against the values it stands for, and its bytes against its bits."""

import pytest
import torch
from torch.nn import functional as F

from mixtura.core import native
from mixtura.core.quantize import nearest
from mixtura.core.two_step import activations
from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear, PackedRows


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(out: int, width: int, group: int, *, share: float = 0.3, low: int = 4, high: int = 8, act: int | None = 8):
    """A layer, and the float weight of the same quantization."""
    weight, bias = draw(out, width, seed=1), draw(out, seed=2)
    is_high = torch.rand(out, generator=torch.Generator().manual_seed(3)) < share
    rows = nearest(weight[~is_high], low, group), nearest(weight[is_high], high, group, symmetric=True)
    fake = weight.clone()
    fake[~is_high], fake[is_high] = (part.dequantize() for part in rows)
    return MixedChannelLinear.of(*rows, is_high, bias=bias, act_bits=act), fake, bias, is_high


@pytest.mark.parametrize(("low", "high"), [(2, 8), (3, 8), (4, 8), (6, 8), (3, 6), (2, 4)])
@pytest.mark.parametrize(("width", "group"), [(16, 16), (96, 48), (192, 96), (256, 128)])
def test_the_packed_weight_is_the_fake_quantized_one_to_the_bit(low: int, high: int, width: int, group: int):
    layer, fake, _, is_high = made(11, width, group, low=low, high=high)
    assert torch.equal(layer.weight(), fake)
    assert torch.equal(layer.is_high, is_high)
    if low == 4:
        assert layer.low.zero.max() <= 15


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 5, 8, 19])
@pytest.mark.parametrize("backend", ["int8", "reference"])
def test_products_equal_those_of_dequantized_weights_and_activations(share: float, rows: int, backend: str):
    layer, fake, bias, _ = made(13, 192, 96, share=share)
    layer.backend, x = backend, draw(2, rows, 192)
    if backend == "int8" and (reason := layer.why_not_int8(x.view(-1, 192))) is not None:
        pytest.skip(reason)
    integers, scale = activations(x.view(-1, 192), 96)
    seen = (integers.double() * scale.double()[..., None]).flatten(1)
    want = (seen @ fake.double().T + bias).view(2, rows, 13)
    # float32: a rounding a group and one for the bias; the integers are exact.
    assert (layer(x).double() - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_rounded_activations_the_product_is_that_of_the_weight(backend: str):
    layer, fake, bias, _ = made(13, 192, 96, act=None)
    layer.backend, x = backend, draw(6, 192)
    want = F.linear(x.double(), fake.double(), bias.double())
    # Fifteen bits of the largest activation of a group, about five times a typical one; sums average it.
    assert (layer(x).double() - want).abs().max() < 2e-4 * want.abs().max()


def test_a_row_gives_the_same_in_any_batch():
    layer, *_ = made(13, 192, 96)
    x = draw(9, 192)
    # One row alone is summed in eight lanes, in a tile in one: float32 sums of the same integers.
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in x]), layer(x), rtol=1e-5, atol=1e-4)


def test_bfloat16_in_bfloat16_out_and_no_cast_touches_the_scales():
    layer, fake, _, _ = made(13, 64, 32)
    for cast in (torch.bfloat16, torch.float64):
        layer.to(cast)
        assert torch.equal(layer.weight(), fake)
    assert layer.to(torch.bfloat16)(draw(2, 3, 64).bfloat16()).dtype == torch.bfloat16


def test_float64_takes_the_reference():
    layer, *_ = made(13, 64, 32)
    torch.testing.assert_close(layer(draw(5, 64).double()).float(), layer(draw(5, 64)), rtol=1e-5, atol=1e-4)


def test_bytes_are_what_the_bits_say():
    layer, _, _, is_high = made(40, 256, 128)
    n_high = int(is_high.sum())
    low, high = (40 - n_high) * (128 + 2 * (2 + 1)), n_high * (256 + 2 * 2)
    assert layer.nbytes == low + high + 4 * 40
    assert layer.bits == pytest.approx(8 * layer.nbytes / (40 * 256))


def test_no_product_holds_the_float_weight():
    """The largest float tensor that a product makes is a fraction of the weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    layer, *_ = made(512, 512, 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                largest = max(largest, out.numel())
            return out

    for backend in ("auto", "reference"):
        layer.backend = backend
        with Watch():
            layer(draw(4, 512))
    assert largest <= 512 * 64


def test_what_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch):
    layer, *_ = made(13, 64, 32)
    with pytest.raises(ValueError, match="group_size=24 must divide the width 64"):
        PackedRows(2, 64, bits=4, group_size=24, symmetric=False)
    with pytest.raises(ValueError, match=r"must be \(4, 32, False\)"):
        layer.low.put(nearest(draw(len(layer.low.codes), 64), 3, 32))
    layer.backend = "fast"
    with pytest.raises(ValueError, match="backend must be one of"):
        layer(draw(1, 64))
    layer.backend = "int8"
    with pytest.raises(ValueError, match="cannot run here: int8_mixed adds groups in float32"):
        layer(draw(1, 64).double())
    monkeypatch.setattr(native, "why_not_int8", lambda *_: None)
    odd, *_ = made(13, 64, 32, low=2, high=4)
    odd.backend = "int8"
    with pytest.raises(ValueError, match="takes rows of 4 and 8 bits, got 2 and 4"):
        odd(draw(1, 64))
