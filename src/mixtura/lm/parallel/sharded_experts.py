"""Experts that live once, sharded over processes, while copies of the busy ones come and go with every iteration.

One pass of a layer:

1. When the layer's attention starts, the expected load says which experts are copied where, and their weights set out.
2. The gate's counts are shared; rows go to the nearest holder of their expert, are computed there, and come back.
3. Backward, the gradients of copies set out for the owners when the experts are done, and arrive behind the attention's backward
   pass. The owner alone has optimizer state, and updates.

The result is that of one process. With ``rematerialize`` copies are freed after the forward pass and fetched again for the
backward pass: the same numbers to the bit, with room for one layer's copies.

Shapes: T tokens, D width, E experts, K experts a token visits, H experts that a process holds, S = T K pairs, W processes.
Source: Hecate (2502.02581), sec. 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from mixtura.lm.anatomy import find_moe
from mixtura.lm.parallel import links
from mixtura.lm.parallel.cluster import Cluster
from mixtura.lm.parallel.exchange import blocks_transposed, gathered_rows, swap_rows
from mixtura.lm.parallel.experts import ParallelExperts, parallel_experts
from mixtura.lm.parallel.mesh import ExpertMesh
from mixtura.lm.parallel.passing_copies import Copies, FetchAgain, Flights, Materialize
from mixtura.lm.parallel.placement import (
    LoadTracker,
    Placement,
    Topology,
    assign_tokens,
    homogeneous,
    materialize,
    shard,
)
from mixtura.lm.parallel.sparse_collectives import (
    Arriving,
    Transfer,
    rearranged,
    sparse_all_gather,
)
from mixtura.lm.parallel.traffic import copy_seconds, flow

__all__ = ["FullyShardedExperts", "reshard", "shard_experts"]

Model = TypeVar("Model", bound=nn.Module)


class FullyShardedExperts(ParallelExperts):
    """Experts of one layer, each owned by one process and copied where the load asks for it; called as the module they were.

    Args:
        experts: stacked experts, each parameter (E, ...); cut down to the owned ones in place.
        n_experts: E.
        mesh: of experts alone: no slices, no tensor axis.
        overlap, capacity: see :func:`~mixtura.lm.parallel.placement.materialize`. An overlap of None is measured in the first
            passes: as many experts as ``bandwidth`` brings while the attention computes.
        bandwidth: bytes a second between processes, for that.
        rematerialize: free copies between the passes.
        calibrate: machines as numbers; once the gate has spoken more copies are made if they gain more than they take.

    Attributes:
        owners: who owns which expert, bool (E, W).
        placement: who held which in the last pass.
    """

    def __init__(
        self,
        experts: nn.Module,
        n_experts: int,
        mesh: ExpertMesh,
        *,
        overlap: int | None,
        capacity: int,
        bandwidth: float = 0.0,
        rematerialize: bool = False,
        calibrate: Cluster | None = None,
        flights: Flights | None = None,
    ) -> None:
        self.owners = homogeneous(n_experts, mesh.world)
        super().__init__(experts, n_experts, mesh)
        self.overlap, self.capacity = overlap or 0, capacity
        self._measure = links.AttentionTime(bandwidth) if overlap is None else None
        self.rematerialize, self.calibrate = rematerialize, calibrate
        self.topology = Topology(mesh.world // mesh.node, mesh.node)
        self.placement = self.owners
        self.loads = LoadTracker()
        self._flights = flights or Flights()
        self._coming: tuple[Placement, Transfer, dict[str, Arriving]] | None = None
        self._checked = False

    @property
    def divisor(self) -> int:
        return self.mesh.world

    def own(self) -> Tensor:
        """Experts that this process owns, (O,)."""
        return self.owners[:, self.mesh.rank].nonzero().flatten()

    def part(self, name: str, whole: Tensor) -> Tensor:
        return whole.index_select(0, self.own().to(whole.device))

    def whole(self, name: str, part: Tensor) -> Tensor:
        group = self.mesh.group("world")
        if group is None:
            return part
        counts = self.owners.sum(0)
        padded = part.new_zeros(int(counts.max()), *part.shape[1:])
        padded[: len(part)] = part.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        rows = torch.cat([p[:n] for p, n in zip(parts, counts.tolist(), strict=True)])
        return rows.index_select(0, self._order().to(rows.device))

    def _of_all(self, own: Tensor) -> Tensor:
        rows = gathered_rows(own, self.owners.sum(0).tolist(), self.mesh.group("world"))
        return rows.index_select(0, self._order().to(rows.device))

    def _order(self) -> Tensor:
        """Where each expert stands when the owners lay theirs down one after another, (E,)."""
        return self.owners.T.nonzero()[:, 1].argsort()

    def set_out(self) -> None:
        """Plan the copies of the coming pass, and start to send them. Collective; done anyway if nobody called it before."""
        if self._coming is not None:
            return
        if self._measure is not None and self.training:
            self._measure.begin()
        placement = self.owners
        expected = self.loads.estimate(0) if self.training else None
        if expected is not None:
            placement = materialize(
                self.owners, expected, overlap=self.overlap, capacity=self.capacity, topology=self.topology
            )
        self._coming = (placement, *self._sent(self.owners, placement))

    def _sent(
        self, before: Placement, after: Placement, *, already: Placement | None = None
    ) -> tuple[Transfer, dict[str, Arriving]]:
        transfer = Transfer.between(before, after, self.mesh.rank, already=already)
        group = self.mesh.group("world")
        shards = {name: getattr(self.local_experts, name) for name in self.stacked}
        return transfer, {name: sparse_all_gather(p.detach(), transfer, group) for name, p in shards.items()}

    def computed(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows (S, D), sorted by expert, ``counts`` (E,) of them for each -> what their experts make of them. Collective."""
        self.set_out()
        assert self._coming is not None
        self._measured()
        (placement, transfer, coming), self._coming = self._coming, None
        counts_WE = self._all_counts(counts)
        load_E = counts_WE.sum(0)
        if self.training and self.calibrate is not None:
            placement, transfer, coming = self._second_look(placement, transfer, coming, load_E, rows)
        if self.training:
            self.loads.update(0, load_E)
        self.placement = placement
        self._check_same(placement)

        sent_WEW = assign_tokens(placement, counts_WE, self.topology)
        rank, group = self.mesh.rank, self.mesh.group("world")
        mine_EW, to_me_WE = sent_WEW[rank], sent_WEW[:, :, rank]
        held = transfer.slots.sort()  # the experts held, by index, and the slot of each
        to_me_WH = to_me_WE[:, held.values]
        places = held.indices.repeat_interleave(to_me_WH.sum(0))
        by_slot = places.argsort(stable=True)
        leave = blocks_transposed(mine_EW.unsqueeze(-1)).to(rows.device)
        arrive = blocks_transposed(to_me_WH.unsqueeze(-1))[by_slot].to(rows.device)
        send, receive = mine_EW.sum(0).tolist(), to_me_WE.sum(1).tolist()
        rows = rows.index_select(0, leave)
        if group is not None:
            rows = swap_rows(rows, send, receive, group)
        results = self._by_slots(rows.index_select(0, arrive), places[by_slot].to(rows.device), transfer, coming)
        results = results.index_select(0, arrive.argsort())
        if group is not None:
            results = swap_rows(results, receive, send, group)
        return results.index_select(0, leave.argsort())

    def _measured(self) -> None:
        """Set the overlap once the attention's time is known. Collective."""
        if self._measure is None or not self.training or not self._measure.end():
            return
        parameters = [getattr(self.local_experts, name) for name in self.stacked]
        chunk = sum(p.element_size() * p.shape[1:].numel() for p in parameters)
        self.overlap = min(self.num_experts, self._measure.fits(chunk, self.mesh.group("world")))
        self._measure = None

    def _all_counts(self, counts_E: Tensor) -> Tensor:
        group = self.mesh.group("world")
        if group is None:
            return counts_E.unsqueeze(0).cpu()
        found = [torch.empty_like(counts_E) for _ in range(self.mesh.world)]
        dist.all_gather(found, counts_E, group=group)
        return torch.stack(found).cpu()

    def _second_look(
        self, placement: Placement, transfer: Transfer, coming: dict[str, Arriving], load: Tensor, rows: Tensor
    ) -> tuple[Placement, Transfer, dict[str, Arriving]]:
        """More copies, now that the load is known, if they are worth their way."""
        cluster = self.calibrate
        assert cluster is not None
        more = materialize(
            self.owners,
            load.double(),
            overlap=self.num_experts,
            capacity=self.capacity,
            topology=self.topology,
            already=placement,
        )
        if more.equal(placement):
            return placement, transfer, coming
        parameters = sum(getattr(self.local_experts, name).shape[1:].numel() for name in self.stacked)

        def seconds(held: Placement) -> float:
            moved = flow(held.numpy(), load.double().numpy(), cluster)
            exchange = moved.exchange_seconds(rows.shape[-1] * rows.element_size(), cluster)
            return float(4 * exchange + 3 * moved.computed.max() * 2 * parameters / cluster.flops)

        weights = parameters * getattr(self.local_experts, self.stacked[0]).element_size()
        takes = float(copy_seconds(placement.numpy(), more.numpy(), weights, cluster))
        if seconds(placement) - seconds(more) <= takes:
            return placement, transfer, coming
        extra, arriving = self._sent(self.owners, more, already=placement)
        whole = Transfer.between(self.owners, more, self.mesh.rank)
        copies = {
            name: rearranged([(transfer, coming[name].wait()), (extra, arriving[name].wait())], whole)
            for name in self.stacked
        }
        return more, whole, {name: Arriving(stack, None, stack) for name, stack in copies.items()}

    def _by_slots(self, rows: Tensor, places: Tensor, transfer: Transfer, coming: dict[str, Arriving]) -> Tensor:
        """Rows in the order of slots -> their results: through the own experts, then through the copies."""
        shards = {name: getattr(self.local_experts, name) for name in self.stacked}
        copies = Copies(self, transfer, {name: arriving.wait() for name, arriving in coming.items()}, self._flights)
        stacks = Materialize.apply(copies, *shards.values())
        own, others = (dict(zip(shards, part, strict=True)) for part in (stacks[: len(shards)], stacks[len(shards) :]))
        n_own = int((places < transfer.n_own).sum())
        by_owner = self._through(own, rows[:n_own], places[:n_own])
        with copies.saved_by_name() if self.rematerialize else nullcontext():
            by_copies = self._through(others, rows[n_own:], places[n_own:] - transfer.n_own)
        y = torch.cat([by_owner, by_copies])
        if self.rematerialize and torch.is_grad_enabled():
            y = FetchAgain.apply(y, copies)
            copies.free()
        return y

    def _through(self, stacks: Mapping[str, Tensor], rows: Tensor, places: Tensor) -> Tensor:
        if len(rows) == 0:  # backward passes are collective: a process without rows must stay in the graph
            return rows + torch.stack([s.flatten()[:0].sum() for s in stacks.values()]).sum().to(rows.dtype)
        experts: Any = self.local_experts
        counted = getattr(experts, "num_experts", None)
        weights = torch.ones_like(places, dtype=rows.dtype).unsqueeze(-1)
        try:
            if counted is not None:
                experts.num_experts = len(next(iter(stacks.values())))
            y: Tensor = functional_call(experts, dict(stacks), (rows, places.unsqueeze(-1), weights))
        finally:
            if counted is not None:
                experts.num_experts = counted
        return y

    def _check_same(self, placement: Placement) -> None:
        """Raise where processes made different plans, once: they compute them from the same counts by the same rule."""
        group = self.mesh.group("world")
        if self._checked or group is None or not placement.any():
            return
        weights = torch.arange(1, placement.numel() + 1).view(placement.shape)
        digest = int((placement * weights * weights).sum())
        seen = torch.tensor([digest, -digest])
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=group)
        if seen[0] != -seen[1]:
            raise RuntimeError(
                "processes planned different copies of the experts; they must run the same version and see the same counts"
            )
        self._checked = bool((placement & ~self.owners).any())  # until a plan with copies was compared

    def move(self, owners: Placement, tensors: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Give the experts to other owners, and what goes with them. Collective.

        Args:
            owners: who shall own which.
            tensors: parameter name -> tensors (O, ...) that move with it: weights, moments.
        Returns:
            The same for the experts that this process owns now.
        """
        old, rank, group = self.owners, self.mesh.rank, self.mesh.group("world")
        mine, new = old[:, rank].nonzero().flatten(), owners[:, rank].nonzero().flatten()
        to, since = owners.int().argmax(1), old.int().argmax(1)
        leave = to[mine].argsort(stable=True)  # own slots by receiver
        send = torch.bincount(to[mine], minlength=self.mesh.world).tolist()
        receive = torch.bincount(since[new], minlength=self.mesh.world).tolist()
        arrived = new[since[new].argsort(stable=True)]  # experts in the order they come in
        place = arrived.argsort()
        moved = {
            name: [_moved(t, leave, send, receive, group).index_select(0, place) for t in group_of]
            for name, group_of in tensors.items()
        }
        self.owners = self.placement = owners
        return moved


def _moved(t: Tensor, leave: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    rows = t.index_select(0, leave)
    if group is None:
        return rows
    out = t.new_empty(sum(receive), *t.shape[1:])
    dist.all_to_all_single(out, rows, receive, send, group=group)
    return out


def shard_experts(
    model: Model,
    mesh: ExpertMesh,
    *,
    overlap: int | None = None,
    capacity: int | None = None,
    rematerialize: bool = False,
    calibrate: Cluster | None = None,
) -> Model:
    """Shard the experts of every mixture layer over the processes, one owner each; in place. Collective.

    Args:
        model: any whose experts :func:`mixtura.lm.anatomy.find_moe` finds stacked; the same in every process.
        mesh: made with ``expert`` as large as the world.
        overlap: experts whose weights travel behind the attention; None: measured in the first passes.
        capacity: copies a process has room for, a layer; None: what half of the free memory holds.
        rematerialize, calibrate: see :class:`FullyShardedExperts`.
    Returns:
        The model. Training it is :func:`~mixtura.lm.parallel.reduce_gradients` and an optimizer step, as with
        :func:`~mixtura.lm.parallel.parallelize_experts`.
    Raises:
        ValueError: no mixture layer, experts that the processes do not divide, slices or a tensor axis, negative numbers.
    """
    for name, value in (("overlap", overlap), ("capacity", capacity)):
        if value is not None and value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if mesh.expert != mesh.world:
        raise ValueError(f"sharded experts need a mesh of experts alone, expert={mesh.world}; got {mesh.shape}")
    if calibrate is not None and calibrate.devices != mesh.world:
        raise ValueError(f"calibrate must be a cluster of {mesh.world} devices, got {calibrate.devices}")
    blocks = find_moe(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no mixture layers, so it has no experts to shard")
    for block in blocks:
        if block.n_experts % mesh.world:
            raise ValueError(f"{block.name}: {block.n_experts} experts do not divide over {mesh.world} processes")
    flights = Flights()
    chunk = max(sum(p[0].numel() * p.element_size() for p in b.experts.parameters()) for b in blocks)
    if capacity is None:
        capacity = links.room(chunk * (1 if rematerialize else len(blocks)), mesh)
    bandwidth = links.bandwidth(chunk, mesh) if overlap is None else 0.0
    for block in blocks:
        sharded = FullyShardedExperts(
            block.experts,
            block.n_experts,
            mesh,
            overlap=overlap,
            capacity=min(capacity, block.n_experts),
            bandwidth=bandwidth,
            rematerialize=rematerialize,
            calibrate=calibrate,
            flights=flights,
        )
        setattr(block.module, block.experts_name.rpartition(".")[2], sharded)
        layer = model.get_submodule(block.name.rpartition(".")[0])
        layer.register_forward_pre_hook(lambda *_, sharded=sharded: sharded.set_out())
    return model


def sharded_layers(model: nn.Module) -> list[FullyShardedExperts]:
    """The sharded layers of a model, in the order of its modules."""
    return [module for _, module in parallel_experts(model) if isinstance(module, FullyShardedExperts)]


def reshard(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> bool:
    """Deal the experts out anew, by the loads seen: between steps, every hundred or so. Collective.

    Weights and optimizer states move to the new owners; nothing is computed differently.

    Args:
        model: sharded by :func:`shard_experts`, without gradients (set to None).
        optimizer: whose states of the experts move along.
    Returns:
        Whether anything moved.
    Source:
        2502.02581, algorithm 2.
    """
    layers = sharded_layers(model)
    loads = [layer.loads.estimate(0) for layer in layers]
    known = [load for load in loads if load is not None]
    if len(known) < len(loads) or not loads:
        return False
    if len({len(load) for load in known}) > 1:
        raise ValueError("experts are dealt out over layers of equal numbers; this model is a pyramid")
    first = layers[0]
    plans = shard(torch.stack(known), overlap=first.overlap, topology=first.topology)
    changed = False
    for layer, owners in zip(layers, plans, strict=True):
        if owners.equal(layer.owners):
            continue
        changed = True
        parameters = {name: getattr(layer.local_experts, name) for name in layer.stacked}
        states = {name: _states(p, optimizer) for name, p in parameters.items()}
        moved = layer.move(owners, {name: [p.detach(), *states[name].values()] for name, p in parameters.items()})
        for name, p in parameters.items():
            weight, *values = moved[name]
            p.grad = None
            p.data = weight
            for key, value in zip(states[name], values, strict=True):
                assert optimizer is not None
                optimizer.state[p][key] = value
        _count(layer)
    return changed


def _states(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return {key: t for key, t in state.items() if isinstance(t, Tensor) and t.shape == parameter.shape and t.dim()}


def _count(layer: FullyShardedExperts) -> None:
    module: Any = layer.local_experts
    if isinstance(getattr(module, "num_experts", None), int):
        module.num_experts = len(layer.own())
