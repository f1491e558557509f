"""Fine-grained and shared experts against loops, hand calculations and transformers' own blocks."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from mixtura.core.balance import balance_loss, load_balance_loss, sequence_balance_loss
from mixtura.core.gates import top_k
from mixtura.lm.cost import model_size
from mixtura.lm.fine_grained import FineGrainedMoE, matched, paper_config
from mixtura.lm.model import MixturaForCausalLM


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(dtype=torch.float64, **changes):
    options = {"d": 6, "hidden": 5, "routed": 7, "active": 3, "shared": 2, "init_std": 0.5} | changes
    return FineGrainedMoE(**options, generator=seeded()).to(dtype)


def one(x, up, down):
    gate, value = (up @ x).chunk(2)
    return down @ (F.silu(gate) * value)


def by_token(layer, x):
    """Equations 9-11, one token and one expert at a time; the shared network as so many experts."""
    experts, h = layer.experts, layer.experts.config.hidden
    rows = []
    for u in x.reshape(-1, x.shape[-1]):
        scores = (layer.gate.weight @ u).softmax(0).detach()
        chosen = sorted(range(len(scores)), key=lambda e: (-scores[e].item(), e))[: layer.gate.config.k]
        y = torch.zeros_like(u)
        for e in chosen:
            y = y + scores[e] * one(u, experts.gate_up_proj[e], experts.down_proj[e])
        if layer.shared is not None:
            gates, values = layer.shared.up_proj.weight.chunk(2)
            for j in range(len(gates) // h):
                part = slice(j * h, (j + 1) * h)
                y = y + one(u, torch.cat([gates[part], values[part]]), layer.shared.down_proj.weight[:, part])
        rows.append(y)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("tokens", [1, 3, 257])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_layer_is_the_equation_token_by_token(backend, tokens, shared):
    layer = small(backend=backend, shared=shared)
    x = torch.randn(tokens, 6, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_token(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("tokens", [1, 3, 257])
def test_the_layer_is_the_one_of_deepseek_v2(backend, tokens):
    config = DeepseekV2Config(
        hidden_size=16,
        moe_intermediate_size=8,
        n_routed_experts=7,
        num_experts_per_tok=3,
        n_shared_experts=2,
        num_attention_heads=2,
        topk_method="greedy",
    )
    config._experts_implementation = "eager"
    theirs = DeepseekV2Moe(config)
    ours = FineGrainedMoE(16, 8, 7, 3, 2, backend=backend, init_std=0.3, generator=seeded())
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.gate.weight)
        theirs.experts.gate_up_proj.copy_(ours.experts.gate_up_proj)
        theirs.experts.down_proj.copy_(ours.experts.down_proj)
        gate, up = ours.shared.up_proj.weight.chunk(2)
        theirs.shared_experts.gate_proj.weight.copy_(gate)
        theirs.shared_experts.up_proj.weight.copy_(up)
        theirs.shared_experts.down_proj.weight.copy_(ours.shared.down_proj.weight)
    x = torch.randn(1, tokens, 16, generator=seeded(1))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_gradients_of_output_and_balance_agree_with_finite_differences(per):
    # The loop: the grouped backend is compared with it elsewhere, forward and backward.
    layer = small(
        hidden=3, routed=4, active=2, shared=1, backend="loop", device_balance=0.5, device_groups=2, balance_per=per
    )
    x = torch.randn(2, 3, 6, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        from torch.func import functional_call

        out = functional_call(Mixed(layer), dict(zip((f"layer.{n}" for n in names), parameters, strict=True)), (x,))
        return out.hidden, out.aux_loss

    assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in layer.parameters())))


class Mixed(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer.mix(x)


def test_an_expert_that_no_token_visits_gets_a_zero_gradient():
    layer = small(routed=4, active=1, expert_balance=0.0)
    with torch.no_grad():
        layer.gate.weight.zero_()  # all tie: the lowest index wins
    layer(torch.randn(9, 6, dtype=torch.float64)).sum().backward()
    assert layer.experts.down_proj.grad[0].abs().sum() > 0
    assert layer.experts.down_proj.grad[1:].abs().sum() == 0


def test_uniform_routing_costs_the_factor_itself():
    probs = torch.full((2, 6, 4), 0.25)
    indices = (torch.arange(24) % 4).view(2, 6, 2)
    for per in ("batch", "sequence"):
        cost = balance_loss(probs, indices, expert=0.3, device=0.05, groups=[[0, 1], [2, 3]], per=per)
        assert float(cost) == pytest.approx(0.35)


def test_one_device_costs_its_factor_for_any_routing_and_a_device_an_expert_is_the_expert_loss():
    layer = small(expert_balance=0.0, device_balance=0.7, device_groups=1)
    x = torch.randn(4, 5, 6, generator=seeded(2), dtype=torch.float64)
    assert layer.mix(x).aux_loss.item() == pytest.approx(0.7, abs=1e-12)
    single = small(expert_balance=0.0, device_balance=0.7, device_groups=7)
    expert = small(expert_balance=0.7)
    assert single.mix(x).aux_loss.item() == pytest.approx(expert.mix(x).aux_loss.item(), abs=1e-12)


def test_two_tokens_and_three_experts_by_hand():
    # Each of two sequences has one token. By sequence: loads (3, 0, 0) and (0, 3, 0), so 3 * 0.6 and 3 * 0.5; mean 1.65.
    # Over the batch: loads (1.5, 1.5, 0), mean probabilities (0.4, 0.4, 0.2): 1.5 * 0.8 = 1.2.
    probs = torch.tensor([[[0.6, 0.3, 0.1]], [[0.2, 0.5, 0.3]]])
    indices = torch.tensor([[[0]], [[1]]])
    assert float(balance_loss(probs, indices, expert=1.0, per="sequence")) == pytest.approx(1.65)
    assert float(balance_loss(probs, indices, expert=1.0, per="batch")) == pytest.approx(1.2)


def test_padding_counts_for_nobody_in_either_scope():
    probs = torch.rand(2, 5, 4, generator=seeded()).softmax(-1)
    indices = top_k(probs.flatten(0, 1), 2).indices.view(2, 5, 2)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    cut = load_balance_loss(probs[0, 2:], indices[0, 2:])
    whole = load_balance_loss(probs[1], indices[1])
    torch.testing.assert_close(sequence_balance_loss(probs, indices, mask=mask), (cut + whole) / 2)
    kept = [torch.cat([t[0, 2:], t[1]])[None] for t in (probs, indices)]
    torch.testing.assert_close(balance_loss(probs, indices, expert=1.0, mask=mask), balance_loss(*kept, expert=1.0))
    assert float(sequence_balance_loss(probs, indices, mask=torch.zeros(2, 5))) == 0


def test_the_gradient_of_the_balance_flows_through_the_probabilities_only():
    logits = torch.randn(1, 6, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    indices = torch.randint(4, (1, 6, 2), generator=seeded(1))
    balance_loss(logits.softmax(-1), indices, expert=1.0).backward()
    load = torch.bincount(indices.flatten(), minlength=4) * 4 / 12  # a constant
    want = torch.autograd.grad((load * logits.softmax(-1).mean((0, 1))).sum(), logits)[0]
    torch.testing.assert_close(logits.grad, want)


@pytest.mark.parametrize(("split", "shared"), [(1, 0), (2, 1), (4, 1), (8, 3)])
def test_matched_shapes_have_equal_expert_parameters_in_all_and_a_token(split, shared):
    shape = matched(32, 16, 2, split=split, shared=shared)
    plain = FineGrainedMoE(8, 32, 16, 2)
    fine = FineGrainedMoE(8, shape.hidden, shape.routed, shape.active, shape.shared)

    def experts(layer, share):
        routed = sum(p.numel() for p in layer.experts.parameters()) * share
        return routed + (sum(p.numel() for p in layer.shared.parameters()) if layer.shared is not None else 0)

    assert experts(fine, 1) == experts(plain, 1) == 8 * shape.expert_parameters
    assert experts(fine, shape.active / shape.routed) == pytest.approx(experts(plain, 2 / 16))
    assert experts(plain, 2 / 16) == 8 * shape.active_parameters


@pytest.mark.parametrize(
    ("name", "total", "active"), [("2b", 2.0e9, 0.3e9), ("16b", 16.4e9, 2.8e9), ("145b", 144.6e9, 22.2e9)]
)
def test_the_papers_models_have_the_papers_parameters(name, total, active):
    """Tables 1, 3 and 6, rounded there to a digit after the point: 0.3 means 0.25 to 0.35."""
    with torch.device("meta"):
        size = model_size(MixturaForCausalLM(paper_config(name)))
    assert size.total == pytest.approx(total, rel=0.025)
    assert size.active == pytest.approx(active, rel=0.025, abs=0.05e9)


def test_the_start_has_the_standard_deviation_asked_for():
    layer = FineGrainedMoE(64, 32, 15, 3, 1, generator=seeded())
    for name, p in layer.named_parameters():
        # Six standard errors of a standard deviation: 6 / sqrt(2 n).
        assert abs(p.std().item() / 0.006 - 1) < 6 / (2 * p.numel()) ** 0.5, name


def test_the_layer_survives_saving_to_the_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    layer, x = small(torch.float32), torch.randn(4, 6)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = FineGrainedMoE(6, 5, 7, 3, 2)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matched(30, 4, 2, split=4), "split must divide hidden=30, got 4"),
        (lambda: matched(32, 4, 5, split=4), "active must be between 1 and experts=4, got 5"),
        (lambda: matched(32, 4, 2, split=4, shared=8), "shared must be between 0 and .* = 7 .* got 8"),
        (lambda: paper_config("7b"), r"name must be one of \['2b', '16b', '145b'\], got '7b'"),
        (lambda: small(shared=-1), "shared must be >= 0, got -1"),
        (lambda: small(active=8), "active must be between 1 and routed=7, got 8"),
        (lambda: small(expert_balance=-1.0), "expert_balance must be >= 0"),
        (lambda: small(device_balance=0.1), "device_balance needs device_groups"),
        (lambda: small(device_groups=3), "device_groups must divide the 7 routed experts, got 3"),
        (lambda: small(balance_per="row"), "balance_per must be one of"),
        (lambda: small(backend="magic"), "backend must be one of"),
        (lambda: small()(torch.full((2, 6), torch.nan, dtype=torch.float64)), "router logits .* not finite"),
        (lambda: sequence_balance_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "must agree in B and L"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
