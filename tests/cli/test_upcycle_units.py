"""A mixture of a dense checkpoint's own hidden units, from the command line."""

import pytest
import torch
from test_cli import here, text  # noqa: F401
from transformers import AutoModelForCausalLM

OWN = ("--method", "own-units", "--samples", 4, "--length", 32)


def test_it_says_what_it_costs_and_writes_what_loads(here, tiny_dense, text, tmp_path):  # noqa: F811
    command = ("upcycle", tiny_dense, "out", *OWN, "--segments", 4, "--top-k", 1, "--text", text)
    shown = here(*command, "--dry-run", cwd=tmp_path)
    assert shown.returncode == 0 and not (tmp_path / "out").exists()
    done = here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out perplexity" in done.stdout and "before any training" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen2_moe", 3, 1)
    assert model(torch.randint(3, 50, (2, 9))).logits.isfinite().all()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "until it is trained" in card and "held-out perplexity" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{dense}", "{dense}", "out", *OWN), "own-units takes one model"),
        (("{dense}", "out", *OWN, "--segments", 7), "split must be at least 2 and divide"),
        (("{dense}", "out", *OWN, "--samples", 0), "--samples must be at least 1"),
        (("{dense}", "out", "--shared", 1), "--shared goes with --method fine-grained or own-units"),
        (("{dense}", "out", "--text", "{text}"), "--text goes with --method own-units"),
    ],
)
def test_what_does_not_fit_is_one_line(here, tiny_dense, text, tmp_path, arguments, message):  # noqa: F811
    filled = [str(a).format(dense=tiny_dense, text=text) for a in arguments]
    done = here("upcycle", *filled, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "out").exists()


def test_pieces_of_copies_may_be_shared(here, tiny_dense, tmp_path):  # noqa: F811
    done = here(
        *("upcycle", tiny_dense, "out", "--method", "fine-grained", "--experts", 2, "--segments", 4, "--shared", 1),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 6
