"""How far a lesser routing moves the next-token distribution, by rank and by kind of token.

Shapes: N rows, L positions, R ranks, E experts.
Source: SCMoE (2405.14507), figure 3 (divergence) and table 6 (unchosen experts).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.decode.routing import Renorm, RoutingRule, routed

__all__ = ["RoutingDivergence", "routing_divergence"]


@dataclass(frozen=True)
class RoutingDivergence:
    """What the ranks do to a model.

    Attributes:
        ranks: the ranks measured, R of them.
        kl: class of tokens -> KL(strong || rank-k) in nats a token, one value a rank.
        unchosen: share of tokens whose rank-k expert the strong pass did not choose, one value a rank and layer, (R, layers).
    """

    ranks: tuple[int, ...]
    kl: dict[str, list[float]]
    unchosen: list[list[float]]


@torch.inference_mode()
def routing_divergence(
    model: Any,
    batches: Iterable[Tensor],
    ranks: Sequence[int] = range(1, 9),
    *,
    classes: Mapping[str, Tensor] | None = None,
    renorm: Renorm = True,
) -> RoutingDivergence:
    """Compare the normal routing with each rank alone.

    Args:
        model: a mixture of experts.
        batches: token ids, each (N, L).
        ranks: ranks to route by, 1 is the best.
        classes: name -> boolean mask of positions (L,) over the *predicting* positions; ``"all"`` is always there.
        renorm: see :func:`~mixtura.lm.decode.routing.routed`.
    """
    blocks = find_moe(model)
    masks: dict[str, Tensor | slice] = {"all": slice(None), **(classes or {})}
    kl = {name: torch.zeros(len(ranks), dtype=torch.float64) for name in masks}
    tokens = dict.fromkeys(masks, 0)
    unchosen = torch.zeros(len(ranks), len(blocks), dtype=torch.float64)
    seen = 0
    for ids in batches:
        with recorded_routing(model) as strong:
            strong_NLV = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        for r, rank in enumerate(ranks):
            with recorded_routing(model) as own, routed(model, RoutingRule.rank(rank), renorm=renorm):
                weak_NLV = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            kl_NL = (strong_NLV.exp() * (strong_NLV - weak_NLV)).sum(-1)
            for name, mask in masks.items():
                kl[name][r] += kl_NL[:, mask].double().sum().item()
            for b, block in enumerate(blocks):
                order_TE = block.scores(own[block.name]).argsort(dim=-1, descending=True, stable=True)
                chosen = (order_TE[:, rank - 1, None] == strong[block.name].indices).any(-1)
                unchosen[r, b] += (~chosen).sum().item()
        for name, mask in masks.items():
            tokens[name] += strong_NLV[:, mask].shape[0] * strong_NLV[:, mask].shape[1]
        seen += ids.numel()
    return RoutingDivergence(
        tuple(int(rank) for rank in ranks),
        {name: (total / tokens[name]).tolist() for name, total in kl.items()},
        (unchosen / seen).tolist(),
    )
