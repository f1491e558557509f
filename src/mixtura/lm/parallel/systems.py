"""Systems that place experts, as the simulator runs them: given past loads, who holds what, and what it takes to get there.

Shapes: L layers, E experts, D devices.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixtura.lm.parallel.cluster import Cluster, ModelShape
from mixtura.lm.parallel.placement import homogeneous, materialize, shard
from mixtura.lm.parallel.traffic import copy_seconds, flow

__all__ = ["SYSTEMS", "Plan", "Setting", "System"]

STATES = 16  # bytes a parameter: half-precision weight and gradient, and Adam's master weight and two moments
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What every system is told."""

    shape: ModelShape
    cluster: Cluster
    layers: int
    experts: int
    attention_seconds: float  # of one layer, forward

    def layer_seconds(self, placement: Bools, load: Floats) -> Floats:
        """Exchanges and experts of each layer under a placement."""
        rows = flow(placement, load, self.cluster)
        exchange = 4 * rows.exchange_seconds(self.shape.row_bytes, self.cluster)
        return np.asarray(exchange + 3 * rows.computed.max(-1) * self.shape.row_flops / self.cluster.flops)

    def copy_seconds(self, before: Bools, after: Bools, weights: float = 1.0) -> Floats:
        """To bring ``weights`` times the bytes of an expert's weights wherever ``after`` wants them."""
        return np.asarray(copy_seconds(before, after, weights * self.shape.expert_bytes, self.cluster))


@dataclass(frozen=True)
class Plan:
    """One iteration.

    Attributes:
        placement: owners and copies, bool (L, E, D).
        forward, backward: seconds of collectives that hide behind the attention's pass, (L,).
        exposed: seconds of collectives that cannot hide, (L,).
        moving: seconds spent on moving experts for good.
        copy_bytes: of copies on the fullest device.
    """

    placement: Bools
    forward: Floats
    backward: Floats
    exposed: Floats
    moving: float = 0.0
    copy_bytes: float = 0.0


class System(ABC):
    """How experts are placed, iteration by iteration."""

    def __init__(self, setting: Setting):
        self.setting = setting
        owners = homogeneous(setting.experts, setting.cluster.devices).numpy()
        self.start: Bools = np.repeat(owners[None], setting.layers, 0)
        self.none = np.zeros(setting.layers)

    @abstractmethod
    def plan(self, t: int, load: Floats) -> Plan:
        """Plan of iteration t; ``load`` (L, E) are its true rows, of which a system may use what it would know."""

    def state_bytes(self) -> float:
        """Weights, gradients and optimizer states of routed experts on the fullest device."""
        return STATES * self.setting.shape.routed_parameters / self.setting.cluster.devices

    @classmethod
    def knobs(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters if name != "setting"]

    @classmethod
    def grid(cls) -> Sequence[dict[str, Any]]:
        """Knobs to try when tuning."""
        return [{}]


class ExpertParallel(System):
    """Experts in order, nothing moves."""

    def plan(self, t: int, load: Floats) -> Plan:
        return Plan(self.start, self.none, self.none, self.none)


class FullySharded(System):
    """All experts of a layer gathered on every device, forward and backward, and gradients scattered back."""

    def plan(self, t: int, load: Floats) -> Plan:
        everywhere = np.ones_like(self.start)
        gather = self.setting.copy_seconds(self.start, everywhere)
        shape = self.setting.shape
        return Plan(everywhere, gather, 2 * gather, self.none, 0.0, self.setting.experts * shape.expert_bytes)


class Hecate(System):
    """Copies of the busiest experts for one iteration, and owners that are dealt out anew now and then.

    Args:
        overlap: experts whose weights travel behind the attention; None: as many as fit there.
        capacity: copies a device has room for, a layer.
        window: iterations that the expected load is the mean of.
        reshard_every: iterations between looks at the owners; 0 keeps them.
        rematerialize: free copies after the forward pass and fetch them again: room for one layer's copies is enough.
        calibrate: once the gate has spoken, add copies where the modelled gain is more than their transfer.
        copies: False leaves only the sharding.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        overlap: int | None = None,
        capacity: int = 8,
        window: int = 5,
        reshard_every: int = 100,
        rematerialize: bool = False,
        calibrate: bool = False,
        copies: bool = True,
    ):
        super().__init__(setting)
        cluster, shape = setting.cluster, setting.shape
        slow = cluster.inter_bw if cluster.nodes > 1 and cluster.inter_bw < cluster.intra_bw else cluster.intra_bw
        fits = int(setting.attention_seconds * slow / shape.expert_bytes)
        self.overlap = min(setting.experts, fits if overlap is None else overlap)
        self.capacity, self.window, self.reshard_every = capacity, window, reshard_every
        self.rematerialize, self.calibrate, self.copies = rematerialize, calibrate, copies
        self.owners = self.start
        self.seen: list[Floats] = []

    @classmethod
    def grid(cls) -> Sequence[dict[str, Any]]:
        # None is the paper's rule: no copy that would be waited for. More of them can pay for the wait.
        return [{"overlap": n, "calibrate": look} for n in (None, 32) for look in (False, True)]

    def plan(self, t: int, load: Floats) -> Plan:
        moving = 0.0
        expected = np.mean(self.seen[-self.window :], 0) if self.seen else None
        if expected is not None and self.reshard_every and (t == 1 or t % self.reshard_every == 0):
            moving = self._reshard(expected)
        placement = self.owners if expected is None or not self.copies else self._copies(expected)
        fetch = self.setting.copy_seconds(self.owners, placement)
        exposed = self.none
        if self.calibrate:
            placement, exposed = self._calibrated(placement, load)
        scatter = self.setting.copy_seconds(self.owners, placement)
        self.seen.append(load)
        extra = (placement & ~self.owners).sum(1)  # (L, D)
        count = extra.max() if self.rematerialize else extra.sum(0).max()
        backward = scatter + fetch if self.rematerialize else scatter
        return Plan(placement, fetch, backward, exposed, moving, float(count) * self.setting.shape.expert_bytes)

    def _copies(self, load: Floats, already: Bools | None = None, overlap: int | None = None) -> Bools:
        made = [
            materialize(
                torch.from_numpy(self.owners[layer]),
                row.tolist(),
                overlap=self.overlap if overlap is None else overlap,
                capacity=self.capacity,
                topology=self.setting.cluster.topology,
                already=None if already is None else torch.from_numpy(already[layer]),
            ).numpy()
            for layer, row in enumerate(load)
        ]
        return np.stack(made)

    def _calibrated(self, placement: Bools, load: Floats) -> tuple[Bools, Floats]:
        more = self._copies(load, placement, overlap=self.setting.experts)
        cost = self.setting.copy_seconds(placement, more)
        gain = self.setting.layer_seconds(placement, load) - self.setting.layer_seconds(more, load)
        worth = gain > cost
        return np.where(worth[:, None, None], more, placement), np.where(worth, cost, 0.0)

    def _reshard(self, load: Floats) -> float:
        hot = self.overlap if self.copies else 0
        owners = np.stack(
            [p.numpy() for p in shard(torch.from_numpy(load), overlap=hot, topology=self.setting.cluster.topology)]
        )
        if (owners == self.owners).all():
            return 0.0
        weights = STATES / self.setting.shape.bytes
        seconds = float(self.setting.copy_seconds(self.owners, owners, weights).sum())
        self.owners = owners
        return seconds


class FasterMoE(System):
    """Copies the experts that are busy now to all devices, after the gate has spoken, as long as the model says it pays.

    Args:
        shadows: largest number of experts a layer that are copied.
    """

    STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of copied experts that are weighed

    def __init__(self, setting: Setting, *, shadows: int = 32):
        super().__init__(setting)
        self.shadows = min(shadows, setting.experts)

    def plan(self, t: int, load: Floats) -> Plan:
        order = np.argsort(-load, axis=1, kind="stable")
        best = self.start.copy()
        cost = self.none.copy()
        total = self.setting.layer_seconds(best, load)
        for n in (n for n in self.STEPS if n <= self.shadows):
            tried = self.start.copy()
            np.put_along_axis(tried, order[:, :n, None], True, axis=1)
            copies = 2 * self.setting.copy_seconds(self.start, tried)  # weights out, gradients back
            seconds = self.setting.layer_seconds(tried, load) + copies
            better = seconds < total
            best, total = np.where(better[:, None, None], tried, best), np.where(better, seconds, total)
            cost = np.where(better, copies, cost)
        extra = (best & ~self.start).sum((0, 1)).max()
        return Plan(best, self.none, self.none, cost, 0.0, float(extra) * self.setting.shape.expert_bytes)


class _Moving(System):
    """Looks at its placement now and then, and changes it when what that saves until the next look is more than it takes."""

    def __init__(self, setting: Setting, *, interval: int):
        super().__init__(setting)
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        self.placement = self.start
        self.seen: list[Floats] = []

    @abstractmethod
    def wanted(self, load: Floats) -> Bools:
        """The placement that a load asks for, bool (L, E, D)."""

    def plan(self, t: int, load: Floats) -> Plan:
        moving = 0.0
        if self.seen and (t == 1 or t % self.interval == 0):
            expected = np.mean(self.seen[-self.interval :], 0)
            wanted = self.wanted(expected)
            # States lie where the weights do: an expert that a device did not have comes whole.
            took = self.setting.copy_seconds(self.placement, wanted, STATES / self.setting.shape.bytes)
            saved = self.setting.layer_seconds(self.placement, expected) - self.setting.layer_seconds(wanted, expected)
            worth = saved * self.interval > took
            self.placement = np.where(worth[:, None, None], wanted, self.placement)
            moving = float(np.where(worth, took, 0).sum())
            self.seen = []
        self.seen.append(load)
        return Plan(self.placement, self.none, self.gradient_seconds(), self.none, moving)

    def gradient_seconds(self) -> Floats:
        """To make the gradients of replicas equal."""
        return self.none


class SmartMoE(_Moving):
    """As many experts a device as before, exchanged so that every device has about the same load.

    Args:
        interval: iterations between looks.
    """

    def __init__(self, setting: Setting, *, interval: int = 50):
        super().__init__(setting, interval=interval)

    @classmethod
    def grid(cls) -> Sequence[dict[str, Any]]:
        return [{"interval": n} for n in (10, 50, 200)]

    def wanted(self, load: Floats) -> Bools:
        topology = self.setting.cluster.topology
        return np.stack([shard(torch.from_numpy(row[None]), overlap=0, topology=topology)[0].numpy() for row in load])


class FlexMoE(_Moving):
    """Every device keeps room for more experts; the busy ones have several, each with states of its own.

    Args:
        slots: experts a device holds beside its own, a layer.
        interval: iterations between looks.
    """

    def __init__(self, setting: Setting, *, slots: int = 2, interval: int = 50):
        super().__init__(setting, interval=interval)
        if slots < 0:
            raise ValueError(f"slots must be >= 0, got {slots}")
        self.slots = slots

    @classmethod
    def grid(cls) -> Sequence[dict[str, Any]]:
        return [{"slots": s, "interval": n} for s in (2, 4) for n in (10, 50, 200)]

    def wanted(self, load: Floats) -> Bools:
        made = [
            materialize(
                torch.from_numpy(owners),
                row.tolist(),
                overlap=self.setting.experts,
                capacity=self.slots,
                topology=self.setting.cluster.topology,
            ).numpy()
            for owners, row in zip(self.start, load, strict=True)
        ]
        return np.stack(made)

    def gradient_seconds(self) -> Floats:
        return 2 * self.setting.copy_seconds(self.start, self.placement)

    def state_bytes(self) -> float:
        setting = self.setting
        return super().state_bytes() + STATES * self.slots * setting.layers * setting.shape.expert_parameters


SYSTEMS: dict[str, type[System]] = {
    "ep": ExpertParallel,
    "faster": FasterMoE,
    "smart": SmartMoE,
    "flex": FlexMoE,
    "hecate": Hecate,
    "fsdp": FullySharded,
}
