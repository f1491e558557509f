"""``save_pretrained(family=...)``: transformers' own classes compute what the decoder made of parts computed."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.lm.families import NATIVE, why_not
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
FINE = EXPERTS | {"norm_topk_prob": False, "shared_expert_intermediate_size": 24}
LATENT = {
    "attention": "latent",
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
CASES = {
    "mixtral": ("mixtral", EXPERTS | {"num_key_value_heads": 2}),
    "mixtral, norms of 1 + w": ("mixtral", EXPERTS | {"norm": "rms_plus_one"}),
    "olmoe": ("olmoe", EXPERTS | {"norm_topk_prob": False, "qk_norm": "full"}),
    "olmoe, clamped": ("olmoe", EXPERTS | {"qk_norm": "full", "clip_qkv": 0.5}),
    "qwen2_moe, fine-grained behind a dense layer": ("qwen2_moe", FINE | {"dense_layers": [0]}),
    "qwen2_moe, tied": ("qwen2_moe", FINE | {"qkv_bias": True, "tie_word_embeddings": True}),
    "qwen3_moe behind a dense layer": ("qwen3_moe", EXPERTS | {"qk_norm": "head", "dense_layers": [1]}),
    "deepseek_v2": ("deepseek_v2", FINE | LATENT),
    "deepseek_v2 behind a dense layer": ("deepseek_v2", FINE | LATENT | {"q_lora_rank": 9, "dense_layers": [0]}),
    "deepseek_v2 with biases": ("deepseek_v2", FINE | LATENT | {"q_lora_rank": 9, "qkv_bias": True, "o_bias": True}),
}
TOKENS = torch.randint(2, 61, (2, 11), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order; logits are of size 1


def model(parts):
    torch.manual_seed(0)
    net = MixturaForCausalLM(MixturaConfig(**SHAPE | copy.deepcopy(parts), initializer_range=0.2)).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():  # norms of ones and biases of zeros would hide a mistake
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    return net


@pytest.mark.parametrize("name", CASES)
def test_the_family_answers_and_continues_as_the_decoder_does(name, tmp_path):
    family, parts = CASES[name]
    ours = model(parts)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    ours.save_pretrained(tmp_path, family=family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == NATIVE[family].model
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS).logits, **CLOSE)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(TOKENS, **options), ours.generate(TOKENS, **options))


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v2"])
def test_each_block_alone_is_the_familys_block(name, tmp_path):
    family, parts = CASES[name]
    ours = model(parts)
    ours.save_pretrained(tmp_path, family=family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    for mine, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        torch.testing.assert_close(mine.mlp(x), other.mlp(x), **CLOSE)


@pytest.mark.parametrize(
    ("family", "parts", "reason"),
    [
        ("mixtral", FINE, "a shared expert"),
        ("mixtral", EXPERTS | {"dense_layers": [0]}, "some dense layers"),
        ("mixtral", {}, "a dense feed-forward part"),
        ("qwen2_moe", FINE | LATENT, "latent attention"),
        ("deepseek_v2", FINE, "attention without a latent"),
        ("deepseek_v2", EXPERTS | LATENT, "gates that are made to sum to 1"),
        ("deepseek_v2", FINE | LATENT | {"dense_layers": [1]}, "dense layers that are not the first ones"),
        ("deepseek_v2", FINE | LATENT | {"shared_expert_intermediate_size": 18}, "no multiple of a routed one"),
    ],
)
def test_what_a_family_cannot_express_is_named(family, parts, reason, tmp_path):
    assert reason in why_not(family, MixturaConfig(**SHAPE | copy.deepcopy(parts)))
    with pytest.raises(ValueError, match=f"cannot express .*{reason}"):
        model(parts).save_pretrained(tmp_path, family=family)


def test_an_unknown_family_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"family must be one of \['deepseek_v2', .*got 'mixtrol'"):
        model(EXPERTS).save_pretrained(tmp_path, family="mixtrol")
    with pytest.raises(TypeError, match=r"takes no further option, got .'max_shard_size'"):
        model(EXPERTS).save_pretrained(tmp_path, family="mixtral", max_shard_size=1)
