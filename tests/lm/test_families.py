"""Every dense family, from a tiny configuration: read in our own words, and upcycled without changing what it computes."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from mixtura.lm.families import (
    FAMILIES,
    NATIVE,
    NotDense,
    UnsupportedFamily,
    build,
    native_family,
    read_dense,
    why_not,
)
from mixtura.lm.families.save import save_checkpoint
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.upcycle import to_standard, upcycle

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 24,
    "dense_layers": [0],
    "attention": "latent",
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
GROUPED = TINY | {"num_key_value_heads": 2}
FALCON = {k: v for k, v in TINY.items() if k != "intermediate_size"} | {"ffn_hidden_size": 48}

# name -> (config of a dense model, what plain upcycling writes)
DENSE = {
    "llama": (hf.LlamaConfig(**GROUPED), "mixtral"),
    "llama with scaled rope": (
        hf.LlamaConfig(**TINY, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "mixtral",
    ),
    "llama with biases, tied": (
        hf.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "mixtura",
    ),
    "smollm2": (hf.LlamaConfig(**GROUPED, tie_word_embeddings=True, rope_theta=1e5), "mixtral"),
    "mistral with a window": (hf.MistralConfig(**GROUPED, sliding_window=5), "mixtral"),
    "qwen2": (hf.Qwen2Config(**GROUPED, tie_word_embeddings=True), "qwen2_moe"),
    "qwen3": (hf.Qwen3Config(**GROUPED, head_dim=16), "qwen3_moe"),
    "gemma": (hf.GemmaConfig(**TINY, num_key_value_heads=1, head_dim=16), "mixtral"),
    "olmo": (hf.OlmoConfig(**TINY, tie_word_embeddings=True), "mixtral"),
    "olmo with clamping": (hf.OlmoConfig(**TINY, clip_qkv=0.02), "mixtura"),
    "olmo2": (hf.Olmo2Config(**GROUPED), "flex_olmo"),
    "smollm3": (hf.SmolLM3Config(**GROUPED, no_rope_layer_interval=2), "mixtura"),
    "phi": (hf.PhiConfig(**TINY), "mixtura"),
    "phi with query norms": (hf.PhiConfig(**TINY, qk_layernorm=True), "mixtura"),
    "phi3": (hf.Phi3Config(**GROUPED), "mixtral"),
    "cohere": (hf.CohereConfig(**GROUPED), "mixtura"),
    "falcon 7b": (hf.FalconConfig(**FALCON), "mixtura"),
    "falcon 40b": (hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2), "mixtura"),
    "falcon rw": (
        hf.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, bias=True, tie_word_embeddings=False),
        "mixtura",
    ),
    "gpt_neox": (hf.GPTNeoXConfig(**TINY), "mixtura"),
    "gpt_neox in sequence": (hf.GPTNeoXConfig(**TINY, use_parallel_residual=False), "mixtura"),
}
TOKENS = torch.arange(3, 27).view(2, 12)
# float32 sums of 32 to 64 terms in another order: a few units in the last place of logits of size 2.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def dense_model(name):
    """The tiny model with every parameter moved off its initial value, norms and biases included."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(DENSE[name][0])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def test_every_known_family_is_tried_here():
    tried = {config.model_type for config, _ in DENSE.values()}
    assert tried == set(FAMILIES) - {"mixtura"}


@pytest.mark.parametrize("name", DENSE)
def test_our_decoder_computes_what_the_family_computes(name):
    model = dense_model(name)
    dense = read_dense(model)
    ours = build(dense.config, lambda key: dense.tensor(key).clone())
    torch.testing.assert_close(logits(ours), logits(model), **CLOSE)


@pytest.mark.parametrize("name", DENSE)
def test_a_model_on_disk_reads_as_in_memory(name, tmp_path):
    model = dense_model(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    in_memory, on_disk = read_dense(model), read_dense(tmp_path)
    assert in_memory.config.to_dict() == on_disk.config.to_dict() | {"_name_or_path": ""}
    for key in in_memory.shapes:
        assert torch.equal(in_memory.tensor(key), on_disk.tensor(key)), key


@pytest.mark.parametrize("name", DENSE)
def test_copies_compute_what_the_dense_model_computes(name):
    model, family = dense_model(name), DENSE[name][1]
    result = upcycle(model, n_experts=4, top_k=2)
    assert result.config.model_type == family
    torch.testing.assert_close(logits(result), logits(model), **CLOSE)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("name", DENSE)
def test_segments_compute_what_the_dense_model_computes(name, shared):
    model = dense_model(name)
    result = upcycle(model, method="fine-grained", n_experts=3, segments=4, shared=shared)
    torch.testing.assert_close(logits(result), logits(model), **CLOSE)


def test_native_results_load_in_a_process_without_mixtura(tmp_path):
    """One process for all families: what takes long is the import."""
    wanted = {}
    for name, (_, family) in DENSE.items():
        if family == "mixtura":
            continue
        for method, options in (("copy", {}), ("fine-grained", {"segments": 4})):
            result = upcycle(dense_model(name), method=method, n_experts=3, **options)
            folder = tmp_path / f"{name} {method}"
            result.save_pretrained(folder)
            wanted[str(folder)] = logits(result)
    torch.save({"tokens": TOKENS}, tmp_path / "tokens")
    script = """
import sys, torch, transformers
sys.modules["mixtura"] = None
out = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        out[folder] = model(torch.arange(3, 27).view(2, 12)).logits
torch.save(out, sys.argv[1])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "logits"), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    got = torch.load(tmp_path / "logits")
    for folder, want in wanted.items():
        torch.testing.assert_close(got[folder], want, **CLOSE, msg=lambda m, f=folder: f"{f}: {m}")


@pytest.mark.parametrize("shared", [0, 16])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_native_family_is_chosen_only_where_it_computes_the_same(placement, qk_norm, renormalise, shared):
    config = MixturaConfig(
        **TINY,
        num_experts=4,
        norm_topk_prob=renormalise,
        shared_expert_intermediate_size=shared,
        qk_norm=qk_norm,
        norm_placement=placement,
    )
    torch.manual_seed(0)
    model = MixturaForCausalLM(config).eval()
    if native_family(config) is None:
        with pytest.raises(ValueError, match="no native family"):
            to_standard(model)
    else:
        torch.testing.assert_close(logits(to_standard(model)), logits(model), **CLOSE)


def test_each_native_family_is_reached():
    reached = {
        native_family(MixturaConfig(**TINY | {"num_experts": 4} | parts))
        for parts in (
            {},
            {"qkv_bias": True},
            {"qk_norm": "head"},
            {"qk_norm": "full"},
            {"qk_norm": "full", "norm_placement": "after"},
            DEEPSEEK,
        )
    }
    assert reached == set(NATIVE)


def test_attention_experts_have_no_native_family():
    config = MixturaConfig(**TINY, num_experts=4, attention="mixture", attention_experts=4)
    assert {why_not(family, config) for family in NATIVE} == {"attention experts"}


def test_a_mixture_is_refused_with_its_experts():
    config = hf.MixtralConfig(**TINY, num_local_experts=4)
    with pytest.raises(NotDense, match="already a mixture of experts with num_local_experts=4"):
        upcycle(hf.AutoModelForCausalLM.from_config(config))
    with pytest.raises(NotDense, match="num_experts=3"):
        upcycle(upcycle(dense_model("phi"), n_experts=3))


def test_an_unknown_family_is_named_and_the_known_ones_are_listed():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedFamily, match=r"GPT2LMHeadModel is of the family 'gpt2'.*Llama \(llama\)"):
        upcycle(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            hf.Qwen2Config(**TINY, use_sliding_window=True, sliding_window=4, max_window_layers=1),
            "mixes kinds of attention",
        ),
        (hf.GemmaConfig(**TINY, use_bidirectional_attention=True), "reads both ways"),
        (hf.CohereConfig(**TINY, use_qk_norm=True), "use_qk_norm=True"),
        (hf.FalconConfig(**FALCON, alibi=True), "alibi=True"),
    ],
)
def test_a_variant_that_cannot_be_expressed_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        upcycle(hf.AutoModelForCausalLM.from_config(config))


def test_quantized_weights_are_refused(tmp_path):
    model = dense_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantized"):
        upcycle(model)


@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi", "olmo2"])
def test_writing_shard_by_shard_writes_what_save_pretrained_writes(name, shard_bytes, tmp_path):
    model = upcycle(dense_model(name), n_experts=3)
    model.save_pretrained(tmp_path / "theirs")
    save_checkpoint(model, tmp_path / "ours", shard_bytes=shard_bytes)
    tensors = [
        {k: v for file in (tmp_path / who).glob("*.safetensors") for k, v in load_file(file).items()}
        for who in ("theirs", "ours")
    ]
    assert set(tensors[0]) == set(tensors[1])
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    assert (tmp_path / "theirs/config.json").read_text() == (tmp_path / "ours/config.json").read_text()
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(model))


def test_a_path_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        upcycle(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        upcycle(tmp_path / "nothing")
    dense_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no safetensors weights"):
        upcycle(tmp_path)


def test_a_file_cut_short_is_named(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or cut short"):
        upcycle(tmp_path)
