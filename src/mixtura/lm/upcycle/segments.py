"""A mixture of few large experts as one of many small ones that computes the same.

Each expert's hidden units are cut into m pieces that become experts of their own, its router row is repeated m times, and m
times as many are chosen: the pieces of one expert have equal logits, so they are chosen together. A gate is thereby spread
over m pieces, whether it is made to sum to 1 or not: each gets its m-th part. So what the pieces write is multiplied by m, and
they add up to the expert. Training then tells them apart. The pieces used most may be made shared ones, which is not exact
(:mod:`mixtura.lm.upcycle.shared_pieces`).

Shapes: E experts, H hidden units of one, D width.
Source: DeepSeekMoE (2401.06066), sec. 3.1; virtual groups of equal logits: Nakamura et al. 2024 (2410.07524), sec. 3.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.core.experts import split_feed_forward
from mixtura.lm.anatomy import MoEBlock, find_moe
from mixtura.lm.evaluate import token_losses
from mixtura.lm.families.write import fill
from mixtura.lm.upcycle.shared_pieces import check_shareable, share_pieces

__all__ = ["FIELDS", "segment"]

log = logging.getLogger(__name__)

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


def segment(
    model: PreTrainedModel, split: int, *, shared: int = 0, batches: Iterable[Tensor] | None = None
) -> PreTrainedModel:
    """Cut every expert of a mixture into pieces that are experts of their own; the function stays the same, to rounding.

    With ``shared`` above 0 it does not: so many pieces of each layer, those used most on ``batches``, are then always on, and as
    many fewer of the others are chosen. Parameters and the cost of a token stay. What that costs in loss on the batches is
    logged (INFO); measure it on other text, and train.

    Args:
        model: a mixture of one of :data:`FIELDS`; it is left as it is.
        split: pieces m of each expert; a power of two rounds nothing.
        shared: pieces K_s of a layer to share, below m times the experts that a token visits; for our own models, Qwen2-MoE
            whose shared expert has weight 1, and DeepSeek-V2.
        batches: token ids to see what is used, each of shape (B, L) or (L,), without padding; goes with ``shared``.
    Returns:
        A model of the same class, with m times as many experts of an m-th of the hidden units, in evaluation mode.
    Raises:
        ValueError: another family, ``split`` that does not divide the hidden units, a gate that is more than a top-k of a
            linear map, or ``shared`` where no expert of weight 1 fits; the layer or the field is named.
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
    rows = _checked_shared(model, split, shared, batches)
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
    made.eval()
    if not shared:
        return made
    sharing = share_pieces(made, shared, rows, fields=(experts, hidden))
    log.info(
        "%d shared pieces a layer: loss on the batches %.3f -> %.3f nats",
        shared,
        _loss(made, rows),
        _loss(sharing, rows),
    )
    return sharing


def _checked_shared(model: Any, split: int, shared: int, batches: Iterable[Tensor] | None) -> list[Tensor]:
    if (shared > 0) != (batches is not None):
        raise ValueError(
            f"shared > 0 and batches go together, got shared={shared} and {'no ' * (batches is None)}batches"
        )
    if batches is None:
        if shared < 0:
            raise ValueError(f"shared must be >= 0, got {shared}")
        return []
    check_shareable(model)
    chosen = split * model.config.num_experts_per_tok
    if shared >= chosen:
        raise ValueError(
            f"shared must be below the {chosen} pieces that a token visits (one has to be routed), got {shared}"
        )
    if getattr(model.config, "device_balance_coef", 0) and shared % model.config.device_groups:
        raise ValueError(
            f"shared={shared} leaves pieces that device_groups={model.config.device_groups} does not divide; take a multiple"
        )
    rows = [ids.reshape(-1, ids.shape[-1]) for ids in batches if ids.numel()]
    if not rows:
        raise ValueError("batches holds no tokens; give token ids of shape (B, L)")
    return rows


def _loss(model: PreTrainedModel, rows: list[Tensor]) -> float:
    return float(torch.cat([token_losses(model, ids).flatten() for ids in rows]).mean())


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
