"""Records of claims on the disk, and the pages made from them."""

from collections.abc import Iterable
from pathlib import Path

from mixtura.claims.framework import Claim, Record
from mixtura.core.checkpoint import atomic_file, read_json, write_json
from mixtura.systems import SYSTEMS, System

__all__ = ["entry", "gallery", "load_record", "save_record", "status", "summary", "systems_table"]


def save_record(claim: Claim, record: Record, directory: Path) -> None:
    """Write a record as ``<id>.json`` (``<id>-<scale>.json`` beside the cpu record) and its plot as PNG."""
    stem = _stem(record["system"], record["scale"])
    write_json(directory / f"{stem}.json", record)
    if claim.plot is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: no global state and no screen needed.
    figure = Figure(figsize=(7.5, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    claim.plot(record, figure)
    with atomic_file(directory / f"{stem}.png") as beside:
        figure.savefig(beside, dpi=110, format="png")


def load_record(system: str, directory: Path, scale: str = "cpu") -> Record | None:
    """The record of a system, or None where there is none."""
    path = directory / f"{_stem(system, scale)}.json"
    return read_json(path) if path.exists() else None


def status(system: System, directory: Path) -> str:
    """What can be said of a system: ``holds`` or ``fails`` from its cpu record, else ``built`` or ``not built yet``."""
    record = load_record(system.id, directory) if system.built else None
    if record is not None:
        return str(record["verdict"])
    return "built, no record" if system.built else "not built yet"


def summary(record: Record) -> str:
    """One line: system, paper, here, verdict."""
    here = "; ".join(
        f"{row['figure']} {_number(row['mean'])} ± {_number(row['spread'])} ({row['sense']} {row['bound']:g})"
        for row in record["margin"]
    )
    scale = "" if record["scale"] == "cpu" else f" at {record['scale']} scale"
    return f"{record['system']}{scale}: paper: {record['paper']} | here: {here} | {record['verdict']}"


def entry(system: System, record: Record | None) -> str:
    """Gallery entry of a system in Markdown."""
    parts = [f"## {system.id}", f"*{system.title}* ([{system.arxiv}]({system.url})). {system.line}"]
    if not system.built:
        return "\n\n".join([*parts, "Not built yet."]) + "\n"
    parts.append("Names: " + ", ".join(f"`{name}`" for name in system.entry) + ".")
    if record is None:
        return "\n\n".join([*parts, f"No record yet; make one with `mixtura claim {system.id}`."]) + "\n"
    parts.append(f"**Claim.** {record['sentence']}")
    parts.append(f"**Paper.** {record['paper']}")
    parts.append(f"**Measured here.** {record['metric']} Against: {record['baseline']}")
    rows = ["| check | bound | mean ± spread | range | holds |", "|---|---|---|---|---|"]
    for row in record["margin"]:
        over = "mean" if row["over"] == "mean" else "every seed"
        found = f"{_number(row['mean'])} ± {_number(row['spread'])} | {_number(row['low'])} to {_number(row['high'])}"
        verdict = (
            ("yes" if row["settled"] or row["over"] == "every" else "yes, within the spread") if row["holds"] else "no"
        )
        rows.append(
            f"| {row['why'] or row['figure']} | {row['sense']} {row['bound']:g} ({over}) | {found} | {verdict} |"
        )
    parts.append("\n".join(rows))
    if record["limits"]:
        parts.append(f"**Limits.** {record['limits']}")
    seeds = ", ".join(str(row["seed"]) for row in record["seeds"])
    machine = f"{record['machine']['processor']}, {record['machine']['threads']} threads"
    parts.append(
        f"Verdict: **{record['verdict']}**. Seeds {seeds}; {record['seconds'] / 60:.1f} minutes on {machine}; "
        f"commit {record['commit'][:10]}. Rerun with `mixtura claim {system.id}`."
    )
    return "\n\n".join(parts) + "\n"


def gallery(directory: Path, systems: Iterable[System] = SYSTEMS) -> str:
    """The whole gallery in Markdown: every system that has code, from its record; then those to come."""
    systems = list(systems)
    parts = ["# Gallery of claims", "Made from the records in this directory with `make docs`; not edited by hand.\n"]
    for system in systems:
        if system.built:
            parts.append(entry(system, load_record(system.id, directory)))
            if (directory / f"{system.id}.png").exists():
                parts.append(f"![What the seeds of {system.id} show]({system.id}.png)\n")
    rest = [f"- `{system.id}`: {system.line}" for system in systems if not system.built]
    return "\n".join([*parts, "## Not built yet\n", *rest]) + "\n"


def systems_table(directory: Path, systems: Iterable[System] = SYSTEMS) -> str:
    """The README's table of systems, in Markdown."""
    rows = ["| system | room | what it does | status |", "|---|---|---|---|"]
    for system in systems:
        rows.append(f"| [`{system.id}`]({system.url}) | {system.room} | {system.line} | {status(system, directory)} |")
    return "\n".join(rows) + "\n"


def _stem(system: str, scale: str) -> str:
    return system if scale == "cpu" else f"{system}-{scale}"


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"
