"""Which device holds which expert: one owner each, and copies of the busy ones for one iteration.

An expert's weights and optimizer state live on one device, its owner. A device whose experts are popular makes all others
wait, so each iteration the busiest experts are also *materialized* on other devices: their weights alone, for that
iteration alone.

- :func:`shard` decides owners, over all layers together, so that the experts too cold to be copied are even in every layer.
- :func:`materialize` decides copies, from the expected load and what fits.
- :func:`assign_tokens` decides which copy serves which token: on the device, else on the node, else anywhere.

All three are deterministic, ties to the lowest index: every process computes the same plan from the same loads without a word
to the others.

Shapes: E experts, D devices, L layers. A placement is a boolean (E, D).
Source: Hecate (2502.02581), algorithms 1 and 2, sec. 4.4 (dispatch). Rounding and the order of cold experts, which the paper
leaves open, are ours.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "LoadTracker",
    "Placement",
    "Topology",
    "assign_tokens",
    "check_owners",
    "homogeneous",
    "materialize",
    "shard",
]

Placement: TypeAlias = Tensor  # bool (E, D)


@dataclass(frozen=True)
class Topology:
    """Devices in nodes of equal size; device d is in node d // devices_per_node."""

    nodes: int
    devices_per_node: int

    def __post_init__(self) -> None:
        for name in ("nodes", "devices_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


class LoadTracker:
    """Load expected of each layer: the mean of its last counts.

    Args:
        window: how many iterations the mean is over.
    Source:
        2502.02581, sec. 4.2 (window 5).
    Example:
        >>> tracker = LoadTracker(2)
        >>> for counts in ([9, 0], [4, 2], [2, 6]):
        ...     tracker.update(0, torch.tensor(counts))
        >>> tracker.estimate(0)
        tensor([3., 4.])
    """

    def __init__(self, window: int = 5):
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window
        self._seen: dict[int, deque[Tensor]] = {}

    def update(self, layer: int, counts: Tensor) -> None:
        """Add the rows that each expert of a layer got, (E,), over all devices."""
        if (counts < 0).any():
            raise ValueError(f"counts of layer {layer} must be >= 0, got {int(counts.min())}")
        self._seen.setdefault(layer, deque(maxlen=self.window)).append(counts.detach().cpu().float())

    def estimate(self, layer: int) -> Tensor | None:
        """Expected rows of each expert, (E,); None before the first update."""
        seen = self._seen.get(layer)
        return torch.stack(list(seen)).mean(0) if seen else None

    def state_dict(self) -> dict[str, Tensor]:
        """Counts of each layer, (iterations, E): what a resumed run needs to make the plans of an unbroken one."""
        return {str(layer): torch.stack(list(seen)) for layer, seen in self._seen.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._seen = {int(layer): deque(counts.unbind(0), maxlen=self.window) for layer, counts in state.items()}


def homogeneous(experts: int, devices: int) -> Placement:
    """Experts in order, as many on every device: what plain expert parallelism has.

    Raises:
        ValueError: ``devices`` does not divide ``experts``.
    """
    if experts % devices:
        raise ValueError(f"devices must divide experts={experts}, got {devices}")
    return torch.arange(experts).unsqueeze(1) // (experts // devices) == torch.arange(devices)


def check_owners(sharded: Placement) -> None:
    """Raise a ValueError that names the first expert without exactly one owner."""
    if sharded.dtype != torch.bool or sharded.dim() != 2:
        raise ValueError(
            f"a placement must be bool with shape (E, D), got {sharded.dtype} with shape {tuple(sharded.shape)}"
        )
    owners = sharded.sum(1)
    if (owners != 1).any():
        expert = int((owners != 1).nonzero()[0])
        raise ValueError(f"every expert must have exactly one owner; expert {expert} has {int(owners[expert])}")


def materialize(
    sharded: Placement,
    load: Tensor | Sequence[float],
    *,
    overlap: int,
    capacity: int,
    topology: Topology,
    already: Placement | None = None,
) -> Placement:
    """Owners and this iteration's copies: the busiest experts on as many devices as their load asks for.

    Where every device has room for all of the ``overlap`` busiest experts, all get them. Otherwise the room of all devices is
    divided among those experts in proportion to load, and their copies are spread over nodes first.

    Args:
        sharded: owners, bool (E, D).
        load: rows expected of each expert, (E,), >= 0. An expert without load is not copied.
        overlap: number t of experts whose weights can travel while the attention computes.
        capacity: number m of copies that fit on a device.
        topology: nodes and devices.
        already: owners and copies that are there; the copies take room. For a second look once the true load is known.
    Returns:
        Bool (E, D), True wherever ``sharded`` is; at most ``capacity`` more on a device.
    Raises:
        ValueError: an expert with no or two owners, a negative argument, or shapes that do not fit.
    Source:
        2502.02581, algorithm 1. Shares are rounded by d'Hondt's rule, which keeps the busiest holder's rows lowest; of
        devices with equal room the one with fewer rows is taken.
    Example:
        >>> owners = homogeneous(4, 2)
        >>> materialize(owners, [9, 1, 2, 8], overlap=2, capacity=1, topology=Topology(1, 2)).int().tolist()
        [[1, 1], [1, 0], [0, 1], [1, 1]]
    """
    check_owners(sharded)
    n_experts, n_devices = sharded.shape
    for name, value in (("overlap", overlap), ("capacity", capacity)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if n_devices != topology.devices:
        raise ValueError(f"sharded must have one column for each of {topology.devices} devices, got {n_devices}")
    expected = _loads(load, n_experts)
    busiest = [e for e in sorted(range(n_experts), key=lambda e: (-expected[e], e)) if expected[e] > 0]
    busiest = busiest[: min(overlap, n_experts)]
    out = sharded.clone() if already is None else already | sharded
    room = (capacity - (out & ~sharded).sum(0)).clamp(min=0).tolist()
    if len(busiest) <= min(room):
        out[busiest] = True
        return out
    slots = sum(min(places, len(busiest)) for places in room)
    holders = out.sum(1).tolist()
    shares = _proportional([expected[e] for e in busiest], [holders[e] for e in busiest], slots, n_devices)
    each = {e: expected[e] / (holders[e] + share) for e, share in zip(busiest, shares, strict=True)}
    rows = (out * torch.tensor([each.get(e, expected[e]) for e in range(n_experts)]).unsqueeze(1)).sum(0).tolist()
    placed = _spread(out, each, shares, room, rows, topology)
    if placed:
        experts, devices = torch.tensor(placed).T
        out[experts, devices] = True
    return out


def _loads(load: Tensor | Sequence[float], n_experts: int) -> list[float]:
    expected = [float(value) for value in (load.tolist() if isinstance(load, Tensor) else load)]
    if len(expected) != n_experts or not all(0 <= value < float("inf") for value in expected):
        raise ValueError(
            f"load must be {n_experts} finite numbers >= 0, got {expected[:8]}{' ...' * (len(expected) > 8)}"
        )
    return expected


def _proportional(rows: list[float], holders: list[int], slots: int, most: int) -> list[int]:
    """Slots in proportion to rows: each goes where a holder has most rows, to no more than ``most`` holders (d'Hondt)."""
    given = [0] * len(rows)
    heap = [(-r / held, i) for i, (r, held) in enumerate(zip(rows, holders, strict=True)) if held < most]
    heapify(heap)
    for _ in range(slots):
        if not heap:
            break
        i = heap[0][1]
        given[i] += 1
        held = holders[i] + given[i]
        if held < most:
            heapreplace(heap, (-rows[i] / held, i))
        else:
            heappop(heap)
    return given


def _spread(
    held: Placement,
    each: dict[int, float],
    shares: list[int],
    room: list[int],
    rows: list[float],
    topology: Topology,
) -> list[tuple[int, int]]:
    """Pairs of expert and device: a node that does not hold the expert yet, then the most room, then the fewest rows.

    ``each`` is expert -> rows that every holder of it will get; ``rows`` are those that the devices have already.
    """
    per = topology.devices_per_node
    free, busy = list(room), list(rows)
    nodes = range(topology.nodes)
    node_free = [sum(free[n * per : n * per + per]) for n in nodes]
    placed: list[tuple[int, int]] = []
    for (expert, more), share in zip(each.items(), shares, strict=True):
        holds = set(held[expert].nonzero().flatten().tolist())
        reached = {device // per for device in holds}
        for _ in range(share):
            best: tuple[bool, int, int] | None = None
            places: list[int] = []
            for node in nodes:  # the order of keys, without a sort: this runs for every copy of every plan
                if not node_free[node]:
                    continue
                key = (node in reached, -node_free[node], node)
                if best is not None and key > best:
                    continue
                first = node * per
                here = [d for d in range(first, first + per) if free[d] and d not in holds]
                if here:
                    best, places = key, here
            if best is None:  # every device with room holds it already
                break
            device = places[0]
            for d in places[1:]:
                if free[d] > free[device] or (free[d] == free[device] and busy[d] < busy[device]):
                    device = d
            placed.append((expert, device))
            holds.add(device)
            reached.add(best[2])
            free[device] -= 1
            node_free[best[2]] -= 1
            busy[device] += more
    return placed


def shard(loads: Tensor, *, overlap: int, topology: Topology, pad: bool = False) -> list[Placement]:
    """Owners of the experts of all layers: even in memory over the model, even in cold load within each layer.

    The ``overlap`` busiest experts of a layer will be copied wherever they are wanted, so it matters little who owns them.
    The others will not; they are dealt out first, each to the least loaded node and device of its layer, and the busy ones
    take what is left. One layer may put many of its experts on a device and another none.

    Args:
        loads: rows expected of each expert, (L, E), >= 0.
        overlap: as in :func:`materialize`.
        topology: nodes and devices.
        pad: allow L * E that the devices do not divide; some then own one expert less.
    Returns:
        L placements (E, D), every expert on one device and L * E / D on each.
    Raises:
        ValueError: L * E does not divide (the number of dummies that would do is named), or negative arguments.
    Source:
        2502.02581, algorithm 2; slots a device are L |E| / |D|, the busy experts go round the nodes in turn.
    Example:
        >>> owners = shard(torch.tensor([[5.0, 1, 1, 1]]), overlap=0, topology=Topology(1, 2))[0]
        >>> owners.int().argmax(1).tolist()
        [0, 1, 1, 0]
    """
    if loads.dim() != 2 or not bool(torch.isfinite(loads).all()) or bool((loads < 0).any()):
        raise ValueError(f"loads must be finite and >= 0 with shape (L, E), got shape {tuple(loads.shape)}")
    if overlap < 0:
        raise ValueError(f"overlap must be >= 0, got {overlap}")
    n_layers, n_experts = loads.shape
    n_devices, per = topology.devices, topology.devices_per_node
    missing = -(n_layers * n_experts) % n_devices
    if missing and not pad:
        raise ValueError(
            f"{n_layers} layers of {n_experts} experts do not divide over {n_devices} devices; {missing} dummies would do: "
            "pad=True"
        )
    free = [-(-n_layers * n_experts // n_devices)] * n_devices
    rows: list[list[float]] = loads.tolist()
    order = [sorted(range(n_experts), key=lambda e: (-row[e], e)) for row in rows]
    hot = min(overlap, n_experts)
    owners = [[0] * n_experts for _ in rows]
    coldest = [max((row[e] for e in experts[hot:]), default=0.0) for row, experts in zip(rows, order, strict=True)]
    for layer in sorted(range(n_layers), key=lambda layer: (-coldest[layer], layer)):
        load = [0.0] * n_devices
        for e in order[layer][hot:]:
            device = _least_loaded(load, free, per)
            owners[layer][e] = device
            load[device] += rows[layer][e]
            free[device] -= 1
    turn = 0
    for layer in range(n_layers):
        for e in order[layer][:hot]:
            while not any(free[turn * per : turn * per + per]):
                turn = (turn + 1) % topology.nodes
            device = max(range(turn * per, turn * per + per), key=lambda d: (free[d], -d))
            owners[layer][e] = device
            free[device] -= 1
            turn = (turn + 1) % topology.nodes
    return [torch.tensor(row).unsqueeze(1) == torch.arange(n_devices) for row in owners]


def _least_loaded(load: list[float], free: list[int], per: int) -> int:
    nodes = range(len(load) // per)
    open_nodes = [n for n in nodes if any(free[n * per : n * per + per])]
    node = min(open_nodes, key=lambda n: (sum(load[n * per : n * per + per]), sum(free[n * per : n * per + per]), n))
    return min((d for d in range(node * per, node * per + per) if free[d]), key=lambda d: (load[d], free[d], d))


def assign_tokens(placement: Placement, counts: Tensor, topology: Topology) -> Tensor:
    """How many of a device's rows for an expert go to which holder of it.

    On the device itself if it holds the expert; else evenly over the holders of its node; else evenly over all holders. Where
    the count does not divide, the first holders get one more.

    Args:
        placement: owners and copies, bool (E, D).
        counts: rows of each source device for each expert, int (D, E).
        topology: nodes and devices.
    Returns:
        int64 (D source, E, D holder); sums over holders give ``counts``.
    Raises:
        ValueError: an expert that nobody holds, negative counts, or shapes that do not fit.
    Source:
        2502.02581, sec. 4.4.
    Example:
        >>> holders = torch.tensor([[True, True, False, False]])
        >>> assign_tokens(holders, torch.tensor([[4], [4], [5], [0]]), Topology(2, 2))[:, 0].tolist()
        [[4, 0, 0, 0], [0, 4, 0, 0], [3, 2, 0, 0], [0, 0, 0, 0]]
    """
    n_experts, n_devices = placement.shape
    if n_devices != topology.devices:
        raise ValueError(f"placement must have one column for each of {topology.devices} devices, got {n_devices}")
    if counts.shape != (n_devices, n_experts) or bool((counts < 0).any()):
        raise ValueError(f"counts must be >= 0 with shape {(n_devices, n_experts)}, got shape {tuple(counts.shape)}")
    if not bool(placement.any(1).all()):
        raise ValueError(f"nobody holds expert {int((~placement.any(1)).nonzero()[0])}")
    node = torch.arange(n_devices) // topology.devices_per_node
    near_DED = placement & (node.unsqueeze(1) == node)[:, None]
    has_node_DE = near_DED.any(2)
    serves_DED = torch.where(has_node_DE.unsqueeze(2), near_DED, placement)
    local_DED = placement & torch.eye(n_devices, dtype=torch.bool)[:, None]
    serves_DED = torch.where(placement.T.unsqueeze(2), local_DED, serves_DED)
    holders_DE = serves_DED.sum(2)
    each_DE, rest_DE = counts // holders_DE, counts % holders_DE
    before_DED = serves_DED.cumsum(2) <= rest_DE.unsqueeze(2)
    return serves_DED * (each_DE.unsqueeze(2) + before_DED)
