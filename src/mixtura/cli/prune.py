"""``mixtura prune``: fewer experts, those that a text hardly visits taken out."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["add_to"]


class PolicyName(StrEnum):
    """How the experts that stay are chosen."""

    usage = "usage"
    random = "random"


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(prune)


def prune(
    source: Annotated[str, typer.Argument(help="Mixture of experts: a directory, or an id on the Hugging Face hub.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    experts: Annotated[
        str, typer.Option(help="Experts of each layer that stay: a share with a point in it (0.5), or a number (4).")
    ] = "0.5",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text of the use at hand, on which visits are counted: a file or directory, may be repeated. Default: Python's "
            "own sources, reference and sums. For the encoder-decoder a folder of pairs, or the word debian."
        ),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Count on this target language alone (encoder-decoder); may be repeated.")
    ] = None,
    policy: Annotated[PolicyName, typer.Option(help="Who stays: the most visited, or any.")] = PolicyName.usage,
    samples: Annotated[
        int, typer.Option(help="Blocks of text a domain (batches of 16 rows for the encoder-decoder).")
    ] = 32,
    length: Annotated[int, typer.Option(help="Tokens a block.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and stop.")] = False,
) -> None:
    """Take out the experts that a text hardly visits.

    Visits are counted on the text, and of every layer the most visited experts stay, with their rows of the gate. What was
    computed by the others goes to the best of those that are left, so the text should be of the use that the model is for. The
    result is of the same family and loads as before: Mixtral, OLMoE, Qwen-MoE, DeepSeek-V2, mixtura's own, and others with
    stacked experts. Training it a little afterwards (`mixtura train`) gets back a part of what was lost.

    Examples:

        mixtura prune out/moe out/half --experts 0.5 --text code/

        mixtura prune out/moe out/four --experts 4 --policy random

        mixtura prune out/translate out/german --experts 4 --text debian --language de
    """
    from mixtura.cli.prune_work import run

    run(
        source,
        destination,
        text,
        experts=experts,
        languages=language or [],
        policy=policy.value,
        samples=samples,
        length=length,
        seed=seed,
        device=device,
        dry_run=dry_run,
        command=shlex.join(["mixtura", *sys.argv[1:]]),
        say=lambda said: Console(highlight=False).print(said, soft_wrap=True, markup=False),
    )
