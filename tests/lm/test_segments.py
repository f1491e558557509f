"""Experts cut into pieces: the same function, by block to 1e-10 and as a whole in every family that can be cut."""

import pytest
import torch
from tiny_models import tiny_model

from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.upcycle import segment

SHAPE = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def model(**parts):
    torch.manual_seed(0)
    config = MixturaConfig(**SHAPE | {"num_experts": 5, "num_experts_per_tok": 2, "initializer_range": 0.3} | parts)
    net = MixturaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("_bias"):
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    return net


@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("layout", ["gated", "plain", "gated with biases", "plain with biases"])
def test_a_block_of_pieces_is_the_block(split, renormalise, layout):
    parts = {"mlp_gated": "gated" in layout, "mlp_bias": "biases" in layout, "norm_topk_prob": renormalise}
    net = model(**parts, shared_expert_intermediate_size=6).double()
    fine = segment(net, split)
    for one in (net, fine):
        one.set_experts_implementation("eager")  # grouped_mm knows no float64
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for whole, pieces in zip(net.model.layers, fine.model.layers, strict=True):
        assert pieces.mlp.experts.down_proj.shape == (5 * split, 16, 24 // split)
        torch.testing.assert_close(pieces.mlp(x), whole.mlp(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "flex_olmo", "deepseek_v2"])
def test_every_family_that_can_be_cut_answers_as_before(family, tmp_path):
    net = tiny_model(family)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    fine = segment(net, 2)
    tokens = TOKENS % net.config.vocab_size
    assert type(fine) is type(net) and fine.config.num_experts_per_tok == 2 * net.config.num_experts_per_tok
    # float32 sums in another order, of logits of size 10.
    torch.testing.assert_close(fine(tokens).logits, net(tokens).logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    fine.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, fine(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segment(model(), 5), "split must divide moe_intermediate_size=24, got 5"),
        (lambda: segment(model(), 0), "split must divide moe_intermediate_size=24, got 0"),
        (lambda: segment(tiny_model("gpt_oss"), 2), "model must be of .*got GptOssForCausalLM"),
    ],
)
def test_what_cannot_be_cut_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_group_limited_routing_is_refused():
    net = tiny_model("deepseek_v2")
    net.config.topk_method = "group_limited_greedy"
    with pytest.raises(ValueError, match="group-limited routing"):
        segment(net, 2)
