"""``mixtura compress --method sparse-attention``."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.cli import main
from mixtura.cli.compress_spans import parse_lengths
from mixtura.data.texts import corpus


@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    """Run a command in this process; (exit status, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mixtura", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text("\n".join(corpus("arithmetic", characters=40_000).train))
    return path


SPANS = ("--method", "sparse-attention", "--lengths", "256", "--span", "0.6", "--samples", "1")


def test_a_checkpoint_with_spans_loads_and_its_plan_can_be_given_again(here, tiny_dense, text, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    code, said, wrong = here("compress", tiny_dense, out, *SPANS, "--text", text)
    assert code == 0, wrong
    assert "of 256 tokens heads keep" in said and (out / "spans.svg").exists()
    plan = json.loads((out / "spans.json").read_text())
    assert len(plan["alphas"]) == 3 and plan["longest"] == 256
    code, _, wrong = here("compress", tiny_dense, again, "--method", "sparse-attention", "--plan", out / "spans.json")
    assert code == 0, wrong
    ids = torch.arange(3, 63)[None]
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (out, again)]
    tokens = [model.generate(ids, max_new_tokens=20, do_sample=False).tolist() for model in models]
    assert tokens[0] == tokens[1]
    assert models[0].config.mixtura_spans["alphas"] == plan["alphas"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", "2k;4k"), "--lengths must look like 2k,4k,8k"),
        (("--span", "1.5"), "--span must be above 0 and at most 1, got 1.5"),
        (("--lengths", "8k"), "this model reads 256"),
        (("--lengths", "128"), "lengths must be at least 256 tokens, four blocks"),
        (("--span", "0.1"), "the smallest that rules of whole blocks of 64 tokens"),
        (("--bits", "4"), "--bits and --prune go with other methods"),
        (("--plan", "{plan}"), "the plan is for 1 layers of 1 key/value heads, the model has 3 of 2"),
    ],
)
def test_what_cannot_be_is_one_clear_line(arguments, message, here, tiny_dense, text, tmp_path):
    (tmp_path / "plan.json").write_text('{"alphas": [[64]], "betas": [[0]]}')
    given = [a.format(plan=tmp_path / "plan.json") for a in arguments]
    code, _, wrong = here(
        "compress", tiny_dense, tmp_path / "out", *SPANS[:4], "--samples", "1", "--text", text, *given
    )
    assert code == 1 and message in wrong and "Traceback" not in wrong
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(here, tiny_dense, text, tmp_path):
    code, said, _ = here("compress", tiny_dense, tmp_path / "out", *SPANS, "--text", text, "--dry-run")
    assert code == 0 and "keep 60 % of the cache" in said and list(tmp_path.iterdir()) == []


def test_lengths_are_read_in_thousands_and_plain():
    assert parse_lengths("8k, 2K,512") == [512, 2048, 8192]
