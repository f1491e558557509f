"""The wide sparse part inside the decoder, and dense models turned into it."""

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from mixtura.core.balance import load_balance_loss
from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.compress.api import compress
from mixtura.lm.cost import model_size
from mixtura.lm.decode.routing import RoutingRule, routed
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.training import language_loss
from mixtura.lm.upcycle import segment, upcycle
from mixtura.lm.wide_sparse import WideSparseMoE

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = torch.arange(3, 27).view(2, 12)


def config(**changes):
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_gated": False,
        "mlp_bias": True,
        "hidden_act": "relu",
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "router": "sparsity",
        "initializer_range": 0.2,
    }
    return MixturaConfig(**options | changes)


def model(**changes):
    torch.manual_seed(0)
    return MixturaForCausalLM(config(**changes)).eval()


def neox(seed=0, hidden_act="gelu"):
    torch.manual_seed(seed)
    dense = hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act=hidden_act,
        )
    ).eval()
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return dense


@torch.no_grad()
def logits(some):
    return some(TOKENS).logits


@pytest.mark.parametrize("statistics", ["diagonal", "full"])
def test_the_part_of_the_decoder_is_the_layer(statistics):
    block = model(router_statistics=statistics).model.layers[1].mlp
    layer = WideSparseMoE(32, 64, 4, 2, bias=True, statistics=statistics)
    layer.load_state_dict({f"experts.{name}": p for name, p in block.experts.named_parameters()})
    assert not list(block.gate.parameters())
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(x), layer(x), **CLOSE)


@pytest.mark.parametrize("engine", ["eager", "grouped_mm", "mixtura"])
def test_every_engine_of_experts_computes_the_same(engine):
    some = model()
    want = logits(some)
    some.set_experts_implementation(engine)
    torch.testing.assert_close(logits(some), want, **CLOSE)


def test_the_loss_balances_the_softmax_of_the_scores_and_adds_no_z_loss():
    some = model(router_z_loss_coef=1.0, router_aux_loss_coef=0.5).train()
    with recorded_routing(some) as routings:
        out = some(TOKENS, labels=TOKENS)
    want = sum(0.5 * load_balance_loss(r.logits.softmax(-1), r.indices) for r in routings.values())
    torch.testing.assert_close(out.aux_loss, want, **CLOSE)
    out.aux_loss.backward()
    assert all(layer.mlp.experts.up_proj.grad.abs().max() > 0 for layer in some.model.layers)
    plain, with_z = (language_loss(some, TOKENS, balance=0.1, z=z).item() for z in (0.0, 1.0))
    assert plain == with_z


def test_a_prompt_is_continued_as_without_a_cache():
    some = model()
    made = some.generate(TOKENS[:, :4], max_new_tokens=6, do_sample=False, eos_token_id=None)
    for n in range(4, 10):
        with torch.no_grad():
            assert torch.equal(some(made[:, :n], use_cache=False).logits[:, -1].argmax(-1), made[:, n])


def test_it_is_saved_loaded_and_seen_by_the_tools(tmp_path):
    some = model()
    some.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(some)) and again.config.router == "sparsity"
    blocks = find_moe(again)
    assert [block.k for block in blocks] == [2, 2]
    assert blocks[0].scoring.function == "softmax" and blocks[0].scoring.renormalises
    with routed(again, RoutingRule.ranks([1, 2]), renorm="as_model"):
        torch.testing.assert_close(logits(again), logits(some), **CLOSE)
    experts = sum(p.numel() for layer in some.model.layers for p in layer.mlp.experts.parameters())
    size = model_size(some)
    assert size.total - size.active == experts // 2


def test_a_dense_model_is_unchanged_where_nothing_is_split_changed_or_dropped():
    dense = neox()
    wide = upcycle(dense, method="interpretable", n_experts=4, split=1, noise=0.0, activation="keep")
    assert type(wide).__name__ == "MixturaForCausalLM"
    torch.testing.assert_close(logits(wide), logits(dense), **CLOSE)


def test_by_default_experts_are_other_halves_of_the_dense_units_and_no_two_are_equal():
    dense = neox(hidden_act="relu")
    before = {name: p.clone() for name, p in dense.state_dict().items()}
    wide = upcycle(dense, method="interpretable", noise=0.0, seed=3)
    c = wide.config
    assert (c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.hidden_act) == (8, 2, 64, "relu")
    source = dense.gpt_neox.layers[0].mlp
    experts = wide.model.layers[0].mlp.experts
    parts = []
    for e in range(8):
        match = torch.cdist(experts.up_proj[e], source.dense_h_to_4h.weight).argmin(-1)
        assert len(set(match.tolist())) == 64
        torch.testing.assert_close(experts.up_proj[e], source.dense_h_to_4h.weight[match], rtol=0, atol=0)
        torch.testing.assert_close(experts.up_proj_bias[e], source.dense_h_to_4h.bias[match], rtol=0, atol=0)
        torch.testing.assert_close(experts.down_proj[e], 2 * source.dense_4h_to_h.weight[:, match], rtol=0, atol=0)
        parts.append(frozenset(match.tolist()))
    assert len(set(parts)) == 8
    assert all(torch.equal(p, before[name]) for name, p in dense.state_dict().items())
    noisy = upcycle(dense, method="interpretable", seed=3).model.layers[0].mlp.experts
    ratio = noisy.up_proj / experts.up_proj
    # Six standard errors of a standard deviation of 8 * 64 * 32 values.
    assert abs(ratio.std().item() / 0.02 - 1) < 6 / (2 * ratio.numel()) ** 0.5


def test_the_average_over_experts_is_the_dense_layer():
    # Every unit is in half of the experts; with 400 experts the mean over them nears the dense output.
    dense = neox(hidden_act="relu")
    wide = upcycle(dense, method="interpretable", n_experts=400, noise=0.0)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    experts = wide.model.layers[0].mlp.experts
    everywhere = torch.arange(400).expand(3, 400)
    mean = experts(x, everywhere, torch.full((3, 400), 1 / 400))
    want = dense.gpt_neox.layers[0].mlp(x)
    assert (mean - want).norm() / want.norm() < 0.15 < (experts(x, everywhere[:, :1], torch.ones(3, 1)) - want).norm()


def test_a_gated_model_is_converted_when_asked_to():
    torch.manual_seed(0)
    dense = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    ).eval()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .* has a gated feed-forward part"):
        upcycle(dense, method="interpretable")
    wide = upcycle(dense, method="interpretable", gate="relu", split=1, noise=0.0, activation="keep", n_experts=3)
    torch.testing.assert_close(logits(wide), logits(dense), **CLOSE)
    block = wide.model.layers[0].mlp
    x = torch.randn(5, 32)
    own = upcycle(dense, method="interpretable", gate="relu", n_experts=3).model.layers[0].mlp
    mean = own.experts.gate_up_proj[:, :24].mean(1)
    var = own.experts.gate_up_proj[:, :24].var(1, correction=0)
    want = -torch.erf((x @ mean.T) / (2 * (x**2 @ var.T + 1e-6)).sqrt())
    torch.testing.assert_close(own.gate(x, own.experts.gate_up_proj[:, :24])[0], want)
    assert block.experts.gate_up_proj.shape == (3, 96, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: config(router="magic"), r"router must be one of \['linear', 'sparsity'\], got 'magic'"),
        (lambda: config(num_experts=0), "router='sparsity' needs num_experts"),
        (lambda: config(norm_topk_prob=False), "norm_topk_prob=True"),
        (
            lambda: upcycle(neox(), method="interpretable", split=3),
            "split=3 must divide the 128 hidden units of GPTNeoX",
        ),
        (lambda: upcycle(neox(), method="interpretable", top_k=9), "top_k must be between 1 and n_experts=8, got 9"),
        (lambda: upcycle(neox(), method="interpretable", router="soft"), r"router must be one of \['linear', 'spars"),
        (lambda: model().save_pretrained("x", family="mixtral"), "cannot express .*"),
        (lambda: segment(model(), 2), "has no rows to repeat"),
        (lambda: compress(model(), None, ["a"]), "mc-moe packs the experts, whose weights the router"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
