"""Write a model of the decoder's parts as a native family of transformers where one has the structure, else as our own.

Native families load with transformers alone, and in vLLM. Which family a config fits is one function a family that answers
with a reason (:func:`why_not`). Some structures fit after folding, which changes weights and no output:

- 1 + w of a Gemma norm becomes the weight of a plain RMS norm;
- a constant factor on the embedding goes into the embedding, which is then no longer tied to the head;
- LayerNorm is RMS norm of a vector whose mean is zero. Taking the mean off everything that writes into the residual stream
  (embedding, attention output, feed-forward output) keeps it zero, so OLMo's norm becomes an RMS norm, exactly.

Shared experts go to Qwen2-MoE beside plain attention, and to DeepSeek-V2 beside latent attention, of which plain attention is
no case. DeepSeek-V2 rotates neighbouring coordinates and we the two halves of a head: the rows are put in its order.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from mixtura.lm.families.dense import Source
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM

__all__ = ["NATIVE", "build", "fill", "native_family", "why_not"]

log = logging.getLogger(__name__)

DENSE_LAYERS = ("qwen2_moe", "qwen3_moe", "deepseek_v2")  # families whose layers need not all have experts
IDLE = (
    64  # width of a shared expert of zeros, where a family insists on one; divisible by any tensor-parallel size in use
)


@dataclass(frozen=True)
class Native:
    """A family of mixtures in transformers.

    Attributes:
        model: class name in transformers.
        fields: our config -> the family's own fields beyond the common ones.
        lacks: our config -> what the family cannot express, or None.
    """

    model: str
    fields: Callable[[MixturaConfig], dict[str, Any]]
    lacks: Callable[[MixturaConfig], str | None]


def native_family(config: MixturaConfig) -> str | None:
    """The transformers family that a mixture can be written as, or None: then it is a ``MixturaForCausalLM``.

    Example:
        >>> native_family(MixturaConfig(num_experts=8)), native_family(MixturaConfig(num_experts=8, qkv_bias=True))
        ('mixtral', 'qwen2_moe')
        >>> print(native_family(MixturaConfig(num_experts=8, attention="mixture", attention_experts=8)))
        None
    """
    return next((family for family in NATIVE if why_not(family, config) is None), None)


def why_not(family: str, config: MixturaConfig) -> str | None:
    """What of the config a native family cannot express, or None if it can.

    Raises:
        ValueError: an unknown family; the known ones are listed.
    """
    if family not in NATIVE:
        raise ValueError(f"family must be one of {sorted(NATIVE)}, got {family!r}")
    checks = {
        "attention experts": config.attention == "mixture",
        "latent attention": config.attention == "latent" and family != "deepseek_v2",
        "a dense feed-forward part": not config.num_experts,
        "layers with different numbers of experts": not isinstance(config.num_experts, int),
        "a learned share of the shared expert": config.shared_combine != "sum",
        "a limit on the tokens of an expert": config.eval_capacity_factor > 0,
        "a router that reads sparsity": config.router != "linear",
        "some dense layers": bool(config.dense_layers) and family not in DENSE_LAYERS,
        "a parallel block": config.block != "sequential",
        "norms with a bias": config.norm_bias,
        "LayerNorm behind the parts": config.norm == "layer" and config.norm_placement == "after",
        "LayerNorm of queries and keys": config.norm == "layer" and config.qk_norm != "none",
        "a feed-forward part without gate": not config.mlp_gated,
        "biases in the feed-forward part": config.mlp_bias,
        "a bias of the head": config.lm_head_bias,
        "clamped queries, keys and values": config.clip_qkv is not None and family != "olmoe",
        "layers without rotary embedding": bool(config.no_rope_layers),
        "partly rotated heads": config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
        "a factor on the logits": config.logit_scale != 1.0,
    }
    return next((what for what, has in checks.items() if has), None) or NATIVE[family].lacks(config)


def build(
    config: MixturaConfig,
    tensor: Source,
    *,
    family: str | None = None,
    generation_config: GenerationConfig | None = None,
) -> PreTrainedModel:
    """Build a model from its parameters, asked for one by one, so that no second copy is ever held.

    Args:
        config: what to build.
        tensor: parameter of ``MixturaForCausalLM(config)`` by name. Must be memory of its own: it becomes the model's.
        family: native family to write, or None for ``MixturaForCausalLM``.
        generation_config: defaults of ``generate`` to carry over.
    Returns:
        The model in evaluation mode.
    Raises:
        ValueError: the family cannot express the config; the part is named.
    """
    if family is None:
        with torch.device("meta"):
            model: PreTrainedModel = MixturaForCausalLM(copy.deepcopy(config))
    else:
        if (reason := why_not(family, config)) is not None:
            raise ValueError(
                f"{NATIVE[family].model} cannot express {reason}; save it as MixturaForCausalLM, which transformers loads after "
                "import mixtura and vLLM cannot load"
            )
        renamed = _deepseek_tensor if family == "deepseek_v2" else _native_tensor
        tensor = renamed(config, _folded(config, tensor))
        model = _native_shell(config, family)
        log.info("written as %s: loads without mixtura", NATIVE[family].model)
    fill(model, tensor)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def fill(model: PreTrainedModel, tensor: Source) -> None:
    """Give a model on the meta device its parameters, asked for by name one by one; they become its own."""
    tied, device = model.config.tie_word_embeddings, None
    for name, empty in list(model.named_parameters()):
        if tied and name == "lm_head.weight":
            continue
        value = tensor(name)
        assert value.shape == empty.shape, f"{name}: {tuple(value.shape)} for {tuple(empty.shape)}"
        # Routers are drawn where the generator lives; everything goes where the embedding came from.
        device = device or value.device
        value = value.to(device)
        owner, _, leaf = name.rpartition(".")
        setattr(
            model.get_submodule(owner), leaf, nn.Parameter(value.contiguous(), requires_grad=value.is_floating_point())
        )
        model.config.dtype = value.dtype
        del value
    model.tie_weights()
    # The only buffers are the rotary frequencies, which are computed and never stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)


def _native_shell(config: MixturaConfig, family: str) -> PreTrainedModel:
    native = NATIVE[family]
    cls = getattr(transformers, native.model)
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "attention_dropout",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "num_experts_per_tok",
        "router_aux_loss_coef",
    )
    fields = {name: getattr(config, name) for name in names}
    fields |= {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": copy.deepcopy(config.rope_parameters),
        "tie_word_embeddings": _stays_tied(config),
        "architectures": [native.model],
    }
    with torch.device("meta"):
        return cls(cls.config_class(**fields, **native.fields(config)))


def _stays_tied(config: MixturaConfig) -> bool:
    """A head tied to an embedding that folding changes must become a matrix of its own."""
    return config.tie_word_embeddings and config.embed_scale == 1.0 and config.norm != "layer"


def _folded(config: MixturaConfig, tensor: Source) -> Source:
    """Parameters of the same function with plain RMS norms and no embedding factor."""

    def folded(name: str) -> Tensor:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            return tensor("model.embed_tokens.weight")
        if "norm" in name and not config.norm_weight:
            return torch.ones(config.hidden_size, dtype=tensor("model.embed_tokens.weight").dtype)
        value = tensor(name)
        dtype = value.dtype
        if "norm" in name and config.norm == "rms_plus_one":
            return (1.0 + value.float()).to(dtype)
        if name == "model.embed_tokens.weight" and config.embed_scale != 1.0:
            value = value * torch.tensor(config.embed_scale, dtype=dtype)
        if config.norm == "layer" and name == "model.embed_tokens.weight":
            value = (value.double() - value.double().mean(-1, keepdim=True)).to(dtype)
        writes = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
        if config.norm == "layer" and writes:
            # (.., D, H): the mean over the outputs, so that what is written has none.
            value = torch.stack([_centred(v) for v in value]) if value.dim() == 3 else _centred(value)
        if config.norm == "layer" and name.endswith("o_proj.bias"):
            value = value - value.mean()
        return value

    return folded


def _centred(weight: Tensor) -> Tensor:
    return (weight.double() - weight.double().mean(-2, keepdim=True)).to(weight.dtype)


def _native_tensor(config: MixturaConfig, tensor: Source) -> Source:
    """Our names are the families' names, but for the shared expert of Qwen2-MoE.

    Its output is multiplied by sigmoid(gate x). A gate of zeros gives exactly one half, so a doubled down projection gives
    weight 1, to the bit, since doubling only moves the exponent.
    """
    shared = config.shared_expert_intermediate_size

    def native(name: str) -> Tensor:
        if ".shared_expert_gate." in name:
            return torch.zeros(1, config.hidden_size, dtype=tensor("model.norm.weight").dtype)
        if ".shared_expert." in name and not shared:
            rows, columns = (config.hidden_size, IDLE) if "down_proj" in name else (IDLE, config.hidden_size)
            return torch.zeros(rows, columns, dtype=tensor("model.norm.weight").dtype)
        if ".shared_expert.down_proj." in name:
            return tensor(name) * 2.0
        return tensor(name)

    return native


def _deepseek_tensor(config: MixturaConfig, tensor: Source) -> Source:
    """DeepSeek-V2's names, and the rows that it rotates in its order: coordinates i and i + P/2 of ours are its 2i and 2i + 1."""
    rope, fixed = config.qk_rope_head_dim, config.qk_nope_head_dim
    order = torch.arange(rope).view(2, -1).T.flatten()

    def native(name: str) -> Tensor:
        value = tensor(name.replace(".shared_experts.", ".shared_expert."))
        if ".kv_a_proj_with_mqa." in name:
            return torch.cat((value[:-rope], value[-rope:][order]))
        if ".q_proj." in name or ".q_b_proj." in name:
            heads = value.unflatten(0, (config.num_attention_heads, -1))
            return torch.cat((heads[:, :fixed], heads[:, fixed:][:, order]), dim=1).flatten(0, 1)
        return value

    return native


def _lacks_deepseek_v2(c: MixturaConfig) -> str | None:
    dense = list(c.dense_layers or [])
    checks = {
        "attention without a latent": c.attention != "latent",
        "LayerNorm of latents": c.norm == "layer",
        "norms without weight": not c.norm_weight,
        "norms behind the parts": c.norm_placement == "after",
        "biases of some attention projections only": c.qkv_bias != c.o_bias,
        "gates that are made to sum to 1": c.norm_topk_prob,
        "no shared expert": not c.shared_expert_intermediate_size,
        "a shared expert that is no multiple of a routed one": bool(
            c.shared_expert_intermediate_size % c.moe_intermediate_size
        ),
        "dense layers that are not the first ones": sorted(dense) != list(range(len(dense))),
        "scaled rotary positions": c.rope_parameters.get("rope_type", "default") != "default",
        "a sliding window": c.sliding_window is not None,
        "a hidden_size that the heads do not divide": c.hidden_size % c.num_attention_heads != 0,
    }
    return next((what for what, has in checks.items() if has), None)


def _lacks_mixtral(c: MixturaConfig) -> str | None:
    checks = {
        "norms of queries and keys": c.qk_norm != "none",
        "norms behind the parts": c.norm_placement == "after",
        "attention biases": c.qkv_bias or c.o_bias,
        "a shared expert": c.shared_expert_intermediate_size > 0,
        "gates that do not sum to 1": not c.norm_topk_prob,
    }
    return next((what for what, has in checks.items() if has), None)


def _lacks_qwen2_moe(c: MixturaConfig) -> str | None:
    checks = {
        "norms of queries and keys": c.qk_norm != "none",
        "norms behind the parts": c.norm_placement == "after",
        "a bias of the attention output": c.o_bias,
        "a head width other than hidden_size / heads": c.head_dim * c.num_attention_heads != c.hidden_size,
        "a sliding window in every layer": c.sliding_window is not None,
    }
    return next((what for what, has in checks.items() if has), None)


def _lacks_qwen3_moe(c: MixturaConfig) -> str | None:
    checks = {
        "attention without norms of each head's queries and keys": c.qk_norm != "head",
        "norms behind the parts": c.norm_placement == "after",
        "biases of some attention projections only": c.qkv_bias != c.o_bias,
        "a shared expert": c.shared_expert_intermediate_size > 0,
    }
    return next((what for what, has in checks.items() if has), None)


def _lacks_olmo(placement: str) -> Callable[[MixturaConfig], str | None]:
    def lacks(c: MixturaConfig) -> str | None:
        checks = {
            "attention without norms over all queries and keys": c.qk_norm != "full",
            f"norms {c.norm_placement} the parts": c.norm_placement != placement,
            "biases of some attention projections only": c.qkv_bias != c.o_bias,
            "a head width other than hidden_size / heads": c.head_dim * c.num_attention_heads != c.hidden_size,
            "a sliding window": c.sliding_window is not None,
            "a shared expert": c.shared_expert_intermediate_size > 0,
        }
        return next((what for what, has in checks.items() if has), None)

    return lacks


NATIVE: dict[str, Native] = {
    "mixtral": Native(
        "MixtralForCausalLM",
        lambda c: {
            "intermediate_size": c.moe_intermediate_size,
            "num_local_experts": c.num_experts,
            "head_dim": c.head_dim,
            "sliding_window": c.sliding_window,
        },
        _lacks_mixtral,
    ),
    "qwen2_moe": Native(
        "Qwen2MoeForCausalLM",
        lambda c: {
            "intermediate_size": c.intermediate_size,
            "moe_intermediate_size": c.moe_intermediate_size,
            "shared_expert_intermediate_size": c.shared_expert_intermediate_size or IDLE,
            "num_experts": c.num_experts,
            "norm_topk_prob": c.norm_topk_prob,
            "qkv_bias": c.qkv_bias,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(c.dense_layers or []),
        },
        _lacks_qwen2_moe,
    ),
    "qwen3_moe": Native(
        "Qwen3MoeForCausalLM",
        lambda c: {
            "intermediate_size": c.intermediate_size,
            "moe_intermediate_size": c.moe_intermediate_size,
            "num_experts": c.num_experts,
            "norm_topk_prob": c.norm_topk_prob,
            "head_dim": c.head_dim,
            "attention_bias": c.qkv_bias,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(c.dense_layers or []),
            "use_sliding_window": c.sliding_window is not None,
            "sliding_window": c.sliding_window,
        },
        _lacks_qwen3_moe,
    ),
    "flex_olmo": Native(
        "FlexOlmoForCausalLM",
        lambda c: {
            "intermediate_size": c.moe_intermediate_size,
            "num_experts": c.num_experts,
            "norm_topk_prob": c.norm_topk_prob,
            "attention_bias": c.qkv_bias,
        },
        _lacks_olmo("after"),
    ),
    "olmoe": Native(
        "OlmoeForCausalLM",
        lambda c: {
            "intermediate_size": c.moe_intermediate_size,
            "num_experts": c.num_experts,
            "norm_topk_prob": c.norm_topk_prob,
            "attention_bias": c.qkv_bias,
            "clip_qkv": c.clip_qkv,
        },
        _lacks_olmo("before"),
    ),
    "deepseek_v2": Native(
        "DeepseekV2ForCausalLM",
        lambda c: {
            "intermediate_size": c.intermediate_size,
            "moe_intermediate_size": c.moe_intermediate_size,
            "n_routed_experts": c.num_experts,
            "n_shared_experts": c.shared_expert_intermediate_size // c.moe_intermediate_size,
            "first_k_dense_replace": len(c.dense_layers or []),
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "kv_lora_rank": c.kv_lora_rank,
            "q_lora_rank": c.q_lora_rank or None,
            "qk_nope_head_dim": c.qk_nope_head_dim,
            "qk_rope_head_dim": c.qk_rope_head_dim,
            "v_head_dim": c.v_head_dim,
            "attention_bias": c.qkv_bias,
        },
        _lacks_deepseek_v2,
    ),
}
