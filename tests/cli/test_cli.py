"""The command line as a person meets it: help that teaches, errors of one line, commands that run one after another."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from mixtura.cli import main

COMMANDS = (
    "demo",
    "systems",
    "show",
    "claim",
    "upcycle",
    "train",
    "compress",
    "prune",
    "generate",
    "inspect",
    "compare",
    "explain",
)


@dataclass
class Done:
    """What a command said and how it ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in this process, which is much quicker than importing torch again."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, cwd: Path) -> Done:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["mixtura", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def mixtura(*arguments: object, cwd: Path | None = None, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mixtura", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "MIXTURA_PROGRESS": "0", "COLUMNS": "200"},
        timeout=300,
    )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mixtura.data.texts import corpus

    folder = tmp_path_factory.mktemp("text") / "sums"
    folder.mkdir()
    for i, document in enumerate(corpus("arithmetic", characters=40_000).train):
        (folder / f"{i:03d}.txt").write_text(document)
    return folder


@pytest.fixture(scope="module")
def moe(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe") / "moe"
    mixtura("upcycle", tiny_dense, out, "--experts", 4, "--top-k", 2)
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command: str, here, tmp_path: Path):
    shown = here(command, "--help", cwd=tmp_path).stdout
    assert f"mixtura {command}" in shown.split("Options")[0].split("Usage")[1].split("\n", 2)[2]


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = "import sys; from mixtura.cli.app import app; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_systems_are_listed_and_shown():
    assert "spectral-unmixing" in mixtura("systems").stdout
    assert "not built yet" in mixtura("systems", "--room", "audio").stdout
    assert "2410.06270" in mixtura("show", "mc-moe").stdout


def test_an_upcycled_checkpoint_is_native_and_has_a_card(moe: Path):
    assert json.loads((moe / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    card = (moe / "README.md").read_text()
    assert "mixtura upcycle" in card and "base_model" not in card.split("---")[1].replace("mixture", "")
    code = (
        "import sys; from transformers import AutoModelForCausalLM; "
        f"m = AutoModelForCausalLM.from_pretrained({str(moe)!r}); print(type(m).__name__, 'mixtura' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["MixtralForCausalLM", "False"]


def test_the_life_of_a_mixture_command_by_command(moe: Path, text: Path, tmp_path: Path):
    trained, small = tmp_path / "trained", tmp_path / "small"
    said = mixtura("train", moe, "--text", text, "--steps", 3, "--length", 32, "--out", trained).stdout
    assert "held-out perplexity" in said
    assert not trained.with_name("trained.state").exists()
    said = mixtura("compress", trained, small, "--bits", 2.5, "--text", text, "--samples", 4, "--length", 64).stdout
    assert "bits a weight" in said
    assert (small / "README.md").exists()
    for decode in ("greedy", "sample", "self-contrast"):
        mixtura("generate", small, "12 + 3 = ", "--decode", decode, "--tokens", 4)
    compared = ("compare", moe, small, "--text", text, "--report", tmp_path / "c.html", "--plot", tmp_path / "c.svg")
    said = mixtura(*compared, "--samples", 2, "--length", 32, "--context", 32, "--tokens", 2).stdout
    assert "excess" in said and small.name in said
    assert all((tmp_path / f"c.{kind}").exists() for kind in ("html", "json", "svg"))
    mixtura("inspect", small, "--text", text, "--report", tmp_path / "r.html", "--samples", 2, "--length", 32)
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_an_interrupted_training_goes_on(moe: Path, text: Path, tmp_path: Path):
    arguments = ["train", moe, "--text", text, "--steps", "400", "--length", "32", "--checkpoint-every", "5"]
    command = [sys.executable, "-m", "mixtura", *map(str, arguments), "--out", str(tmp_path / "t")]
    # Where the tests run in the background of a script SIGINT is ignored, and children would ignore it, too.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    state = tmp_path / "t.state" / "training.json"
    until = time.monotonic() + 120
    while not state.exists() and time.monotonic() < until and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "interrupted" in said and not (tmp_path / "t").exists()
    done = len(json.loads(state.read_text())["losses"])
    assert 5 <= done < 400
    # Fewer steps would be another schedule, so the rest of the same one is run.
    said = mixtura(*arguments, "--out", tmp_path / "t").stdout
    assert f"went on from step {done}" in said
    assert (tmp_path / "t" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcycle", "{text}", "{out}"], "is no checkpoint: it holds no config.json"),
        (["upcycle", "/nowhere/model", "{out}"], "does not exist"),
        (["upcycle", "{dense}", "{out}", "--top-k", "9", "--experts", "4"], "top_k"),
        (["upcycle", "{moe}", "{out}"], "mixture"),
        (["upcycle", "{dense}", "{dense}"], "is also the source"),
        (["upcycle", "{dense}"], "mixtura upcycle SRC DST"),
        (["compress", "{dense}", "{out}"], "is a dense model"),
        (["compress", "{moe}", "{out}", "--bits", "9", "--text", "{text}", "--samples", "2", "--length", "32"], "9"),
        (["train", "{moe}", "--text", "{empty}"], "is empty"),
        (["train", "{moe}", "--text", "{binary}"], "is not UTF-8 text"),
        (["train", "{moe}", "--device", "warp"], "--device must be"),
        (["train", "{moe}", "--text", "{text}", "--out", "{moe}"], "is also the source"),
        (["train", "{moe}", "--text", "{text}", "--out", "{empty}"], "empty.txt is a file; give a directory to write"),
        (["train", "{moe}", "--batch", "0"], "--batch must be at least 1 and --balance >= 0, got 0 and 0.01"),
        (["train", "{moe}", "--balance", "-1"], "--batch must be at least 1 and --balance >= 0, got 4 and -1"),
        (["train", "{bare}", "--text", "{text}", "--steps", "1"], "holds no tokenizer (tokenizer.json); copy the"),
        (["inspect", "{moe}", "--report", "r.json"], "--report must end in .html, got 'r.json'"),
        (["inspect", "{moe}", "--text", "{text}", "--samples", "0"], "must be at least 1, got 0"),
        (["compare", "{moe}", "{dense}", "--report", "c.json"], "--report must end in .html, got 'c.json'"),
        (["generate", "{moe}", "   "], "prompt is empty"),
        (["generate", "{dense}", "1 + 1", "--decode", "self-contrast"], "Llama"),
        (["generate", "{moe}", "1 + 1", "--decode", "self-contrast", "--contrast", "best"], "must look like rank:2"),
        (["generate", "{damaged}", "1 + 1"], "is damaged"),
        (["generate", "{pickled}", "1 + 1"], "pickle"),
        (["compare", "{moe}"], "at least two checkpoints"),
        (["compare", "{moe}", "{dense}", "--plot", "c.gif"], "--plot must end in .png, .svg or .pdf, got 'c.gif'"),
        (["show", "nope"], "no system is called 'nope'"),
        (["claim", "nope"], "no claim for 'nope'"),
        (["systems", "--room", "attic"], "--room must be one of"),
        (["demo", "--model", "{moe}", "--steps", "1"], "mixture"),
        (["demo", "--model", "{dense}", "--text", "{text}"], "at least two domains"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, here, tiny_dense, moe, text, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in moe.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((moe / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((moe / name).read_bytes())
    places = {
        "bare": bare,
        "text": text,
        "dense": tiny_dense,
        "moe": moe,
        "out": tmp_path / "out",
        "empty": tmp_path / "empty.txt",
        "binary": tmp_path / "binary.txt",
        "damaged": damaged,
        "pickled": pickled,
    }
    done = here(*(a.format(**places) for a in arguments), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["upcycle", "train", "compress", "inspect", "compare", "demo"])
def test_a_dry_run_says_what_it_takes_and_writes_nothing(command, here, tiny_dense, moe, text, tmp_path):
    arguments = {
        "upcycle": [tiny_dense, tmp_path / "out"],
        "train": [moe, "--text", text, "--out", tmp_path / "out"],
        "compress": [moe, tmp_path / "out", "--text", text],
        "inspect": [moe, "--text", text],
        "compare": [moe, tiny_dense, "--text", text],
        "demo": ["--model", tiny_dense, "--out", tmp_path / "out"],
    }[command]
    done = here(command, *arguments, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "parameters" in said and "memory" in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(moe: Path, tiny_dense: Path, tmp_path: Path):
    out = tmp_path / "out"
    mixtura("upcycle", tiny_dense, out, "--experts", 2)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    code = (
        "import errno, sys\nfrom mixtura.cli import main\nimport mixtura.lm.families.save as save\n"
        "def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "save.save_file = full\n"
        f"sys.argv = ['mixtura', 'upcycle', {str(tiny_dense)!r}, {str(out)!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "the disk is full" in done.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
