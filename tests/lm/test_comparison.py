"""Checkpoints side by side."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtura.data.texts import corpus
from mixtura.lm import compare
from mixtura.lm.evaluate import token_losses, token_losses_and_choices
from mixtura.lm.generation import cache_bytes
from mixtura.lm.tokens import blocks

TEXTS = {"arithmetic": corpus("arithmetic", characters=20_000).held_out}
SMALL = {"samples": 4, "length": 32, "context": 40, "new_tokens": 3}


@pytest.fixture(scope="module")
def noisy(tiny_dense, tmp_path_factory):
    """The tiny model with its weights shaken."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dense)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("noisy") / "noisy"
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_dense).save_pretrained(path)
    return path


def test_losses_and_choices_are_those_of_a_plain_forward_pass(tiny_dense):
    model = AutoModelForCausalLM.from_pretrained(tiny_dense).eval()
    ids = blocks(AutoTokenizer.from_pretrained(tiny_dense), TEXTS["arithmetic"], 16, limit=5)
    losses, choices = token_losses_and_choices(model, ids, batch_size=2)
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(losses, -log_p.gather(-1, ids[:, 1:, None])[..., 0])
    assert (choices == log_p.argmax(-1)).all()
    torch.testing.assert_close(token_losses(model, ids), losses)


def test_the_reference_loses_nothing_against_itself_and_the_excess_is_the_difference_of_losses(tiny_dense, noisy):
    found = compare([tiny_dense, noisy], TEXTS, **SMALL)
    first, second = (row.quality["arithmetic"] for row in found.rows)
    assert (first.excess, first.give, first.agreement) == (0, 0, 1)
    assert second.excess == pytest.approx(math.log(second.perplexity / first.perplexity), abs=1e-6)
    assert second.agreement < 1 and second.give > 0
    assert [row.name for row in found.rows] != [str(tiny_dense), str(noisy)]
    assert all(row.disk > 4 * row.total * 0.9 for row in found.rows)  # float32, embeddings tied


def test_a_comparison_is_written_as_page_figures_and_table(tiny_dense, noisy, tmp_path):
    found = compare([tiny_dense, noisy], TEXTS, **SMALL)
    found.to_html(tmp_path / "page.html")
    found.to_json(tmp_path / "page.json")
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and found.rows[1].name in page
    assert all(len(row) == len(found.header()) for row in found.cells())


def test_the_cache_counts_keys_and_values_of_every_layer(tiny_dense):
    model = AutoModelForCausalLM.from_pretrained(tiny_dense).eval()
    with torch.no_grad():
        out = model(torch.arange(10)[None], use_cache=True)
    # 3 layers, keys and values, 2 heads of width 16, 10 tokens, 4 bytes
    assert cache_bytes(out.past_key_values) == 3 * 2 * 2 * 16 * 10 * 4


def test_what_cannot_be_compared_says_why(tiny_dense, noisy, tmp_path):
    with pytest.raises(ValueError, match="at least two checkpoints"):
        compare([tiny_dense], TEXTS)
    with pytest.raises(ValueError, match="given twice"):
        compare([tiny_dense, noisy, noisy], TEXTS)
    other = AutoTokenizer.from_pretrained(tiny_dense)
    other.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_dense)
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="'<new>' is None in the first"):
        compare([tiny_dense, tmp_path / "other"], TEXTS)
    with pytest.raises(ValueError, match="do not fill one block"):
        compare([tiny_dense, noisy], {"short": ["1"]})
