"""``mixtura plan``: tables, pictures and recorded loads, and words for what does not fit."""

import json

import pytest
from typer.testing import CliRunner

from mixtura.cli.app import app

CONFIG = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "max_position_embeddings": 128,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def run(*words):
    result = CliRunner().invoke(app, ["plan", *map(str, words)])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_a_plan_is_tables_a_picture_and_figures(config, tmp_path):
    code, said = run(
        config, "--gpus", 8, "--cluster", "A", "--memory", 1, "--tokens", 64, "--iterations", 6,
        "--plot", tmp_path / "p.png", "--out", tmp_path / "p.json",
    )  # fmt: skip
    assert code == 0, said
    for words in ("E: experts split", "expert parallelism", "hecate", "Fits: E", "over EP"):
        assert words in said
    assert (tmp_path / "p.png").stat().st_size > 5000
    figures = json.loads((tmp_path / "p.json").read_text())
    assert figures["seconds"]["ep"]["all"] > 0
    assert figures["memory"]["E"]["device"] == pytest.approx(
        sum(figures["memory"]["E"][k] for k in ("weights", "gradients", "states"))
    )


def test_too_little_memory_says_what_is_least(config):
    code, said = run(config, "--gpus", 4, "--memory", 1e-6, "--host", 0, "--tokens", 8, "--iterations", 3)
    assert code == 0
    assert "Nothing fits; the least is" in said


def test_more_devices_than_experts_have_no_times(config):
    code, said = run(config, "--gpus", 16, "--tokens", 8, "--iterations", 3)
    assert code == 0, said
    assert "16 does not divide" in said.replace("\n", " ")
    assert "E+D: the same" in said


def test_loads_are_recorded_from_a_checkpoint_and_read_again(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The number {n} stands beside {n + 1}, and {n * n} is its square." for n in range(300))
    )
    made = CliRunner().invoke(
        app, ["train", str(config), "--text", str(text), "--steps", "1", "--out", str(tmp_path / "m")]
    )
    assert made.exit_code == 0, made.output
    where = tmp_path / "loads.safetensors"
    code, said = run(tmp_path / "m", "--text", text, "--record", where, "--gpus", 2, "--tokens", 64, "--iterations", 4)
    assert code == 0, said
    code, again = run(tmp_path / "m", "--loads", where, "--gpus", 2, "--tokens", 64, "--iterations", 4)
    assert code == 0, again
    assert said[said.index(" billion") :].strip() == again[again.index(" billion") :].strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "Z"], "cluster must be one of"),
        (["--gpus", "12", "--cluster", "A"], "multiple of it on cluster A"),
        (["--memory", "0"], "--memory must be > 0"),
        (["--record", "x.safetensors"], "--record keeps the loads that --text makes"),
        (["--out", "x.txt"], "--out must end in .json"),
        (["--text", "."], "give its directory, not a config"),
    ],
)
def test_wrong_options_are_named(config, words, message):
    code, said = run(config, *words)
    assert code != 0
    assert message in said


def test_a_dense_model_has_nothing_to_place(tmp_path):
    path = tmp_path / "dense.json"
    path.write_text(json.dumps(CONFIG | {"num_experts": 0}))
    code, said = run(path)
    assert code != 0
    assert "no routed experts" in said
