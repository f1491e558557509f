"""The routing report against counting by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from mixtura.data.texts import corpus
from mixtura.lm import inspect, upcycle
from mixtura.lm.anatomy import find_moe
from mixtura.lm.loading import load, load_tokenizer
from mixtura.lm.prune_experts import prune
from mixtura.lm.tokens import blocks


@pytest.fixture(scope="module")
def moe(tiny_dense: Path):
    model = upcycle(str(tiny_dense), method="copy", n_experts=4, top_k=2, noise=0.5)
    for block in find_moe(model):
        torch.nn.init.normal_(block.gate.weight, std=0.5)
    return model, load_tokenizer(tiny_dense)


def test_shares_and_tokens_are_those_counted_one_by_one(moe):
    model, tokenizer = moe
    texts = {"sums": corpus("arithmetic", characters=8000).train, "prose": ["the sum of all is not a number, " * 200]}
    report = inspect(model, tokenizer, texts, samples=3, length=32)
    block = find_moe(model)[1]
    for m, (name, documents) in enumerate(texts.items()):
        visits: Counter[int] = Counter()
        rows = blocks(tokenizer, documents, 32, limit=3)
        seen = []
        hook = block.gate.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[2]))
        with torch.no_grad():
            for row in rows:
                model(input_ids=row[None], use_cache=False)
        hook.remove()
        for chosen in seen:
            for token in chosen:
                visits.update(token.tolist())
        want = [visits[e] / sum(visits.values()) for e in range(4)]
        assert report.share[1][m] == pytest.approx(want, abs=1e-9)
        assert report.tokens[name] == rows.numel()


def test_even_and_one_sided_loads_are_told_apart(moe):
    model, tokenizer = moe
    text = {"sums": corpus("arithmetic", characters=8000).train}
    gate = find_moe(model)[0].gate
    kept = gate.weight.detach().clone()
    gate.weight.data.zero_()  # ties: the same two experts take everything
    report = inspect(model, tokenizer, text, samples=2, length=32)
    gate.weight.data.copy_(kept)
    assert report.entropy[0] == pytest.approx(0.5)  # log 2 / log 4
    assert report.variation[0] == pytest.approx(1.0)


def test_the_report_survives_as_page_and_json(moe, tmp_path: Path):
    model, tokenizer = moe
    report = inspect(model, tokenizer, {"sums": corpus("arithmetic", characters=8000).train}, samples=2, length=32)
    report.to_html(tmp_path / "r.html")
    report.to_json(tmp_path / "r.json")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert json.loads((tmp_path / "r.json").read_text())["domains"] == ["sums"]
    assert report.bits == []


def test_packed_experts_show_their_bits(moe):
    from mixtura.lm import compress

    model, tokenizer = moe
    texts = {"sums": corpus("arithmetic", characters=8000).train}
    small = compress(model, tokenizer, texts, bits=2.0, samples=4, length=32)
    assert inspect(small, tokenizer, texts, samples=1, length=32).bits == [
        b.experts.bits.tolist() for b in find_moe(small)
    ]


def test_a_dense_model_is_named(tiny_dense: Path):
    model, tokenizer = load(tiny_dense)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no mixture layers"):
        inspect(model, tokenizer, {"a": ["b"]})


def test_a_layer_of_one_expert_is_even_and_its_report_is_written(tiny_dense: Path, tmp_path: Path):
    model, tokenizer = upcycle(str(tiny_dense), method="copy", n_experts=2, top_k=1), load_tokenizer(tiny_dense)
    alone = prune(model, None, 1, policy="random")
    report = inspect(alone, tokenizer, {"sums": ["1 + 1 = 2\n" * 200]}, samples=1, length=32)
    assert report.entropy == [1.0] * len(report.layers)
    report.to_json(tmp_path / "r.json")  # which refuses NaN
