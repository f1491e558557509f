"""``search``: an index of texts, questions to it, and the training and judging of what searches."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mixtura.cli.plain import plain_console

__all__ = ["add_to"]

INDEX = Path("search-index")


class Ways(StrEnum):
    """What a search goes by."""

    both = "both"
    meaning = "meaning"
    words = "words"


class Pairs(StrEnum):
    """What an encoder learns from."""

    independent = "independent"
    cloze = "cloze"
    identical = "identical"


class _Questions(TyperGroup):
    """A group in which whatever is no command is a question."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["ask", *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_Questions,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Search texts by meaning and by words.\n\n"
    "**mixtura search index DIR** makes an index, **mixtura search 'question'** asks it. The encoder that comes along is "
    "small, English, and learned from unlabelled text alone; **train** makes one of your own texts, **eval** judges one.\n\n"
    "Examples:\n\n"
    "    mixtura search index notes/\n\n"
    "    mixtura search 'how do I tune a lute'\n\n"
    "    mixtura search ask index          # a question that is also the name of a command",
)


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(group, name="search")


@group.command()
def index(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders of texts, sets in BEIR's layout (corpus.jsonl), or files.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the index; made, or brought up to date.")] = INDEX,
    model: Annotated[
        str | None,
        typer.Option(help="Encoder: a directory or a name on the hub. Default: the small one that comes along."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep documents that are no longer in their source.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be read, and stop.")] = False,
) -> None:
    """Make an index of texts, or bring one up to date: only what is new or changed is read.

    Every file of UTF-8 or UTF-16 text is a document, and so is every line of a corpus.jsonl; links to folders are not followed.
    Long ones are cut into passages. Memory does not grow with the number or the size of the documents. Interrupt it as you
    like: the same command goes on from there.

    Started by torchrun, several processes encode what one of them reads, and *--device cuda* gives each a GPU of its own; the
    index is that of one process. It pays for transformers; the small encoder is quicker than what reads for it.

    Examples:

        mixtura search index notes/ mail/

        mixtura search index /usr/share/doc --out doc-index

        mixtura search index scifact/ --model facebook/contriever --out scifact-index

        torchrun --nproc-per-node 2 -m mixtura search index scifact/ --model facebook/contriever --out scifact-index
    """
    from mixtura.cli import search_work

    search_work.make_index(sources, out, model, prune=not keep, device=device, dry_run=dry_run, say=_say)


@group.command()
def ask(
    question: Annotated[list[str], typer.Argument(help="The question; quotes are not needed.")],
    index: Annotated[Path, typer.Option(help="Directory of the index.")] = INDEX,
    k: Annotated[int, typer.Option("--results", "-k", help="Documents to show.")] = 5,
    by: Annotated[Ways, typer.Option(help="Meaning (vectors), words (BM25), or both.")] = Ways.both,
    model: Annotated[str | None, typer.Option(help="Encoder of the index. Default: the one it was made with.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print the results as JSON lines, passages whole.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
) -> None:
    """Ask an index; the word *ask* may be left out.

    Examples:

        mixtura search "which package plays old video games"

        mixtura search tuning a lute -k 3 --by meaning

        mixtura search "disk is full" --index doc-index --json
    """
    from mixtura.cli import search_work

    search_work.ask(" ".join(question), index, k, by.value, model, as_json=json_out, device=device, say=_say)


@group.command()
def train(
    corpora: Annotated[
        list[str],
        typer.Argument(
            help="Folders of texts, BEIR sets or files; or names: debian, debian:da, glosses, dictionary, prose, code."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write the encoder to.")] = Path("encoder"),
    steps: Annotated[int, typer.Option(help="Steps of the training.")] = 1000,
    width: Annotated[int, typer.Option(help="Width of the vectors.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers of a transformer; 0 averages token vectors.")] = 0,
    vocab: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 16_000,
    batch: Annotated[int, typer.Option(help="Pairs a step.")] = 256,
    queue: Annotated[int, typer.Option(help="Keys that serve as negatives.")] = 8192,
    lr: Annotated[float, typer.Option(help="Peak learning rate; for layers > 0 rather 0.001.")] = 2e-2,
    pairs: Annotated[Pairs, typer.Option(help="What is drawn together.")] = Pairs.independent,
    half: Annotated[bool, typer.Option("--half", help="Store float16, half the size.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count the text and stop.")] = False,
) -> None:
    """Train an encoder from nothing on plain texts: no questions, no labels.

    Two random crops of one document are drawn together, crops of other documents apart. Several corpora are sampled alike,
    whatever their size, and every pair is of one corpus: give each language as a corpus of its own. An interrupted training
    goes on with the same command.

    Examples:

        mixtura search train notes/ --out my-encoder

        mixtura search train debian debian:da debian:fr --vocab 24000 --out three-languages

        mixtura search train debian glosses prose --vocab 12000 --width 128 --steps 3000 --half --out default
    """
    from mixtura.cli import search_work

    options: dict[str, Any] = {
        "steps": steps,
        "width": width,
        "layers": layers,
        "vocab": vocab,
        "batch": batch,
        "queue": queue,
        "lr": lr,
    }
    options |= {"pairs": pairs.value, "half": half, "seed": seed}
    search_work.train(corpora, out, options, device=device, dry_run=dry_run, command=_command(), say=_say)


@group.command(name="eval")
def evaluate(
    source: Annotated[str, typer.Argument(help="A set in BEIR's layout, or debian (package descriptions).")],
    split: Annotated[str, typer.Option(help="Which qrels/SPLIT.tsv to judge by.")] = "test",
    fuse: Annotated[str | None, typer.Option(help="Also search by words and by both: bm25.")] = None,
    weight: Annotated[float, typer.Option(help="Weight of the vectors in the fusion, 0 to 1.")] = 0.3,
    model: Annotated[str | None, typer.Option(help="Encoder: a directory or a name on the hub.")] = None,
    questions: Annotated[int, typer.Option(help="Questions of debian, drawn by the seed.")] = 2000,
    out: Annotated[Path, typer.Option(help="Figures to write, .json.")] = Path("search-eval.json"),
    plot: Annotated[Path, typer.Option(help="Picture to write, .png, .svg or .pdf.")] = Path("search-eval.png"),
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Which questions of debian.")] = 0,
) -> None:
    """Judge a search on questions with known answers: nDCG@10, MRR@10, recall at 1, 10 and 100.

    Figures are those of trec_eval. With *--fuse bm25* (needs mixtura[search]) word matching and the fusion of both stand
    beside, with the probability that the fusion is no better than words.

    Examples:

        mixtura search eval scifact/ --fuse bm25

        mixtura search eval scifact/ --model facebook/contriever

        mixtura search eval debian --fuse bm25 --plot packages.png
    """
    from mixtura.cli import search_work

    table = search_work.judge(
        source, out, plot, split=split, fuse=fuse, weight=weight, model=model, questions=questions, device=device, seed=seed,
        say=_say,
    )  # fmt: skip
    plain_console().print(table)
    _say(f"{out} and {plot} are written")


def _say(line: str) -> None:
    plain_console().print(line, soft_wrap=True, markup=False)


def _command() -> str:
    return "mixtura " + " ".join(sys.argv[1:])
