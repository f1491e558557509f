"""What a placement costs: rows to compute on each device, rows on each link, copies on each link.

Rows are taken as continuous and each device as the source of an equal part, which is what
:func:`~mixtura.lm.parallel.placement.assign_tokens` gives where counts divide.

Shapes: E experts, D devices, N nodes; leading dimensions (layers, iterations) are free.
Source: Hecate (2502.02581), sec. 4.4 and the cost model of sec. 4.2.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtura.lm.parallel.cluster import Cluster

__all__ = ["Flow", "copy_seconds", "flow", "moved_chunks", "told_seconds"]

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Flow:
    """Rows of one layer and iteration.

    Attributes:
        computed: through the experts of each device, (..., D).
        device: the larger of what each device gets from and sends to others of its node, (..., D).
        node: the larger of what each node gets from and sends to others, (..., N).
    """

    computed: Floats
    device: Floats
    node: Floats

    def exchange_seconds(self, row_bytes: float, cluster: Cluster) -> Floats:
        """Of one exchange, (...): the slowest link decides."""
        intra = self.device.max(-1) * row_bytes / cluster.intra_bw
        inter = self.node.max(-1) * row_bytes / cluster.inter_bw
        messages = cluster.devices - 1
        return np.maximum(intra, inter) + cluster.latency * messages


def flow(placement: Bools, load: Floats, cluster: Cluster) -> Flow:
    """Rows under a placement.

    Args:
        placement: who holds what, bool (..., E, D).
        load: rows of each expert over all devices, (..., E).
        cluster: its nodes and devices.
    """
    per, nodes = cluster.devices_per_node, cluster.nodes
    *lead, n_experts, n_devices = placement.shape
    held = placement.astype(np.float64)
    each = (load / n_devices)[..., None]  # rows that one device has for an expert
    here = held.reshape(*lead, n_experts, nodes, per).sum(-1)  # holders in each node
    absent = here == 0
    holders = here.sum(-1, keepdims=True)
    far = absent.sum(-1, keepdims=True) * per * each / holders  # rows that each holder gets from nodes without one
    near = each * (per - here) / np.maximum(here, 1)  # and from others of its node
    near_D, each_D = np.repeat(near, per, -1), np.broadcast_to(each, held.shape)
    into = (held * near_D).sum(-2)
    out = ((1 - held) * np.repeat(~absent, per, -1) * each_D).sum(-2)
    into_node = (here * far).sum(-2)
    out_node = (absent * per * each).sum(-2)
    computed = (held * (each_D + near_D + far)).sum(-2)
    return Flow(computed, np.maximum(into, out), np.maximum(into_node, out_node))


def told_seconds(expert_bytes: float, n_experts: int, cluster: Cluster) -> float:
    """Of one exchange in which each device tells every other one something of the experts that it holds, so many bytes each.

    What a router that reads experts' weights needs in a forward pass, and the other way round in a backward pass. Every device
    is told by itself, also across a node's border.
    """
    own, per = expert_bytes * n_experts / cluster.devices, cluster.devices_per_node
    intra = (per - 1) * own / cluster.intra_bw
    inter = per * (cluster.devices - per) * own / cluster.inter_bw
    return max(intra, inter) + cluster.latency * (cluster.devices - 1)


def moved_chunks(before: Bools, after: Bools, cluster: Cluster) -> tuple[Floats, Floats]:
    """Expert-sized pieces that a sparse all-gather brings: to each device (..., D), across each node's border (..., N).

    A piece crosses into a node once, however many of its devices want it, and leaves one node that holds it, the first, once:
    nodes pass it on.
    """
    extra = after & ~before
    per, nodes = cluster.devices_per_node, cluster.nodes
    *lead, n_experts, _ = extra.shape
    wanted = extra.reshape(*lead, n_experts, nodes, per).any(-1)
    held = before.reshape(*lead, n_experts, nodes, per).any(-1)
    sender = held & (held.cumsum(-1) == 1)
    missing = wanted & ~held
    into = missing.sum(-2)
    out = (sender & missing.any(-1, keepdims=True)).sum(-2)
    return extra.sum(-2).astype(np.float64), np.maximum(into, out).astype(np.float64)


def copy_seconds(before: Bools, after: Bools, chunk_bytes: float, cluster: Cluster) -> Floats:
    """Of a sparse all-gather, or of the sparse reduce-scatter that mirrors it, (...)."""
    device, node = moved_chunks(before, after, cluster)
    slowest = np.maximum(device.max(-1) * chunk_bytes / cluster.intra_bw, node.max(-1) * chunk_bytes / cluster.inter_bw)
    return slowest + cluster.latency * (after & ~before).any((-1, -2))
