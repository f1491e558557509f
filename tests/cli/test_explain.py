"""A dense one-matrix model becomes one that can be read, and a page says what its units stand for."""

import json

import pytest
import torch
from test_cli import here, text  # noqa: F401
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from mixtura.data.texts import corpus
from mixtura.lm.tokens import byte_pair_tokenizer


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    tokenizer = byte_pair_tokenizer(corpus("arithmetic", characters=20_000).train, vocab_size=300)
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    path = tmp_path_factory.mktemp("neox") / "dense"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_dense_model_is_made_readable_trained_and_explained(here, neox, text, tmp_path):  # noqa: F811
    done = here("upcycle", neox, "wide", "--method", "interpretable", "--experts", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loads after `import mixtura`, and vLLM cannot serve it" in done.stdout
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").config
    assert (config.router, config.hidden_act, config.num_experts, config.moe_intermediate_size) == (
        "sparsity",
        "relu",
        4,
        64,
    )
    trained = here("train", "wide", "--text", text, "--steps", 3, "--length", 32, "--out", "read", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    options = ("--text", text, "--samples", 4, "--length", 64, "--units", 3, "--report", "u.html")
    told = here("explain", "read", *options, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "of 256 units fire on a token" in told.stdout and "model.layers.1.mlp" in told.stdout
    found = json.loads((tmp_path / "u.json").read_text())
    assert len(found["experts"]) == 4 and sum(len(e["units"]) for e in found["experts"]) >= 4
    assert "What the units of read stand for" in (tmp_path / "u.html").read_text()
    first = here("explain", "read", *options, "--layer", 0, "--dry-run", cwd=tmp_path)
    assert "model.layers.0.mlp" in first.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", 7), "layer must lie in 0..2, got 7"),
        (("--report", "u.pdf"), "--report must end in .html, got 'u.pdf'"),
        (("--units", 0), "per_expert and examples must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(here, neox, text, tmp_path, options, message):  # noqa: F811
    done = here("explain", neox, "--text", text, "--samples", 1, "--length", 32, *options, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr


def test_a_gated_model_is_refused_with_the_reason(here, tiny_dense, tmp_path):  # noqa: F811
    done = here("upcycle", tiny_dense, "wide", "--method", "interpretable", cwd=tmp_path)
    assert done.returncode == 1 and "has a gated feed-forward part" in done.stderr
    assert not (tmp_path / "wide").exists()
