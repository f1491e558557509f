import pytest
import torch
import torch.nn.functional as F

from mixtura.core.experts import (
    ConvExperts,
    Experts,
    ExpertsConfig,
    FeedForward,
    ResidualExperts,
    split_feed_forward,
)
from mixtura.core.gates import Gate, GateConfig, Routing, soft, top_k
from mixtura.core.mixture import MixtureLayer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def routing_of(n_tokens, n_experts, k=2, seed=0):
    return top_k(torch.randn(n_tokens, n_experts, generator=seeded(seed)).double(), k)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_stacked_experts_are_so_many_feed_forward_networks(gated, bias):
    config = ExpertsConfig(width=5, hidden=3, n_experts=4, gated=gated, bias=bias)
    experts = Experts(config, generator=seeded()).double()
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(generator=seeded(1))
    x, routing = torch.randn(7, 5, generator=seeded(2)).double(), routing_of(7, 4)
    up = "gate_up_proj" if gated else "up_proj"
    y = torch.zeros_like(x)
    for e in range(4):
        one = FeedForward(ExpertsConfig(width=5, hidden=3, gated=gated, bias=bias)).double()
        one.up_proj.weight.data, one.down_proj.weight.data = getattr(experts, up)[e], experts.down_proj[e]
        if bias:
            one.up_proj.bias.data, one.down_proj.bias.data = (
                getattr(experts, f"{up}_bias")[e],
                experts.down_proj_bias[e],
            )
        y += (routing.weights * (routing.indices == e)).sum(-1, keepdim=True) * one(x)
    torch.testing.assert_close(experts(x, routing), y)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_the_segments_of_a_network_add_up_to_it(gated, m):
    experts = Experts(ExpertsConfig(width=5, hidden=8, n_experts=2, gated=gated), generator=seeded()).double()
    up, down = split_feed_forward(getattr(experts, experts._up_name), experts.down_proj, m, gated=gated)
    fine = Experts(ExpertsConfig(width=5, hidden=8 // m, n_experts=2 * m, gated=gated)).double()
    setattr(fine, fine._up_name, torch.nn.Parameter(up))
    fine.down_proj = torch.nn.Parameter(down)
    x = torch.randn(6, 5, generator=seeded(1)).double()
    for e in range(2):
        whole = Routing(torch.ones(6, 1).double(), torch.full((6, 1), e), *[torch.zeros(6, 2)] * 2)
        segments = torch.arange(e * m, (e + 1) * m).expand(6, m)
        parts = Routing(torch.ones(6, m).double(), segments, *[torch.zeros(6, 2 * m)] * 2)
        torch.testing.assert_close(fine(x, parts), experts(x, whole), rtol=1e-10, atol=1e-10)


def test_convolutional_experts_match_a_loop_over_samples_and_choices():
    experts = ConvExperts(3, 2, 4, 3, stride=2, padding=1, generator=seeded()).double()
    with torch.no_grad():
        experts.bias.normal_(generator=seeded(1))
    x = torch.randn(5, 2, 6, 7, generator=seeded(2)).double()
    routing = routing_of(5, 3)
    routing.indices[0, 1] = 3  # the sentinel
    want = [
        sum(
            w * F.conv2d(x[t : t + 1], experts.weight[e], experts.bias[e], stride=2, padding=1)
            for e, w in zip(routing.indices[t].tolist(), routing.weights[t], strict=True)
            if e < 3
        )
        for t in range(5)
    ]
    torch.testing.assert_close(experts(x, routing), torch.cat(want))
    assert experts(x[:0], routing_of(0, 3)).shape == (0, 4, 3, 4)


def test_residual_experts_start_at_the_mean_of_both_and_sum_when_told_to():
    config = ExpertsConfig(width=4, hidden=3, n_experts=2)
    experts, fixed = Experts(config), FeedForward(ExpertsConfig(width=4, hidden=3))
    x, routing = torch.randn(5, 4), top_k(torch.randn(5, 2), 1)
    both = experts(x, routing) + fixed(x)
    torch.testing.assert_close(ResidualExperts(experts, fixed, 4)(x, routing), both / 2)
    torch.testing.assert_close(ResidualExperts(experts, fixed, 4, combine="sum")(x, routing), both)


def test_the_layer_adds_shared_experts_and_keeps_its_routing_on_the_output():
    config = ExpertsConfig(width=8, hidden=4, n_experts=4)
    shared = FeedForward(ExpertsConfig(width=8, hidden=12))
    layer = MixtureLayer(Gate(8, 4, GateConfig(k=2)), Experts(config), shared=shared)
    x = torch.randn(2, 3, 8)
    out = layer.mix(x)
    assert torch.equal(layer(x), out.hidden) and out.hidden.shape == x.shape
    alone = layer.experts(x.view(6, 8), out.routing) + shared(x.view(6, 8))
    torch.testing.assert_close(out.hidden, alone.view_as(x))
    seen = []
    layer.gate.register_forward_hook(lambda module, args, routing: seen.append(routing))
    layer(x)
    assert torch.equal(seen[0].indices, out.routing.indices)


def test_one_expert_makes_the_layer_a_feed_forward_network():
    config = ExpertsConfig(width=8, hidden=4)
    layer = MixtureLayer(Gate(8, 1, GateConfig(k=1)), Experts(config))
    one = FeedForward(config)
    one.up_proj.weight.data, one.down_proj.weight.data = layer.experts.gate_up_proj[0], layer.experts.down_proj[0]
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), one(x))


def test_the_soft_gate_visits_all_experts():
    config = ExpertsConfig(width=8, hidden=4, n_experts=3)
    experts, x, logits = Experts(config), torch.randn(5, 8), torch.randn(5, 3)
    want = sum(
        logits.softmax(-1)[:, e, None] * experts(x, Routing(torch.ones(5, 1), torch.full((5, 1), e), logits, logits))
        for e in range(3)
    )
    torch.testing.assert_close(experts(x, soft(logits)), want)


def test_a_layer_survives_saving_to_the_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    def make(seed):
        config = ExpertsConfig(width=8, hidden=4, n_experts=3, bias=True)
        return MixtureLayer(
            Gate(8, 3, GateConfig(k=1), generator=seeded(seed)), Experts(config, generator=seeded(seed))
        )

    layer, other, x = make(0), make(1), torch.randn(4, 8)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(layer(x), other(x))


def test_the_same_seed_gives_the_same_start():
    config = ExpertsConfig(width=8, hidden=4, n_experts=3)
    assert torch.equal(Experts(config, generator=seeded(1)).down_proj, Experts(config, generator=seeded(1)).down_proj)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExpertsConfig(width=0, hidden=1), "width must be at least 1, got 0"),
        (lambda: ExpertsConfig(width=1, hidden=1, activation="swish"), "activation must be one of .*got 'swish'"),
        (lambda: FeedForward(ExpertsConfig(width=1, hidden=1, n_experts=2)), "n_experts must be 1"),
        (lambda: split_feed_forward(torch.zeros(1, 6, 2), torch.zeros(1, 2, 3), 2), "m must divide the hidden size 3"),
        (
            lambda: split_feed_forward(torch.zeros(1, 3, 2), torch.zeros(1, 2, 3), 1),
            r"gate_up must have shape \(1, 6, 2\)",
        ),
        (lambda: ConvExperts(0, 1, 1, 1), "must be at least 1"),
        (lambda: ResidualExperts(torch.nn.Identity(), torch.nn.Identity(), 2, combine="max"), "combine must be one of"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
