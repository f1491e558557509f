"""What this machine's links and memory allow: measured, and the least over processes, so that all plan alike."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from mixtura.lm.parallel.mesh import ExpertMesh

__all__ = ["AttentionTime", "bandwidth", "room"]


class AttentionTime:
    """How long a layer's attention takes, in its first passes."""

    PASSES = 4  # the first of them warm up

    def __init__(self, bandwidth: float):
        self.bandwidth, self.seconds, self._began = bandwidth, list[float](), 0.0

    def begin(self) -> None:
        self._began = _now()

    def end(self) -> bool:
        """Whether enough was seen."""
        self.seconds.append(_now() - self._began)
        return len(self.seconds) == self.PASSES

    def fits(self, chunk_bytes: int, group: Any) -> int:
        """Experts that travel meanwhile, in the process where they are fewest. Collective."""
        found = torch.tensor([min(self.seconds[self.PASSES // 2 :]) * self.bandwidth / chunk_bytes])
        if group is not None:
            found = found.to(_collective_device(group))
            dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
        return int(found)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _collective_device(group: Any) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def room(slot_bytes: int, mesh: ExpertMesh) -> int:
    """Copies a layer for which half of the free memory has room, weights and gradients, in the process with least. Collective."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        pages = (
            "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        )  # macOS has no free ones
        free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // mesh.node
    return _least(free // 2 // (2 * slot_bytes), mesh)


def bandwidth(chunk_bytes: int, mesh: ExpertMesh) -> int:
    """Bytes a second that a process receives while every one sends an expert to every other. Collective."""
    group = mesh.group("world")
    if group is None:
        return 0
    device = _collective_device(group)
    sent = torch.zeros(mesh.world * chunk_bytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(3):
        dist.barrier(group=group)
        began = _now()
        dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
        seconds.append(_now() - began)
    return _least(int((mesh.world - 1) * chunk_bytes / min(seconds)), mesh)


def _least(value: int, mesh: ExpertMesh) -> int:
    group = mesh.group("world")
    if group is None:
        return value
    found = torch.tensor([value], device=_collective_device(group))
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    return int(found)
