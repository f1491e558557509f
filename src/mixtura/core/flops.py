"""Multiply-adds of a forward pass, counted: by module, and without those that a mask saves.

The dense count is torch's own (``FlopCounterMode``, two operations a multiply-add), so attention scores are in it. A masked
weight's part of its module's count is scaled by its density.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixtura.core.sparse_layers import PREFIX

__all__ = ["FlopReport", "WeightCost", "count_flops", "forward_once"]


@dataclass(frozen=True)
class WeightCost:
    """What one weight of a model takes in a forward pass.

    Attributes:
        dense: multiply-adds as if every entry counted.
        numel: entries.
        active: entries that are active; all of them where there is no mask.
    """

    dense: float
    numel: int
    active: int

    @property
    def each(self) -> float:
        """Multiply-adds an entry: positions that it is multiplied with."""
        return self.dense / self.numel

    @property
    def sparse(self) -> float:
        """Multiply-adds of the active entries."""
        return self.each * self.active


@dataclass(frozen=True)
class FlopReport:
    """Forward multiply-adds of a model for one input.

    Attributes:
        dense: all, masks ignored.
        weights: parameter name -> its part, for every weight matrix that was used.
        order: names of the modules that hold those weights, in the order of their first call.
    """

    dense: float
    weights: Mapping[str, WeightCost]
    order: tuple[str, ...]

    @property
    def total(self) -> float:
        """All but what masks save."""
        return self.dense - sum(cost.dense - cost.sparse for cost in self.weights.values())

    @property
    def other(self) -> float:
        """What no weight matrix takes: attention scores and the like."""
        return self.dense - sum(cost.dense for cost in self.weights.values())

    def training_step(self, every: int = 0) -> float:
        """Mean multiply-adds of a training step: three forward passes, and with RigL one dense gradient each ``every`` steps.

        Source: RigL (1911.11134), appendix H: (3 f_s every + 2 f_s + f_d) / (every + 1).
        """
        if not every:
            return 3 * self.total
        return (3 * self.total * every + 2 * self.total + self.dense) / (every + 1)


def count_flops(model: nn.Module, example_input: Any) -> FlopReport:
    """Count the multiply-adds of ``model(example_input)``; nothing is kept, and the model's mode is left as it was.

    Args:
        model: on any device; on the meta device nothing is computed.
        example_input: a tensor, a tuple of arguments or a mapping of named ones.
    Example:
        >>> report = count_flops(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.zeros(3, 8))
        >>> report.total, report.order
        (120.0, ('0', '1'))
    """
    order: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    weighty = [m for m in model.modules() if any(p.dim() >= 2 for p in m.parameters(recurse=False))]

    def note(module: nn.Module, *_: Any) -> None:
        if names[id(module)] not in order:
            order.append(names[id(module)])

    hooks = [module.register_forward_pre_hook(note) for module in weighty]
    # torch has no formula for its own attention on CPUs.
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    )
    mode = model.training
    try:
        # In evaluation, so that batch norms learn nothing from an example.
        model.eval()
        with torch.no_grad(), counter:
            forward_once(model, example_input)
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    # The counter names modules by the class of the root and the path below it.
    by_module = {
        name.partition(".")[2]: sum(ops.values()) / 2
        for name, ops in counter.get_flop_counts().items()
        if name != "Global"
    }
    if any(not name for name in order):  # the root is itself a layer
        by_module[""] = counter.get_total_flops() / 2
    weights: dict[str, WeightCost] = {}
    modules = dict(model.named_modules())
    for name in order:
        module = modules[name]
        own = by_module.get(name, 0.0) - sum(
            by_module.get(f"{name}.{child}", 0.0) for child, _ in module.named_children()
        )
        matrices = {k: p for k, p in module.named_parameters(recurse=False) if p.dim() >= 2}
        size = sum(p.numel() for p in matrices.values())
        for key, p in matrices.items():
            if not own:
                continue  # an embedding looks up and multiplies nothing
            mask = module._buffers.get(f"{PREFIX}{key}")
            active = p.numel() if mask is None or mask.is_meta else int(mask.sum())
            weights[f"{name}.{key}".lstrip(".")] = WeightCost(own * p.numel() / size, p.numel(), active)
    return FlopReport(counter.get_total_flops() / 2, weights, tuple(order))


def forward_once(model: nn.Module, example_input: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a mapping of named ones."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, tuple) else model(example_input)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of attention scores and of their product with the values, nothing spared for a causal mask."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])
