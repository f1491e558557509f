"""A model from a config file, trained and written by one command."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_cli import here, text  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtura.cli.train_new import start

CONFIG = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "norm_topk_prob": False,
    "dense_layers": [0],
    "balance_per": "sequence",
}


def test_a_config_becomes_a_trained_model_that_transformers_families_hold(here, text, tmp_path):  # noqa: F811
    (tmp_path / "fine.json").write_text(json.dumps(CONFIG))
    options = ("--text", text, "--length", 32, "--lr", 1e-2)
    done = here("train", "fine.json", *options, "--steps", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "300 tokens learned from" in said
    out = tmp_path / "fine-trained"
    assert not out.with_name("fine-trained.start").exists()
    before, after = said.split("held-out perplexity ")[1].split()[0:3:2]
    assert float(after.rstrip(",")) < 0.7 * float(before)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).float().eval(), AutoTokenizer.from_pretrained(out)
    assert model.config.balance_per == "sequence" and len(tokenizer) == 300
    model.save_pretrained(tmp_path / "native", family="qwen2_moe")
    ids = torch.tensor([tokenizer("def one():")["input_ids"]])
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    torch.testing.assert_close(native(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object of config fields, got list"),
        (json.dumps({"n_layers": 2}), "has unknown fields ['n_layers']"),
        (
            json.dumps(CONFIG | {"num_experts_per_tok": 9}),
            "num_experts_per_tok must be between 1 and num_experts=7, got 9",
        ),
        (json.dumps(CONFIG | {"num_experts": 0}), "shared_expert_intermediate_size needs routed experts"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_in_a_line(content, message, here, text, tmp_path):  # noqa: F811
    (tmp_path / "bad.json").write_text(content)
    done = here("train", "bad.json", "--text", text, "--steps", 1, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr


def test_a_config_that_is_not_there_is_said(here, text, tmp_path):  # noqa: F811
    done = here("train", "none.json", "--text", text, cwd=tmp_path)
    assert done.returncode == 1 and "none.json does not exist" in done.stderr


def test_a_start_of_the_same_config_text_and_seed_is_used_again(text, tmp_path):  # noqa: F811
    (tmp_path / "fine.json").write_text(json.dumps(CONFIG))
    said = []

    def begin(seed):
        start(str(tmp_path / "fine.json"), tmp_path / "s", [text], seed, command="train", say=said.append)
        return load_file(tmp_path / "s" / "model.safetensors")["lm_head.weight"]

    first, again, other = begin(0), begin(0), begin(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(said) == 2  # the second call drew nothing
