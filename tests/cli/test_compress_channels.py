"""``mixtura compress --method mixllm`` as a person meets it."""

import json
import sys
from pathlib import Path

import pytest

from mixtura.cli import main
from mixtura.data.texts import corpus


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run a command in this process: (exit status, what it said, what it complained of)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixtura", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.txt"
    path.write_text("\n".join(corpus("arithmetic", characters=30_000).train))
    return path


def test_a_dense_checkpoint_is_compressed_said_drawn_and_generates(run, tiny_dense: Path, sums: Path, tmp_path: Path):
    command = ["compress", tiny_dense, "small", "--method", "mixllm", "--bits", "4.8", "--text", sums]
    code, said, complaint = run(*command, "--samples", 3, "--length", 32)
    assert code == 0, complaint
    assert "channels at 8 bits:" in said and "v_proj" in said and "over those quantized" in said
    small = tmp_path / "small"
    settings = json.loads((small / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "mixtura-mixed-channels"
    assert settings["settings"]["high_share"] == pytest.approx(0.2)
    card = (small / "README.md").read_text()
    assert "--method mixllm --bits 4.8" in card and "2412.14590" in card and "import mixtura" in card
    assert (small / "channels.svg").read_text().startswith("<?xml")
    code, said, complaint = run("generate", small, "12 + 3 = ", "--tokens", 4)
    assert code == 0, complaint
    code, _, complaint = run(
        "compress", small, "again", "--method", "mixllm", "--text", sums, "--samples", 2, "--length", 32
    )
    assert code == 1 and "quantized already (mixtura-mixed-channels); start from the checkpoint in float" in complaint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "9"], "bits=9 cannot be reached: with channels of 4 and 8 bits the average lies between 4 and 8"),
        (["--bits", "2.5"], "lies between 4 and 8"),
        (["--prune", "0.02"], "--prune goes with --method mc-moe"),
        (["--text", "{short}", "--length", "256"], "do not fill one block of 256; give more text"),
        (["--length", "1"], "length must be at least 2"),
        (["--device", "warp"], "--device must be"),
    ],
)
def test_bad_input_is_one_clear_line(options, message, run, tiny_dense: Path, sums: Path, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("1 + 1 = 2\n2 + 2 = 4\n")
    given = [option.format(short=short) for option in options]
    text = [] if "--text" in given else ["--text", sums]
    code, _, complaint = run("compress", tiny_dense, "out", "--method", "mixllm", "--samples", 2, *text, *given)
    assert code == 1 and message in complaint and "Traceback" not in complaint
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(run, tiny_dense: Path, sums: Path, tmp_path: Path):
    code, said, _ = run("compress", tiny_dense, "out", "--method", "mixllm", "--text", sums, "--dry-run")
    assert code == 0 and "4.4 bits a weight" in said and "memory" in said
    assert not (tmp_path / "out").exists()


def test_an_option_that_would_do_nothing_is_an_error_of_the_function_too(tiny_dense: Path):
    from mixtura.lm import compress

    with pytest.raises(ValueError, match="takes bits and no prune"):
        compress(None, None, ["text"], method="mixllm", bits=None)
    with pytest.raises(ValueError, match=r"scope must be one of \['model', 'block'\]"):
        compress(None, None, ["text"], method="mixllm", scope="layer")
