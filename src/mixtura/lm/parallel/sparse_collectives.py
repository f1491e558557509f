"""Send the weights of some experts to some devices, and bring their gradients home: two collectives that mirror each other.

- *Sparse all-gather*, from placement P to P', which contains it: every device receives the experts that P' gives it beyond P,
  from their owners.
- *Sparse reduce-scatter*, from P' to P: every owner gets the sum of what the other holders of its experts have.

Nothing else moves: no optimizer state, no expert that nobody asked for. One is the transpose of the other.

What a device holds is in *slots*: its own experts in the order of their index, then the copies, by sender and index.

Shapes: E experts, D devices, O own experts of a device, C copies on it, H = O + C; chunks (...) are of equal shape.
Source: Hecate (2502.02581), sec. 4.1. The paper launches a broadcast (a reduction) for each expert; here each owner sends to
each receiver, all in one all-to-all: the same bytes received, and sums in the order of ranks, whatever the timing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixtura.lm.parallel.placement import Placement, check_owners

__all__ = ["Arriving", "Summing", "Transfer", "bytes_moved", "rearranged", "sparse_all_gather", "sparse_reduce_scatter"]

Group = dist.ProcessGroup | None


def bytes_moved(before: Placement, after: Placement, chunk_bytes: int) -> Tensor:
    """Bytes that each device sends and receives in a sparse all-gather; of a reduce-scatter the same with rows exchanged.

    Args:
        before, after: bool (E, D), the first with one owner an expert and within the second.
        chunk_bytes: of one expert.
    Returns:
        int64 (2, D): sent, received.
    Example:
        >>> owners = torch.eye(2, dtype=torch.bool)
        >>> bytes_moved(owners, owners | torch.tensor([[True], [False]]), 10).tolist()
        [[10, 0], [0, 10]]
    """
    _check(before, after)
    extra = (after & ~before).long()
    sent = (before.long() * extra.sum(1, keepdim=True)).sum(0)
    return chunk_bytes * torch.stack([sent, extra.sum(0)])


@dataclass(frozen=True)
class Transfer:
    """What one device sends and receives between two placements.

    Attributes:
        slots: expert in each slot, (H,); the device's own first.
        n_own: O.
        send: own slots to send, by receiver and index; ``send_counts`` of them to each.
        receive_counts: experts that come from each.
    """

    slots: Tensor
    n_own: int
    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]

    @classmethod
    def between(cls, before: Placement, after: Placement, rank: int, *, already: Placement | None = None) -> "Transfer":
        """Transfer of one device.

        Args:
            before, after: who owns, and who shall hold.
            rank: of the device.
            already: owners and copies that are there; they are neither sent nor given a slot.
        Raises:
            ValueError: an expert without exactly one owner, or ``before`` not within ``after``.
        """
        _check(before, after)
        extra = after & ~(before if already is None else before | already)
        own = before[:, rank].nonzero().flatten()
        receivers = extra[own].T  # (D, O)
        owner = before.int().argmax(1)
        received = extra[:, rank].nonzero().flatten()
        received = received[owner[received].argsort(stable=True)]
        return cls(
            slots=torch.cat([own, received]),
            n_own=len(own),
            send=receivers.nonzero()[:, 1],
            send_counts=receivers.sum(1).tolist(),
            receive_counts=torch.bincount(owner[received], minlength=before.shape[1]).tolist(),
        )


def rearranged(stacks: Sequence[tuple[Transfer, Tensor]], whole: Transfer) -> Tensor:
    """Copies that came in several transfers, as they would have come in one.

    Args:
        stacks: transfers from the same owners with what they brought, (C, ...) each.
        whole: the transfer that gives the slots.
    """
    experts = torch.cat([transfer.slots[transfer.n_own :] for transfer, _ in stacks])
    place = experts.argsort()[whole.slots[whole.n_own :].argsort().argsort()]
    copies = torch.cat([copies for _, copies in stacks])
    return copies.index_select(0, place.to(copies.device))


class Arriving:
    """Copies on their way. :meth:`wait` gives them."""

    def __init__(self, copies: Tensor, work: dist.Work | None, sent: Tensor):
        self._copies, self._work, self._sent = copies, work, sent  # what is sent must live until it has left

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._copies


def sparse_all_gather(shard: Tensor, transfer: Transfer, group: Group) -> Arriving:
    """Start to bring the copies that this device shall hold. Collective.

    Args:
        shard: own experts, (O, ...).
        transfer: of this device.
        group: one process a device.
    Returns:
        The copies (C, ...) in slots, once they are waited for.
    Raises:
        ValueError: a shard of another number of experts.
    """
    if len(shard) != transfer.n_own:
        raise ValueError(f"shard must hold the {transfer.n_own} experts that this device owns, got {len(shard)}")
    copies = shard.new_empty(len(transfer.slots) - transfer.n_own, *shard.shape[1:])
    sent = shard.detach().index_select(0, transfer.send.to(shard.device))
    return Arriving(copies, _swap(copies, sent, transfer.receive_counts, transfer.send_counts, group), sent)


class Summing:
    """Gradients on their way home. :meth:`wait` gives the sums."""

    def __init__(self, came: Tensor, work: dist.Work | None, transfer: Transfer, left: Tensor):
        self._came, self._work, self._transfer, self._left = came, work, transfer, left

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        transfer = self._transfer
        total = self._came.new_zeros(transfer.n_own, *self._came.shape[1:])
        slots = transfer.send.to(total.device)
        for part, own in zip(self._came.split(transfer.send_counts), slots.split(transfer.send_counts), strict=True):
            total.index_add_(0, own, part)  # one device after the other: a sum does not depend on who was first
        return total


def sparse_reduce_scatter(gradients: Tensor, transfer: Transfer, group: Group) -> Summing:
    """Start to sum the gradients of copies at the experts' owners. Collective.

    Args:
        gradients: of the copies, (C, ...), in slots.
        transfer: of the all-gather that made the copies.
        group: one process a device.
    Returns:
        What the copies add to the gradients of the own experts, (O, ...), once it is waited for: sums in the order of ranks.
    """
    copies = len(transfer.slots) - transfer.n_own
    if len(gradients) != copies:
        raise ValueError(f"gradients must be of the {copies} copies held, got {len(gradients)}")
    came = gradients.new_empty(len(transfer.send), *gradients.shape[1:])
    left = gradients.contiguous()
    return Summing(came, _swap(came, left, transfer.send_counts, transfer.receive_counts, group), transfer, left)


def _swap(out: Tensor, rows: Tensor, receive: list[int], send: list[int], group: Group) -> dist.Work | None:
    if group is None:
        return None
    work: dist.Work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)
    return work


def _check(before: Placement, after: Placement) -> None:
    check_owners(before)
    if after.shape != before.shape or bool((before & ~after).any()):
        raise ValueError(
            f"before, of shape {tuple(before.shape)}, must lie within after, of shape {tuple(after.shape)}: owners keep theirs"
        )
