"""What a claim is, how it is run over seeds, judged and recorded.

A claim is the sentence of a paper, an honest baseline, and figures that must come out on this machine. ``run`` computes
the figures of one seed; the checks judge them over all seeds; the record keeps every figure, so that the verdict can be
drawn again from the file alone.
"""

import math
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mixtura.core.checkpoint import read_json, write_json
from mixtura.core.progress import bar

__all__ = ["SCALES", "Check", "Claim", "Record", "Scale", "agrees", "judge", "run_claim"]

Scale = Literal["smoke", "cpu", "gpu"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "gpu")
SEEDS: Mapping[str, tuple[int, ...]] = MappingProxyType({"smoke": (0,), "cpu": (0, 1, 2), "gpu": (0, 1, 2)})

Record = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold: a figure, a bound, and whether the mean over the seeds or every seed must meet it.

    Attributes:
        figure: name of a figure that every seed reports.
        at_least, at_most: the bound; exactly one of them is given.
        over: ``"mean"`` judges the mean over the seeds, ``"every"`` the worst seed.
        why: the check in words, for the record and the gallery.
    """

    figure: str
    at_least: float | None = None
    at_most: float | None = None
    over: Literal["mean", "every"] = "mean"
    why: str = ""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"check on {self.figure!r} needs exactly one of at_least and at_most")

    def judge(self, figures: Sequence[Figures]) -> dict[str, Any]:
        """Mean, standard deviation, range and the verdict over the seeds; a missing or NaN figure does not hold.

        ``settled`` is whether the mean lies more than one standard error inside the bound: with three seeds a verdict
        that is not settled may turn with another three.
        """
        values = [math.nan if (v := seed.get(self.figure)) is None else float(v) for seed in figures]
        n, finite = len(values), all(math.isfinite(v) for v in values)
        bound = self.at_least if self.at_least is not None else self.at_most
        assert bound is not None
        sign = 1.0 if self.at_least is not None else -1.0
        row: dict[str, Any] = {
            "figure": self.figure,
            "bound": bound,
            "sense": "at least" if sign > 0 else "at most",
            "over": self.over,
            "why": self.why,
        }
        if not finite:
            return row | {"holds": False, "settled": False, "mean": None, "spread": None, "low": None, "high": None}
        mean = sum(values) / n
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
        judged = mean if self.over == "mean" else min(sign * v for v in values) * sign
        holds = sign * judged >= sign * bound
        settled = n > 1 and sign * (mean - bound) > spread / math.sqrt(n)
        return row | {
            "holds": holds,
            "settled": settled,
            "mean": mean,
            "spread": spread,
            "low": min(values),
            "high": max(values),
        }


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The claim of one system and the run that checks it.

    Attributes:
        system: id of the registry row.
        sentence: the paper's claim in our own words.
        paper: the paper's own figures, with table or section.
        metric: what is measured, in which unit and direction.
        baseline: what it is measured against, and how that was tuned.
        checks: what must hold at ``cpu`` and ``gpu`` scale.
        run: (scale, seed, scratch directory) -> figures of that seed. Numbers are judged and tabulated; what stands
            under ``"detail"`` is kept for the plot. The directory may not exist yet; what an interrupted run left there is from
            the same scale, seed and commit.
        plot: draws a record on a matplotlib figure.
        limits: what this run does not show.
        seeds: seeds per scale.
    """

    system: str
    sentence: str
    paper: str
    metric: str
    baseline: str
    checks: tuple[Check, ...]
    run: Callable[[Scale, int, Path], Figures]
    plot: Callable[[Record, Any], None] | None = None
    limits: str = ""
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: SEEDS)


def judge(claim: Claim, figures: Sequence[Figures]) -> tuple[str, list[dict[str, Any]]]:
    """Verdict (``holds`` or ``fails``) and one row a check."""
    rows = [check.judge(figures) for check in claim.checks]
    return ("holds" if rows and all(row["holds"] for row in rows) else "fails"), rows


def run_claim(
    claim: Claim,
    scale: Scale,
    *,
    seeds: Sequence[int] | None = None,
    scratch: Path,
    resume: bool = True,
) -> Record:
    """Run a claim over its seeds and return its record.

    Each seed's figures are saved under ``scratch`` as soon as they are there, so an interrupted run continues with the
    next seed, and with what that seed's run kept for itself. Both are used only by the same commit of the code.

    Args:
        claim: what to run.
        scale: ``smoke`` checks that it runs, ``cpu`` is where it must hold, ``gpu`` is closer to the paper.
        seeds: instead of the claim's own.
        scratch: directory for finished seeds and for what ``run`` wants to keep.
        resume: use seeds that an earlier run of this commit finished.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {list(SCALES)}, got {scale!r}")
    chosen = tuple(seeds) if seeds is not None else claim.seeds[scale]
    if not chosen:
        raise ValueError("seeds must name at least one seed")
    commit = _commit()
    rows: list[Figures] = []
    with bar(desc=f"{claim.system} {scale}", unit="seed", total=len(chosen)) as shown:
        for seed in chosen:
            kept = scratch / f"{claim.system}-{scale}-{seed}.json"
            row = read_json(kept) if resume and kept.exists() else {}
            if row.get("commit") != commit or commit.endswith("+"):
                began = time.perf_counter()
                parts = scratch / f"{claim.system}-{scale}-{seed}-{commit}"
                if not resume or commit.endswith("+") or commit == "unknown":
                    shutil.rmtree(parts, ignore_errors=True)  # of which code they are, nobody can tell
                figures = claim.run(scale, seed, parts)
                row = {"seed": seed, "commit": commit, "seconds": time.perf_counter() - began, **_plain(figures)}
                write_json(kept, row)
                shutil.rmtree(parts, ignore_errors=True)
            rows.append(row)
            shown.update()
    verdict, checks = judge(claim, rows)
    return {
        "system": claim.system,
        "scale": scale,
        "verdict": verdict,
        "sentence": claim.sentence,
        "paper": claim.paper,
        "metric": claim.metric,
        "baseline": claim.baseline,
        "limits": claim.limits,
        "margin": checks,
        "seeds": rows,
        "seconds": sum(row["seconds"] for row in rows),
        "peak_memory_bytes": _peak_memory(),
        "machine": _machine(),
        "versions": _versions(),
        "commit": commit,
    }


def agrees(claim: Claim, record: Record, figures: Figures, *, tolerance: float = 0.05) -> list[str]:
    """Names of the judged figures in which a rerun of one seed differs from its record by more than ``tolerance``.

    The tolerance is relative to the larger of the recorded value and the bound: threads and library versions move sums
    in the last digits, and a training carries that further.
    """
    kept = next((row for row in record["seeds"] if row["seed"] == figures["seed"]), None)
    if kept is None:
        raise ValueError(f"the record of {claim.system} has no seed {figures['seed']}")
    differing = []
    for check in claim.checks:
        bound = check.at_least if check.at_least is not None else check.at_most
        was, now = float(kept[check.figure]), float(figures[check.figure])
        if abs(was - now) > tolerance * max(abs(was), abs(bound or 0.0), 1e-12):
            differing.append(f"{check.figure}: {was:.4g} recorded, {now:.4g} now")
    return differing


def _plain(value: Any) -> Any:
    """Tensors and NumPy numbers as JSON numbers; NaN and infinity as None, which no check accepts."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _commit() -> str:
    """Commit of the code that runs, with a ``+`` where the working tree differs; ``unknown`` outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "."],
            cwd=here.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _peak_memory() -> int:
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine() -> dict[str, Any]:
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": name, "threads": torch.get_num_threads(), "system": platform.system(), "gpu": device}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("mixtura", "torch", "transformers", "numpy", "scipy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
