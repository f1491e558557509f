"""Masked layers: what they compute, whose gradient they pass, and the three shapes that are made of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixtura.core.sparse_layers import (
    Between,
    DopedSparse,
    FactorizedSparse,
    ParallelSparse,
    SparseConv2d,
    SparseLinear,
    draw_mask,
    mask_parameter,
    masked_parameters,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_sparse_layer_is_the_dense_one_with_its_zeros_and_its_gradient_reaches_them():
    layer, x = SparseLinear(6, 4), torch.randn(3, 6, generator=seeded())
    mask = draw_mask((4, 6), 9, generator=seeded(1))
    layer.mask_weight.copy_(mask)  # without zeroing the weight: the forward pass has to see to it
    want = x @ (layer.weight.detach() * mask).T + layer.bias.detach()
    y = layer(x)
    torch.testing.assert_close(y, want)
    y.pow(2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, (2 * want).T @ x)  # dense: of the product, at every entry
    torch.testing.assert_close(layer.to_sparse_csr().to_dense(), layer.weight.detach() * mask)
    assert layer.density == 9 / 24


def test_a_layer_spares_the_product_with_its_mask_only_until_somebody_writes_to_it():
    layer, x = SparseLinear(6, 4), torch.randn(3, 6, generator=seeded())
    mask = draw_mask((4, 6), 9, generator=seeded(1))
    layer.set_mask(mask)
    assert layer.effective() is layer.weight
    twin = copy.deepcopy(layer)
    for touched in (layer, twin):
        with torch.no_grad():
            touched.weight.add_(1.0)  # as an optimizer that knows of no mask
        assert touched.effective() is not touched.weight
        torch.testing.assert_close(touched(x), x @ (touched.weight * mask).T + touched.bias)
    layer.set_mask(mask)
    layer.mask_weight.logical_not_()
    torch.testing.assert_close(layer(x), layer.bias.expand(3, 4))
    with torch.inference_mode():
        made = SparseLinear(6, 4)
        assert made(x).shape == (3, 4)


def test_a_sparse_convolution_is_the_dense_one_with_its_zeros():
    layer = SparseConv2d(3, 5, 3, stride=2, padding=1)
    layer.set_mask(draw_mask(layer.weight.shape, 40, generator=seeded()))
    x = torch.randn(2, 3, 7, 7, generator=seeded())
    want = F.conv2d(x, layer.weight * layer.mask, layer.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), want)
    assert int((layer.weight != 0).sum()) == 40


def test_parallel_layers_are_the_sum_of_their_activated_branches():
    made, x = ParallelSparse(nn.Linear(6, 4), 3, Between(norm="none", activation="tanh")), torch.randn(5, 6)
    want = sum(torch.tanh(F.linear(x, layer.weight, layer.bias)) for layer in made.layers)
    torch.testing.assert_close(made(x), want)


def test_factorized_and_doped_layers_compute_their_formulas():
    x = torch.randn(2, 5, 6)
    made = FactorizedSparse(nn.Linear(6, 4), 7, Between(norm="rms", activation="gelu"))
    u = F.rms_norm(F.linear(x, made.u.weight), (7,), eps=1e-6)
    torch.testing.assert_close(made(x), F.linear(F.gelu(u), made.v.weight, made.v.bias))
    doped = DopedSparse(nn.Linear(6, 4), 2)
    whole = doped.sparse.weight + doped.v.weight @ doped.u.weight
    torch.testing.assert_close(doped(x), F.linear(x, whole, doped.sparse.bias))
    assert masked_parameters(doped).keys() == {"sparse.weight"}


@pytest.mark.parametrize("between", [Between(), Between(norm="none"), Between(norm="batch", activation="none")])
@pytest.mark.parametrize("kind", ["parallel", "factorized", "doped"])
def test_every_shape_is_a_drop_in_for_a_strided_convolution(kind: str, between: Between):
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), torch.randn(2, 4, 9, 9)
    if kind == "parallel" and between.activation == "none":
        with pytest.raises(ValueError, match="are one layer; give activation"):
            ParallelSparse(conv, 2, between)
        return
    made = {
        "parallel": lambda: ParallelSparse(conv, 2, between),
        "factorized": lambda: FactorizedSparse(conv, 5, between),
        "doped": lambda: DopedSparse(conv, 5),
    }[kind]()
    assert made(x).shape == conv(x).shape


def test_batch_norms_of_branches_are_their_own():
    made = ParallelSparse(nn.Linear(6, 4), 2, Between())
    made(torch.randn(50, 3, 6))
    first, second = (norm.running_mean for norm in made.norms)
    assert first.shape == (4,) and not torch.equal(first, second)


def test_a_mask_has_exactly_the_number_of_active_weights_and_the_pattern_asked_for():
    for active in (0, 1, 17, 24):
        assert int(draw_mask((4, 6), active, generator=seeded()).sum()) == active
    mask = draw_mask((6, 8), 24, generator=seeded(), n_m=(2, 4))
    assert bool((mask.view(-1, 4).sum(-1) == 2).all())
    with pytest.raises(ValueError, match="active must be between 0 and 24"):
        draw_mask((4, 6), 25)
    with pytest.raises(ValueError, match="2 of every 4 along axis 1 does not fit 24"):
        draw_mask((8, 6), 24, n_m=(2, 4))


def test_a_parameter_that_two_modules_mask_is_named_twice():
    net = nn.Sequential(SparseLinear(4, 4), SparseLinear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one shared parameter"):
        masked_parameters(net)


def test_a_parameter_may_have_a_mask_without_a_layer_of_its_own():
    net = nn.Module()
    net.stack = nn.Parameter(torch.randn(3, 4, 5))
    mask_parameter(net, "stack")
    found = masked_parameters(net)["stack"]
    assert found.layers == 3 and found.active == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm must be 'batch', 'rms' or 'none'"),
        ({"activation": "elu"}, "activation must be one of"),
    ],
)
def test_what_stands_between_is_checked(options: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        Between(**options)
    with pytest.raises(ValueError, match="norm='rms' is for linear layers"):
        FactorizedSparse(nn.Conv2d(2, 2, 3), 2, Between(norm="rms"))
    with pytest.raises(ValueError, match=r"mask must have the weight's shape \(2, 3\)"):
        SparseLinear(3, 2).set_mask(torch.ones(3, 2, dtype=torch.bool))


def test_the_form_of_hardware_that_skips_two_of_four_needs_the_pattern_and_the_device():
    layer = SparseLinear(8, 4)
    with pytest.raises(ValueError, match=r"more than 2 active of some 4 neighbours; draw it with n_m=\(2, 4\)"):
        layer.to_sparse_semi_structured()
    layer.set_mask(draw_mask((4, 8), 16, n_m=(2, 4), generator=seeded()))
    with pytest.raises(ValueError, match=r"for CUDA devices .* the layer is on cpu"):
        layer.to_sparse_semi_structured()
    with pytest.raises(ValueError, match="more than 2 active"):
        SparseLinear(6, 4).to_sparse_semi_structured()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 products are for CUDA devices")
def test_two_of_four_products_on_a_device_are_those_of_the_layer():
    layer = SparseLinear(128, 64)
    layer.set_mask(draw_mask((64, 128), 64 * 64, n_m=(2, 4), generator=seeded()))
    layer = layer.to("cuda", torch.bfloat16)
    x = torch.randn(64, 128, generator=seeded(1)).to("cuda", torch.bfloat16)
    found = F.linear(x, layer.to_sparse_semi_structured(), layer.bias)
    torch.testing.assert_close(found, layer(x), rtol=2e-2, atol=2e-2)
