"""How specialised experts are: what a model loses when its best experts, its shared ones or some of many are taken away.

An expert that nobody can stand in for holds something of its own. The gate is left as it is: experts are banned by rank and
the next ones take their place with the weights that the gate gives them; nothing is taken out of the softmax.

Shapes: T tokens, E experts, K experts a token visits.
Source: DeepSeekMoE (2401.06066), sec. 4.5: fig. 4 (banned top experts), fig. 5 (fewer active ones) and the text between them
(shared expert switched off, one more routed).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.core.gates import Routing, top_k
from mixtura.lm.anatomy import MoEBlock, find_moe
from mixtura.lm.decode.routing import RoutingRule, routed
from mixtura.lm.evaluate import token_losses

__all__ = ["ban_top", "drop_shared", "fewer_active", "without_best", "without_shared"]


def ban_top(model: Any, blocks: Tensor, shares: Sequence[float] = (0.0, 1 / 16, 1 / 8, 1 / 4)) -> dict[float, float]:
    """Loss when each token's best experts are banned in every layer and it visits the K best of the rest.

    Args:
        model: a mixture of experts; it is left as it was.
        blocks: token ids, shape (N, L), L >= 2.
        shares: of a layer's routed experts to ban, rounded to whole ones.
    Returns:
        share -> nats a token.
    Raises:
        ValueError: a share that leaves fewer than K experts, or a model without mixture layers.
    """
    moe = _mixture_layers(model)
    found = {}
    for share in shares:
        rules = {_banned(block, share) for block in moe}
        if len(rules) > 1:
            raise ValueError("layers must have equally many experts to ban the same share of each")
        first, k = rules.pop()
        found[share] = _loss(model, blocks, RoutingRule.ranks(range(first + 1, first + k + 1)))
    return found


def fewer_active(model: Any, blocks: Tensor, counts: Sequence[int]) -> dict[int, float]:
    """Loss when a token visits so many routed experts, in nats a token; weights by the gate's own rule."""
    _mixture_layers(model)
    return {k: _loss(model, blocks, RoutingRule.top(k)) for k in counts}


def drop_shared(model: Any, blocks: Tensor, *, instead: int = 1) -> dict[str, float]:
    """Loss with the shared experts, and with them switched off and ``instead`` more routed ones a token, nats a token.

    Raises:
        ValueError: the model has no shared expert.
    """
    moe = _mixture_layers(model)
    with without_shared(model):
        off = _loss(model, blocks, RoutingRule.top(moe[0].k + instead))
    return {"with": _loss(model, blocks, RoutingRule.default()), "without": off}


def without_best(routing: Routing, banned: int, *, renormalise: bool) -> Routing:
    """Routing to the K best experts after the ``banned`` best, with the gate's weights for them.

    Args:
        routing: of K experts a token.
        banned: experts of each token to pass over.
        renormalise: what the gate does with its weights: whether they are made to sum to 1.
    Example:
        >>> routing = top_k(torch.tensor([[3.0, 2.0, 1.0]]), 1, renormalise=False)
        >>> without_best(routing, 1, renormalise=False).indices
        tensor([[1]])
    """
    k, n_experts = routing.indices.shape[-1], routing.n_experts
    if not 0 <= banned <= n_experts - k:
        raise ValueError(
            f"banned must be between 0 and {n_experts - k}, so that {k} of {n_experts} experts are left, got {banned}"
        )
    ranked = top_k(routing.logits, banned + k, renormalise=False)
    weights_TK, indices_TK = ranked.weights[:, banned:], ranked.indices[:, banned:]
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Routing(weights=weights_TK, indices=indices_TK, logits=routing.logits, probs=routing.probs)


@contextmanager
def without_shared(model: nn.Module) -> Iterator[None]:
    """Let the shared experts of every layer answer zeros inside the block.

    Raises:
        ValueError: the model has no shared expert.
    """
    shared = [module for block in find_moe(model) for module in block.shared]
    if not shared:
        raise ValueError(f"{type(model).__name__} has no shared expert to switch off")
    hooks = [module.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output)) for module in shared]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mixture_layers(model: nn.Module) -> list[MoEBlock]:
    moe = find_moe(model)
    if not moe:
        raise ValueError(f"{type(model).__name__} has no mixture layers, so it has no experts to take away")
    return moe


def _banned(block: MoEBlock, share: float) -> tuple[int, int]:
    banned = round(share * block.n_experts)
    if not 0 <= banned <= block.n_experts - block.k:
        raise ValueError(
            f"share={share:g} bans {banned} of the {block.n_experts} experts of {block.name} and leaves fewer than the "
            f"{block.k} that a token visits"
        )
    return banned, block.k


def _loss(model: Any, blocks: Tensor, rule: RoutingRule) -> float:
    with routed(model, rule, renorm="as_model"):
        return float(token_losses(model, blocks).double().mean())
