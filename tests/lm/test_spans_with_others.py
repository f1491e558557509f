"""Spans together with the other ways of making a model small, and from texts alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtura.data.texts import corpus
from mixtura.lm import compress, upcycle
from mixtura.lm.attention import SpanPlan, convert, profile_spans
from mixtura.lm.attention.api import answer_loss, plan_from_texts
from mixtura.lm.attention.span_model import attending
from mixtura.lm.attention.span_profile import AnswerSample

TEXTS = {"arithmetic": corpus("arithmetic", characters=60_000).train}
PLAN = SpanPlan([[32.0, 0.0]] * 3, [[0.0, 0.5]] * 3, block=16)


@pytest.fixture(scope="module")
def dense(tiny_dense):
    return AutoModelForCausalLM.from_pretrained(tiny_dense).eval(), AutoTokenizer.from_pretrained(tiny_dense)


def same_tokens(model, path) -> bool:
    """Whether a checkpoint that is loaded anew writes what the model in memory writes."""
    model.save_pretrained(path)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(3, 83)[None]
    options = {"max_new_tokens": 30, "do_sample": False}
    return bool(model.generate(ids, **options).tolist() == loaded.generate(ids, **options).tolist())


def test_spans_go_onto_a_model_quantized_by_channels(dense, tmp_path):
    model, tokenizer = dense
    small = compress(model, tokenizer, TEXTS, method="mixllm", samples=2, length=32, group_size=16)
    assert same_tokens(convert(small, PLAN), tmp_path / "both")


def test_spans_go_onto_a_mixture_whose_experts_are_packed(dense, tmp_path):
    model, tokenizer = dense
    moe = upcycle(model, method="copy", n_experts=4, top_k=2)
    small = compress(moe, tokenizer, TEXTS, bits=2.5, samples=2, length=32)
    assert same_tokens(convert(small, PLAN), tmp_path / "both")


def test_a_quantized_model_is_not_profiled_itself(dense):
    model, tokenizer = dense
    small = compress(model, tokenizer, TEXTS, method="mixllm", samples=2, length=32, group_size=16)
    with pytest.raises(ValueError, match="profile the model that it was made of"):
        profile_spans(small, [AnswerSample(torch.arange(20), torch.tensor([19]))], block=8)


def test_a_plan_from_texts_keeps_its_budget_at_every_length(dense):
    model, tokenizer = dense
    plan = plan_from_texts(model, tokenizer, TEXTS, density=0.5, lengths=(128, 192), samples=1, block=16)
    assert plan.longest == 192 and plan.shape == (3, 2)
    assert plan.density(128) <= 0.5 and plan.density(192) <= 0.5
    assert not hasattr(model.config, "mixtura_spans")
    small = compress(
        model, tokenizer, TEXTS, method="sparse-attention", density=0.5, lengths=(128,), samples=1, block=16
    )
    assert small.config.mixtura_spans["longest"] == 128
    with pytest.raises(ValueError, match="no bits and no prune"):
        compress(model, tokenizer, TEXTS, method="sparse-attention", bits=4.0)


def test_attending_for_a_while_is_what_the_converted_model_does(dense):
    model, _ = dense
    sample = AnswerSample(torch.arange(3, 103), torch.arange(60, 100))
    before = answer_loss(model, [sample])
    with attending(model, PLAN):
        during = answer_loss(model, [sample])
    assert during == pytest.approx(answer_loss(convert(model, PLAN), [sample]), abs=1e-6)
    assert during != before and answer_loss(model, [sample]) == before
