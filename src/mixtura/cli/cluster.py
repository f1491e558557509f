"""``cluster``: a table taken apart into clusters, with probabilities, a summary and a picture."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixtura.cli.added_columns import check_places, write_beside
from mixtura.cli.class_column import class_numbers

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np
    import pandas as pd

__all__ = ["add_to"]

SHOWN_COLUMNS = 6  # of the table, in the summary
PATIENCE = 4  # numbers of components tried after the best
CERTIFIED_ROWS = 600  # beyond, a certificate takes minutes
MIXTURE_ALONE = {
    "most": "--max",
    "labels": "--labels",
    "criterion": "--criterion",
    "missing": "--missing",
    "starts": "--starts",
}


class MethodName(StrEnum):
    """How clusters are found."""

    gaussian_mixture = "gaussian-mixture"
    adjusted_sdp = "adjusted-sdp"


class CovarianceName(StrEnum):
    """Kinds of covariance."""

    full = "full"
    tied = "tied"
    diag = "diag"
    spherical = "spherical"


class CriterionName(StrEnum):
    """What chooses the number of clusters."""

    bic = "bic"
    aic = "aic"
    icl = "icl"


@dataclass(frozen=True)
class Job:
    """A table that was read and checked, and what its columns are."""

    table: pd.DataFrame
    X: np.ndarray
    names: list[str]
    y: np.ndarray | None
    classes: list[str]

    @property
    def frame(self) -> pd.DataFrame:
        """X with its names, so that errors and the saved model have them."""
        import pandas as pd

        return pd.DataFrame(self.X, columns=self.names)


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(cluster)


def cluster(
    context: typer.Context,
    table: Annotated[
        Path, typer.Argument(help="CSV, TSV or Parquet file (or folder); the first line names the columns.")
    ],
    components: Annotated[str, typer.Option(help="Number of clusters, or auto.")] = "auto",
    method: Annotated[
        MethodName, typer.Option(help="A mixture by EM, or a semidefinite program that needs no good start.")
    ] = MethodName.gaussian_mixture,
    most: Annotated[int, typer.Option("--max", help="Most clusters that auto tries.")] = 12,
    labels: Annotated[
        str | None, typer.Option(help="Column with the known classes of some rows; empty or -1 where unknown.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Column to leave out, such as a name; repeat for more.")
    ] = None,
    covariance: Annotated[
        CovarianceName | None,
        typer.Option(
            help="Shape of a cluster. Default: full; adjusted-sdp shrinks those of few rows.", show_default=False
        ),
    ] = None,
    criterion: Annotated[CriterionName, typer.Option(help="What chooses the number of clusters.")] = CriterionName.bic,
    missing: Annotated[
        bool, typer.Option("--missing", help="Take empty fields as missing values instead of an error.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Table to write, .csv, .tsv or .parquet. Default: TABLE-clusters.csv, here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .png, .svg or .pdf.")] = None,
    save: Annotated[Path | None, typer.Option(help="Directory to keep the fitted mixture in.")] = None,
    starts: Annotated[int, typer.Option(help="Random starts; the best is kept.")] = 3,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, auto.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Find the clusters of a table: a mixture of Gaussians over its numeric columns.

    Writes the table again with three kinds of columns beside it: the cluster of each row, how probable that cluster is, and
    the probability of each. Units do not matter; a column of text must be ignored or be the labels.

    With `--labels`, rows whose class is known hold their cluster to it, and the other clusters are new groups.

    `--method adjusted-sdp` takes the number of clusters, estimates no centre on the way, and says, up to 600 rows, how far its
    last program can be from the optimum. It takes seconds to minutes; above 2000 rows it clusters samples of 1000.

    Examples:

        mixtura cluster flowers.csv --ignore name --plot flowers.png

        mixtura cluster flowers.csv --components 3 --covariance tied

        mixtura cluster cells.parquet --labels type --components 8 --out typed.parquet

        mixtura cluster survey.csv --missing --criterion icl --max 20

        mixtura cluster flowers.csv --method adjusted-sdp --components 3 --ignore name --plot flowers.png
    """
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    out = out or Path(f"{table.stem}-clusters.csv")
    check_places(table, out, plot, save)
    n = _number(components, most)
    if method is MethodName.adjusted_sdp:
        _check_adjusted(context, n)
    job = _read(table, labels, ignore or [], missing)
    tried = "" if n else f", trying {max(len(job.classes), 1)} to {most} clusters by {criterion.value}"
    known = "" if job.y is None else f", {int((job.y >= 0).sum())} of them labelled with {len(job.classes)} classes"
    say(f"{table}: {len(job.X):,} rows of {len(job.names)} numeric columns{known}{tried}")
    if dry_run:
        say(f"would write {out}" + (f" and {plot}" if plot else "") + (f" and {save}" if save else ""))
        return
    kind = {} if covariance is None else {"covariance": covariance.value}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if method is MethodName.adjusted_sdp:
            model, curve = _fit_adjusted(job, n, {**kind, "device": device, "seed": seed}), None
        else:
            options = {"missing": "expect" if missing else "error", "n_init": starts, "max_iter": 300}
            model, curve = _fit(
                job, n, most, criterion.value, {**kind, **options, "device": device, "random_state": seed}
            )
    for warning in heard if curve is None else []:
        say(f"note: {warning.message}")
    _write(out, job, model)
    if plot is not None:
        from mixtura.cli.cluster_picture import draw

        draw(plot, job.X, job.names, model, curve, _titles(job, model))
    if save is not None:
        model.save(save)
    # A narrow terminal wraps the rows; cells cut to nothing would say nothing.
    Console(highlight=False, width=max(console.width, 150)).print(_summary(job, model))
    if method is MethodName.adjusted_sdp:
        say(_certificate(model))
    if curve is not None and curve.best == curve.n_components[-1] == most:
        say(f"the best number is the largest that was tried; --max {2 * most} would try more")
    written = [str(path) for path in (out, plot, save) if path is not None]
    say(f"{' and '.join(written)} {'is' if len(written) == 1 else 'are'} written")


def _number(components: str, most: int) -> int | None:
    if components == "auto":
        if most < 1:
            raise ValueError(f"--max must be >= 1, got {most}")
        return None
    if not components.isdecimal() or int(components) < 1:
        raise ValueError(f"--components must be auto or a number >= 1, got {components!r}")
    return int(components)


def _check_adjusted(context: typer.Context, n: int | None) -> None:
    """Complain of what the semidefinite program cannot use."""
    if n is None:
        raise ValueError("--method adjusted-sdp needs --components K; to choose K, run --method gaussian-mixture first")
    for name, option in MIXTURE_ALONE.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(
                f"{option} has no effect with --method adjusted-sdp; leave it out, or take gaussian-mixture"
            )


def _read(path: Path, labels: str | None, ignore: list[str], missing: bool) -> Job:
    from mixtura.data.tables import column, numbers, read_table

    table = read_table(path)
    without = [str(column(table, name).name) for name in ignore]
    y, classes = None, list[str]()
    if labels is not None:
        y, classes = class_numbers(column(table, labels))
        without.append(labels)
    try:
        X, names = numbers(table, without=without, missing="allow" if missing else "error")
    except ValueError as error:
        hint = ""
        if "no column of numbers" in str(error):
            hint = " (on the command line: --ignore COLUMN, or --labels COLUMN where it holds classes)"
        elif "missing (NaN)" in str(error):
            hint = "; --missing takes empty fields as missing values"
        raise ValueError(f"{path}: {error}{hint}") from error
    return Job(table, X, names, y, classes)


def _fit(job: Job, n: int | None, most: int, criterion: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from mixtura.density import GaussianMixture, select_components

    if n is not None:
        return GaussianMixture(n, **options).fit(job.frame, job.y), None
    least = max(len(job.classes), 1)
    if most < least:
        raise ValueError(f"--max must be at least the number of classes, {least}, got {most}")
    return select_components(job.frame, range(least, most + 1), criterion, y=job.y, patience=PATIENCE, **options)


def _fit_adjusted(job: Job, n: int | None, options: dict[str, Any]) -> Any:
    from mixtura.density import AdjustedSDPClustering

    return AdjustedSDPClustering(n, certify=len(job.X) <= CERTIFIED_ROWS, **options).fit(job.frame)


def _certificate(model: Any) -> str:
    """How far the answer of the last program is from its optimum, in words."""
    turns = f"{model.n_iter_} {'turn' if model.n_iter_ == 1 else 'turns'} of shapes and program"
    if not math.isfinite(model.gap_):
        return f"{turns}; no certificate above {CERTIFIED_ROWS} rows or for one cluster"
    return f"{turns}; certificate: the program's optimum is at most {max(model.gap_, 0):.2%} lower than this answer"


def _titles(job: Job, model: Any) -> list[str]:
    """Name of each cluster: its class, or its number from 1."""
    known = getattr(model, "component_classes_", [-1] * len(model.weights_))
    return [job.classes[c] if c >= 0 else str(i + 1) for i, c in enumerate(known)]


def _write(out: Path, job: Job, model: Any) -> None:
    titles = _titles(job, model)
    proba = model.predict_proba(job.frame)
    rows = range(len(proba))
    added = {"cluster": [titles[c] for c in model.labels_], "probability": proba[rows, model.labels_].round(6)}
    added |= {f"p({title})": proba[:, c].round(6) for c, title in enumerate(titles)}
    write_beside(out, job.table, added)


def _summary(job: Job, model: Any) -> Table:
    import numpy as np

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cluster")
    for name in ("rows", "share", "sure", *job.names[:SHOWN_COLUMNS]):
        table.add_column(name, justify="right", overflow="fold")
    spread = np.sqrt(np.diagonal(model.gaussians_.full_covariances().numpy(), axis1=1, axis2=2))
    proba = model.predict_proba(job.frame)
    for c, title in enumerate(_titles(job, model)):
        mine = model.labels_ == c
        sure = f"{proba[mine, c].mean():.2f}" if mine.any() else ""
        cells = [f"{model.means_[c, f]:.4g} ± {spread[c, f]:.2g}" for f in range(len(job.names))][:SHOWN_COLUMNS]
        table.add_row(title, f"{int(mine.sum()):,}", f"{model.weights_[c]:.1%}", sure, *cells)
    if len(job.names) > SHOWN_COLUMNS:
        table.caption = f"and {len(job.names) - SHOWN_COLUMNS} more columns"
    return table
