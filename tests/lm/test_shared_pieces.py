"""Pieces used most, always on: exact where their weights were constant, of equal size everywhere, least squares elsewhere."""

import logging

import pytest
import torch
import transformers as hf
from tiny_models import tiny_model

from mixtura.core.gates import Routing, top_k
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.upcycle import segment, upcycle
from mixtura.lm.upcycle.shared_pieces import choose_shared

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = torch.randint(2, 64, (3, 24), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def ours(**parts):
    torch.manual_seed(0)
    parts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "initializer_range": 0.3} | parts
    net = MixturaForCausalLM(MixturaConfig(**SHAPE | parts)).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return net


def native(**options):
    """Qwen2-MoE out of a dense model, so that its shared expert has weight 1."""
    torch.manual_seed(0)
    net = hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE | {"initializer_range": 0.3})).eval()
    return upcycle(net, method="fine-grained", n_experts=4, segments=3, shared=1, noise=0.5, **options)


def model(family):
    return {"mixtura": ours, "qwen2_moe": native, "deepseek_v2": lambda: tiny_model("deepseek_v2")}[family]()


@torch.no_grad()
def logits(net):
    return net(TEXT).logits


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("family", ["mixtura", "qwen2_moe", "deepseek_v2"])
def test_the_cost_stays_and_the_result_loads(family, tmp_path):
    net = model(family)
    exact = segment(net, 2)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    sharing = segment(net, 2, shared=2, batches=TEXT)
    config, k = sharing.config, exact.config.num_experts_per_tok
    assert type(sharing) is type(net) and config.num_experts_per_tok == k - 2
    rows = 2 * config.hidden_size * config.num_hidden_layers  # the router has no row for what is always on
    assert parameters(sharing) == parameters(exact) - rows
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    assert logits(sharing).isfinite().all()
    sharing.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(sharing), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["mixtura", "mixtura, softmax as it is", "mixtura, plain with biases", "qwen2_moe", "deepseek_v2"]
)
def test_what_had_a_constant_weight_is_shared_exactly(family):
    if family == "deepseek_v2":
        net = tiny_model("deepseek_v2")
    elif family == "qwen2_moe":
        net = native()
    else:
        plain = {"mlp_gated": False, "mlp_bias": True} if "plain" in family else {}
        net = ours(norm_topk_prob="as it is" not in family, shared_expert_intermediate_size=8, **plain)
    kind = next(name for name in ("num_experts", "n_routed_experts") if hasattr(net.config, name))
    net.config.num_experts_per_tok = getattr(net.config, kind)  # everyone is chosen ...
    for layer in net.model.layers:
        layer.mlp.gate.top_k = net.config.num_experts_per_tok
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # ... with equal weights
    torch.testing.assert_close(logits(segment(net, 2, shared=3, batches=TEXT)), logits(net), **CLOSE)


def test_layers_with_different_numbers_of_experts_share_as_many():
    sharing = segment(ours(num_experts=[0, 4, 6], num_hidden_layers=3), 2, shared=1, batches=TEXT)
    assert sharing.config.num_experts == [0, 7, 11]
    assert logits(sharing).isfinite().all()


@torch.no_grad()
def test_a_layer_is_its_shared_pieces_beside_the_others():
    net = ours(num_hidden_layers=1)
    exact, sharing = segment(net, 2), segment(net, 2, shared=1, batches=TEXT)
    x = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(1))
    a, b = exact.model.layers[0].mlp, sharing.model.layers[0].mlp
    piece = next(e for e in range(8) if torch.equal(a.experts.gate_up_proj[e, :16], b.shared_expert.gate_proj.weight))
    kept = [e for e in range(8) if e != piece]
    assert torch.equal(b.gate.weight, a.gate.weight[kept])
    factor = (b.experts.down_proj / a.experts.down_proj[kept]).flatten()
    assert float(factor.std()) < 1e-4 and 0.3 < float(factor.mean()) <= 1.0  # fewer share the gates, so each has more
    gates = top_k(x[0] @ b.gate.weight.T, 3).weights
    torch.testing.assert_close(b.gate(x)[1], gates)


def test_the_pieces_that_write_most_are_shared_with_the_least_squares_weight():
    generator = torch.Generator().manual_seed(0)
    routing = top_k(torch.randn(50, 6, generator=generator), 3)
    norms = torch.rand(50, 6, generator=generator) * torch.tensor([1.0, 1.0, 9.0, 1.0, 1.0, 7.0])
    choice = choose_shared(routing, norms, 2, renormalise=True)
    assert choice.shared.tolist() == [2, 5] and choice.kept.tolist() == [0, 1, 3, 4]
    had = torch.zeros(50, 6).scatter(1, routing.indices, routing.weights)
    for e, c in zip(choice.shared, choice.weights, strict=True):
        line = torch.linalg.lstsq(norms[:, [e]], (had * norms)[:, [e]]).solution
        assert float(c) == pytest.approx(float(line), rel=1e-5)
    fewer = top_k(routing.logits[:, choice.kept], 1)
    has = torch.zeros(50, 4).scatter(1, fewer.indices, fewer.weights)
    y, x = ((w * norms[:, choice.kept]).reshape(-1, 1) for w in (had[:, choice.kept], has))
    assert choice.factor == pytest.approx(float(torch.linalg.lstsq(x, y).solution), rel=1e-4)


def test_a_place_that_no_expert_fills_counts_for_nobody():
    logits_TE = torch.tensor([[3.0, 2.0, 1.0]])
    dropped = Routing(
        weights=torch.tensor([[0.0, 0.4]]),
        indices=torch.tensor([[3, 1]]),
        logits=logits_TE,
        probs=logits_TE.softmax(-1),
    )
    assert choose_shared(dropped, torch.ones(1, 3), 1, renormalise=True).shared.tolist() == [1]


def test_the_loss_before_and_after_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="mixtura.lm.upcycle.segments"):
        segment(ours(), 2, shared=1, batches=TEXT)
    assert "1 shared pieces a layer: loss on the batches" in caplog.text


def learned_gate():
    net = native()
    with torch.no_grad():
        net.model.layers[1].mlp.shared_expert_gate.weight[0, 0] = 0.1
    return net


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segment(tiny_model("mixtral"), 2, shared=1, batches=TEXT), "MixtralForCausalLM has no shared experts"),
        (
            lambda: segment(
                ours(shared_expert_intermediate_size=8, shared_combine="coefficient"), 2, shared=1, batches=TEXT
            ),
            "shared_combine='coefficient' weights the shared expert by the token",
        ),
        (lambda: segment(learned_gate(), 2, shared=1, batches=TEXT), "shared expert of model.layers.1.mlp is weighted"),
        (lambda: segment(ours(), 2, shared=4, batches=TEXT), "shared must be below the 4 pieces"),
        (lambda: segment(ours(), 2, shared=1), "shared > 0 and batches go together, got shared=1 and no batches"),
        (lambda: segment(ours(), 2, batches=TEXT), "go together, got shared=0 and batches"),
        (lambda: segment(ours(), 2, shared=-1), "shared must be >= 0, got -1"),
        (lambda: segment(ours(), 2, shared=1, batches=[]), "batches holds no tokens"),
        (
            lambda: segment(ours(device_balance_coef=0.1, device_groups=2), 2, shared=1, batches=TEXT),
            "device_groups=2 does not divide",
        ),
    ],
)
def test_what_cannot_be_shared_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
