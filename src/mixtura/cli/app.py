"""The application: its commands, and what a person sees when one of them goes wrong."""

import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mixtura import __version__
from mixtura.cli import (
    claims,
    classify,
    cluster,
    compare,
    convert,
    demo,
    discover,
    distill,
    explain,
    lm,
    outliers,
    plan,
    prune,
    regress,
    search,
    separate,
    solve_pde,
    unmix,
)

__all__ = ["app", "main"]

# Which extra brings a package; what is not here is in the language models'.
EXTRAS = {
    "PIL": "vision",
    "Stemmer": "search",
    "bm25s": "search",
    "chess": "chess",
    "pandas": "density",
    "pyarrow": "density",
    "sacrebleu": "translation",
    "sklearn": "density",
    "soundfile": "audio",
    "spectral": "vision",
    "tokenizers": "search",
}

app = typer.Typer(
    name="mixtura",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Everything that is mixed, and everything that is being taken apart.\n\n"
    "Start with **mixtura demo**: a real dense language model becomes a mixture of experts, is trained, compressed "
    "and generates. Every command has examples in its `--help`.",
)
demo.add_to(app)
lm.add_to(app)
convert.add_to(app)
prune.add_to(app)
distill.add_to(app)
explain.add_to(app)
compare.add_to(app)
cluster.add_to(app)
discover.add_to(app)
regress.add_to(app)
solve_pde.add_to(app)
classify.add_to(app)
unmix.add_to(app)
outliers.add_to(app)
plan.add_to(app)
separate.add_to(app)
search.add_to(app)
claims.add_to(app)


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what happens inside.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    """Options of every command."""
    if version:
        typer.echo(f"mixtura {__version__}")
        raise typer.Exit
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s")


def main() -> None:
    """Run the command line; an expected error is one line and exit status 1, an interrupt 130.

    ``MIXTURA_DEBUG=1`` shows the traceback instead.
    """
    # Bars and warnings of other libraries would interleave with ours; a user's own setting wins.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Large tensors on large pages: a training step of 135 M parameters took 17 % less time for it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.stderr.isatty():
        os.environ.setdefault("MIXTURA_PROGRESS", "1")
    try:
        app()
    except KeyboardInterrupt:
        _say("interrupted; what was finished is kept, and the same command goes on from there")
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("MIXTURA_DEBUG") == "1":
            raise
        _say(_in_words(error))
        sys.exit(1)


def _in_words(error: BaseException) -> str:
    if isinstance(error, ImportError) and error.name:
        extra = EXTRAS.get(error.name.partition(".")[0], "lm")
        return f"this command needs the package {error.name}; get it with: pip install 'mixtura[{extra}]'"
    if isinstance(error, OSError) and error.errno == 28:
        return f"the disk is full ({error.filename or 'while writing'}); nothing that stood there before was changed"
    return str(error) or type(error).__name__


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(
        # Escaped: a message that names [[term]] or [boundary] is no markup.
        f"[red]error[/red] {escape(text)}" if text else "error",
        markup=True,
        soft_wrap=True,
    )
