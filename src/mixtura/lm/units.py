"""Hidden units of a model's feed-forward layers, read as it runs: one vector a token, dense layer or mixture alike.

Of a mixture it is the vector of all experts' units, scaled by the gate, with zeros for experts that were not chosen: unit i means
the same thing on every token (:mod:`mixtura.lm.wide_sparse`).

Shapes: N rows, L positions, U units (E H for a mixture), T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.core.progress import progress
from mixtura.lm.anatomy import _arguments, find_moe, run_layers
from mixtura.lm.wide_sparse import wide_units

__all__ = ["UnitLayer", "find_units", "read_units", "recorded_units", "unit_layer"]

# Names of the input and output maps of a dense feed-forward part, over families.
PAIRS = (("up_proj", "down_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc1", "fc2"), ("c_fc", "c_proj"))


@dataclass(frozen=True)
class UnitLayer:
    """A feed-forward layer whose units can be read.

    Attributes:
        name: path of the part in the model.
        module: what is hooked: the experts, or the map that reads the units.
        n_experts: E; 1 for a dense layer.
        hidden: units of one expert.
        experts: whether it is a mixture.
    """

    name: str
    module: nn.Module
    n_experts: int
    hidden: int
    experts: bool

    @property
    def n_units(self) -> int:
        return self.n_experts * self.hidden


def find_units(model: nn.Module) -> list[UnitLayer]:
    """Feed-forward layers in the order of the model's modules; parts inside a mixture (shared experts) are left out.

    Raises:
        ValueError: experts whose matrices are not stacked plainly (packed, or transposed), named by their path.
    """
    moe = {block.name: block for block in find_moe(model)}
    found: list[UnitLayer] = []
    for path, module in model.named_modules():
        if path in moe:
            experts: Any = moe[path].experts
            _inner(experts, path)
            down = experts.down_proj
            found.append(UnitLayer(path, experts, len(down), down.shape[2], True))
        elif not any(path.startswith(f"{name}.") for name in moe):
            children = dict(module.named_children())
            for up, down in PAIRS:
                if up in children and down in children:
                    found.append(UnitLayer(path, children[down], 1, _inputs(children[down]), False))
    return found


def unit_layer(model: nn.Module, layer: int | None = None) -> UnitLayer:
    """The feed-forward layer of an index, counted from the first; None takes the middle one.

    Raises:
        ValueError: no such layer, or a model without any that can be read.
    """
    found = find_units(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no feed-forward layer whose units can be read")
    index = len(found) // 2 if layer is None else layer
    if not 0 <= index < len(found):
        raise ValueError(f"layer must lie in 0..{len(found) - 1}, got {layer}")
    return found[index]


@contextmanager
def recorded_units(layer: UnitLayer, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show every forward pass's units (T, U) to ``see`` inside the block."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not layer.experts:
            see(args[0].reshape(-1, args[0].shape[-1]))
            return
        x, indices, weights = _arguments(args, kwargs)
        up, bias, inner = _inner(module, layer.name)
        see(wide_units(x.reshape(-1, x.shape[-1]), up, indices, weights, inner, hidden=layer.hidden, up_bias=bias))

    hook = layer.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def read_units(
    model: Any,
    blocks: Tensor,
    layer: UnitLayer,
    *,
    columns: Tensor | None = None,
    batch_size: int = 8,
    label: str = "units",
) -> Iterator[Tensor]:
    """Units of token ids (N, L), batch by batch: float32 on the CPU, (rows, L, U), or of ``columns`` only."""
    mode = model.training
    model.eval()
    seen: list[Tensor] = []
    try:
        with recorded_units(layer, seen.append):
            for ids in progress(blocks.split(batch_size), desc=label, unit="batch"):
                run_layers(model, ids)
                units = seen.pop()
                seen.clear()
                units = units if columns is None else units[:, columns.to(units.device)]
                yield units.float().cpu().view(*ids.shape, -1)
    finally:
        model.train(mode)


def _inner(experts: Any, path: str) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Input matrices, biases and what turns their product into units."""
    for name in ("gate_up_proj", "up_proj"):
        up = getattr(experts, name, None)
        if isinstance(up, Tensor) and not getattr(experts, "is_transposed", False) and hasattr(experts, "act_fn"):
            bias = getattr(experts, f"{name}_bias", None)
            if name == "up_proj":
                return up, bias, experts.act_fn
            if hasattr(experts, "_apply_gate"):
                return up, bias, experts._apply_gate
            return up, bias, lambda u: experts.act_fn(u.chunk(2, dim=-1)[0]) * u.chunk(2, dim=-1)[1]
    raise ValueError(
        f"{path}: {type(experts).__name__} does not hold its matrices in plain stacks, so its units cannot be read"
    )


def _inputs(linear: nn.Module) -> int:
    weight: Any = linear.weight
    # GPT-2's Conv1D holds (in, out).
    return int(weight.shape[0] if type(linear).__name__ == "Conv1D" else weight.shape[1])
