"""Times rivals side by side: one process, alternating rounds, a ratio with its spread, and a JSON record.

A machine drifts (other tenants, clocks, caches) more than two good programs differ. So rivals take turns within each
round, each round yields one ratio, and the median of the ratios is reported with the lowest and the highest.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["RECORDS", "Ratio", "alternate", "machine", "median", "ratio", "versions", "write_record"]

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


@dataclass(frozen=True)
class Ratio:
    """Time of one rival over the time of another, round by round: below 1 the first is faster."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def alternate(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that each rival took in each round.

    The order within a round turns by one place a round, so that no rival always runs on another's warm cache.

    Args:
        rivals: name -> call without arguments. Its result is dropped outside the timed span.
        rounds: timed rounds, at least 1.
        warmup: rounds before those, not timed.
        clock: seconds; ``time.process_time`` suits a busy machine and one thread.
    Raises:
        ValueError: no rival, or fewer than one round.
    """
    if not rivals:
        raise ValueError("rivals must name at least one call, got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(rivals)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            result = rivals[name]()
            elapsed = clock() - start
            del result
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> Ratio:
    """Time of ``a`` over time of ``b``, paired round by round."""
    rounds = [x / y for x, y in zip(times[a], times[b], strict=True)]
    return Ratio(statistics.median(rounds), min(rounds), max(rounds))


def median(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each rival."""
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """What this ran on: processor, cores, threads that torch uses, memory in bytes, system."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "system": platform.system(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of python and of the named packages; torch, transformers and numpy when none is named."""
    found = {"python": platform.python_version()}
    for package in packages or ("torch", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_record(name: str, payload: Mapping[str, Any]) -> Path:
    """Writes ``docs/benchmarks/<name>.json`` with the machine, the versions and the date beside the payload."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **payload,
    }
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(record, indent=2, default=_plain) + "\n")
    beside.replace(path)
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Ratio):
        return {"median": value.median, "low": value.low, "high": value.high}
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
