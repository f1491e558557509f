"""Fewer experts, and the experts of two models in one: by hand, to the bit, and through every family's own loading."""

import copy
import logging

import pytest
import torch
from tiny_models import E, tiny_model
from transformers import AutoModelForCausalLM

from mixtura.lm.aggregate_experts import aggregate
from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.cost import model_size
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.model.encoder_decoder import MultitaskMoEForConditionalGeneration
from mixtura.lm.model.multitask_config import MultitaskMoEConfig
from mixtura.lm.prune_experts import expert_usage, prune

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ids(seed=0, rows=3, length=8, vocabulary=64):
    return torch.randint(3, vocabulary, (rows, length), generator=seeded(seed))


def multitask(seed=0, **changes):
    torch.manual_seed(seed)
    options = {"vocab_size": 64, "d_model": 16, "heads": 2, "ffn": 12, "encoder_layers": 4, "decoder_layers": 2}
    options |= {"num_experts": 4, "initializer_range": 0.3, "pad_token_id": 0, "eval_capacity_factor": 0.0}
    return MultitaskMoEForConditionalGeneration(MultitaskMoEConfig(**options | changes)).eval()


def decoder(k=1, **changes):
    torch.manual_seed(0)
    options = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 12}
    options |= {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": k, "norm_topk_prob": False}
    return MixturaForCausalLM(MixturaConfig(**options | {"initializer_range": 0.3} | changes)).eval()


def logits(model, x):
    if model.config.is_encoder_decoder:
        return model(input_ids=x, decoder_input_ids=x[:, :5]).logits
    return model(input_ids=x).logits


def by_hand(model, x):
    with recorded_routing(model) as routings, torch.no_grad():
        logits(model, x)
    return {name: torch.bincount(r.indices.flatten(), minlength=r.n_experts) for name, r in routings.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_family_loads_as_itself_and_routes_to_the_experts_that_stayed(family, tmp_path):
    model = tiny_model(family).eval()
    x = ids()
    usage = expert_usage(model, [x])
    assert {name: counts.tolist() for name, counts in usage.items()} == {
        n: c.tolist() for n, c in by_hand(model, x).items()
    }
    before = copy.deepcopy(model.state_dict())
    small = prune(model, usage, 3)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())  # the input is left alone
    for old, new in zip(find_moe(model), find_moe(small), strict=True):
        rows = usage[old.name].argsort(descending=True, stable=True)[:3].sort().values
        assert new.n_experts == 3
        assert torch.equal(new.gate.weight, old.gate.weight[rows])
        assert torch.equal(new.experts.down_proj, old.experts.down_proj[rows])
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, x), logits(small, x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [decoder, multitask, lambda: tiny_model("mixtral").eval()])
def test_keeping_all_experts_is_the_identity_to_the_bit(make):
    model = make()
    usage = expert_usage(
        model, [{"input_ids": ids(), "decoder_input_ids": ids()}] if model.config.is_encoder_decoder else [ids()]
    )
    same = prune(model, usage, 4)
    assert torch.equal(logits(same, ids(1)), logits(model, ids(1)))


def test_a_token_whose_expert_is_gone_goes_to_the_best_that_is_left():
    model, x = decoder(), ids()
    usage = expert_usage(model, [x])
    first = find_moe(model)[0]
    rows = usage[first.name].argsort(descending=True, stable=True)[:2].sort().values
    with recorded_routing(model) as before:
        logits(model, x)
    small = prune(model, usage, 2)
    with recorded_routing(small) as after:
        logits(small, x)
    want = before[first.name].logits[:, rows].argmax(-1)
    assert torch.equal(after[first.name].indices.flatten(), want)


def test_padding_is_not_counted_in_either_kind_of_model():
    model, x = decoder(), ids()
    mask = torch.ones_like(x)
    mask[1:, 3:] = 0
    counts = expert_usage(model, [{"input_ids": x, "attention_mask": mask}])
    assert all(int(c.sum()) == int(mask.sum()) for c in counts.values())
    both = multitask()
    y = ids(2)
    x[1:, 3:], y[0, 2:] = 0, 0
    counts = expert_usage(both, [{"input_ids": x, "decoder_input_ids": y}])
    halves = {name: int(c.sum()) for name, c in counts.items()}
    assert [halves[n] for n in sorted(halves)] == [int((y != 0).sum()), int((x != 0).sum()), int((x != 0).sum())]


def test_visits_add_up_over_batches_and_the_mode_is_put_back():
    model = decoder().train()
    both, parts = expert_usage(model, [ids(0), ids(1)]), [expert_usage(model, [ids(s)]) for s in (0, 1)]
    assert model.training
    assert all(torch.equal(both[n], parts[0][n] + parts[1][n]) for n in both)


def test_layers_may_keep_different_numbers_where_the_config_can_say_so(tmp_path):
    model = multitask()
    names = [block.name for block in find_moe(model)]
    keep = dict(zip(names, (3, 2, 1), strict=True))
    small = prune(model, None, keep, policy="random", generator=seeded())
    assert [b.n_experts for b in find_moe(small)] == [3, 2, 1] == small.config.experts_by_layer
    small.save_pretrained(tmp_path)
    again = MultitaskMoEForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, ids()), logits(small, ids()), rtol=0, atol=0)
    layered = prune(decoder(), None, {"model.layers.0.mlp": 3, "model.layers.1.mlp": 2}, policy="random")
    layered.save_pretrained(tmp_path / "decoder")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").config.num_experts == [3, 2]
    plain = tiny_model("mixtral")
    blocks = [b.name for b in find_moe(plain)]
    with pytest.raises(ValueError, match=r"has one number of experts for all layers, got \[3, 2, 2, 2\]"):
        prune(plain, None, dict(zip(blocks, (3, 2, 2, 2), strict=True)), policy="random")
    assert find_moe(plain)[0].n_experts == E  # refused before anything was changed


def test_pruning_in_place_changes_the_model_itself():
    model = decoder()
    assert prune(model, None, 2, policy="random", inplace=True, generator=seeded()) is model
    assert find_moe(model)[0].n_experts == 2 == model.config.num_experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 5}, "keep must be between 1 .* and 4 in .*, got 5"),
        ({"keep": 0}, "keep must be between 1 .* and 4 in .*, got 0"),
        ({"keep": {}}, "keep has no number for model.layers.0.mlp"),
        ({"keep": 2, "policy": "size"}, r"policy must be one of \['random', 'usage'\], got 'size'"),
        ({"keep": 2, "usage": None}, "policy='usage' needs the visits"),
        ({"keep": 2, "usage": {}}, "usage has no visits of the 4 experts of model.layers.0.mlp"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options, message):
    model = decoder()
    options = {"usage": expert_usage(model, [ids()])} | options
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        expert_usage(model, [])
    with pytest.raises(ValueError, match="has no mixture layers"):
        prune(decoder(num_experts=0), None, 1, policy="random")


@pytest.mark.parametrize("make", [decoder, multitask])
def test_a_model_joined_with_itself_computes_what_it_did(make):
    model = make()
    twice = aggregate(model, model)
    torch.testing.assert_close(logits(twice, ids()), logits(model, ids()), rtol=0, atol=1e-5)
    with recorded_routing(twice) as routings:
        logits(twice, ids())
    assert all(int(r.indices.max()) < 4 for r in routings.values())  # of equal copies the first
    size, double, moe = model_size(model), model_size(twice), find_moe(model)
    experts = sum(p.numel() for b in moe for part in (b.experts, b.gate) for p in part.parameters())
    assert double.total == size.total + experts
    plain = aggregate(model, model, preserve_scale=False)
    with torch.no_grad():
        assert (logits(plain, ids()) - logits(model, ids())).abs().max() > 1e-3  # weights that fell by half are seen


@pytest.mark.parametrize("make", [decoder, multitask])
def test_a_model_joined_with_itself_and_pruned_back_is_the_model_to_the_bit(make):
    model = make()
    for scale in (False, True):
        back = prune(
            aggregate(model, model, preserve_scale=scale),
            {b.name: torch.tensor([1] * 4 + [0] * 4) for b in find_moe(model)},
            4,
        )
        for name, tensor in model.state_dict().items():
            factor = 2 if scale and "experts.down_proj" in name else 1
            assert torch.equal(back.state_dict()[name], factor * tensor), name


def test_two_models_are_averaged_but_for_their_experts_which_are_joined(tmp_path):
    a, b = multitask(0), multitask(1)
    both = aggregate(a, b, preserve_scale=False, rel_tol=-1)
    sa, sb, got = a.state_dict(), b.state_dict(), both.state_dict()
    assert torch.equal(
        got["encoder.layers.1.mlp.gate.weight"],
        torch.cat([sa["encoder.layers.1.mlp.gate.weight"], sb["encoder.layers.1.mlp.gate.weight"]]),
    )
    name = "decoder.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(got[name], torch.cat([sa[name], sb[name]]))
    for name in (
        "encoder.embed_tokens.weight",
        "decoder.layers.0.cross_attn.k_proj.weight",
        "encoder.layers.0.mlp.up_proj.weight",
    ):
        torch.testing.assert_close(got[name], (sa[name] + sb[name]) / 2)
    both.save_pretrained(tmp_path)
    again = MultitaskMoEForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, ids()), logits(both, ids()), rtol=0, atol=0)


def test_gates_that_sum_to_one_need_no_scale():
    model = decoder(k=2, norm_topk_prob=True)
    torch.testing.assert_close(
        logits(aggregate(model, model), ids())[0, 0], logits(aggregate(model, model, preserve_scale=False), ids())[0, 0]
    )


def test_strangers_are_joined_with_a_warning_and_other_shapes_are_refused(caplog):
    with caplog.at_level(logging.WARNING):
        aggregate(multitask(0), multitask(0))
        assert not caplog.records
        aggregate(multitask(0), multitask(1))
    assert "no close relatives" in caplog.text
    with pytest.raises(ValueError, match=r"encoder.layers.1.mlp.gate.weight is \(4, 16\) in a and \(3, 16\) in b"):
        aggregate(multitask(), multitask(num_experts=3))
    with pytest.raises(ValueError, match="a and b must be of one class"):
        aggregate(multitask(), decoder())
