"""``mixtura plan``: tables, pictures and recorded loads, and words for what does not fit."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
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
        (["--loads", __file__], "is no trace of loads, which is a safetensors file"),
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


FAMILY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    "fields",
    [
        CONFIG | {"num_hidden_layers": 4, "dense_layers": [0, 2], "intermediate_size": 64, "moe_intermediate_size": 16},
        CONFIG | {"attention": "mixture", "attention_experts": 4},
        CONFIG
        | {"attention": "latent", "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        FAMILY | {"model_type": "mixtral", "num_local_experts": 8, "intermediate_size": 64},
        FAMILY
        | {"model_type": "qwen2_moe", "num_experts": 8, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
        | {"intermediate_size": 64, "shared_expert_intermediate_size": 16},
        FAMILY
        | {"model_type": "deepseek_v2", "n_routed_experts": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
        | {"intermediate_size": 64, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": None}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "architectures": ["DeepseekV2ForCausalLM"]},
    ],
    ids=["dense layers", "attention experts", "latent", "mixtral", "qwen2_moe", "deepseek_v2"],
)
def test_every_parameter_is_counted(fields, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    code, said = run(path, "--gpus", 8, "--tokens", 8, "--iterations", 3, "--out", tmp_path / "p.json")
    assert code == 0, said
    found = json.loads((tmp_path / "p.json").read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"model_type": "mixtura"} | fields))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    assert found["parameters"] == {"all": sum(p.numel() for p in model.parameters()), "experts": experts}
    parts = found["memory"]["E"]  # one device holds an eighth of the experts and all of the rest, 16 bytes each
    assert parts["device"] == 16 * (found["parameters"]["all"] - experts * 7 / 8)
    sparse = sum(any(f"layers.{i}.mlp.experts" in name for name, _ in model.named_parameters()) for i in range(4))
    assert sum(count > 0 for count in found["model"]["experts"]) == sparse


def test_a_pyramid_has_its_memory_planned_and_no_times(tmp_path):
    path = tmp_path / "pyramid.json"
    path.write_text(json.dumps(CONFIG | {"num_experts": [4, 8]}))
    code, said = run(path, "--gpus", 4, "--out", tmp_path / "p.json", "--plot", tmp_path / "p.svg")
    assert code == 0, said
    assert "one number of experts, and these have [4, 8]" in said.replace("\n", " ")
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["imbalance"] is None and found["seconds"] == {} and found["memory"]["E"]["device"] > 0
    code, said = run(path, "--gpus", 4, "--loads", "x.safetensors")
    assert code != 0 and "leave --loads and --text out" in said


def test_a_family_that_transformers_does_not_have_is_said(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"model_type": "mixtrall"}))
    code, said = run(path)
    assert code != 0 and "is no config that transformers builds" in said and "mixtrall" in said
