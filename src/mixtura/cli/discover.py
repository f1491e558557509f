"""``discover``: a table of which some rows have a class, and the classes of all rows, named and unnamed ones."""

from __future__ import annotations

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

ARRAYS = (".npy", ".npz")


class RuleName(StrEnum):
    """How splits and merges are judged."""

    calibrated = "calibrated"
    paper = "paper"


@dataclass(frozen=True)
class Job:
    """What was read: the table to write again, the numbers, and the known classes."""

    table: pd.DataFrame
    X: np.ndarray
    y: np.ndarray
    classes: list[str]
    embeddings: bool


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(discover)


def discover(
    table: Annotated[Path, typer.Argument(help="CSV, TSV or Parquet file, or embeddings: .npz, .npy.")],
    labels: Annotated[
        str,
        typer.Option(
            help="Column with the known classes, empty or -1 where unknown; an array of the .npz; a .npy file."
        ),
    ],
    ignore: Annotated[
        list[str] | None, typer.Option(help="Column to leave out, such as a name; repeat for more.")
    ] = None,
    start: Annotated[
        str, typer.Option(help="New classes to start from, or auto; what is found hardly depends on it.")
    ] = "auto",
    most: Annotated[int | None, typer.Option("--max", help="Most new classes.", show_default=False)] = None,
    pca: Annotated[int, typer.Option(help="Principal components to look in; 0 keeps all columns.")] = 16,
    rule: Annotated[
        RuleName, typer.Option(help="Judged as known classes suggest, or as published.")
    ] = RuleName.calibrated,
    raw: Annotated[
        bool, typer.Option("--raw", help="Keep the columns' units; else each column has unit variance.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Table to write, .csv, .tsv or .parquet. Default: TABLE-classes.csv, here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .png, .svg or .pdf.")] = None,
    save: Annotated[Path | None, typer.Option(help="Directory to keep the fitted model in.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, auto.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Find the classes of all rows where only some rows of some classes are labelled.

    Nobody says how many classes there are: clusters split and merge until their number stays, and how different two clusters
    must be is learned from the classes you named. Rows you labelled keep their class; new classes are called new 1, new 2, ...

    Writes the table again with the class of each row and how probable it is. Of embeddings (.npy, .npz) it writes the number of
    the row, the label, the class and the probability; an .npz holds one matrix, and the labels in another array.

    Examples:

        mixtura discover flowers.csv --labels species --plot flowers.png

        mixtura discover cells.parquet --labels type --ignore barcode --max 20 --out typed.parquet

        mixtura discover embeddings.npz --labels label --plot classes.png

        mixtura discover embeddings.npy --labels labels.npy --out classes.csv
    """
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    out = out or Path(f"{table.stem}-classes.csv")
    check_places(table, out, plot, save)
    job = _read(table, labels, ignore or [])
    options = _options(start, most, pca, rule)
    told = int((job.y >= 0).sum())
    say(
        f"{table}: {len(job.X):,} rows of {job.X.shape[1]} columns, {told:,} of them labelled with {len(job.classes)} classes"
    )
    if dry_run:
        say(f"would write {out}" + (f" and {plot}" if plot else "") + (f" and {save}" if save else ""))
        return
    from mixtura.density import CategoryDiscovery

    model = CategoryDiscovery(**options, device=device, seed=seed)
    if raw or job.embeddings:
        model.fit(job.X, job.y)
    else:
        _fit_standardised(model, job.X, job.y)
    titles = [*job.classes, *(f"new {i + 1}" for i in range(model.n_novel_))]
    component = _components(model)
    proba = model.predict_proba(job.X)
    rows = range(len(proba))
    write_beside(
        out, job.table, {"class": [titles[c] for c in component], "probability": proba[rows, component].round(6)}
    )
    if plot is not None:
        from mixtura.cli.discover_picture import draw

        draw(plot, model.reduce(job.X), model, component, titles)
    if save is not None:
        model.save(save)
    console.print(_summary(job, model, proba, titles))
    say(f"{model.n_classes_} classes, {model.n_novel_} of them new; temper {model.temper_:.3g}")
    if not model.converged_:
        say("note: the last round still moved clusters; another --seed may find another number")
    written = [str(path) for path in (out, plot, save) if path is not None]
    say(f"{' and '.join(written)} {'is' if len(written) == 1 else 'are'} written")


def _fit_standardised(model: Any, X: np.ndarray, y: np.ndarray) -> None:
    """Fit to columns of mean 0 and variance 1; the model itself takes the columns as they are, and so does a saved one."""
    centre, spread = X.mean(0), X.std(0)
    spread[spread <= 0] = 1.0
    model.fit((X - centre) / spread, y)
    model.mean_ = centre + spread * model.mean_
    model.components_ = model.components_ / spread
    model.prototypes_ = centre + spread * model.prototypes_


def _options(start: str, most: int | None, pca: int, rule: RuleName) -> dict[str, Any]:
    if start != "auto" and not start.isdecimal():
        raise ValueError(f"--start must be auto or a number >= 0, got {start!r}")
    if most is not None and most < 0:
        raise ValueError(f"--max must be >= 0, got {most}")
    if pca < 0:
        raise ValueError(f"--pca must be >= 0, got {pca}")
    return {
        "initial_novel": start if start == "auto" else int(start),
        "max_novel": most,
        "pca": pca or None,
        "rule": rule.value,
    }


def _read(path: Path, labels: str, ignore: list[str]) -> Job:
    from mixtura.data.tables import column, numbers, read_table

    if path.suffix.lower() in ARRAYS:
        if ignore:
            raise ValueError(f"--ignore names columns, and {path} has none; leave it out")
        return _read_arrays(path, labels)
    table = read_table(path)
    y, classes = class_numbers(column(table, labels))
    without = [str(column(table, name).name) for name in ignore]
    try:
        X, _ = numbers(table, without=[*without, labels])
    except ValueError as error:
        hint = " (on the command line: --ignore COLUMN)" if "no column of numbers" in str(error) else ""
        raise ValueError(f"{path}: {error}{hint}") from error
    return Job(table, X, y, classes, False)


def _read_arrays(path: Path, labels: str) -> Job:
    """Embeddings and labels from NumPy files; nothing pickled is read."""
    import numpy as np
    import pandas as pd

    if path.suffix.lower() == ".npy":
        matrix, values = _load(path), _load(Path(labels))
    else:
        arrays = _load(path)
        if labels not in arrays:
            raise ValueError(f"{path} has no array {labels!r}; it has {', '.join(map(repr, arrays))}")
        wide = [name for name in arrays if name != labels and arrays[name].ndim == 2]
        if len(wide) != 1:
            raise ValueError(
                f"{path} must hold one matrix beside {labels!r}, got {len(wide)}: {', '.join(wide) or 'none'}"
            )
        matrix, values = arrays[wide[0]], arrays[labels]
    if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        raise ValueError(f"{path} must hold a matrix of numbers, got {matrix.dtype} of shape {matrix.shape}")
    if values.shape != (len(matrix),):
        raise ValueError(f"labels {labels} must have shape ({len(matrix)},), one a row, got {values.shape}")
    y, classes = class_numbers(pd.Series(values, name=labels))
    named = [classes[c] if c >= 0 else "" for c in y]
    table = pd.DataFrame({"row": np.arange(len(matrix)), "label": named})
    return Job(table, matrix.astype(np.float64, copy=False), y, classes, True)


def _load(path: Path) -> Any:
    import zipfile

    import numpy as np

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        found = np.load(path, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no NumPy file of plain arrays ({error})") from error


def _components(model: Any) -> np.ndarray:
    """Number of each row's class among the model's, shape (N,)."""
    import numpy as np

    return np.searchsorted(model.classes_, model.labels_)


def _summary(job: Job, model: Any, proba: np.ndarray, titles: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    for name in ("rows", "share", "labelled", "sure", "log H of a split"):
        table.add_column(name, justify="right")
    component = _components(model)
    for c, title in enumerate(titles):
        mine = component == c
        cells = [f"{int(mine.sum()):,}", f"{mine.mean():.1%}", f"{int((job.y[mine] >= 0).sum()):,}"]
        table.add_row(title, *cells, f"{proba[mine, c].mean():.2f}", f"{model.split_scores_[c]:.0f}")
    return table
