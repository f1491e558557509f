"""Tiny models of every mixture-of-experts family that the installed transformers has, found by looking, not by name."""

import pathlib
import re
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mixtura.lm.anatomy import CONFIG_NAMES

E, K = 4, 2

# Field of a config -> value of a tiny model. The first pattern that matches the whole name counts.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size(_per_layer_input)?|padded_vocab_size", 64),
    (r"num_hidden_layers|num_layers|n_layers", 4),
    (r"hidden_size|d_model|dim", 32),
    (r"zero_expert_num", 0),
    (r"kv_n_heads", 2),
    (r"(moe_)?num_shared_experts|n_shared_experts|num_shared_expert", 1),
    (r"moe_layer_freq|decoder_sparse_step|moe_layer_interval|expert_layer_period", 1),
    (
        r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|inner_size|d_inner)(_\w+)?|prefix_dense_intermediate_size",
        32,
    ),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts", E),
    (
        r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts|router_topk|moe_router_topk",
        K,
    ),
    (r"n_group|topk_group|num_expert_group|moe_n_group", 1),
    (
        r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_hash_layers|num_hash_layers|expert_layer_offset",
        0,
    ),
    (
        r"num_attention_heads|num_heads|n_heads|linear_num_\w+_heads|index_n_heads|lightning_\w*heads|swa_num_attention_heads",
        4,
    ),
    (r"num_key_value_heads|num_kv_heads|num_global_key_value_heads|swa_num_key_value_heads", 2),
    (r"(\w+_)?head_dim|v_head_dim|qk_rope_head_dim|qk_nope_head_dim|qk_head_dim|linear_\w+_head_dim|kv_channels", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|index_head_dim", 16),
    (r"max_position_embeddings|max_seq_len", 128),
    (r"sliding_window(_size)?|attention_chunk_size|index_topk", 16),
    (r"mamba_n_heads", 4),
    (r"mamba_d_head", 16),
)

# What a size cannot express: switches, and layouts that a family derives only if they are given.
SETTINGS: dict[str, Any] = {
    "enable_moe_block": True,
    "layer_types": ["conv", "full_attention"] * 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}


def families() -> list[str]:
    """Model types of causal language models whose code calls experts as transformers' interface does, or that count experts."""
    root = pathlib.Path(transformers.__file__).parent / "models"
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]
        except KeyError:
            continue
        folder = root / folder_of(model_type)
        code = "".join(file.read_text() for file in folder.glob("modeling_*.py"))
        uses = "@use_experts_implementation" in code or "top_k_index" in code
        if uses or _counts_experts(config):
            found.append(model_type)
    return found


def folder_of(model_type: str) -> str:
    """Name of the folder that holds the family's code; a text model and its multimodal parent share one."""
    return str(CONFIG_MAPPING[model_type].__module__.split(".")[2])


def _counts_experts(kind: type) -> bool:
    try:
        text = kind().get_text_config()
    except Exception:  # a config without defaults of its own
        return False
    counts = [getattr(text, name, None) for name in CONFIG_NAMES]
    return any(isinstance(count, int) and count > 1 for count in counts)


def tiny_config(model_type: str) -> Any:
    """A config of the family with every size shrunk; nested text configs as well."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    text = default.get_text_config()
    if text is not default:
        name = next(n for n, sub in kind.sub_configs.items() if isinstance(text, sub) or n == "text_config")
        return kind(**{name: tiny_config(text.model_type).to_dict()})
    sizes = _shrunk(default) | _parts(default)
    try:
        return kind(**sizes)
    except Exception as error:
        # Some families serve one expert a token only, and say so.
        if "num_experts_per_tok" not in str(error):
            raise
        return kind(**{**sizes, "num_experts_per_tok": 1})


def tiny_model(model_type: str, seed: int = 0) -> Any:
    """A random model of the tiny config, float32, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), experts_implementation="eager").eval().float()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            # The usual 0.02 leaves experts so alike that a wrong one would hardly show.
            torch.nn.init.normal_(parameter, std=0.2 if "embed" not in name else 1.0)
    return model


def _parts(default: Any) -> dict[str, Any]:
    """Configs inside a config (DBRX keeps its feed-forward's in one), shrunk."""
    parts = {name: getattr(default, name, None) for name in type(default).sub_configs}
    # transformers' own default of this part lacks fields that its model reads.
    extra = {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}}
    return {name: _shrunk(part) | extra.get(name, {}) for name, part in parts.items() if part is not None}


def _shrunk(default: Any) -> dict[str, Any]:
    sizes = {}
    for name, value in default.to_dict().items():
        if isinstance(value, bool) or not isinstance(value, (int, type(None))):
            continue
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                if not (value is None and "intermediate" in name and "moe" not in name):
                    sizes[name] = size
                break
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # latent attention has as many as queries
    if "qk_head_dim" in sizes and "qk_nope_head_dim" in sizes:
        sizes["qk_head_dim"] = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]
    for name, value in SETTINGS.items():
        if getattr(default, name, ...) in (None, False):
            sizes[name] = value
    return sizes | {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id") if hasattr(default, name)}
