"""Rows to the processes that hold their experts, and back; both ways, and both ways of the gradient, are mirror images.

A plan is a list of linear steps (put in another order, swap with a group, keep a part, gather parts). `exchange` runs them
forward, ``undo`` runs their mirror images backward, and autograd does the same with gradients.

- ``direct``: one all-to-all among the owners of one copy of the experts.
- ``coordinated``: processes along the ``tensor`` axis hold the same rows, so each sends only what belongs to owners with
  its own place on that axis, and a gather among them restores the results: O(p/L) + O(L) peers for O(p), 1/L of the bytes.
- ``hierarchical``: within the node first, then between nodes: O(G + p/G) peers for twice the bytes.

Where experts are sliced, the slices' processes gather each other's rows after the exchange, and their partial results are
summed before the way back.

Shapes: S rows, D width, E experts, R received rows, p owners, G owners in a node, L tensor ranks.

Source: DeepSpeed-MoE (2201.05596), sec. 5.1-5.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mixtura.lm.parallel.mesh import ExpertMesh

__all__ = [
    "PLANS",
    "Cost",
    "Exchanged",
    "Plan",
    "blocks_transposed",
    "exchange",
    "exchange_cost",
    "gathered_rows",
    "swap_rows",
]

Plan = Literal["direct", "coordinated", "hierarchical"]
PLANS: tuple[Plan, ...] = ("direct", "coordinated", "hierarchical")
Group = dist.ProcessGroup | None
Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exchanged:
    """Rows that belong to this process's experts."""

    rows: Tensor  # (R, D), sorted by expert; of equal experts by where they come from
    counts: Tensor  # (E / p,), int64: rows of each expert that lives here
    undo: Callable[[Tensor], Tensor]  # (R, D') -> (S, D'): results to where their rows came from, in their order


def exchange(rows: Tensor, counts: Tensor, mesh: ExpertMesh, *, plan: Plan = "direct") -> Exchanged:
    """Send rows to the processes that hold their experts.

    Every process of the mesh calls it equally often, also with no rows. Gradients take the mirror exchange. Rows that are the
    same on all tensor ranks are sent once under ``coordinated`` and once a rank under ``direct`` and ``hierarchical``; in the
    latter case the experts' gradients count them as often.

    Args:
        rows: shape (S, D), sorted by expert.
        counts: rows of each expert, int64, shape (E,), sum S.
        mesh: with as many ``owners`` as parts that the experts are cut into (:meth:`ExpertMesh.for_experts`).
        plan: one of `PLANS`.
    Returns:
        See `Exchanged`.
    Raises:
        ValueError: an unknown plan, counts that do not sum to S, or experts that the owners do not divide.
        RuntimeError: no process group for a mesh of several processes; tensor ranks with other rows than each other.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {list(PLANS)}, got {plan!r}")
    if counts.dim() != 1 or int(counts.sum()) != len(rows):
        raise ValueError(
            f"counts (E,) must sum to the {len(rows)} rows, got shape {tuple(counts.shape)}, sum {int(counts.sum())}"
        )
    if len(counts) % mesh.owners:
        raise ValueError(
            f"{len(counts)} experts do not divide among {mesh.owners} owners; take mesh.for_experts({len(counts)})"
        )
    table_PE = counts.view(mesh.owners, -1)
    steps, table_PE = _there(table_PE, mesh, plan)
    steps.append(_Order(blocks_transposed(table_PE.unsqueeze(-1))))
    if (group := mesh.group("slice")) is not None:
        own_E = table_PE.sum(0)
        table_PE = _gathered(own_E, group)  # slice, expert
        steps.append(_Spread(table_PE.sum(1).tolist(), int(own_E.sum()), group))
        steps.append(_Order(blocks_transposed(table_PE.unsqueeze(-1))))
    for step in steps:
        rows = step.there(rows)

    def undo(results: Tensor) -> Tensor:
        for step in reversed(steps):
            results = step.back(results)
        return results

    return Exchanged(rows, table_PE.sum(0), undo)


@dataclass(frozen=True)
class Cost:
    """What one process does in one direction of an exchange, its part for itself included."""

    peers: int  # processes it sends to
    bytes_sent: float
    seconds: float  # latency x peers + bytes / bandwidth


def exchange_cost(
    tokens: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    mesh: ExpertMesh,
    plan: Plan = "direct",
    *,
    latency: float = 0.0,
    bandwidth: float = float("inf"),
    direction: Literal["there", "back"] = "there",
) -> Cost:
    """Closed formulas for evenly spread rows; slices not counted.

    ======================  ==========  =====================
    plan                    peers       bytes (T k d s = 1)
    ======================  ==========  =====================
    direct                  p           1
    coordinated, there      p/L         1/L
    coordinated, back       p/L + L     1/L + 1: results, and a copy of a 1/L for each of L ranks (within the node)
    hierarchical            G + p/G     2
    ======================  ==========  =====================

    Args:
        tokens: T, tokens of a process.
        k: experts a token visits.
        d: width of a row.
        dtype: of a row; its size is s bytes.
        mesh: of the layer; p is its ``owners``, L its ``tensor``, G the owners of one group on one node.
        plan: one of `PLANS`.
        latency: seconds a peer.
        bandwidth: bytes a second.
        direction: to the experts or back.
    Source:
        DeepSpeed-MoE (2201.05596), sec. 5.2-5.3: with 128 processes and L = 8, 128 C1 + C2 becomes 16 C1 + C2.
    Example:
        >>> from mixtura.lm.parallel.mesh import make_mesh
        >>> exchange_cost(1, 1, 1, torch.float32, make_mesh(128, tensor=8), "coordinated").peers
        16
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {list(PLANS)}, got {plan!r}")
    whole = float(tokens * k * d * dtype.itemsize)
    if plan == "direct":
        peers, sent = mesh.owners, whole
    elif plan == "hierarchical":
        near, far = mesh.near_and_far()
        peers, sent = len(near[0]) + len(far[0]), 2 * whole
    else:
        peers, sent = mesh.expert, whole / mesh.tensor
        if direction == "back" and mesh.tensor > 1:
            peers, sent = peers + mesh.tensor, sent + whole  # a copy of its own T k d s / L for each of L ranks
    return Cost(peers, sent, latency * peers + sent / bandwidth)


# ---- steps: each goes there and back, and back is the transpose of there (on rows that tensor ranks repeat: the inverse) ----


class _Order:
    def __init__(self, order: Tensor) -> None:
        self.order, self.inverse = order, order.argsort()

    def there(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.order)

    def back(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.inverse)


class _Swap:
    def __init__(self, send: Tensor, receive: Tensor, group: Group) -> None:
        self.send, self.receive, self.group = send.tolist(), receive.tolist(), group

    def there(self, rows: Tensor) -> Tensor:
        return swap_rows(rows, self.send, self.receive, self.group)

    def back(self, rows: Tensor) -> Tensor:
        return swap_rows(rows, self.receive, self.send, self.group)


class _Spread:
    """There: the rows of all processes, in the order of ranks. Back: the sum of what they made of one's own rows."""

    def __init__(self, lengths: list[int], own: int, group: Group) -> None:
        self.lengths, self.own, self.group = lengths, own, group

    def there(self, rows: Tensor) -> Tensor:
        return gathered_rows(rows, self.lengths, self.group)

    def back(self, rows: Tensor) -> Tensor:
        parts = swap_rows(rows, self.lengths, [self.own] * len(self.lengths), self.group)
        return parts.view(len(self.lengths), self.own, *rows.shape[1:]).sum(0)


class _Share:
    """There: of rows that all hold, in parts of given lengths, one's own part. Back: all parts, so that all hold them.

    What is the same on all processes has the same gradient on all of them, so the gradient of one is the other.
    """

    def __init__(self, lengths: list[int], place: int, group: Group) -> None:
        self.lengths, self.place, self.group = lengths, place, group

    def there(self, rows: Tensor) -> Tensor:
        part: Tensor = _Mirrored.apply(rows, self.keep, self.back)
        return part

    def back(self, rows: Tensor) -> Tensor:
        whole: Tensor = _Mirrored.apply(rows, self.join, self.there)
        return whole

    def keep(self, rows: Tensor) -> Tensor:
        return rows.split(self.lengths)[self.place].clone()

    def join(self, rows: Tensor) -> Tensor:
        return _Spread(self.lengths, self.lengths[self.place], self.group).there(rows)


class _Mirrored(torch.autograd.Function):
    """One way forward; the other, with the gradient, backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way, back: Way) -> Tensor:
        ctx.back = back
        return way(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


class _Swapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.mirror = receive, send, group
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return swap_rows(grad, *ctx.mirror), None, None, None


def swap_rows(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows to and from every process of a group; the gradient takes the way back. Collective.

    Args:
        rows: shape (S, ...), those for each process in the order of ranks.
        send, receive: numbers of rows to and from each.
        group: their process group.
    Returns:
        Shape (R, ...), in the order of ranks they come from.
    """
    swapped: Tensor = _Swapped.apply(rows, send, receive, group)
    return swapped


def gathered_rows(rows: Tensor, lengths: list[int], group: Group, *, repeated: bool = False) -> Tensor:
    """The rows of all processes of a group, in the order of ranks. Collective.

    Args:
        rows: shape (S, ...), this process's.
        lengths: numbers of rows of each.
        group: their process group; None: this process alone.
        repeated: all of them do the same with the rows, so that the gradient of one is that of all; otherwise the gradients
            of what each does are summed.
    Returns:
        Shape (sum of lengths, ...).
    """
    if group is None:
        return rows
    if repeated:
        return _Share(lengths, dist.get_rank(group), group).back(rows)
    copies = rows.repeat(len(lengths), *[1] * (rows.dim() - 1))
    return swap_rows(copies, [len(rows)] * len(lengths), lengths, group)


Step = _Order | _Swap | _Spread | _Share


def _there(table_PE: Tensor, mesh: ExpertMesh, plan: Plan) -> tuple[list[Step], Tensor]:
    """Steps of the way to the owners, and from which source how many rows of each local expert come."""
    if plan == "coordinated" and mesh.tensor > 1:
        return _coordinated(table_PE, mesh)
    if plan == "hierarchical" and mesh.owners > 1:
        return _hierarchical(table_PE, mesh)
    group = mesh.group("owners")
    if group is None:
        return [], table_PE
    received_PE = _swapped_counts(table_PE, group)
    return [_Swap(table_PE.sum(1), received_PE.sum(1), group)], received_PE


def _hierarchical(table_PE: Tensor, mesh: ExpertMesh) -> tuple[list[Step], Tensor]:
    near, far = mesh.near_and_far()
    table = table_PE.view(len(far[0]), len(near[0]), -1)  # node, place in it, expert
    steps: list[Step] = []
    for lists in (near, far):
        group = mesh.group(lists)
        steps.append(_Order(blocks_transposed(table)))
        table = table.transpose(0, 1).contiguous()
        if group is not None:
            received = _swapped_counts(table, group)
            steps.append(_Swap(table.sum((1, 2)), received.sum((1, 2)), group))
            table = received
    return steps, table.reshape(table_PE.shape)


def _coordinated(table_PE: Tensor, mesh: ExpertMesh) -> tuple[list[Step], Tensor]:
    group, place = mesh.group("tensor"), mesh.coordinates().tensor
    same = torch.cat([table_PE, -table_PE])
    dist.all_reduce(same, dist.ReduceOp.MAX, group=group)
    if not torch.equal(same[: len(table_PE)], -same[len(table_PE) :]):
        raise RuntimeError("tensor ranks must hold the same rows, and their counts differ; give them the same tokens")
    table = table_PE.view(mesh.expert, mesh.tensor, -1)
    steps: list[Step] = [
        _Order(blocks_transposed(table)),
        _Share(table.sum((0, 2)).tolist(), place, group),
    ]
    mine = table[:, place].contiguous()
    if (owners := mesh.group("expert")) is not None:
        received = _swapped_counts(mine, owners)
        steps.append(_Swap(mine.sum(1), received.sum(1), owners))
        mine = received
    return steps, mine


def _gathered(counts_E: Tensor, group: Group) -> Tensor:
    found = [torch.empty_like(counts_E) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, counts_E.contiguous(), group=group)
    return torch.stack(found)


def _swapped_counts(table: Tensor, group: Group) -> Tensor:
    received = torch.empty_like(table)
    dist.all_to_all_single(received, table.contiguous(), group=group)
    return received


def blocks_transposed(table: Tensor) -> Tensor:
    """Order that takes rows in blocks (a, b, c) of lengths ``table`` to blocks (b, a, c)."""
    starts = (table.flatten().cumsum(0) - table.flatten()).view(table.shape)
    lengths, first = (t.transpose(0, 1).flatten() for t in (table, starts))
    shift = first - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum()), device=table.device) + shift.repeat_interleave(lengths)
