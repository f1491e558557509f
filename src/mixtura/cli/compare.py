"""``mixtura compare``: checkpoints side by side."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(compare)


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="REFERENCE OTHER...", help="Checkpoints, directories or hub ids; the first is the reference."
        ),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file or directory of one domain; may be repeated. Default: code, prose, arithmetic."),
    ] = None,
    report: Annotated[
        Path, typer.Option(help="HTML file to write; a JSON file of the same name stands beside it.")
    ] = Path("comparison.html"),
    plot: Annotated[Path | None, typer.Option(help="Also write the picture alone: .png, .svg or .pdf.")] = None,
    samples: Annotated[int, typer.Option(help="Blocks a domain.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens a block.")] = 256,
    context: Annotated[int, typer.Option(help="Tokens of the prompt at which speed and cache are measured.")] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens written for the speed.")] = 32,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and stop.")] = False,
) -> None:
    """Measure checkpoints side by side: quality on the same tokens, bytes on disk and in memory, speed.

    The first is what the others are compared with; all must share its tokenizer. Use text that none of them was trained or
    calibrated on. One checkpoint is in memory at a time. Differences of loss come with their 95 % interval, which is that of
    pairs: a hundredth of a nat shows.

    Examples:

        mixtura compare SmolLM2-135M out/small

        mixtura compare base out/w4 out/w44 --text code/ --text letters/ --report w4.html --plot w4.png

        mixtura compare base out/spans --context 4096 --tokens 64
    """
    from mixtura.cli import work

    console = Console(highlight=False)
    table = work.compare(
        sources,
        text,
        report,
        plot,
        {"samples": samples, "length": length, "context": context, "new_tokens": tokens},
        device=device,
        dry_run=dry_run,
        say=lambda line: console.print(line, soft_wrap=True, markup=False),
    )
    if table is not None:
        # A narrow terminal wraps the rows; cells cut to nothing would say nothing.
        Console(highlight=False, width=max(console.width, 150)).print(table)
