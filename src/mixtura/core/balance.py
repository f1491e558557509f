"""Balance: what keeps a gate from sending every token to the same few experts.

Losses are averages over tokens, without a coefficient: multiply by your own (0.01 is usual for balance, 0.001 for the
z-loss). Counts carry no gradient. The sentinel index E (no expert here) counts for nobody.

Where the tokens lie in several processes, ``shared`` makes each loss that of all of them: the mean over processes of its values
and of its gradients is what one process with all tokens gets (`shared_batch`).

Shapes: T tokens, E experts, K experts a token visits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mixtura.core.shared_batch import SharedBatch

__all__ = [
    "BalancePer",
    "LoadStatistics",
    "balance_loss",
    "device_balance_loss",
    "device_split",
    "expert_counts",
    "load_balance_loss",
    "load_statistics",
    "router_z_loss",
    "sequence_balance_loss",
    "updated_bias",
]

BalancePer = Literal["batch", "sequence"]


@dataclass(frozen=True)
class LoadStatistics:
    """How evenly experts are visited. Without unit."""

    share: Tensor  # (E,), of all visits; sums to 1, or is 0 everywhere when nothing was visited
    entropy: float  # of the shares over log E: 1 when even, 0 when one expert takes all
    variation: float  # standard deviation of the shares over their mean: 0 when even
    max_over_mean: float  # 1 when even, E when one expert takes all


def expert_counts(indices: Tensor, n_experts: int) -> Tensor:
    """Visits of each expert: int64 (E,). Indices of any shape in [0, E]; the sentinel E is left out.

    Example:
        >>> expert_counts(torch.tensor([[0, 2], [2, 3]]), n_experts=3)
        tensor([1, 0, 2])
    """
    flat = indices.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) <= n_experts:
        raise ValueError(f"indices must be in [0, {n_experts}], got {int(flat.min())} to {int(flat.max())}")
    return torch.bincount(flat, minlength=n_experts + 1)[:n_experts]


def load_balance_loss(probs: Tensor, indices: Tensor, *, shared: SharedBatch | None = None) -> Tensor:
    """Imbalance of a gate: 1 when experts share the tokens evenly, E when one expert takes them all.

    Args:
        probs: gate probabilities before the choice, shape (T, E), rows sum to 1.
        indices: chosen experts, shape (T, K), integers in [0, E]; E is the sentinel.
        shared: processes that hold the other tokens; None: there are none.
    Returns:
        Scalar without unit; 0 for no tokens. Its gradient reaches ``probs`` only: the counts are constants.
    Raises:
        ValueError: an index outside [0, E], or a different number of tokens in the two arguments.
    Source:
        Switch Transformers (2101.03961), eq. 4-6, without the factor alpha; for K > 1 counts are divided by K
        (DeepSeekMoE, 2401.06066, eq. 12-14).
    Example:
        >>> load_balance_loss(torch.full((4, 2), 0.5), torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    load_E, importance_E = _load_and_importance(probs, indices, shared)
    return (load_E * importance_E).sum()


def device_balance_loss(
    probs: Tensor, indices: Tensor, groups: Sequence[Sequence[int]], *, shared: SharedBatch | None = None
) -> Tensor:
    """Imbalance between devices that each hold a group of experts: 1 when even between devices.

    Within a device experts may be as uneven as they like. With one expert a device it equals `load_balance_loss`;
    with one device it is 1 for any routing.

    Args:
        probs: shape (T, E), rows sum to 1.
        indices: shape (T, K), in [0, E].
        groups: expert indices of each device; together every expert exactly once.
        shared: processes that hold the other tokens.
    Source:
        DeepSeekMoE (2401.06066), eq. 15-17, without the factor alpha.
    """
    n_experts = probs.shape[-1]
    _check_groups(groups, n_experts)
    load_E, importance_E = _load_and_importance(probs, indices, shared)
    terms = [load_E[list(group)].mean() * importance_E[list(group)].sum() for group in groups]
    return torch.stack(terms).sum()


def sequence_balance_loss(
    probs: Tensor,
    indices: Tensor,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    mask: Tensor | None = None,
    shared: SharedBatch | None = None,
) -> Tensor:
    """`load_balance_loss` of every sequence by itself, then the mean over sequences: stricter than over the batch.

    A batch can be even while each of its sequences goes to a few experts; this loss sees the latter.

    Args:
        probs: shape (B, L, E), rows sum to 1.
        indices: shape (B, L, K), in [0, E]; E is the sentinel.
        groups: expert indices of each device, for `device_balance_loss` in place of `load_balance_loss`.
        mask: shape (B, L), false at padding, which counts for nobody; None: none is padding.
        shared: processes that hold the other sequences.
    Returns:
        Scalar without unit; a sequence without tokens is left out, and 0 comes back where all are.
    Raises:
        ValueError: shapes that do not agree, or groups that do not hold every expert once.
    Source:
        DeepSeekMoE's released model (2401.06066; ``seq_aux``); the paper takes the batch.
    """
    if probs.dim() != 3 or indices.dim() != 3 or probs.shape[:2] != indices.shape[:2]:
        raise ValueError(
            f"probs (B, L, E) and indices (B, L, K) must agree in B and L, got {tuple(probs.shape)} and {tuple(indices.shape)}"
        )
    kept_BL = torch.ones(probs.shape[:2], dtype=torch.bool, device=probs.device) if mask is None else mask.bool()
    experts, k = probs.shape[-1], indices.shape[-1]
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) <= experts:
        raise ValueError(f"indices must be in [0, {experts}], got {int(indices.min())} to {int(indices.max())}")
    wide_BLE = _wide(probs)
    weight_BL = kept_BL.to(wide_BLE)
    tokens_B = weight_BL.sum(1)
    per_token_B1 = 1 / tokens_B.clamp(min=1)[:, None]
    importance_BE = torch.einsum("ble,bl->be", wide_BLE, weight_BL) * per_token_B1
    # One place more, for the sentinel, whose choices count for nobody.
    counts = wide_BLE.new_zeros(len(probs), experts + 1)
    counts.scatter_add_(1, indices.flatten(1), weight_BL.repeat_interleave(k, 1))
    load_BE = counts[:, :experts] * per_token_B1 * (experts / k)
    if groups is None:
        loss_B = (load_BE * importance_BE).sum(1)
    else:
        _check_groups(groups, experts)
        terms = [load_BE[:, list(group)].mean(1) * importance_BE[:, list(group)].sum(1) for group in groups]
        loss_B = torch.stack(terms).sum(0)
    alive = (tokens_B > 0).sum()
    return loss_B.sum() / (alive.clamp(min=1) if shared is None else shared.mean(alive, loss_B))


def _check_groups(groups: Sequence[Sequence[int]], n_experts: int) -> None:
    if sorted(e for group in groups for e in group) != list(range(n_experts)) or not all(groups):
        raise ValueError(f"groups must hold each of the {n_experts} experts once, none empty, got {list(groups)}")


def device_split(experts: int, groups: int) -> list[range]:
    """Experts 0 .. E-1 in ``groups`` runs of equal length, as expert parallelism lays them over devices.

    Raises:
        ValueError: ``groups`` does not divide the experts.
    """
    if groups < 1 or experts % groups:
        raise ValueError(f"device_groups must divide the {experts} routed experts, got {groups}")
    size = experts // groups
    return [range(i * size, (i + 1) * size) for i in range(groups)]


def balance_loss(
    probs: Tensor,
    indices: Tensor,
    *,
    expert: float,
    device: float = 0.0,
    groups: Sequence[Sequence[int]] | None = None,
    per: BalancePer = "batch",
    mask: Tensor | None = None,
    shared: SharedBatch | None = None,
) -> Tensor:
    """Expert-level plus device-level balance loss, factors applied.

    Args:
        probs: softmax of all routed experts, shape (B, L, E).
        indices: chosen experts, shape (B, L, K).
        expert, device: factors alpha1 and alpha2.
        groups: experts of each device; needed when ``device`` is above 0.
        per: over all tokens of the ``batch`` (the paper), or each ``sequence`` by itself (the released model).
        mask: shape (B, L), false at padding.
        shared: processes that hold the other sequences.
    Source:
        DeepSeekMoE (2401.06066), eq. 12-17.
    """
    if device and groups is None:
        raise ValueError("a device balance needs groups, the experts of each device")
    total = _wide(probs).new_zeros(())
    terms: list[tuple[float, Sequence[Sequence[int]] | None]] = [(expert, None), (device, groups)]
    for factor, held in terms:
        if not factor:
            continue
        if per == "sequence":
            loss = sequence_balance_loss(probs, indices, groups=held, mask=mask, shared=shared)
        else:
            flat = (probs.flatten(0, 1), indices.flatten(0, 1))
            if mask is not None:
                flat = (flat[0][mask.reshape(-1).bool()], flat[1][mask.reshape(-1).bool()])
            if held is None:
                loss = load_balance_loss(*flat, shared=shared)
            else:
                loss = device_balance_loss(*flat, held, shared=shared)
        total = total + factor * loss
    return total


def router_z_loss(logits: Tensor, *, shared: SharedBatch | None = None) -> Tensor:
    """Mean over tokens of the squared log-partition of the logits: keeps them from growing without bound.

    Args:
        logits: shape (T, E).
        shared: processes that hold the other tokens.
    Returns:
        Scalar, in squared logits; 0 for no tokens.
    Source:
        ST-MoE (2202.08906), eq. 5.
    """
    total = _wide(logits).logsumexp(-1).square().sum()
    return total / (max(len(logits), 1) if shared is None else shared.mean(len(logits), total))


def updated_bias(bias: Tensor, counts: Tensor, *, rate: float = 1e-3) -> Tensor:
    """Selection bias after one step of balancing without a loss: up by ``rate`` for an expert under the mean load,
    down for one over it, unchanged at the mean.

    Add it to the scores that choose, never to the weights (``top_k(..., select_by=logits + bias)``). No gradient.

    Args:
        bias: shape (E,).
        counts: visits of each expert in this step, shape (E,); see `expert_counts`.
        rate: step, in logits, >= 0.
    Source:
        2408.15664, algorithm 1; DeepSeek-V3 (2412.19437), sec. 2.1.2.
    Example:
        >>> updated_bias(torch.zeros(2), torch.tensor([3, 1]), rate=0.5)
        tensor([-0.5000,  0.5000])
    """
    if rate < 0:
        raise ValueError(f"rate must be >= 0, got {rate}")
    if bias.shape != counts.shape:
        raise ValueError(f"bias and counts must have one shape, got {tuple(bias.shape)} and {tuple(counts.shape)}")
    load_E = counts.to(bias.dtype)
    return bias.detach() + rate * torch.sign(load_E.mean() - load_E)


def load_statistics(indices: Tensor, n_experts: int) -> LoadStatistics:
    """Share, entropy, variation and peak of the experts' load.

    Example:
        >>> load_statistics(torch.tensor([[0], [0], [1], [1]]), n_experts=4).max_over_mean
        2.0
    """
    counts_E = expert_counts(indices, n_experts).double()
    share_E = counts_E / counts_E.sum().clamp(min=1)
    entropy = float(torch.special.entr(share_E).sum()) / math.log(n_experts) if n_experts > 1 else 1.0
    return LoadStatistics(
        share=share_E.float(),
        entropy=entropy,
        variation=float(share_E.std(correction=0) * n_experts),
        max_over_mean=float(share_E.max() * n_experts),
    )


def _load_and_importance(probs: Tensor, indices: Tensor, shared: SharedBatch | None) -> tuple[Tensor, Tensor]:
    if probs.dim() != 2 or indices.dim() != 2 or len(probs) != len(indices):
        raise ValueError(
            f"probs (T, E) and indices (T, K) must agree in T, got {tuple(probs.shape)} and {tuple(indices.shape)}"
        )
    n_tokens, n_experts = probs.shape
    probs_TE = _wide(probs)
    counts_E = expert_counts(indices, n_experts)
    tokens = counts_E.new_tensor([n_tokens])
    parts = 1
    if shared is not None:
        summed = shared.sum(torch.cat([counts_E, tokens]))
        counts_E, tokens = summed[:-1], summed[-1:]
        parts = shared.size
    tokens = tokens.clamp(min=1).to(probs_TE.dtype)
    load_E = counts_E.to(probs_TE.dtype) * (n_experts / max(indices.shape[1], 1)) / tokens  # 1 each when even
    return load_E, probs_TE.sum(0) / (tokens / parts)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
