"""Lesser experts skipped at run time: a token's second expert is left out where its weight is small against the first.

Rule 1: in a layer, the second expert is a candidate where w_1 / w_0 is below that layer's median over calibration tokens.
Rule 2: in a prompt, the most important tokens keep theirs. Importance is the norm of the token times the mean attention it
receives from the tokens after it, I_j = ||t_j||_1 * sum_{i >= j} A_ij / (L - j). Where one token is decoded at a time there
are no later ones, and rule 1 alone applies.

A skipped expert's index becomes E: packed experts and mixtura's experts engine drop it before any product.

Shapes: B rows, L positions, T tokens, E experts, K chosen.
Source: MC-MoE (2410.06270), sec. 3.3, eq. 7 and algorithm 1.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixtura.core.gates import Routing
from mixtura.core.progress import progress
from mixtura.lm.anatomy import MoEBlock, find_moe, rerouted, run_layers
from mixtura.lm.compress.attention_received import RECEIVED, observe
from mixtura.lm.compress.factors import as_batches

__all__ = ["attach", "prune_dynamically", "pruned_share", "pruned_weights", "thresholds"]

Layers = Literal["all"] | int | Sequence[int]


def prune_dynamically(
    model: Any,
    calibration: Tensor | Iterable[Tensor],
    *,
    protect: float = 0.02,
    layers: Layers = "all",
    threshold: float | None = None,
    beyond_two: bool = False,
    inplace: bool = False,
) -> Any:
    """Let a model skip experts that hardly count, in every later forward pass.

    Args:
        model: a mixture of experts, float or packed; float ones are switched to ``experts_implementation="mixtura"``.
        calibration: token ids that set the medians, (N, length), or batches of them.
        protect: share of a prompt's tokens that keep all their experts, in [0, 1).
        layers: ``"all"``, the number of layers to prune (those where it changes the block's output least), or their indices.
        threshold: one ratio for all layers instead of the medians.
        beyond_two: also prune models with more than two experts a token: rank r is dropped where w_r / w_0 is below its own
            median. Ours; the paper has two.
        inplace: change the model itself instead of a copy.
    Returns:
        The pruning model; a packed one saves and loads with its thresholds.
    Raises:
        ValueError: a dense model, one expert a token, more than two without ``beyond_two``, a share outside [0, 1), a layer
            that does not exist.
    """
    blocks = find_moe(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} is a dense model and has no experts to skip; upcycle it first")
    k = blocks[0].k
    if k < 2:
        raise ValueError(
            "every token visits one expert here, so there is no second one to skip; this needs top-2 or more"
        )
    if k > 2 and not beyond_two:
        raise ValueError(
            f"tokens visit {k} experts here and the method is defined for two; set beyond_two=True to extend it"
        )
    if not 0 <= protect < 1:
        raise ValueError(f"protect is a share and must be in [0, 1), got {protect}")
    if not inplace:
        model = copy.deepcopy(model)
        blocks = find_moe(model)
    batches = as_batches(calibration)
    ratios = [[threshold] * (k - 1)] * len(blocks) if threshold is not None else thresholds(model, batches)
    chosen = _chosen(model, blocks, batches, layers, ratios)
    settings = {
        "protect": protect,
        "ratios": {blocks[i].name: ratios[i] for i in chosen},
    }
    attach(model, settings)
    config = getattr(model.config, "quantization_config", None)
    if config is not None and hasattr(config, "pruning"):
        config.pruning = settings
    return model


@torch.inference_mode()
def thresholds(model: Any, batches: Iterable[Tensor]) -> list[list[float]]:
    """Median of w_r / w_0 over all tokens, for each layer and each rank r >= 1."""
    blocks = find_moe(model)
    found: dict[str, list[Tensor]] = {block.name: [] for block in blocks}

    def keep(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
        sorted_TK = routing.weights.float().sort(-1, descending=True).values
        found[block.name].append(sorted_TK[:, 1:] / sorted_TK[:, :1])
        return routing.weights, routing.indices

    with rerouted(blocks, keep):
        for batch in progress(as_batches(batches), desc="thresholds", unit="batch"):
            run_layers(model, batch)
    return [torch.cat(parts).median(0).values.tolist() for parts in found.values()]


def pruned_weights(
    weights: Tensor, indices: Tensor, n_experts: int, ratios: Sequence[float], protected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights and indices after pruning.

    Args:
        weights: (T, K), in any order.
        indices: (T, K).
        n_experts: E; the index of a place without an expert.
        ratios: for ranks 1, ..., K - 1, below which w_r / w_0 is dropped.
        protected: boolean (T,); those tokens keep everything.
    Returns:
        Weights (T, K), scaled so that each token's sum is what it was, and indices (T, K). With two experts of renormalised
        weights the one that is left has weight 1, as in the paper.
    """
    order_TK = weights.sort(dim=-1, descending=True, stable=True).indices
    sorted_TK = weights.gather(-1, order_TK)
    limits = torch.tensor([-1.0, *ratios], device=weights.device, dtype=torch.float32)
    drop_TK = sorted_TK.float() / sorted_TK[:, :1].float() < limits
    if protected is not None:
        drop_TK = drop_TK & ~protected[:, None]
    drop_TK = torch.zeros_like(drop_TK).scatter(-1, order_TK, drop_TK)
    left_TK = weights.masked_fill(drop_TK, 0)
    left_TK = left_TK * (weights.sum(-1, keepdim=True) / left_TK.sum(-1, keepdim=True))
    return left_TK.to(weights.dtype), indices.masked_fill(drop_TK, n_experts)


def attach(model: Any, settings: dict[str, Any]) -> None:
    """Make a model prune from now on; ``settings`` is what a packed checkpoint keeps in its config."""
    blocks = {block.name: block for block in find_moe(model)}
    if missing := [name for name in settings["ratios"] if name not in blocks]:
        raise ValueError(f"pruning names the layer {missing[0]}, which {type(model).__name__} does not have")
    protect = float(settings["protect"])
    for name, ratios in settings["ratios"].items():
        _Pruner(model, blocks[name], ratios, protect)
    if protect > 0:
        observe(model)
    if not all(getattr(block.experts, "mixtura_experts", False) for block in blocks.values()):
        import mixtura.lm.experts_forward  # noqa: F401 (registers the engine that drops what is skipped)

        model.set_experts_implementation("mixtura")


@torch.inference_mode()
def pruned_share(model: Any, batches: Iterable[Tensor]) -> float:
    """Share of expert visits beyond the first that a pruning model skips on these tokens."""
    skipped = visits = 0

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal skipped, visits
        skipped += int((args[1] == module.num_experts).sum())  # type: ignore[operator]
        visits += args[1].numel() - len(args[1])

    hooks = [block.experts.register_forward_pre_hook(count) for block in find_moe(model)]
    try:
        for batch in as_batches(batches):
            run_layers(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return skipped / visits


class _Pruner:
    """Two hooks on one layer: norms of the tokens where the gate reads them, pruning where the experts are called."""

    def __init__(self, model: nn.Module, block: MoEBlock, ratios: Sequence[float], protect: float):
        self.n_experts, self.ratios, self.protect = block.n_experts, list(ratios), protect
        layer = block.name.rpartition(".")[0]
        beside = dict(model.named_modules()).get(f"{layer}.self_attn")
        # The module that calls the attention function may sit inside (attention experts).
        self.attentions = [] if beside is None else list(beside.modules())
        block.experts.register_forward_pre_hook(self.before_experts)

    def before_experts(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, indices, weights = args
        protected = self.protected(hidden) if self.protect > 0 else None
        weights, indices = pruned_weights(weights, indices, self.n_experts, self.ratios, protected)
        return hidden, indices, weights

    def protected(self, hidden: Tensor) -> Tensor | None:
        """The most important real tokens of each row, boolean (T,); None where attention says nothing."""
        received = next((r for m in self.attentions if (r := getattr(m, RECEIVED, None)) is not None), None)
        if received is None or received[0].numel() != len(hidden):
            return None
        means_BL, real_BL = received
        importance_BL = hidden.float().abs().sum(-1).view(means_BL.shape) * means_BL
        importance_BL = importance_BL.masked_fill(~real_BL, -1.0)
        keep_BL = torch.zeros_like(real_BL)
        for row, real in enumerate(real_BL.sum(-1).tolist()):
            most = importance_BL[row].topk(math.ceil(self.protect * real)).indices
            keep_BL[row, most] = True
        return keep_BL.flatten()


def _chosen(
    model: Any, blocks: Sequence[MoEBlock], batches: Sequence[Tensor], layers: Layers, ratios: list[list[float]]
) -> list[int]:
    if layers == "all":
        return list(range(len(blocks)))
    if isinstance(layers, int):
        if not 1 <= layers <= len(blocks):
            raise ValueError(f"layers must be between 1 and the number of mixture layers, {len(blocks)}, got {layers}")
        losses = _losses(model, blocks, batches, ratios)
        return sorted(sorted(range(len(blocks)), key=lambda i: losses[i])[:layers])
    chosen = [int(i) for i in layers]
    if bad := [i for i in chosen if not 0 <= i < len(blocks)]:
        raise ValueError(f"layers must lie in 0..{len(blocks) - 1}, got {bad}")
    return chosen


@torch.inference_mode()
def _losses(
    model: Any, blocks: Sequence[MoEBlock], batches: Sequence[Tensor], ratios: list[list[float]]
) -> list[float]:
    """Squared change of each block's output by pruning it alone, relative to the output."""
    index = {block.name: i for i, block in enumerate(blocks)}
    hidden: dict[str, Tensor] = {}
    changed, whole = [0.0] * len(blocks), [0.0] * len(blocks)

    def compare(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
        i, x = index[block.name], hidden[block.name]
        run = type(block.experts).forward
        full = run(block.experts, x, routing.indices, routing.weights)
        weights, indices = pruned_weights(routing.weights, routing.indices, block.n_experts, ratios[i])
        kept = run(block.experts, x, indices.clamp(max=block.n_experts - 1), weights)
        changed[i] += (full - kept).float().square().sum().item()
        whole[i] += full.float().square().sum().item()
        return routing.weights, routing.indices

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden[name] = args[0]

        return hook

    hooks = [block.experts.register_forward_pre_hook(keep(block.name)) for block in blocks]
    try:
        with rerouted(blocks, compare):
            for batch in batches:
                run_layers(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [c / max(w, 1e-30) for c, w in zip(changed, whole, strict=True)]
