"""``mixtura convert``: a dense checkpoint into a sparse one of equal cost."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["add_to"]


class ConvertMethod(StrEnum):
    """Ways to convert a model."""

    sparse_ift = "sparse-ift"


class KindName(StrEnum):
    """Shapes of a sparse layer of equal cost."""

    wide = "wide"
    parallel = "parallel"
    factorized = "factorized"
    doped = "doped"


class MatchName(StrEnum):
    """What is held equal."""

    network = "network"
    layer = "layer"


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(convert)


def convert(
    source: Annotated[str, typer.Argument(help="Dense checkpoint: a directory, or an id on the Hugging Face hub.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    method: Annotated[ConvertMethod, typer.Option(help="How to convert.")] = ConvertMethod.sparse_ift,
    kind: Annotated[KindName, typer.Option(help="Shape of the sparse layers.")] = KindName.wide,
    sparsity: Annotated[float, typer.Option(help="From 0 to below 1: how much larger and how sparse.")] = 0.5,
    match: Annotated[
        MatchName,
        typer.Option(help="Hold the network's multiply-adds equal, or give every layer the density 1 - sparsity."),
    ] = MatchName.network,
    erk: Annotated[bool, typer.Option("--erk", help="Denser where layers are small, instead of one density.")] = False,
    groups: Annotated[
        str,
        typer.Option(
            help="Masks with N active of every M inputs, as 2:4, for hardware that skips such zeros; with --match layer and "
            "--sparsity 1 - N/M."
        ),
    ] = "",
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave dense, as *.o_proj; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the text for which costs are equal.")] = 128,
    multiple_of: Annotated[int, typer.Option(help="Hidden units of a wide model are a multiple of this.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Picture of the cost of every layer: .png, .svg or .pdf.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of new weights and masks.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and stop.")] = False,
) -> None:
    """Turn a dense checkpoint into a sparse one that takes the same multiply-adds, to be trained.

    `wide` builds the model anew, 1 / sqrt(1 - sparsity) times as wide; `parallel` and `factorized` start their layers anew;
    `doped` keeps the largest weights and a low-rank part of the rest. Then `mixtura train` trains it and moves the masks, and
    the number of active weights stays. On hardware that cannot skip zeros the masks save nothing; they are simulated.

    Examples:

        mixtura convert base out/wide --kind wide --sparsity 0.5 --plot wide.png

        mixtura convert base out/parallel --kind parallel --sparsity 0.75

        mixtura convert base out/doped --kind doped --sparsity 0.9 --skip "*.o_proj"

        mixtura convert base out/groups --kind doped --groups 2:4 --match layer

        mixtura train out/wide --text notes/ --masks rigl --steps 2000
    """
    from mixtura.cli import work

    work.convert(
        source,
        destination,
        {
            "kind": kind.value,
            "sparsity": sparsity,
            "match": match.value,
            "distribution": "erk" if erk else "uniform",
            "skip": tuple(skip or ()),
            "n_m": _groups(groups),
        },
        length=length,
        multiple_of=multiple_of,
        plot=plot,
        seed=seed,
        device=device,
        dry_run=dry_run,
        command=shlex.join(["mixtura", *sys.argv[1:]]),
        say=lambda line: Console(highlight=False).print(line, soft_wrap=True, markup=False),
    )


def _groups(text: str) -> tuple[int, int]:
    n, _, m = (text or "0:0").partition(":")
    if not (n.isdecimal() and m.isdecimal()):
        raise ValueError(f"--groups must be two numbers as in 2:4, got {text!r}")
    return int(n), int(m)
