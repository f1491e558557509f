"""Where the mixture is, in any model: gate, experts and shared experts of every layer, and how to reroute them.

No list of names is kept. transformers gives its MoE families one experts interface: a module decorated by
``use_experts_implementation``, or called like those, with ``hidden_states (T, D), top_k_index (T, K), top_k_weights
(T, K)``. That module is what is looked for; the gate is the module beside it that scores the experts. mixtura's packed
experts carry the mark ``mixtura_experts`` and are called the same way.

Routing is recorded and changed where the experts are called, which all families share, and not in their gates, which
differ. Logits are read off the gate's output, so what ``output_router_logits`` reports is never touched.

Shapes: T tokens, D width, E experts, K experts a token visits.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.core.gates import Routing
from mixtura.lm.scoring import Scoring, find_scoring, router_logits

__all__ = ["MoEBlock", "find_moe", "idle_experts", "recorded_routing", "replaced_experts", "rerouted", "run_layers"]

CALL = ("hidden_states", "top_k_index", "top_k_weights")
GATE_NAMES = ("gate", "router")
COUNT_NAMES = ("num_experts", "total_experts")
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
# Fields of a config that count experts, for telling a dense model from one whose experts are called in another way.
CONFIG_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


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
        gate_name, experts_name: paths of the two in the model.
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
    gate_name: str
    experts_name: str

    @cached_property
    def scoring(self) -> Scoring:
        """Score function of the gate and whether it renormalises; the gate is asked once (:mod:`mixtura.lm.scoring`)."""
        scale = self.scale if self.expert_scale is None else self.scale * self.expert_scale
        return find_scoring(self.module, self.gate, self.experts, self.n_experts, self._correction, scale)

    @property
    def expert_scale(self) -> Tensor | None:
        """What the gate multiplies each expert's weight by, shape (E,) (Gemma 4); None elsewhere."""
        factors = getattr(self.gate, "per_expert_scale", None)
        return factors.detach() if isinstance(factors, Tensor) else None

    def scores(self, routing: Routing) -> Tensor:
        """What the gate ranks the experts by, shape (T, E): larger is chosen first.

        Logits, unless the gate adds a correction to its scores when it chooses (DeepSeek-V3, 2412.19437, eq. 16).
        """
        bias = self._correction
        return routing.logits if bias is None else self.scoring.ranked(routing.logits, bias)

    def probabilities(self, routing: Routing) -> Tensor:
        """What the gate weights experts by before it chooses, shape (T, E), without scaling."""
        return self.scoring(routing.logits)

    @cached_property
    def _correction(self) -> Tensor | None:
        """The vector that a gate adds to its scores when it chooses, and not when it weighs."""
        for place in (self.gate, self.module):
            for name, tensor in (*place.named_buffers(), *place.named_parameters()):
                last = name.rpartition(".")[2]
                if ("correction_bias" in last or last == "expert_bias") and tensor.numel() == self.n_experts:
                    return tensor.detach().reshape(-1)
        return None


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

    Yields a dictionary, block name -> :class:`~mixtura.core.gates.Routing` of the latest forward pass; ``weights`` and
    ``logits`` with gradients, ``probs`` without.
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
        raise ValueError(_why_none(model))
    with ExitStack() as hooks:
        for block in blocks:
            _attach(block, change, hooks)
        yield


def run_layers(model: Any, ids: Tensor) -> None:
    """Run a model on token ids (B, L) for the sake of hooks on its layers; no logits are computed where it has a base."""
    getattr(model, "base_model", model)(input_ids=ids.to(next(model.parameters()).device), use_cache=False)


@contextmanager
def idle_experts(block: MoEBlock) -> Iterator[None]:
    """Let a layer's experts answer zeros inside the block: for passes of which only what is before them matters."""
    with replaced_experts(block, lambda *args, **kwargs: torch.zeros_like(_arguments(args, kwargs)[0])):
        yield


@contextmanager
def replaced_experts(block: MoEBlock, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let a function answer in place of a layer's experts inside the block."""
    experts: Any = block.experts
    own = experts.__dict__.get("forward")  # libraries that move weights about put their own there
    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward
        if own is not None:
            experts.forward = own


def _attach(block: MoEBlock, change: Change, hooks: ExitStack) -> None:
    logits: list[Tensor] = []

    def after_gate(module: nn.Module, inputs: Any, output: Any) -> None:
        logits[:] = [router_logits(output, block.n_experts)]

    def before_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, indices, weights = _arguments(args, kwargs)
        scored = logits.pop()
        # No graph of its own: under gradient checkpointing a layer is computed again without these hooks, and what they saved
        # for a backward pass would be missed.
        probs = scored.detach().float().softmax(-1)
        routing = Routing(weights=weights, indices=indices, logits=scored, probs=probs)
        new_weights, new_indices = change(block, routing)
        if new_indices.shape[-1] == 1 and not _is_marked(module):
            # LongCat's experts squeeze a single column away; the same expert again with weight 0 changes nothing.
            new_indices = new_indices.expand(-1, 2)
            new_weights = nn.functional.pad(new_weights, (0, 1))
        return (hidden, new_indices, new_weights.to(weights.dtype)), {}

    hooks.callback(block.gate.register_forward_hook(after_gate).remove)
    hooks.callback(block.experts.register_forward_pre_hook(before_experts, with_kwargs=True).remove)


def _why_none(model: Any) -> str:
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if (_number((config,), CONFIG_NAMES) or 1) > 1:
        return f"{name} does not call its experts with ({', '.join(CALL)}), so its routing cannot be read or changed"
    return f"{name} has no mixture layers, so there is no routing to read or change; upcycle it first"


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    given = [*args, *(kwargs[name] for name in CALL[len(args) :] if name in kwargs)]
    if len(given) != 3:
        raise TypeError(f"experts were called with {len(args)} arguments and {sorted(kwargs)}, expected {CALL}")
    return given[0], given[1], given[2]


def _is_experts(module: nn.Module) -> bool:
    # Families without the decorator may still be called in its way.
    return _is_marked(module) or set(CALL[1:]) <= set(inspect.signature(type(module).forward).parameters)


def _is_marked(module: nn.Module) -> bool:
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
    names = {id(child): f"{path}.{name}".lstrip(".") for name, child in parent.named_children()}
    return MoEBlock(
        name=path,
        module=parent,
        gate=gate,
        experts=experts,
        shared=shared,
        n_experts=n,
        k=int(k),
        scale=1.0 if scale is None else float(scale),
        parts=tuple(parts),
        gate_name=names[id(gate)],
        experts_name=names[id(experts)],
    )


def _count(experts: nn.Module) -> int:
    n = _number((experts,), COUNT_NAMES)
    down: Any = getattr(experts, "down_proj", None)
    return int(n) if n is not None else int(down.shape[0])


def _number(places: Iterable[Any], names: Sequence[str]) -> float | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return value
    return None
