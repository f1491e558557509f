"""A pyramid made of a dense checkpoint and a student of it, command by command."""

import json
from pathlib import Path

import pytest
import torch
from test_cli import here, text  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtura.lm.students as students
from mixtura.cli.work import expert_counts

SMALL = ("--steps", 6, "--batch", 2, "--length", 16, "--checkpoint-every", 2)


@pytest.fixture(scope="module")
def pyramid(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mixtura.cli import work

    out = tmp_path_factory.mktemp("pyramid") / "pyramid"
    layers = json.loads((tiny_dense / "config.json").read_text())["num_hidden_layers"]
    options = {"n_experts": [2] * (layers // 2), "top_k": 1, "combine": "coefficient"}
    said: list[str] = []
    work.upcycle([str(tiny_dense)], out, "pyramid", options, device="cpu", dry_run=False, command="c", say=said.append)
    assert "vLLM cannot serve it" in said[-1]
    return out


def test_upcycle_writes_a_pyramid_that_answers_as_the_dense_model(here, tiny_dense, tmp_path):  # noqa: F811
    layers = json.loads((tiny_dense / "config.json").read_text())["num_hidden_layers"]
    wanted = f"2x{layers // 2}"
    command = ("upcycle", tiny_dense, "out", "--method", "pyramid", "--experts", wanted)
    shown = here(*command, "--dry-run", cwd=tmp_path)
    assert shown.returncode == 0 and not (tmp_path / "out").exists()
    done = here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dense, grown = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (tiny_dense, tmp_path / "out")
    )
    # What was estimated before is what came out: the size of a pyramid is known from its config.
    total = sum(p.numel() for p in grown.parameters())
    assert f"{total / 1e6:,.1f} M parameters" in shown.stdout
    ids = torch.randint(3, 50, (2, 9))
    torch.testing.assert_close(grown(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_student_is_written_and_loads(here, pyramid, text, tmp_path):  # noqa: F811
    done = here("distill", pyramid, "student", "--layers", 1, "--text", text, *SMALL, "--lr", 1e-2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out perplexity" in done.stdout and "the teacher's" in done.stdout
    out = tmp_path / "student"
    assert not out.with_name("student.state").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.num_hidden_layers == 1
    assert model(torch.tensor([tokenizer("1 + 1")["input_ids"]])).logits.isfinite().all()
    assert "stop=0.7" in (out / "README.md").read_text()


def test_an_interrupted_distillation_goes_on(here, pyramid, text, tmp_path, monkeypatch):  # noqa: F811
    command = ("distill", pyramid, "student", "--layers", 1, "--text", text, *SMALL)
    own = students.StagedDistillation.forward

    def interrupted(self, *args, **kwargs):
        if args[-1] > 0.6:  # progress: step 4 of 6
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    monkeypatch.setattr(students.StagedDistillation, "forward", interrupted)
    assert here(*command, cwd=tmp_path).returncode == 130
    monkeypatch.setattr(students.StagedDistillation, "forward", own)
    assert here(*command[:-2], "--checkpoint-every", 3, "--stop", 0.5, cwd=tmp_path).returncode == 1
    done = here(*command, cwd=tmp_path)
    assert done.returncode == 0 and "went on from step 4" in done.stdout


def test_a_dry_run_writes_nothing(here, pyramid, text, tmp_path):  # noqa: F811
    done = here("distill", pyramid, "student", "--layers", 1, "--text", text, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "a student of 1 of" in done.stdout and not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", 9), "keep_layers must be between 1 and"),
        (("--layers", 1, "--stop", 2), "stop is a share of the steps and must be between 0 and 1, got 2.0"),
        (("--layers", 1, "--tau", 0), "tau must be > 0"),
        (("--layers", 1, "--steps", 0), "--steps must be at least 1, got 0"),
        (("--layers", 1, "--batch", 0), "--batch must be at least 1 and --balance >= 0, got 0 and 0.01"),
        (("--layers", 1, "--device", "tpu9"), "--device must be"),
    ],
)
def test_mistakes_are_said_in_a_line(options, message, here, pyramid, text, tmp_path):  # noqa: F811
    done = here("distill", pyramid, "student", "--text", text, *options, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr


def test_a_teacher_that_is_not_there_is_said(here, text, tmp_path):  # noqa: F811
    done = here("distill", "./nowhere", "student", "--layers", 1, "--text", text, cwd=tmp_path)
    assert done.returncode == 1 and "nowhere does not exist" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "pyramid", "--experts", "2,4,4,4,4,4"), "num_experts must have one number for each of the"),
        (("--method", "pyramid", "--top-k", 2), "top_k must be 1 for a pyramid"),
        (("--experts", "2,4"), "--experts as a list goes with --method pyramid, got '2,4' for copy"),
        (("--combine", "sum"), "--combine goes with --method pyramid, got it with copy"),
        (("--experts", "two"), "--experts must be whole numbers above 0"),
    ],
)
def test_mistakes_in_a_pyramid_are_said_in_a_line(options, message, here, tiny_dense, tmp_path):  # noqa: F811
    done = here("upcycle", tiny_dense, "out", *options, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr


def test_experts_are_written_as_people_write_them():
    assert expert_counts("8") == [8]
    assert expert_counts("4,4,8") == [4, 4, 8] == expert_counts("4x2, 8")
