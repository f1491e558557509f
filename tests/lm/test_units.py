"""Hidden units as they are read off a running model, rules for them, and the page that shows them."""

import json
import re

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.tokens import blocks, byte_pair_tokenizer
from mixtura.lm.unit_report import top_examples, unit_report
from mixtura.lm.unit_rules import KINDS, detection_score, kind_of, mean_score
from mixtura.lm.units import find_units, read_units, unit_layer
from mixtura.lm.wide_sparse import WideSparseMoE

TEXTS = ["the cat sat on the mat (12 times) and the dog ran. " * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_pair_tokenizer(TEXTS, 300)


def mixture(**changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_gated": False,
        "hidden_act": "relu",
        "num_experts": 4,
        "router": "sparsity",
        "initializer_range": 0.2,
    }
    return MixturaForCausalLM(MixturaConfig(**options | changes)).eval()


def units_of(model, ids, layer):
    return torch.cat(list(read_units(model, ids, unit_layer(model, layer), batch_size=2)))


def seen_input(module, model, ids):
    kept = []
    hook = module.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return kept[0]


IDS = torch.randint(300, (3, 10), generator=torch.Generator().manual_seed(0))


def test_units_of_a_wide_sparse_model_are_those_of_the_layer():
    model = mixture()
    block = model.model.layers[1].mlp
    layer = WideSparseMoE(32, 48, 4, 2)
    layer.load_state_dict({f"experts.{name}": p for name, p in block.experts.named_parameters()})
    with torch.no_grad():
        want = layer.wide(seen_input(block, model, IDS))
    got = units_of(model, IDS, 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.shape == (3, 10, 192) and (got > 0).float().mean() < 0.5


def test_units_of_gated_experts_are_products_and_shared_experts_are_no_layer_of_their_own():
    model = mixture(mlp_gated=True, router="linear", shared_expert_intermediate_size=16, hidden_act="silu")
    assert [(f.n_experts, f.hidden) for f in find_units(model)] == [(4, 48)] * 2
    block = model.model.layers[0].mlp
    x = seen_input(block, model, IDS).reshape(30, 32)
    with torch.no_grad():
        _, weights, indices = block.gate(x)
        gate, up = torch.einsum("td,ehd->teh", x, block.experts.gate_up_proj).chunk(2, -1)
        w = torch.zeros(30, 4).scatter(1, indices, weights)
        want = (F.silu(gate) * up * w[..., None]).flatten(1)
    torch.testing.assert_close(units_of(model, IDS, 0).view(30, -1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "opt", "phi", "llama"])
def test_units_of_dense_families_are_what_the_output_map_reads(family):
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if family == "gpt2":
        sizes = {"vocab_size": 300, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4}
    if family == "opt":
        sizes = sizes | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(family, **sizes)).eval()
    found = find_units(model)
    assert [(f.n_experts, f.hidden, f.experts) for f in found] == [(1, 48, False)] * 2
    want = seen_input(found[1].module, model, IDS).reshape(3, 10, 48)
    torch.testing.assert_close(units_of(model, IDS, 1), want)


def test_a_unit_that_fires_on_one_token_scores_one_and_noise_scores_one_half(tokenizer):
    ids = torch.randint(100, 140, (40, 101), generator=torch.Generator().manual_seed(1))
    fires = (ids == 105).float() * torch.rand(40, 101, generator=torch.Generator().manual_seed(2)).add(0.1)
    after = F.pad((ids == 107).float(), (1, 0))[:, :-1]
    noise = (torch.rand(40, 101, generator=torch.Generator().manual_seed(3)) - 0.5).clamp(min=0)
    rare, never = torch.zeros(40, 101), torch.zeros(40, 101)
    rare[0, 5:8] = 1
    activations = torch.stack((fires, after, noise, rare, never), -1)
    rules = {r.unit: r for r in detection_score(activations, ids, tokenizer, units=[7, 8, 9, 10, 11])}
    assert set(rules) == {7, 8, 9}
    assert rules[7].score == 1.0 and rules[7].explanation == repr(tokenizer.decode([105]))
    assert rules[8].score == 1.0 and rules[8].explanation == "what follows " + repr(tokenizer.decode([107]))
    # 100 test examples: one half within four standard errors of 0.05.
    assert abs(rules[9].score - 0.5) <= 0.2
    assert rules[7].fires == pytest.approx(float((ids == 105).float().mean()))
    assert mean_score([rules[7], rules[8]]) == 1.0


def test_a_judge_gets_the_words_and_the_places_and_its_answers_count(tokenizer):
    ids = blocks(tokenizer, TEXTS, 40)
    cat = tokenizer(" cat", add_special_tokens=False)["input_ids"][-1]
    fires = (ids == cat).float()[..., None]
    heard = []

    def judge(explanation, contexts):
        heard.append((explanation, contexts))
        return [f"«{tokenizer.decode([cat])}»" in c for c in contexts]

    right = detection_score(fires, ids, tokenizer, judge=judge)[0]
    wrong = detection_score(fires, ids, tokenizer, judge=lambda e, c: [not a for a in judge(e, c)])[0]
    assert right.score == 1.0 and wrong.score == 0.0
    assert heard[0][0] == right.explanation and all(re.search("«.*»", c, re.S) for c in heard[0][1])
    with pytest.raises(ValueError, match=r"judge must answer for \d+ examples, got 1 answers"):
        detection_score(fires, ids, tokenizer, judge=lambda e, c: [True])


def test_strength_does_not_matter_to_which_places_are_asked_about(tokenizer):
    # Drawn evenly over tenths: a unit with a few huge activations is judged by all of them alike.
    ids = torch.randint(100, 140, (40, 101), generator=torch.Generator().manual_seed(1))
    fires = (ids == 105).float()
    scaled = torch.where(ids == 105, torch.rand(40, 101, generator=torch.Generator().manual_seed(4)).pow(9) + 1e-6, 0)
    for z in (fires, scaled):
        assert detection_score(z[..., None], ids, tokenizer)[0].score == 1.0


def test_kinds_of_tokens():
    got = [KINDS[kind_of(t)] for t in (" the", "The", " USA", "42", "\n", "([", '"', ".", "a1", "I")]
    assert got == [
        *(
            "lower case",
            "Capital",
            "UPPER CASE",
            "digits",
            "space",
            "brackets",
            "quotes",
            "punctuation",
            "other",
            "Capital",
        )
    ]


def test_the_report_counts_what_a_loop_counts_and_is_one_page(tokenizer, tmp_path):
    model = mixture()
    texts = {"animals": TEXTS, "numbers": ["one two three 4 5 6, seven. " * 60]}
    report = unit_report(model, tokenizer, texts, per_expert=5, samples=6, length=32)
    ids = torch.cat([blocks(tokenizer, t, 32, limit=6) for t in texts.values()])
    z = units_of(model, ids, None)
    assert report.positions == ids.numel()
    assert report.per_token == pytest.approx(float((z > 0).float().sum(-1).mean()), rel=1e-5)
    chosen = (z.view(-1, 4, 48).abs().sum(-1) > 0).float()  # an expert that fires nothing at all is rare enough
    assert [n.load for n in report.experts] == pytest.approx((chosen.mean(0) / chosen.mean(0).sum()).tolist(), abs=0.02)
    assert [n.alive for n in report.experts] == (z.view(-1, 4, 48) > 0).any(0).sum(-1).tolist()
    assert report.judged > sum(len(n.units) for n in report.experts)
    for note in report.experts:
        scores = [unit.rule.score for unit in note.units]
        assert scores == sorted(scores, reverse=True) and len(scores) <= 5
        for unit in note.units:
            assert unit.rule.unit // 48 == note.expert
            rate = float((z[..., unit.rule.unit] > 0).float().mean())
            assert unit.rule.fires == pytest.approx(rate) and 0.0005 <= rate <= 0.3
            best = unit.examples[0]
            assert best.activations[best.peak] == pytest.approx(float(z[..., unit.rule.unit].max()), rel=1e-5)
    report.to_html(tmp_path / "units.html")
    report.to_json(tmp_path / "units.json")
    page = (tmp_path / "units.html").read_text()
    assert "<script" not in page and not re.search(r"(src|href)=[\"']http", page)
    assert page.count("<summary>") == sum(len(n.units) for n in report.experts) > 4
    assert json.loads((tmp_path / "units.json").read_text())["experts"][0]["units"][0]["rule"]["explanation"]


def test_the_report_of_a_dense_model_has_one_expert_and_text_cannot_break_the_page(tokenizer, tmp_path):
    model = mixture(num_experts=0, router="linear")
    report = unit_report(model, tokenizer, ["<script>alert(1)</script> & more. " * 80], length=16, samples=8)
    assert len(report.experts) == 1 and report.experts[0].load == 1.0 and report.experts[0].tokens == []
    report.to_html(tmp_path / "units.html")
    assert "<script" not in (tmp_path / "units.html").read_text()


def test_the_strongest_places_of_a_unit_come_in_order(tokenizer):
    model = mixture()
    unit = 5
    found = top_examples(model, tokenizer, TEXTS, 0, unit, 4, samples=6, length=32)
    ids = blocks(tokenizer, TEXTS, 32, limit=6)
    peaks = units_of(model, ids, 0)[..., unit].max(1).values.sort(descending=True).values
    got = [e.activations[e.peak] for e in found]
    assert got == pytest.approx([p for p in peaks.tolist() if p > 0][:4], rel=1e-5)
    with pytest.raises(ValueError, match=r"unit must lie in 0..191, got 192"):
        top_examples(model, tokenizer, TEXTS, 0, 192)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: unit_layer(mixture(), 2), r"layer must lie in 0..1, got 2"),
        (lambda t: unit_layer(torch.nn.Linear(2, 2)), "Linear has no feed-forward layer"),
        (lambda t: unit_report(mixture(), t, TEXTS, per_expert=0), "per_expert and examples must be at least 1"),
        (lambda t: detection_score(torch.zeros(2, 3, 1), torch.zeros(2, 4), t), "must agree"),
        (lambda t: detection_score(torch.zeros(2, 3, 2), torch.zeros(2, 3), t, units=[1]), "units must name 2 columns"),
    ],
)
def test_wrong_arguments_are_named(call, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)
