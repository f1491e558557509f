"""Fewer experts: those that a text, a task or a language hardly visits are taken out.

Experts specialise, so a model that serves one language needs few of them. Visits are counted on text of the use at hand; the
most visited stay, their gate rows with them. A token whose expert is gone goes to the best of those that are left.

Shapes: T tokens, E experts, K experts a token visits.
Source: 2109.10465, sec. 5 (expert pruning); the random choice is its baseline.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mixtura.core.balance import expert_counts
from mixtura.core.gates import Routing
from mixtura.lm.anatomy import MoEBlock, rerouted
from mixtura.lm.resized_experts import check_resizable, row_index, set_number, with_rows

__all__ = ["expert_usage", "prune"]

POLICIES = ("usage", "random")


@torch.inference_mode()
def expert_usage(model: Any, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """How often each expert of each layer is visited.

    Args:
        model: a mixture of experts; it is put into evaluation mode and back.
        batches: token ids (B, L), or the arguments of a forward pass by name. Tokens that an ``attention_mask`` of the same
            number marks as padding are not counted.
    Returns:
        Name of the layer -> visits, int64, shape (E,).
    Raises:
        ValueError: no batch, or a model without mixture layers.
    """
    usage: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def count(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
        indices_TK = routing.indices
        if mask is not None and mask.numel() == len(indices_TK):
            indices_TK = indices_TK[mask.reshape(-1).bool().to(indices_TK.device)]
        counts = expert_counts(indices_TK, block.n_experts).cpu()
        usage[block.name] = usage[block.name] + counts if block.name in usage else counts
        return routing.weights, routing.indices

    mode, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with rerouted(model, count):
            for batch in batches:
                inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                inputs = {name: value.to(device) for name, value in inputs.items()}
                encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
                # The encoder-decoder leaves padding out by itself, in both halves.
                mask = None if encoder_decoder else inputs.get("attention_mask")
                model(**inputs, use_cache=False)
    finally:
        model.train(mode)
    if not usage:
        raise ValueError("batches must hold at least one batch to count visits on, got none")
    return usage


def prune(
    model: Any,
    usage: Mapping[str, Tensor] | None,
    keep: int | Mapping[str, int],
    *,
    policy: Literal["usage", "random"] = "usage",
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """Keep some experts of every layer and take the others out.

    Args:
        model: a mixture of experts: Mixtral, OLMoE, Qwen-MoE, DeepSeek-V2, our own decoder and encoder-decoder, and whatever
            else has stacked experts behind a linear gate.
        usage: visits by layer, of :func:`expert_usage`; None with ``policy="random"``.
        keep: experts that stay in every layer, or by name of the layer; different numbers need a config that can say so (our
            encoder-decoder's).
        policy: ``usage`` keeps the most visited (of equal ones the first), ``random`` draws.
        inplace: change ``model`` itself.
        generator: source of chance for ``random``.
    Returns:
        A model of the same class; the experts that stay keep their order, so that with all of them nothing changes.
    Raises:
        ValueError: keep above the experts or below the number that a token visits, a layer without usage, or a model that cannot
            be pruned; the layer is named.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {sorted(POLICIES)}, got {policy!r}")
    if policy == "usage" and usage is None:
        raise ValueError("policy='usage' needs the visits that expert_usage counts, got None")
    moe = check_resizable(model)
    kept = {
        block.name: _chosen(block, keep if isinstance(keep, int) else keep.get(block.name), usage, policy, generator)
        for block in moe
    }
    _check_config(model.config, [len(rows) for rows in kept.values()])
    if not inplace:
        model = copy.deepcopy(model)
        moe = check_resizable(model)
    numbers = with_rows(model, moe, lambda block, name, tensor: row_index(kept[block.name], tensor))
    set_number(model.config, numbers)
    return model


def _check_config(config: Any, numbers: list[int]) -> None:
    set_number(copy.copy(config), numbers)


def _chosen(
    block: MoEBlock,
    keep: int | None,
    usage: Mapping[str, Tensor] | None,
    policy: str,
    generator: torch.Generator | None,
) -> Tensor:
    """Experts that stay, in order."""
    if keep is None:
        raise ValueError(f"keep has no number for {block.name}")
    if not block.k <= keep <= block.n_experts:
        raise ValueError(
            f"keep must be between {block.k} (the experts that a token visits) and {block.n_experts} in {block.name}, got {keep}"
        )
    if policy == "random":
        return torch.randperm(block.n_experts, generator=generator)[:keep].sort().values
    assert usage is not None
    if block.name not in usage or len(usage[block.name]) != block.n_experts:
        raise ValueError(
            f"usage has no visits of the {block.n_experts} experts of {block.name}; it has {sorted(usage)}"
        )
    return usage[block.name].argsort(descending=True, stable=True)[:keep].sort().values
