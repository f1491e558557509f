"""Where the mixture is, in any model: gate, experts and shared experts of every layer, and how to reroute them.

No list of names is kept. transformers gives its MoE families one experts interface: a module decorated by
``use_experts_implementation``, called with ``(hidden (T, D), indices (T, K), weights (T, K))``. That module is what is
looked for; the gate is the module beside it that scores the experts. mixtura's packed experts carry the mark
``mixtura_experts`` and are called the same way.

Routing is recorded and changed where the experts are called, which all families share, and not in their gates, which
differ. Logits are read off the gate's output, so what ``output_router_logits`` reports is never touched.

Shapes: T tokens, D width, E experts, K experts a token visits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.core.gates import Routing

__all__ = ["MoEBlock", "find_moe", "recorded_routing", "rerouted"]

GATE_NAMES = ("gate", "router")
K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "k",
    "num_experts_per_token",
    "top_k_experts",
)
SCALE_NAMES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")


@dataclass(frozen=True)
class MoEBlock:
    """One mixture layer of a model.

    Attributes:
        name: path of the experts' parent in the model, ``"model.layers.0.mlp"``.
        module: that parent.
        gate: module that scores the experts.
        experts: module that holds them.
        shared: experts that every token visits; empty where there are none.
        n_experts: routed experts, E.
        k: experts a token visits.
        scale: what the gate multiplies its weights by (DeepSeek's routed scaling factor); 1 elsewhere.
        parts: modules that hold weights of one expert each: the experts, and the layer's attention experts if it has them.
    """

    name: str
    module: nn.Module
    gate: nn.Module
    experts: nn.Module
    shared: tuple[nn.Module, ...]
    n_experts: int
    k: int
    scale: float
    parts: tuple[nn.Module, ...]

    def scores(self, routing: Routing) -> Tensor:
        """What the gate ranks the experts by, shape (T, E): larger is chosen first.

        Logits, unless the gate adds a correction to its scores when it chooses (DeepSeek-V3, 2412.19437, eq. 16). Then
        the score function is the one under which the gate's own choice ranks highest in this very batch.
        """
        bias = _correction(self)
        if bias is None or not bool(bias.any()):
            return routing.logits
        return self._scored(routing)[0] + bias

    def probabilities(self, routing: Routing) -> Tensor:
        """What the gate weights experts by before it chooses, shape (T, E), without scaling."""
        if _correction(self) is None:
            return routing.logits.float().softmax(-1)
        return self._scored(routing)[0]

    def renormalises(self, routing: Routing) -> bool:
        """Whether the gate makes the chosen weights sum to a constant, read off its own weights of this batch."""
        if routing.weights.shape[-1] == 1:
            return bool(getattr(self.gate, "norm_topk_prob", True)) and _constant(routing.weights[:, 0], self.scale)
        return _constant(routing.weights.float().sum(-1), self.scale)

    def _scored(self, routing: Routing) -> tuple[Tensor, float]:
        bias = _correction(self)
        assert bias is not None
        logits = routing.logits.float()
        found: list[tuple[float, Tensor]] = []
        for scores in (logits.sigmoid(), logits.softmax(-1), logits):
            best = (scores + bias).topk(routing.indices.shape[-1], dim=-1).indices
            hits = (best[:, :, None] == routing.indices[:, None, :]).any(-1).float().mean().item()
            found.append((hits, scores))
        agreement, scores = max(found, key=lambda pair: pair[0])
        return scores, agreement


Change = Callable[[MoEBlock, Routing], tuple[Tensor, Tensor]]


def find_moe(model: nn.Module) -> list[MoEBlock]:
    """The mixture layers of a model in the order of its modules; an empty list for a dense model.

    Args:
        model: any module; on the meta device too.
    Example:
        >>> find_moe(nn.Linear(2, 2))
        []
    """
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        if not _is_experts(module):
            continue
        parent_path = path.rpartition(".")[0]
        parent = modules[parent_path]
        gate = _gate(parent, module)
        if gate is not None:
            found.append(_block(model, modules, parent_path, parent, gate, module))
    return found


@contextmanager
def recorded_routing(model: nn.Module | Sequence[MoEBlock]) -> Iterator[dict[str, Routing]]:
    """Record what every gate decides in the forward passes inside the block.

    Yields a dictionary, block name -> :class:`~mixtura.core.gates.Routing` of the latest forward pass, with gradients.
    """
    seen: dict[str, Routing] = {}

    def record(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
        seen[block.name] = routing
        return routing.weights, routing.indices

    with rerouted(model, record):
        yield seen


@contextmanager
def rerouted(model: nn.Module | Sequence[MoEBlock], change: Change) -> Iterator[None]:
    """Let ``change`` decide the routing of every mixture layer inside the block.

    Args:
        model: a model, or the blocks to change.
        change: (block, what its gate decided) -> weights (T, K'), indices (T, K'); K' may differ from K, and the index E
            with weight 0 means no expert.
    Raises:
        ValueError: the model has no mixture layer; its class is named.
    The model is left as it was, also after an exception.
    """
    blocks = find_moe(model) if isinstance(model, nn.Module) else list(model)
    if not blocks:
        name = type(model).__name__
        raise ValueError(f"{name} has no mixture layers, so there is no routing to read or change; upcycle it first")
    with ExitStack() as hooks:
        for block in blocks:
            _attach(block, change, hooks)
        yield


def _attach(block: MoEBlock, change: Change, hooks: ExitStack) -> None:
    logits: list[Tensor] = []

    def after_gate(module: nn.Module, inputs: Any, output: Any) -> None:
        logits[:] = [_logits(output, block.n_experts)]

    def before_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, indices, weights = _arguments(args, kwargs)
        scored = logits.pop()
        routing = Routing(weights=weights, indices=indices, logits=scored, probs=scored.float().softmax(-1))
        new_weights, new_indices = change(block, routing)
        return (hidden, new_indices, new_weights.to(weights.dtype)), {}

    hooks.callback(block.gate.register_forward_hook(after_gate).remove)
    hooks.callback(block.experts.register_forward_pre_hook(before_experts, with_kwargs=True).remove)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    if len(given) != 3:
        raise TypeError(f"experts were called with {len(args)} arguments and {sorted(kwargs)}, expected {names}")
    return given[0], given[1], given[2]


def _logits(output: Any, n_experts: int) -> Tensor:
    """Router logits (T, E) in a gate's output: the first floating tensor that has a column for every expert."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.shape[-1] >= n_experts:
            return part.reshape(-1, part.shape[-1])[:, :n_experts]
    raise TypeError(f"the gate returned no tensor with a column for each of {n_experts} experts")


def _is_experts(module: nn.Module) -> bool:
    if getattr(module, "mixtura_experts", False):
        return True
    # What the decorator leaves on a class and its instances.
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _gate(parent: nn.Module, experts: nn.Module) -> nn.Module | None:
    children = dict(parent.named_children())
    for name in GATE_NAMES:
        if name in children:
            return children[name]
    n = _count(experts)
    for child in children.values():
        if child is not experts and any(p.dim() == 2 and p.shape[0] == n for p in child.parameters(recurse=False)):
            return child
    return None


def _block(
    model: nn.Module, modules: dict[str, nn.Module], path: str, parent: nn.Module, gate: nn.Module, experts: nn.Module
) -> MoEBlock:
    shared = tuple(
        child for name, child in parent.named_children() if name.startswith("shared") and not name.endswith("gate")
    )
    parts = [experts]
    beside = modules.get(f"{path.rpartition('.')[0]}.self_attn")
    if beside is not None and type(beside).__name__ == "AttentionMixture":
        parts.append(beside)
    n = _count(experts)
    k = _number((gate, parent, getattr(experts, "config", None), getattr(model, "config", None)), K_NAMES)
    if k is None:
        raise ValueError(f"{path}: cannot tell how many experts a token visits; looked for {', '.join(K_NAMES)}")
    scale = _number((gate,), SCALE_NAMES)
    return MoEBlock(
        path, parent, gate, experts, shared, n, int(k), 1.0 if scale is None else float(scale), tuple(parts)
    )


def _count(experts: nn.Module) -> int:
    n: Any = getattr(experts, "num_experts", None)
    down: Any = getattr(experts, "down_proj", None)
    return int(n) if n is not None else int(down.shape[0])


def _number(places: Iterable[Any], names: Sequence[str]) -> float | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return value
    return None


def _correction(block: MoEBlock) -> Tensor | None:
    """The vector that a gate adds to its scores when it chooses, and not when it weighs."""
    for place in (block.gate, block.module):
        for name, tensor in (*place.named_buffers(), *place.named_parameters()):
            last = name.rpartition(".")[2]
            if ("correction_bias" in last or last == "expert_bias") and tensor.numel() == block.n_experts:
                return tensor.detach().reshape(-1)
    return None


def _constant(sums: Tensor, scale: float) -> bool:
    # bfloat16 weights carry three digits.
    return bool(torch.allclose(sums.float(), torch.full_like(sums, scale, dtype=torch.float32), rtol=2e-2))
