"""``systems``, ``show`` and ``claim``: the registry, a card with its record, a claim rerun."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["add_to"]

RECORDS = Path("docs/claims")


class ScaleName(StrEnum):
    """Scales of a claim."""

    smoke = "smoke"
    cpu = "cpu"
    gpu = "gpu"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(systems)
    app.command()(show)
    app.command()(claim)


def systems(
    room: Annotated[
        str | None, typer.Option(help="Only this room: lm, density, audio, vision, multimodal, robust.")
    ] = None,
    records: Annotated[Path, typer.Option(help="Directory of claim records.")] = RECORDS,
) -> None:
    """List the forty systems and what their records say.

    Examples:

        mixtura systems

        mixtura systems --room lm
    """
    from mixtura.claims.gallery import status
    from mixtura.systems import ROOMS, SYSTEMS

    if room is not None and room not in ROOMS:
        raise ValueError(f"--room must be one of {list(ROOMS)}, got {room!r}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "room", "status", "what it does"):
        table.add_column(column, overflow="fold")
    for row in SYSTEMS:
        if room in (None, row.room):
            table.add_row(row.id, row.room, status(row, records), row.line)
    Console().print(table)


def show(
    system: Annotated[str, typer.Argument(help="Id of a system, as `mixtura systems` lists them.")],
    records: Annotated[Path, typer.Option(help="Directory of claim records.")] = RECORDS,
) -> None:
    """Show a system: its paper, its names, and what was measured here.

    Example:

        mixtura show mc-moe
    """
    from mixtura.claims.gallery import entry, load_record
    from mixtura.systems import get

    row = get(system)
    from rich.markdown import Markdown

    Console().print(Markdown(entry(row, load_record(row.id, records))))


def claim(
    system: Annotated[str, typer.Argument(help="Id of a system, or `all`.")],
    scale: Annotated[
        ScaleName, typer.Option(help="smoke: seconds, does it run. cpu: minutes, must hold. gpu: closer to the paper.")
    ] = ScaleName.cpu,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed to run instead of the claim's own; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the record and its plot into this directory.")] = None,
    scratch: Annotated[Path, typer.Option(help="Where finished seeds are kept.")] = Path("out/claims"),
    check: Annotated[
        bool, typer.Option("--check", help="Rerun one seed and compare it with the record in --out.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
) -> None:
    """Rerun the claim of a system on this machine and say whether it holds.

    Each seed is saved when it is finished, so an interrupted claim goes on with the next seed.

    Examples:

        mixtura claim self-contrast --scale smoke

        mixtura claim mc-moe --out docs/claims

        mixtura claim mc-moe --check --out docs/claims
    """
    from mixtura.claims import available, load

    names = available() if system == "all" else [system]
    console = Console(highlight=False)
    failed = []
    for name in names:
        described = load(name)
        seeds = tuple(seed) if seed else described.seeds[scale.value]
        if dry_run:
            console.print(f"{name}: {described.sentence} Would run seeds {list(seeds)} at scale {scale.value}.")
            continue
        if check:
            if not _check(console, name, seeds[0], out or RECORDS, scratch):
                failed.append(name)
            continue
        if not _run(console, name, scale.value, seeds, out, scratch):
            failed.append(name)
    if failed and scale is not ScaleName.smoke:
        raise typer.Exit(1)


def _run(console: Console, name: str, scale: Any, seeds: tuple[int, ...], out: Path | None, scratch: Path) -> bool:
    from mixtura.claims import load, run
    from mixtura.claims.gallery import save_record, summary

    record = run(name, scale, seeds, scratch=scratch)
    if out is not None:
        save_record(load(name), record, out)
    console.print(summary(record))
    return bool(record["verdict"] == "holds")


def _check(console: Console, name: str, seed: int, records: Path, scratch: Path) -> bool:
    from mixtura.claims import agrees, load, run
    from mixtura.claims.gallery import load_record

    record = load_record(name, records)
    if record is None:
        raise ValueError(f"{records} holds no record of {name}; make one with: mixtura claim {name} --out {records}")
    figures = run(name, record["scale"], seed, scratch=scratch, resume=False)["seeds"][0]
    differing = agrees(load(name), record, figures)
    console.print(f"{name}, seed {seed}: " + ("agrees with the record" if not differing else "; ".join(differing)))
    return not differing
