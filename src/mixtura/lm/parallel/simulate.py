"""How long a training step takes on machines that are not here, system by system, on one trace of loads.

One layer and iteration, with attention taking A seconds forward and 2 A backward:

    3 A + 4 exchanges + 3 times the rows of the busiest device + copies that outlast the attention they hide behind + moves

A router that reads the experts' weights is told of those that lie elsewhere, forward and back, which counts as exchange; where
all weights are everywhere (FSDP) it need not be.

Every system sees what it would: Hecate plans with past loads, FasterMoE with the true ones (it decides after the gate), SmartMoE
and FlexMoE move experts with their optimizer states when the time they expect to save before the next look is more than the
move takes. Seconds are modelled, not measured.

Source: Hecate (2502.02581), sec. 4.2 and 5; FasterMoE (PPoPP 2022), SmartMoE (ATC 2023), FlexMoE (2304.03946).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.lm.parallel.cluster import Cluster, ModelShape
from mixtura.lm.parallel.load_trace import LoadTrace
from mixtura.lm.parallel.systems import SYSTEMS, Setting, System
from mixtura.lm.parallel.traffic import flow, told_seconds

__all__ = ["SimReport", "simulate", "tune"]


@dataclass(frozen=True)
class SimReport:
    """What a simulation found.

    Attributes:
        system, knobs: what was simulated.
        seconds: mean of an iteration.
        phases: those seconds by ``attention``, ``exchange``, ``experts``, ``copies`` (what was not hidden) and ``moves``.
        per_layer: seconds of each layer, moves left out, (L,).
        imbalance: rows of the busiest device over the mean, averaged.
        memory: bytes of the fullest device by ``states`` (weights, gradients, optimizer), ``copies``.
    """

    system: str
    knobs: Mapping[str, Any]
    seconds: float
    phases: Mapping[str, float]
    per_layer: NDArray[np.float64]
    imbalance: float
    memory: Mapping[str, float] = field(default_factory=dict)


def simulate(
    trace: LoadTrace, shape: ModelShape, cluster: Cluster, system: str = "hecate", *, skip: int = 0, **knobs: Any
) -> SimReport:
    """Run one system over a trace.

    Args:
        trace: rows of each expert; its experts and layers must be those of ``shape``.
        shape: the model; layers without experts are left out, they cost every system the same.
        cluster: the machines.
        system: one of :data:`~mixtura.lm.parallel.systems.SYSTEMS`.
        skip: iterations at the start that are run but not counted.
        **knobs: of that system.
    Raises:
        ValueError: an unknown system or knob (the known ones are listed), a trace of another model, or nothing left to count.
    """
    policy = _policy(trace, shape, cluster, system, knobs)
    setting = policy.setting
    n_iterations, n_layers, _ = trace.counts.shape
    if not 0 <= skip < n_iterations:
        raise ValueError(f"skip must be between 0 and {n_iterations - 1}, got {skip}")
    attention, moves, uneven = setting.attention_seconds, 0.0, 0.0
    parts = {name: np.zeros(n_layers) for name in ("exchange", "experts", "copies")}
    copies = 0.0
    told = 0.0
    if shape.router_statistics and system != "fsdp":
        told = 2 * told_seconds(shape.statistics_bytes, setting.experts, cluster)
    for t in range(n_iterations):
        load = trace.counts[t].astype(np.float64)
        plan = policy.plan(t, load)
        if t < skip:
            continue
        rows = flow(plan.placement, load, cluster)
        parts["exchange"] += 4 * rows.exchange_seconds(shape.row_bytes, cluster) + told
        parts["experts"] += 3 * rows.computed.max(-1) * shape.row_flops / cluster.flops
        hidden = np.maximum(plan.forward - attention, 0) + np.maximum(plan.backward - 2 * attention, 0)
        parts["copies"] += hidden + plan.exposed
        moves += plan.moving
        uneven += float((rows.computed.max(-1) / rows.computed.mean(-1)).mean())
        copies = max(copies, plan.copy_bytes)
    n = n_iterations - skip
    per_layer = 3 * attention + sum(parts.values()) / n
    phases = {
        "attention": 3 * attention * n_layers,
        **{k: float(v.sum()) / n for k, v in parts.items()},
        "moves": moves / n,
    }
    memory = {"states": policy.state_bytes(), "copies": copies}
    return SimReport(system, dict(knobs), sum(phases.values()), phases, per_layer, uneven / n, memory)


def tune(trace: LoadTrace, shape: ModelShape, cluster: Cluster, system: str) -> dict[str, Any]:
    """The knobs of a system that are fastest on a trace, of the grid that its class gives."""
    grid = SYSTEMS[system].grid() if system in SYSTEMS else [{}]
    return min(grid, key=lambda knobs: simulate(trace, shape, cluster, system, **knobs).seconds)


def _policy(trace: LoadTrace, shape: ModelShape, cluster: Cluster, system: str, knobs: Mapping[str, Any]) -> System:
    if system not in SYSTEMS:
        raise ValueError(f"system must be one of {sorted(SYSTEMS)}, got {system!r}")
    counts = {count for count in shape.experts if count}
    _, n_layers, n_experts = trace.counts.shape
    if counts != {n_experts} or shape.sparse_layers != n_layers:
        raise ValueError(
            f"trace has {n_layers} layers of {n_experts} experts, the model {shape.sparse_layers} of {sorted(counts)}"
        )
    tokens = float(trace.counts[0, 0].sum()) / shape.top_k / cluster.devices
    setting = Setting(shape, cluster, n_layers, n_experts, shape.attention_flops(1) * tokens / cluster.flops)
    try:
        return SYSTEMS[system](setting, **knobs)
    except TypeError as error:
        raise ValueError(f"{system} takes the knobs {sorted(SYSTEMS[system].knobs())}, got {sorted(knobs)}") from error
