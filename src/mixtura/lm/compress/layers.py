"""A model's layers, one at a time, each fed by what the layers before it now compute.

The inputs of the first layer, and what else every layer is called with (masks, rotary tables), are caught in one pass over
the calibration batches. From then on only one layer runs at a time.

Shapes: T tokens of all batches, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.core.gates import Routing
from mixtura.lm.anatomy import MoEBlock, idle_experts, rerouted, run_layers

__all__ = ["LayerInputs", "gram", "linear_inputs", "other_linears", "unstack_attention"]


class LayerInputs:
    """Hidden states before a layer, for every calibration batch.

    Attributes:
        layers: (path, module) of the decoder's layers, in order.
    """

    def __init__(self, model: Any, batches: Sequence[Tensor]):
        self.layers = decoder_layers(model)
        self.hidden: list[Tensor] = []
        self.others: list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.names = {id(layer): path for path, layer in self.layers}
        for batch in batches:
            self._catch(model, batch)

    def outputs(self, layer: nn.Module) -> Iterator[Tensor]:
        """Outputs of a layer on its inputs, batch by batch."""
        path = self.names[id(layer)]
        for hidden, others in zip(self.hidden, self.others, strict=True):
            args, kwargs = others[path]
            out = layer(hidden, *args, **kwargs)
            yield out[0] if isinstance(out, tuple) else out

    def advance(self, layer: nn.Module) -> None:
        """Go on to the next layer: what this one computes now is what the next one reads."""
        self.hidden = list(self.outputs(layer))

    def routed(self, layer: nn.Module, block: MoEBlock) -> tuple[Tensor, Tensor]:
        """What the experts of a block are called with: inputs (T, D) and indices (T, K) of all batches."""
        inputs: list[Tensor] = []
        indices: list[Tensor] = []

        def keep(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
            indices.append(routing.indices)
            return routing.weights, routing.indices

        hook = block.experts.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            with rerouted([block], keep), idle_experts(block):
                for _ in self.outputs(layer):
                    pass
        finally:
            hook.remove()
        return torch.cat(inputs), torch.cat(indices)

    def _catch(self, model: Any, batch: Tensor) -> None:
        seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        first = self.layers[0][0]

        def before(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                named = dict(kwargs)
                hidden = args[0] if args else named.pop("hidden_states")
                named.pop("past_key_values", None)
                seen[path] = (args[1:], named)
                if path == first:
                    self.hidden.append(hidden)

            return hook

        hooks = [layer.register_forward_pre_hook(before(path), with_kwargs=True) for path, layer in self.layers]
        try:
            run_layers(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.others.append(seen)


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the longest list of layers in a model.

    Raises:
        ValueError: the model has none.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers to go through")
    path, longest = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return [(f"{path}.{i}", layer) for i, layer in enumerate(longest)]


def other_linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a decoder layer that hold weights worth packing: attention, shared and dense feed-forward parts.

    Gates are left out: they are small, and a rounded gate sends tokens elsewhere.
    """
    return {
        name: module
        for name, module in layer.named_modules()
        if type(module) is nn.Linear and module.out_features > 1 and not name.endswith(("gate", "router"))
    }


def unstack_attention(model: nn.Module) -> None:
    """Turn the stacked weights of attention experts, where a model has any, into linear layers that can be packed."""
    for module in model.modules():
        if hasattr(module, "unstack") and hasattr(module, "q_proj"):
            module.unstack()  # type: ignore[operator]


def linear_inputs(
    inputs: LayerInputs, layer: nn.Module, linears: Mapping[str, nn.Linear]
) -> list[tuple[list[str], Tensor]]:
    """Hessian 2 X^T X of every linear layer over all batches, float32, shared by those that read the same tensor.

    Queries, keys and values do, those of all attention experts too: what is rounded by the same Hessian can be rounded in one
    go.
    """
    readers: list[list[str]] = []
    hessians: list[Tensor] = []
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    hooks = [linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()]
    try:
        for _ in inputs.outputs(layer):
            together: dict[int, list[str]] = {}
            for name in seen.keys() - {name for names in readers for name in names}:
                together.setdefault(id(seen[name]), []).append(name)
            readers += map(sorted, together.values())
            for i, names in enumerate(readers):
                if names[0] in seen:
                    found = gram(seen[names[0]].flatten(0, -2))
                    hessians[i : i + 1] = [hessians[i] + found if i < len(hessians) else found]
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return list(zip(readers, hessians, strict=True))


def gram(x: Tensor) -> Tensor:
    """2 X^T X of rows (T, D), float32, shape (D, D); zero for no rows."""
    x = x.float()
    return 2 * x.T @ x
