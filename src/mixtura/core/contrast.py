"""Contrastive losses: two views of a thing come together, different things move apart.

Shapes: B things of a batch, D width of an embedding, K keys in a queue, C prototypes, S = 2B rows where both views of all
things are stacked.
Embeddings are compared by the inner product of what comes in: give unit vectors (``torch.nn.functional.normalize``) for
the cosine that the papers of the first two mean.

Negatives need not come from the batch: in :class:`KeyQueue` the keys of the last batches wait, and the network that makes
them follows the trained one so slowly (:func:`follow`) that old keys still agree with new ones.

Source: van den Oord et al. 2018 (1807.03748), eq. 4, in the form of Chen et al. 2020 (2002.05709), eq. 1; Khosla et al.
2020 (2004.11362), eq. 2; Li et al. 2021 (2005.04966), eq. 11-12; Gutmann and Hyvärinen 2012 for the pair loss; He et al.
2020 (1911.05722), eq. 1-2 and algorithm 1, for the queue.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "KeyQueue",
    "concentrations",
    "follow",
    "gathered",
    "info_nce",
    "pair_logistic",
    "prototype_contrast",
    "queue_contrast",
    "supervised_contrast",
]


def info_nce(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """How badly a view finds its other view among all views of the batch; log(2B - 1) when it cannot tell them.

    Args:
        first, second: embeddings of two views of the same B >= 2 things, each of shape (B, D).
        temperature: > 0; similarities are divided by it.
    Returns:
        Scalar in nats, the mean over the 2B views. A view is never compared with itself.
    Raises:
        ValueError: shapes that differ or are no matrices, fewer than two things, a temperature of 0 or below.
    Source:
        SimCLR (2002.05709), eq. 1.
    Example:
        >>> same = torch.ones(3, 4)
        >>> info_nce(same, same)  # all alike: log 5
        tensor(1.6094)
    """
    z_SD = _stacked(first, second, temperature)
    n = len(first)
    logits_SS = _similarities(z_SD, temperature)
    other_S = torch.arange(2 * n, device=z_SD.device).roll(n)
    return F.cross_entropy(logits_SS, other_S)


def supervised_contrast(first: Tensor, second: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """How badly a view finds the views of its class among all views of the batch.

    Args:
        first, second: embeddings of two views of the same B >= 2 things, each of shape (B, D).
        labels: class of each thing, shape (B,), integers.
        temperature: > 0.
    Returns:
        Scalar in nats, the mean over the 2B views of the mean over the views of their class. Where every class occurs
        once it equals :func:`info_nce`.
    Raises:
        ValueError: as :func:`info_nce`, or as many labels as things are missing.
    Source:
        Supervised contrastive learning (2004.11362), eq. 2 (the sum over positives outside the logarithm).
    """
    z_SD = _stacked(first, second, temperature)
    if labels.shape != first.shape[:1]:
        raise ValueError(f"labels must have shape {tuple(first.shape[:1])}, got {tuple(labels.shape)}")
    log_p_SS = _similarities(z_SD, temperature).log_softmax(-1)
    twice_S = torch.cat([labels, labels])
    same_SS = twice_S[:, None] == twice_S[None, :]
    same_SS.fill_diagonal_(False)
    # Masked before the sum: the diagonal is -inf, and -inf times zero is NaN.
    found_S = log_p_SS.masked_fill(~same_SS, 0.0).sum(-1) / same_SS.sum(-1)
    return -found_S.mean()


def pair_logistic(first: Tensor, second: Tensor, same: Tensor) -> Tensor:
    """Negative mean log likelihood of "these two belong together" under sigmoid(first . second); log 2 for guessing.

    Args:
        first, second: embeddings of the two things of a pair, each of shape (B, D).
        same: 1 or True where the pair belongs together, else 0, shape (B,).
    Returns:
        Scalar in nats.
    Raises:
        ValueError: shapes that do not match, or entries of ``same`` other than 0 and 1.
    Source:
        The contrastive case of 2303.01566, sec. 6: P(t = 1 | x, x') = sigmoid(f(x)'f(x')).
    Example:
        >>> pair_logistic(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([1, 0]))
        tensor(0.6931)
    """
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"first and second must share a shape (pairs, width), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if same.shape != first.shape[:1]:
        raise ValueError(f"same must have shape {tuple(first.shape[:1])}, got {tuple(same.shape)}")
    if not bool(((same == 0) | (same == 1)).all()):
        raise ValueError("same must hold 0 and 1 (or False and True) only")
    return F.binary_cross_entropy_with_logits((first * second).sum(-1), same.to(first.dtype))


def prototype_contrast(z: Tensor, prototypes: Tensor, assigned: Tensor, concentration: Tensor | float = 0.1) -> Tensor:
    """Cross entropy of finding the prototype that each embedding is assigned to.

    Args:
        z: embeddings, shape (B, D).
        prototypes: shape (C, D).
        assigned: prototype of each embedding, shape (B,), integers in [0, C).
        concentration: what similarities to each prototype are divided by, > 0, scalar or shape (C,).
    Returns:
        Scalar in nats.
    Raises:
        ValueError: shapes that do not match, or a prototype that does not exist.
    Source:
        Prototypical contrastive learning (2005.04966), eq. 11, against all prototypes.
    """
    if z.dim() != 2 or prototypes.dim() != 2 or z.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"z and prototypes must be matrices of one width, got {tuple(z.shape)} and {tuple(prototypes.shape)}"
        )
    if assigned.shape != z.shape[:1]:
        raise ValueError(f"assigned must have shape {tuple(z.shape[:1])}, got {tuple(assigned.shape)}")
    if not bool(((assigned >= 0) & (assigned < len(prototypes))).all()):
        raise ValueError(f"assigned must lie between 0 and {len(prototypes) - 1}")
    phi = torch.as_tensor(concentration, dtype=z.dtype, device=z.device)
    return F.cross_entropy(z @ prototypes.mT / phi, assigned)


def concentrations(
    distances: Tensor, assigned: Tensor, n_prototypes: int, *, temperature: float = 0.1, smoothing: float = 10.0
) -> Tensor:
    """How spread each prototype's embeddings are, scaled so that the mean is the temperature.

    Args:
        distances: of each embedding to its prototype, shape (N,), >= 0.
        assigned: prototype of each embedding, shape (N,), integers in [0, n_prototypes).
        n_prototypes: C.
        temperature: mean of the result, > 0.
        smoothing: alpha; a small prototype counts as more spread.
    Returns:
        Shape (C,), > 0. A prototype with at most one embedding gets the largest; all are clipped to the 10th and 90th
        percentile.
    Source:
        Prototypical contrastive learning (2005.04966), eq. 12 and its released code.
    """
    ones_N = torch.ones_like(distances)
    count_C = distances.new_zeros(n_prototypes).index_add(0, assigned, ones_N)
    sum_C = distances.new_zeros(n_prototypes).index_add(0, assigned, distances)
    phi_C = sum_C / count_C.clamp(min=1) / (count_C + smoothing).log()
    known_C = count_C > 1
    if not bool(known_C.any()) or not float(phi_C[known_C].max()) > 0:
        return torch.full_like(phi_C, temperature)
    phi_C = torch.where(known_C, phi_C, phi_C[known_C].max())
    low, high = torch.quantile(phi_C, phi_C.new_tensor([0.1, 0.9]))
    phi_C = phi_C.clamp(min=float(low), max=float(high)).clamp(min=1e-12)
    return phi_C * (temperature / phi_C.mean())


class KeyQueue(nn.Module):
    """The last K keys, the oldest first to go; it starts empty.

    Args:
        size: K, >= 1.
        width: D, >= 1.

    Example:
        >>> queue = KeyQueue(3, 1)
        >>> for key in (1.0, 2.0, 3.0, 4.0):
        ...     queue.push(torch.tensor([[key]]))
        >>> queue.ordered().flatten().tolist()
        [2.0, 3.0, 4.0]
    """

    keys: Tensor
    pushed: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1 or width < 1:
            raise ValueError(f"size and width must be at least 1, got {size} and {width}")
        self.register_buffer("keys", torch.zeros(size, width))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return min(int(self.pushed), len(self.keys))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Put keys, shape (B, D), into the queue in their order; of more than K the last K stay."""
        if keys.dim() != 2 or keys.shape[1] != self.keys.shape[1]:
            raise ValueError(f"keys must have shape (B, {self.keys.shape[1]}), got {tuple(keys.shape)}")
        size = len(self.keys)
        at = (int(self.pushed) + torch.arange(len(keys), device=keys.device)) % size
        self.keys[at[-size:]] = keys[-size:].to(self.keys.dtype)
        self.pushed += len(keys)

    def held(self) -> Tensor:
        """The keys in it in no particular order, shape (number of keys, D).

        A copy: the queue moves on before the backward pass, which still needs them.
        """
        return self.keys[: len(self)].clone()

    def ordered(self) -> Tensor:
        """The keys in it from the oldest to the newest; a copy."""
        size, pushed = len(self.keys), int(self.pushed)
        return self.held() if pushed <= size else self.keys.roll(-(pushed % size), 0)


def queue_contrast(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float = 0.05, *, label_smoothing: float = 0.0
) -> Tensor:
    """How badly each query finds its own key among that key and the negatives, in nats, mean over the queries.

    Args:
        queries, keys: row by row the two sides of a pair, shape (B, D); the other keys of the batch are no negatives.
        negatives: shape (K, D), K >= 1.
        temperature: > 0; inner products are divided by it.
        label_smoothing: share of the target that is spread over all candidates, in [0, 1).
    Raises:
        ValueError: shapes that do not match, no negatives, a temperature of 0 or below.
    Source:
        MoCo (1911.05722), eq. 1; logits are float32 whatever comes in.
    Example:
        >>> one = torch.eye(2)
        >>> queue_contrast(one, one, one, temperature=1.0)  # of three candidates two are right
        tensor(0.8620)
    """
    if queries.shape != keys.shape or queries.dim() != 2:
        raise ValueError(
            f"queries and keys must share a shape (B, D), got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if negatives.dim() != 2 or negatives.shape[1] != queries.shape[1] or len(negatives) < 1:
        raise ValueError(f"negatives must have shape (K >= 1, {queries.shape[1]}), got {tuple(negatives.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    own_B1 = (queries.float() * keys.float()).sum(-1, keepdim=True)
    others_BK = queries.float() @ negatives.float().mT
    logits = torch.cat([own_B1, others_BK], 1) / temperature
    target = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move every parameter of ``slow`` towards that of ``fast``: m * slow + (1 - m) * fast. Buffers are copied.

    Source:
        MoCo (1911.05722), eq. 2.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
    followers: list[Tensor] = list(slow.parameters())
    leaders = [p.detach() for p in fast.parameters()]
    if followers:
        torch._foreach_lerp_(followers, leaders, 1 - momentum)
    for mine, theirs in zip(slow.buffers(), fast.buffers(), strict=True):
        mine.copy_(theirs)


def gathered(keys: Tensor) -> Tensor:
    """Keys of all processes, in the order of their ranks, shape (world * B, D); alone, the keys themselves. No gradient."""
    keys = keys.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, keys.contiguous())
    return torch.cat(parts)


def _stacked(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"first and second must share a shape (things, width), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if len(first) < 2:
        raise ValueError(f"a contrast needs at least 2 things in a batch, got {len(first)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return torch.cat([first, second])


def _similarities(z_SD: Tensor, temperature: float) -> Tensor:
    """Similarities over the temperature, shape (S, S), -inf of a view with itself."""
    itself_SS = torch.eye(len(z_SD), dtype=torch.bool, device=z_SD.device)
    return (z_SD @ z_SD.mT / temperature).masked_fill(itself_SS, -torch.inf)
