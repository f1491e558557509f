"""The pieces of a mixture that are used most, taken out of the router and always on.

A piece that many tokens visit with large weights takes a place of each of them; shared, it takes none. In each layer by itself,
the K_s pieces with the largest sum over tokens of weight times norm of what they write become shared, and K_s fewer of the
others are chosen, so that parameters and the cost of a token stay. This is not exact. Two factors a layer, least squares over the
tokens that were read, keep the loss small; both go into the down projections:

- a shared piece has one weight for all tokens, c = sum w n^2 / sum n^2, where w = 0 if a token did not choose it;
- the others have larger gates w', since the softmax has lost entries, and are multiplied by r = sum w w' n^2 / sum w'^2 n^2.

Shapes: T tokens, E pieces, K pieces a token visits, D width; n is the norm of what a piece writes, w its weight.
Source: DeepSeekMoE (2401.06066), sec. 3.2, for what shared experts are; making them out of a trained mixture is not in the paper.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.core.gates import Routing, top_k
from mixtura.lm.anatomy import MoEBlock, find_moe, rerouted, run_layers
from mixtura.lm.families.write import fill

__all__ = ["SHARING", "Choice", "check_shareable", "choose_shared", "share_pieces"]

SHARING = ("deepseek_v2", "mixtura", "qwen2_moe")  # model types that can hold a shared expert of weight 1


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer's pieces.

    Attributes:
        shared, kept: pieces that are always on, shape (K_s,), and the others, shape (E - K_s,); ascending.
        weights: what each shared piece is multiplied by, shape (K_s,).
        factor: what the others are multiplied by.
    """

    shared: Tensor
    kept: Tensor
    weights: Tensor
    factor: float


def check_shareable(model: PreTrainedModel) -> None:
    """Refuse a model that cannot hold a shared expert of weight 1.

    Raises:
        ValueError: what is in the way, and what would do.
    """
    config: Any = model.config
    instead = "leave shared at 0, or start from the dense model: upcycle(dense, method='fine-grained', shared=...)"
    if config.model_type not in SHARING:
        raise ValueError(f"{type(model).__name__} has no shared experts ({', '.join(SHARING)} have); {instead}")
    if getattr(config, "shared_combine", "sum") != "sum":
        raise ValueError(
            f"shared_combine={config.shared_combine!r} weights the shared expert by the token, not by 1; {instead}"
        )
    for block in find_moe(model) if config.model_type == "qwen2_moe" else []:
        weight: Any = block.module.shared_expert_gate.weight  # type: ignore[union-attr]
        if bool(weight.any()):
            raise ValueError(
                f"the shared expert of {block.name} is weighted by a gate that has learned, and more units cannot join it "
                f"with weight 1; {instead}"
            )


def choose_shared(routing: Routing, norms: Tensor, count: int, *, renormalise: bool, scale: float = 1.0) -> Choice:
    """Which pieces of a layer to share, and the factors that keep its output near what it was.

    Args:
        routing: of T tokens over E pieces, K each.
        norms: of what every piece would write for every token, without its gate, shape (T, E).
        count: pieces to share, below K.
        renormalise, scale: what the gate does with its weights: whether they are made to sum to 1, and its constant factor.
    Example:
        >>> logits = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
        >>> choose_shared(top_k(logits, 2), torch.ones(2, 3), 1, renormalise=True).shared
        tensor([2])
    """
    w_TE = _spread(routing)
    used_E = (w_TE * norms).sum(0)
    shared = used_E.sort(descending=True, stable=True).indices[:count].sort().values
    kept = torch.ones_like(used_E, dtype=torch.bool).index_fill_(0, shared, False).nonzero()[:, 0]
    n_TE = norms.square()
    c = (w_TE * n_TE)[:, shared].sum(0) / n_TE[:, shared].sum(0).clamp_min(torch.finfo(norms.dtype).tiny)
    fewer = routing.indices.shape[1] - count
    new_TE = scale * _spread(top_k(routing.logits[:, kept], fewer, renormalise=renormalise))
    had, has = (w_TE[:, kept] * new_TE * n_TE[:, kept]).sum(), (new_TE.square() * n_TE[:, kept]).sum()
    return Choice(shared=shared, kept=kept, weights=c, factor=float(had / has) if has > 0 else 1.0)


@torch.no_grad()
def share_pieces(
    model: PreTrainedModel, count: int, batches: Sequence[Tensor], *, fields: tuple[str, str]
) -> PreTrainedModel:
    """A mixture with ``count`` of its experts shared in each layer, the same parameters, and that many fewer chosen.

    Args:
        model: of one of :data:`SHARING`, checked by :func:`check_shareable`; it is left as it is.
        count: experts to share, below the number that a token visits.
        batches: token ids, each of shape (B, L) or (L,), without padding.
        fields: the config's names of the experts and of the hidden units of one.
    """
    config: Any = copy.deepcopy(model.config)
    experts, hidden = fields
    now = getattr(config, experts)
    setattr(config, experts, now - count if isinstance(now, int) else [n - count if n else 0 for n in now])
    config.num_experts_per_tok -= count
    if config.model_type == "deepseek_v2":  # counts them in units of routed ones
        config.n_shared_experts += count
    else:
        config.shared_expert_intermediate_size += count * getattr(config, hidden)
    changes: dict[str, Tensor] = {}
    for block, routing, x_TD in _recorded(model, batches):
        norms_TE = _norms(block, x_TD)
        renormalise = bool(block.scoring.renormalises)
        choice = choose_shared(routing, norms_TE, count, renormalise=renormalise, scale=block.scale)
        changes |= _changes(block, choice, doubled=config.model_type == "qwen2_moe")
    state = model.state_dict()
    with torch.device("meta"):
        made: PreTrainedModel = type(model)(config)
    fill(made, lambda name: changes[name] if name in changes else state[name].clone())
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def _spread(routing: Routing) -> Tensor:
    """Weights of all experts, 0 where not chosen, shape (T, E), float32 or wider."""
    wide = routing.weights.to(torch.promote_types(routing.weights.dtype, torch.float32))
    out_TE = wide.new_zeros(len(wide), routing.n_experts + 1)  # the last column is the sentinel's
    return out_TE.scatter_(1, routing.indices, wide)[:, :-1]


def _recorded(model: PreTrainedModel, batches: Iterable[Tensor]) -> list[tuple[MoEBlock, Routing, Tensor]]:
    """Every block with what its gate decided and its experts read, all batches together."""
    moe = find_moe(model)
    routings: dict[str, list[Routing]] = {block.name: [] for block in moe}
    inputs: dict[str, list[Tensor]] = {block.name: [] for block in moe}

    def note(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
        routings[block.name].append(routing)
        return routing.weights, routing.indices

    def keep(block: MoEBlock) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            inputs[block.name].append(x.reshape(-1, x.shape[-1]))

        return hook

    with ExitStack() as stack:
        for block in moe:
            stack.callback(block.experts.register_forward_pre_hook(keep(block), with_kwargs=True).remove)
        stack.enter_context(rerouted(moe, note))
        for ids in batches:
            run_layers(model, ids.reshape(-1, ids.shape[-1]))
    return [(block, _joined(routings[block.name]), torch.cat(inputs[block.name])) for block in moe]


def _joined(parts: Sequence[Routing]) -> Routing:
    names = ("weights", "indices", "logits", "probs")
    return Routing(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _norms(block: MoEBlock, x_TD: Tensor) -> Tensor:
    """Norm of what each piece would write for each token, its output bias included, shape (T, E)."""
    experts: Any = block.experts
    own = dict(experts.named_parameters())
    up = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    norms = []
    for e in range(block.n_experts):
        inner = F.linear(x_TD, own[up][e], own[f"{up}_bias"][e] if f"{up}_bias" in own else None)
        if up == "gate_up_proj":
            gate, inner = inner.chunk(2, dim=-1)
            inner = experts.act_fn(gate) * inner
        else:
            inner = experts.act_fn(inner)
        written = F.linear(inner, own["down_proj"][e], own["down_proj_bias"][e] if "down_proj_bias" in own else None)
        norms.append(written.float().norm(dim=-1))
    return torch.stack(norms, dim=1)


def _changes(block: MoEBlock, choice: Choice, *, doubled: bool) -> dict[str, Tensor]:
    """A layer's new parameters: fewer router rows and experts, and the shared expert with more hidden units."""
    gate: Any = block.gate
    found = {f"{block.gate_name}.weight": gate.weight[choice.kept]}
    own = dict(block.experts.named_parameters())
    for name, stack in own.items():
        kept = stack[choice.kept]
        found[f"{block.experts_name}.{name}"] = kept * choice.factor if name.startswith("down_proj") else kept
    up = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    halves = ("gate_proj", "up_proj") if up == "gate_up_proj" else ("up_proj",)
    rows: dict[str, Tensor] = {}
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        if f"{up}{suffix}" in own:
            parts = own[f"{up}{suffix}"][choice.shared].chunk(len(halves), dim=1)
            rows |= {f"{half}.{kind}": part.flatten(0, 1) for half, part in zip(halves, parts, strict=True)}
    # Qwen2-MoE halves its shared expert: a sigmoid of zero.
    c = choice.weights.to(own["down_proj"].dtype) * (2.0 if doubled else 1.0)
    down = (own["down_proj"][choice.shared] * c[:, None, None]).movedim(0, 1).flatten(1)  # (D, K_s H)
    there = dict(block.shared[0].named_parameters()) if block.shared else {}
    prefix = f"{block.name}.{'shared_experts' if hasattr(block.module, 'shared_experts') else 'shared_expert'}"
    for name, value in rows.items():
        found[f"{prefix}.{name}"] = torch.cat((there[name], value)) if there else value
    name = "down_proj.weight"
    found[f"{prefix}.{name}"] = torch.cat((there[name], down), dim=1) if there else down
    if "down_proj_bias" in own:
        bias = (own["down_proj_bias"][choice.shared] * c[:, None]).sum(0)
        found[f"{prefix}.down_proj.bias"] = there["down_proj.bias"] + bias if there else bias
    return found
