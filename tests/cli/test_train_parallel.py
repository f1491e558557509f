"""``torchrun -m mixtura train --parallel``: the same command, the same model, and what cannot be is said in a line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_cli import here, text  # noqa: F401
from transformers import AutoConfig

from mixtura.cli.train_new import start
from mixtura.data.parallel_texts import write_parallel
from mixtura.lm.model import MultitaskMoEForConditionalGeneration

CONFIG = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 16,
}
OPTIONS = ("--steps", 6, "--batch", 3, "--length", 16, "--lr", 1e-3, "--checkpoint-every", 4)


def torchrun(world, *arguments, cwd):
    environment = {**os.environ, "MIXTURA_PROGRESS": "0", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "-m", "mixtura"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def test_two_processes_write_the_model_that_one_writes(here, text, tmp_path):  # noqa: F811
    (tmp_path / "m.json").write_text(json.dumps(CONFIG))
    alone = here("train", "m.json", "--text", text, *OPTIONS, "--out", "one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    layout = ("--parallel", "expert=2")
    done = torchrun(2, "train", "m.json", "--text", text, *OPTIONS, "--out", "two", *layout, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two is written") == 1, "one process speaks"
    assert "by 2 processes (expert=2)" in (tmp_path / "two" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "one", "two"]
    begun = start(str(tmp_path / "m.json"), tmp_path / "begun", [text], 0, command="", say=lambda _: None)
    first, one, two = (load_file(path / "model.safetensors") for path in (begun, tmp_path / "one", tmp_path / "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        moved, other = ((after[name].float() - first[name].float()).flatten() for after in (one, two))
        if tensor.dim() > 1:  # norms stay 1 in bfloat16, in which weights are written
            assert torch.cosine_similarity(moved, other, dim=0) > 0.9, name


PAIRS = {
    ("en", "de"): [(f"{i} {i + 1}", f"zahl {i} und {i + 1}") for i in range(12)],
    ("en", "fr"): [(f"{i} {i + 2}", f"nombre {i} et {i + 2}") for i in range(30)],
}
TRANSLATOR = {"model_type": "mixtura_multitask", "vocab_size": 300, "d_model": 32, "heads": 2, "ffn": 48}
TRANSLATOR |= {"encoder_layers": 2, "decoder_layers": 2, "num_experts": 4}
UNLIMITED = {"capacity_factor": 0.0, "eval_capacity_factor": 0.0}  # whose places do not depend on who holds which rows


def test_two_processes_write_the_translator_that_one_writes(here, tmp_path):  # noqa: F811
    write_parallel(tmp_path / "pairs", PAIRS)
    (tmp_path / "t.json").write_text(json.dumps(TRANSLATOR | UNLIMITED))
    options = ("train", "t.json", "--text", "pairs", *OPTIONS)
    alone = here(*options, "--out", "one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    done = torchrun(2, *options, "--out", "two", "--parallel", "expert=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two is written") == 1 and done.stdout.count("en-de: held-out") == 1, "one process speaks"
    assert "by 2 processes (expert=2)" in (tmp_path / "two" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "pairs", "t.json", "two"]
    torch.manual_seed(0)  # as the command draws it
    config = AutoConfig.from_pretrained(tmp_path / "one")
    first = MultitaskMoEForConditionalGeneration(config).float().state_dict()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        moved, other = ((after[name].float() - first[name]).flatten() for after in (one, two))
        if tensor.dim() > 1:
            assert torch.cosine_similarity(moved, other, dim=0) > 0.9, name


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        (
            1,
            ("--parallel", "expert=2,data=2"),
            "expert=2,data=2 needs 4 processes, and 1 is running; start with torchrun",
        ),
        (3, ("--parallel", "expert=2"), "needs a multiple of 2 processes, and 3 are running"),
        (2, ("--parallel", "pipeline=2"), "a layout is made of expert=N"),
        (4, (), "4 processes are running, and nothing says how they share the work; give --parallel"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_in_a_line(world, options, message, here, text, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "m.json").write_text(json.dumps(CONFIG))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    done = here("train", "m.json", "--text", text, *options, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr
    assert not (tmp_path / "m-trained").exists()
