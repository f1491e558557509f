"""A mixture of few large experts as one of many small ones that computes the same.

Each expert's hidden units are cut into m pieces that become experts of their own, its router row is repeated m times, and m
times as many are chosen: the pieces of one expert have equal logits, so they are chosen together. A gate is thereby spread
over m pieces, whether it is made to sum to 1 or not: each gets its m-th part. So what the pieces write is multiplied by m, and
they add up to the expert. Training then tells them apart.

Shapes: E experts, H hidden units of one, D width.
Source: DeepSeekMoE (2401.06066), sec. 3.1; virtual groups of equal logits: Nakamura et al. 2024 (2410.07524), sec. 3.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.core.experts import split_feed_forward
from mixtura.lm.anatomy import MoEBlock, find_moe
from mixtura.lm.families.write import fill

__all__ = ["FIELDS", "segment"]

# model type -> the config's names of: experts, hidden units of one; the number chosen is `num_experts_per_tok` in all.
FIELDS: Mapping[str, tuple[str, str]] = {
    "deepseek_v2": ("n_routed_experts", "moe_intermediate_size"),
    "flex_olmo": ("num_experts", "intermediate_size"),
    "mixtral": ("num_local_experts", "intermediate_size"),
    "mixtura": ("num_experts", "moe_intermediate_size"),
    "olmoe": ("num_experts", "intermediate_size"),
    "qwen2_moe": ("num_experts", "moe_intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
}


def segment(model: PreTrainedModel, split: int) -> PreTrainedModel:
    """Cut every expert of a mixture into pieces that are experts of their own; the function stays the same, to rounding.

    Args:
        model: a mixture of one of :data:`FIELDS`; it is left as it is.
        split: pieces m of each expert; a power of two rounds nothing.
    Returns:
        A model of the same class, with m times as many experts of an m-th of the hidden units, in evaluation mode.
    Raises:
        ValueError: another family, ``split`` that does not divide the hidden units, or a gate that is more than a top-k of a
            linear map; the layer or the field is named.
    Example:
        >>> from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
        >>> config = MixturaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_experts=4
        ... )
        >>> fine = segment(MixturaForCausalLM(config), 4)
        >>> fine.config.num_experts, fine.config.num_experts_per_tok, fine.config.moe_intermediate_size
        (16, 8, 12)
    """
    config = model.config
    if config.model_type not in FIELDS:
        raise ValueError(f"model must be of {sorted(FIELDS)}, got {type(model).__name__} ({config.model_type!r})")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} has quantized weights; segment it before it is compressed")
    experts, hidden = FIELDS[config.model_type]
    if split < 1 or getattr(config, hidden) % split:
        raise ValueError(f"split must divide {hidden}={getattr(config, hidden)}, got {split}")
    changes = _changes(find_moe(model), config, split)
    finer: Any = copy.deepcopy(config)
    now = getattr(config, experts)
    setattr(finer, experts, now * split if isinstance(now, int) else [n * split for n in now])
    setattr(finer, hidden, getattr(config, hidden) // split)
    finer.num_experts_per_tok = config.num_experts_per_tok * split
    if config.model_type == "deepseek_v2":  # counts its shared experts in units of routed ones
        finer.n_shared_experts = config.n_shared_experts * split
    state = model.state_dict()
    with torch.device("meta"):
        made: PreTrainedModel = type(model)(finer)
    fill(made, lambda name: changes[name] if name in changes else state[name].clone())
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def _changes(moe: list[MoEBlock], config: Any, split: int) -> dict[str, Tensor]:
    """Every parameter that is not carried over as it is."""
    if getattr(config, "topk_method", "greedy") not in (None, "greedy"):
        raise ValueError(f"group-limited routing (topk_method={config.topk_method!r}) chooses groups, not pieces")
    changes: dict[str, Tensor] = {}
    for block in moe:
        if not isinstance(getattr(block.gate, "weight", None), Tensor):
            raise ValueError(f"the gate of {block.name} has no rows to repeat: it is no linear map")
        extra = [name for name, _ in block.gate.named_parameters() if name != "weight"]
        if extra:
            raise ValueError(
                f"the gate of {block.name} has {extra} beside its weight and cannot be repeated row by row"
            )
        weight: Any = block.gate.weight
        changes[f"{block.gate_name}.weight"] = weight.detach().repeat_interleave(split, dim=0)
        changes |= {f"{block.experts_name}.{n}": t for n, t in _pieces(block.experts, split).items()}
    return changes


def _pieces(experts: nn.Module, split: int) -> dict[str, Tensor]:
    own = {name: p.detach() for name, p in experts.named_parameters()}
    gated = "gate_up_proj" in own
    up = "gate_up_proj" if gated else "up_proj"
    cut_up, cut_down = split_feed_forward(own[up], own["down_proj"], split, gated=gated)
    pieces = {up: cut_up, "down_proj": cut_down * split}
    if f"{up}_bias" in own:
        parts = 2 if gated else 1
        bias = own[f"{up}_bias"].unflatten(1, (parts, split, -1))  # (E, parts, m, H/m)
        pieces[f"{up}_bias"] = bias.transpose(1, 2).flatten(2).flatten(0, 1)
        # The m-th part of the gate, m times, is the gate: the bias is not multiplied.
        pieces["down_proj_bias"] = own["down_proj_bias"].repeat_interleave(split, dim=0)
    return pieces
