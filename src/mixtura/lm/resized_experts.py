"""The tensors of a mixture that have one row an expert, and how to put others in their place.

Pruning keeps some rows, aggregation joins those of two models; both leave a model of the same class, whose config says the
new number, so that it is saved and loaded like any of its family.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.lm.anatomy import CONFIG_NAMES, MoEBlock, find_moe

__all__ = ["check_resizable", "expert_tensors", "set_number", "with_rows"]

# What a gate may hold beside its weight, one number an expert.
GATE_ROWS = ("weight", "bias", "e_score_correction_bias", "expert_bias", "per_expert_scale", "balance_bias")
COUNTERS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "total_experts")


def check_resizable(model: Any) -> list[MoEBlock]:
    """The mixture layers of a model whose number of experts can be changed.

    Raises:
        ValueError: no mixture layer, quantized weights, groups of experts that are chosen first, or a gate that is more than a
            matrix with one row an expert; what is in the way is named.
    """
    moe = find_moe(model)
    name = type(model).__name__
    if not moe:
        raise ValueError(f"{name} has no mixture layers, so it has no experts to keep or to join")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{name} has quantized weights; change its experts before it is compressed")
    if (getattr(model.config, "n_group", None) or 1) > 1:
        raise ValueError(
            f"{name} chooses among n_group={model.config.n_group} groups of experts, which must stay whole"
        )
    for block in moe:
        if extra := [n for n, _ in block.gate.named_parameters() if n not in GATE_ROWS]:
            raise ValueError(f"the gate of {block.name} has {extra} beside its weight, so its rows are not its experts")
    return moe


def expert_tensors(block: MoEBlock) -> dict[str, Tensor]:
    """Parameters and buffers with one row an expert, by their name in the model."""
    found: dict[str, Tensor] = {}
    for module, path in ((block.gate, block.gate_name), (block.experts, block.experts_name)):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.dim() and tensor.shape[0] == block.n_experts:
                found[f"{path}.{name}"] = tensor
    return found


def with_rows(model: nn.Module, moe: Sequence[MoEBlock], rows: Callable[[MoEBlock, str, Tensor], Tensor]) -> list[int]:
    """Put ``rows(block, name, tensor)`` in the place of every tensor with one row an expert; the new numbers of experts."""
    numbers = []
    for block in moe:
        number = 0
        for name, tensor in expert_tensors(block).items():
            owner_path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner_path)
            new = rows(block, name, tensor.detach())
            number = len(new)
            if isinstance(tensor, nn.Parameter):
                setattr(owner, leaf, nn.Parameter(new, requires_grad=tensor.requires_grad))
            else:
                owner.register_buffer(leaf, new, persistent=leaf not in owner._non_persistent_buffers_set)
        for module in (block.module, block.gate, block.experts):
            for counter in COUNTERS:
                if getattr(module, counter, None) == block.n_experts:
                    setattr(module, counter, number)
        numbers.append(number)
    return numbers


def set_number(config: Any, numbers: Sequence[int]) -> None:
    """Write the number of experts of every mixture layer into a config.

    Raises:
        ValueError: the numbers differ, and the config has one for all layers.
    """
    name = next((n for n in CONFIG_NAMES if getattr(config, n, None) is not None), None)
    if name is None:
        raise ValueError(
            f"{type(config).__name__} has none of {list(CONFIG_NAMES)}, so the new number cannot be written"
        )
    value: Any = max(numbers)
    if hasattr(config, "experts_by_layer"):
        config.experts_by_layer = list(numbers) if len(set(numbers)) > 1 else None
    elif len(set(numbers)) > 1:
        if not hasattr(config, "experts_of"):
            raise ValueError(
                f"{type(config).__name__} has one number of experts for all layers, got {list(numbers)}; keep equally many"
            )
        left = iter(numbers)
        value = [next(left) if config.experts_of(i) else 0 for i in range(config.num_hidden_layers)]
    setattr(config, name, value)


def row_index(rows: Tensor, tensor: Tensor) -> Tensor:
    """Rows of a tensor, in memory of their own."""
    return torch.index_select(tensor, 0, rows.to(tensor.device))
