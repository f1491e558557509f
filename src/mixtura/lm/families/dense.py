"""Dense families of transformers, each told in the decoder's own words: a config and where each tensor comes from.

A family is two functions: its config as fields of :class:`~mixtura.lm.model.MixturaConfig`, and a tensor of the decoder, by
the decoder's name, out of the family's tensors. Most families use the same names and need only the first.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Family", "Fields", "Source"]

Source = Callable[[str], Tensor]  # a tensor by its name in the checkpoint; KeyError if there is none
Fields = dict[str, Any]


def _same_name(name: str, source: Source, config: Any) -> Tensor:
    return source(name)


@dataclass(frozen=True)
class Family:
    """How one dense family reads.

    Attributes:
        title: as people write it.
        fields: the family's config -> fields of ``MixturaConfig``; raises ValueError for a variant it cannot express.
        tensor: (name in our decoder, the family's tensors, the family's config) -> tensor.
    """

    title: str
    fields: Callable[[Any], Fields]
    tensor: Callable[[str, Source, Any], Tensor] = _same_name


def _common(config: Any) -> Fields:
    """Fields that mean the same in every family."""
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "attention_dropout",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    fields = {name: getattr(config, name) for name in names if hasattr(config, name)}
    fields["intermediate_size"] = getattr(config, "ffn_hidden_size", None) or config.intermediate_size
    fields["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields["rope_parameters"] = _rope(config)
    fields["sliding_window"] = _window(config)
    return fields


def _rope(config: Any) -> dict[str, Any]:
    rope = copy.deepcopy(dict(config.rope_parameters))
    if rope.get("rope_type") == "longrope":
        raise ValueError(
            f"{config.model_type} with rope_type='longrope' switches its position embedding with the length of the text, "
            "which no mixture family does; use a checkpoint with plain rotary embeddings"
        )
    return rope


def _window(config: Any) -> int | None:
    """The sliding window that every layer has, or None."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
        raise ValueError(
            f"{config.model_type} mixes kinds of attention over its layers ({sorted(kinds)}); only models whose layers all "
            "attend alike can be read"
        )
    if kinds == {"full_attention"}:
        return None
    return getattr(config, "sliding_window", None) or None


def _llama(config: Any) -> Fields:
    bias = bool(getattr(config, "attention_bias", False))
    return _common(config) | {
        "norm_eps": config.rms_norm_eps,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
    }


def _qwen2(config: Any) -> Fields:
    return _llama(config) | {"qkv_bias": True}


def _qwen3(config: Any) -> Fields:
    return _llama(config) | {"qk_norm": "head"}


def _gemma(config: Any) -> Fields:
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("gemma with use_bidirectional_attention reads both ways; only causal models can be read")
    act = "gelu_pytorch_tanh" if config.hidden_act == "gelu" else config.hidden_act
    return _llama(config) | {"norm": "rms_plus_one", "embed_scale": config.hidden_size**0.5, "hidden_act": act}


def _olmo(config: Any) -> Fields:
    bias = bool(config.attention_bias)
    fields = {"norm": "layer", "norm_weight": False, "norm_eps": 1e-5, "qkv_bias": bias, "o_bias": bias}
    return _common(config) | fields | {"clip_qkv": config.clip_qkv}


def _olmo2(config: Any) -> Fields:
    return _llama(config) | {"qk_norm": "full", "norm_placement": "after"}


def _smollm3(config: Any) -> Fields:
    still = [i for i, rotates in enumerate(config.no_rope_layers or []) if not rotates]
    return _llama(config) | {"no_rope_layers": still}


def _phi(config: Any) -> Fields:
    layout = {"norm": "layer", "norm_bias": True, "norm_eps": config.layer_norm_eps, "block": "parallel"}
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "lm_head_bias"), True)
    return (
        _common(config) | layout | biases | {"mlp_gated": False, "qk_norm": "head" if config.qk_layernorm else "none"}
    )


def _cohere(config: Any) -> Fields:
    if config.use_qk_norm:
        raise ValueError("cohere with use_qk_norm=True has a norm for each head, which is not supported; others are")
    bias = bool(config.attention_bias)
    layout = {
        "norm": "layer",
        "norm_eps": config.layer_norm_eps,
        "block": "parallel",
        "logit_scale": config.logit_scale,
    }
    return _common(config) | layout | {"qkv_bias": bias, "o_bias": bias}


def _gpt_neox(config: Any) -> Fields:
    bias = bool(config.attention_bias)
    block = "parallel_two_norms" if config.use_parallel_residual else "sequential"
    layout = {"norm": "layer", "norm_bias": True, "norm_eps": config.layer_norm_eps, "block": block}
    return _common(config) | layout | {"qkv_bias": bias, "o_bias": bias, "mlp_bias": True, "mlp_gated": False}


def _falcon(config: Any) -> Fields:
    if config.alibi:
        raise ValueError("falcon with alibi=True has no rotary embedding, which is not supported; others are")
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    parallel = config.new_decoder_architecture or config.parallel_attn
    layout = {
        "norm": "layer",
        "norm_bias": True,
        "norm_eps": config.layer_norm_epsilon,
        "block": "parallel_two_norms" if two else "parallel" if parallel else "sequential",
        "hidden_act": config.activation,
        "mlp_gated": False,
        "num_key_value_heads": _falcon_groups(config),
    }
    return _common(config) | layout | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), bool(config.bias))


def _falcon_groups(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _mixtura(config: Any) -> Fields:
    skipped = {"transformers_version", "architectures", "model_type", "dtype", "_name_or_path"}
    return {k: copy.deepcopy(v) for k, v in config.to_dict().items() if k not in skipped}


def _renamed(renames: Mapping[str, str]) -> Callable[[str, Source, Any], Tensor]:
    def tensor(name: str, source: Source, config: Any) -> Tensor:
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        return source(name)

    return tensor


def _phi3_tensor(name: str, source: Source, config: Any) -> Tensor:
    """Phi-3 stores queries, keys and values as one matrix, gate and up as another."""
    head = config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    hidden = config.intermediate_size
    rows = {
        ".q_proj.": ("qkv", 0, queries),
        ".k_proj.": ("qkv", queries, queries + keys),
        ".v_proj.": ("qkv", queries + keys, queries + 2 * keys),
        ".gate_proj.": ("gate_up", 0, hidden),
        ".up_proj.": ("gate_up", hidden, 2 * hidden),
    }
    for part, (fused, first, last) in rows.items():
        if part in name:
            return source(name.replace(part, f".{fused}_proj."))[first:last]
    return source(name)


def _cohere_tensor(name: str, source: Source, config: Any) -> Tensor:
    """Cohere rotates neighbours (2j, 2j + 1); we rotate (j, j + half). Reordering the rows of queries and keys alike turns
    one into the other and leaves every score as it was."""
    tensor = source(name)
    if ".q_proj." not in name and ".k_proj." not in name:
        return tensor
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    order = torch.cat((torch.arange(0, head, 2), torch.arange(1, head, 2)))
    return tensor.view(-1, head, *tensor.shape[1:])[:, order].flatten(0, 1)


def _gpt_neox_tensor(name: str, source: Source, config: Any) -> Tensor:
    """GPT-NeoX interleaves queries, keys and values head by head."""
    head = config.hidden_size // config.num_attention_heads
    for which, part in enumerate(("q_proj", "k_proj", "v_proj")):
        if f".{part}." in name:
            fused = source(_neox_name(name.replace(part, "query_key_value")))
            return fused.view(-1, 3, head, *fused.shape[1:])[:, which].flatten(0, 1)
    return source(_neox_name(name))


def _neox_name(name: str) -> str:
    renames = {
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.norm": "gpt_neox.final_layer_norm",
        "model.layers": "gpt_neox.layers",
        "self_attn.o_proj": "attention.dense",
        "self_attn": "attention",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    for ours, theirs in renames.items():
        name = name.replace(ours, theirs)
    return name


def _falcon_tensor(name: str, source: Source, config: Any) -> Tensor:
    """Falcon stores, key/value head by key/value head, its queries, its key and its value."""
    rows = {"q_proj": slice(0, -2), "k_proj": slice(-2, -1), "v_proj": slice(-1, None)}
    groups, head = _falcon_groups(config), config.hidden_size // config.num_attention_heads
    for part, which in rows.items():
        if f".{part}." in name:
            fused = source(_falcon_name(name.replace(part, "query_key_value"), config))
            return fused.view(groups, -1, head, *fused.shape[1:])[:, which].flatten(0, 2)
    return source(_falcon_name(name, config))


def _falcon_name(name: str, config: Any) -> str:
    renames = {
        "model.embed_tokens": "transformer.word_embeddings",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "self_attn.o_proj": "self_attention.dense",
        "self_attn": "self_attention",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        renames |= {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
    for ours, theirs in renames.items():
        name = name.replace(ours, theirs)
    return name


PHI_NAMES = {
    "model.norm": "model.final_layernorm",
    "self_attn.o_proj": "self_attn.dense",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "self_attn.q_norm": "self_attn.q_layernorm",
    "self_attn.k_norm": "self_attn.k_layernorm",
}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", _llama),
    "mistral": Family("Mistral", _llama),
    "qwen2": Family("Qwen2", _qwen2),
    "qwen3": Family("Qwen3", _qwen3),
    "gemma": Family("Gemma", _gemma),
    "olmo": Family("OLMo", _olmo),
    "olmo2": Family("OLMo2", _olmo2),
    "smollm3": Family("SmolLM3", _smollm3),
    "phi": Family("Phi-1 and Phi-2", _phi, _renamed(PHI_NAMES)),
    "phi3": Family("Phi-3", _llama, _phi3_tensor),
    "cohere": Family("Cohere", _cohere, _cohere_tensor),
    "gpt_neox": Family("GPT-NeoX", _gpt_neox, _gpt_neox_tensor),
    "falcon": Family("Falcon", _falcon, _falcon_tensor),
    "mixtura": Family("a dense mixtura model", _mixtura),
}
