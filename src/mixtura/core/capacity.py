"""Capacity: how many tokens an expert may take, and which of those that chose it stay.

Shapes: T tokens, E experts, K experts a token visits, S = T * K pairs, Q queues (one an expert and group).
Sources: Switch Transformers (2101.03961), eq. 3; 2109.10465, sec. 3.2 (random token selection).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["CapacityPolicy", "capacity", "capacity_select"]

CapacityPolicy = Literal["random", "prefix", "group", "probs"]
_POLICIES = ("random", "prefix", "group", "probs")


def capacity(n_tokens: int, n_experts: int, factor: float, *, minimum: int = 4) -> int:
    """Tokens that an expert may take: max(ceil(T / E * factor), minimum).

    Example:
        >>> capacity(100, 8, 1.25)
        16
    """
    if factor <= 0:
        raise ValueError(f"factor must be > 0, got {factor}")
    if minimum < 0:
        raise ValueError(f"minimum must be >= 0, got {minimum}")
    # The epsilon keeps 100 / 10 * 1.1 at 11, where floats say 11.000000000000002.
    return max(math.ceil(n_tokens * factor / n_experts - 1e-9), minimum)


def capacity_select(
    indices: Tensor,
    n_experts: int,
    limit: int,
    *,
    policy: CapacityPolicy = "random",
    probs: Tensor | None = None,
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which token-expert pairs stay when an expert takes at most ``limit`` tokens.

    Args:
        indices: chosen experts, shape (T, K); the sentinel is never kept and fills no place.
        n_experts: E.
        limit: places an expert has, >= 0.
        policy: "random" draws among an expert's tokens, so that no position is favoured (random token selection);
            "prefix" takes the first in token order; "group" splits the tokens into ``groups`` equal spans and gives
            each its part of ``limit``, so that an expert may take fewer than it could; "probs" takes the largest gate
            weights, ties by position.
        probs: weights for "probs", shape (T, K).
        groups: spans for "group". With tokens in the order of time (all first tokens, then all second ones) spans are
            spans of time.
        generator: source of chance for "random": an expert takes its tokens in the order of ``torch.randperm(S)``, which
            is the order of independent uniform numbers, without ties.
    Returns:
        Bool, shape (T, K), True where the pair stays. Memory is that of a few vectors of length S.
    Raises:
        ValueError: an unknown policy, a negative limit, probs or groups that do not go with the policy, or groups < 1.
    Source:
        2109.10465, sec. 3.2.
    Example:
        >>> capacity_select(torch.tensor([[0], [0], [1], [0]]), 2, 2, policy="prefix").flatten().tolist()
        [True, True, True, False]
    """
    if policy not in _POLICIES:
        raise ValueError(f"policy must be one of {sorted(_POLICIES)}, got {policy!r}")
    if limit < 0:
        raise ValueError(f"limit must be >= 0, got {limit}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if groups > 1 and policy != "group":
        raise ValueError(f"groups goes with policy 'group' and with no other, got groups={groups} and {policy!r}")
    if (probs is None) == (policy == "probs"):
        raise ValueError(f"probs goes with policy 'probs' and with no other, got policy {policy!r}")
    if probs is not None and probs.shape != indices.shape:
        raise ValueError(f"probs must have the shape of indices {tuple(indices.shape)}, got {tuple(probs.shape)}")
    n_tokens, k = indices.shape
    queue_S, n_queues = indices.reshape(-1), n_experts + 1  # the last queue holds the sentinels
    places: Tensor | int = limit
    if policy == "group":
        span_T = torch.arange(n_tokens, device=indices.device) * groups // max(n_tokens, 1)
        queue_S = queue_S * groups + span_T.repeat_interleave(k)
        n_queues = n_queues * groups
        # The j-th span ends at the j-th part of the limit, rounded down: the parts add up to the limit.
        ends_G = torch.arange(groups + 1, device=indices.device) * limit // groups
        places = ends_G.diff()
    order_S = _by_queue(queue_S, policy, probs, generator)
    sorted_S = queue_S[order_S]
    starts_Q = torch.bincount(queue_S, minlength=n_queues).cumsum(0).roll(1)
    starts_Q[0] = 0
    place_S = torch.arange(len(order_S), device=indices.device) - starts_Q[sorted_S]
    if isinstance(places, Tensor):
        places = places[sorted_S % groups]
    kept_S = torch.zeros_like(queue_S, dtype=torch.bool)
    kept_S[order_S] = (place_S < places) & (sorted_S < n_queues - groups)
    return kept_S.view(n_tokens, k)


def _by_queue(queue_S: Tensor, policy: str, probs: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Pairs sorted by queue, and within a queue by who comes first."""
    turn_S = None
    if policy == "random":
        turn_S = torch.randperm(len(queue_S), generator=generator, device=queue_S.device)
    elif policy == "probs" and probs is not None:
        turn_S = probs.reshape(-1).argsort(descending=True, stable=True)
    if turn_S is not None:
        return turn_S[queue_S[turn_S].argsort(stable=True)]
    return queue_S.argsort(stable=True)
