"""``regress``: one column of a table predicted from the others, with a band that says how sure it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixtura.cli import regress_gated, regress_pretrained
from mixtura.cli.added_columns import check_places, write_beside
from mixtura.cli.regress_gated import GateName

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np
    import pandas as pd

__all__ = ["add_to"]

MOST_ROWS = 20_000  # a Gram matrix of 3.2 GB, and a few of that size beside it


class MethodName(StrEnum):
    """Ways to regress."""

    scale_mixture = "scale-mixture"
    gated = "gated"
    pretraining_advantage = "pretraining-advantage"


class PriorName(StrEnum):
    """Priors of the scale."""

    inverse_gamma = "inverse-gamma"
    burr = "burr"
    fixed = "fixed"


class KernelName(StrEnum):
    """Activations of the wide network."""

    relu = "relu"
    erf = "erf"


@dataclass(frozen=True)
class Job:
    """A table that was read and checked.

    Attributes:
        table: as read, N rows.
        X: features, shape (N, F).
        names: of the features.
        y: target, shape (N,), NaN where empty.
    """

    table: pd.DataFrame
    X: np.ndarray
    names: list[str]
    y: np.ndarray


@dataclass(frozen=True)
class Held:
    """What a model said of rows that it had not seen.

    Attributes:
        location, low, high: centre and band, shape (N,), NaN for rows that were not asked about.
        log_density: of the observed targets, shape (N,).
    """

    location: np.ndarray
    low: np.ndarray
    high: np.ndarray
    log_density: np.ndarray


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(regress)


def regress(
    context: typer.Context,
    table: Annotated[
        Path, typer.Argument(help="CSV, TSV or Parquet file (or folder); the first line names the columns.")
    ],
    target: Annotated[str, typer.Option(help="Column to predict; rows where it is empty are predicted.")],
    ignore: Annotated[
        list[str] | None, typer.Option(help="Column to leave out, such as a name; repeat for more.")
    ] = None,
    method: Annotated[
        MethodName | None, typer.Option(help="How to regress. Default: gated with --gate, else scale-mixture.")
    ] = None,
    gate: Annotated[GateName | None, typer.Option(help="Gate of the gated method.")] = None,
    experts: Annotated[int, typer.Option(help="Lines of the gated method.")] = 3,
    active: Annotated[
        int | None, typer.Option(help="Lines that answer at an input, for --gate topk. Default: 1.")
    ] = None,
    activation: Annotated[str | None, typer.Option(help="tanh, sigmoid or another, for --gate activation.")] = None,
    unlabeled: Annotated[
        Path | None,
        typer.Option(help="Table with the same columns and no target, for --method pretraining-advantage."),
    ] = None,
    factors: Annotated[
        int | None, typer.Option(help="Factors of that method. Default: as many as stand out of noise.")
    ] = None,
    prior: Annotated[PriorName, typer.Option(help="What is assumed of the scale.")] = PriorName.inverse_gamma,
    kernel: Annotated[KernelName, typer.Option(help="Activation of the wide network.")] = KernelName.relu,
    depth: Annotated[int, typer.Option(help="Hidden layers of the wide network.")] = 2,
    folds: Annotated[int, typer.Option(help="Parts of the cross-validation; each is predicted by the others.")] = 5,
    band: Annotated[float, typer.Option(help="Share of targets that the band should hold.")] = 0.95,
    out: Annotated[
        Path | None, typer.Option(help="Table to write, .csv, .tsv or .parquet. Default: TABLE-predicted.csv, here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .png, .svg or .pdf.")] = None,
    starts: Annotated[int, typer.Option(help="Starts of the search for kernel and noise; the best is kept.")] = 2,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, auto.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Predict a column of a table from its other numeric columns, with error bars that follow the data.

    Writes the table again with the prediction and its band beside it. A row whose target is known is predicted by a model that
    did not see it (cross-validation); a row whose target is empty by one that saw all others. Units do not matter.

    Three methods. **scale-mixture** is one curve whose band follows the data, for few rows, compared with a plain process.
    **gated** is several lines, each in charge where a gate says so, compared with one line; `--gate topk` cuts the inputs into
    regions, the others blend. It names each line and adds the likeliest expert of every row. **pretraining-advantage** is for few
    targets and many rows without one (`--unlabeled`, or empty targets): a line in factors that all rows teach, compared with
    ridge on the columns, and a report that says which of the two to trust here.

    The summary gives NLL (nats a target, lower is better), RMSE, and the share of targets inside the band, all held out.

    Examples:

        mixtura regress cars.csv --target mpg --plot cars.png

        mixtura regress cars.csv --target mpg --ignore name --folds 10 --band 0.8

        mixtura regress cars.csv --target mpg --ignore name --gate topk --experts 2 --plot lines.png

        mixtura regress cars.csv --target mpg --ignore name --gate activation --activation sigmoid --experts 3

        mixtura regress few.csv --target y --method pretraining-advantage --unlabeled many.csv

        mixtura regress yield.parquet --target tons --prior burr --kernel erf --out filled.parquet
    """
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    out = out or Path(f"{table.stem}-predicted.csv")
    check_places(table, out, plot)
    _check(depth, folds, band, starts)
    method = _method(context, method, gate)
    job = _read(table, target, ignore or [], MOST_ROWS if method is MethodName.scale_mixture else None)
    n_known = int((job.y == job.y).sum())
    empty = f", {len(job.y) - n_known:,} of them without {target}" if n_known < len(job.y) else ""
    folds = min(folds, n_known)
    if method is MethodName.gated:
        gate = gate or GateName.softmax
        makers = regress_gated.makers(gate, experts, active, activation, device, seed)
        ask, what = regress_gated.ask, f"{experts} lines, {gate.value} gate, and one line, {folds} folds"
    elif method is MethodName.pretraining_advantage:
        more = regress_pretrained.unlabelled_rows(unlabeled, job.X[job.y != job.y], job.names)
        makers = regress_pretrained.makers(more, factors, seed)
        ask, what = regress_pretrained.ask, f"factors of {len(more):,} rows without {target}, and ridge, {folds} folds"
    else:
        options = {"kernel": kernel.value, "depth": depth, "n_restarts": starts - 1, "device": device, "seed": seed}
        makers = _processes({method.value: prior.value, "plain process": "fixed"}, options)
        # The search keeps the recursion for its gradients: about six matrices a layer.
        gigabytes = n_known**2 * 8 * (6 * depth + 4) / 1e9
        memory = f"about {max(gigabytes, 0.01):.2f} GB of memory"
        ask, what = _ask, f"{method.value} and a plain process, {folds} folds, {memory}"
    say(f"{table}: {len(job.y):,} rows of {len(job.names)} numeric columns{empty}; {what}")
    if dry_run:
        say(f"would write {out}" + (f" and {plot}" if plot else ""))
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        held, models = _held_out(job, makers, ask, folds, band, seed)
    for message in dict.fromkeys(str(warning.message) for warning in heard if warning.category is UserWarning):
        say(f"note: {message}")
    ours = held[next(iter(makers))]
    columns = {"predicted": ours.location, "low": ours.low, "high": ours.high}
    added = {name: _digits(values) for name, values in columns.items()}
    shown = Console(highlight=False, width=max(console.width, 100))
    if method is MethodName.gated:
        model, known = next(iter(models.values())), job.y == job.y
        added |= {name: _digits(values) for name, values in regress_gated.added_columns(model, job.X).items()}
        shown.print(regress_gated.experts_table(model, job.X[known], job.names))
    elif method is MethodName.pretraining_advantage:
        shown.print(regress_pretrained.report(more, job.X, job.y, factors, folds, seed), markup=False)
    write_beside(out, job.table, added)
    if plot is not None and method is MethodName.pretraining_advantage:
        regress_pretrained.draw(plot, job.y, held, target, band)
    elif plot is not None and method is MethodName.gated:
        regress_gated.draw(plot, model, job.X[known], job.y[known], job.names, target, band)
    elif plot is not None:
        from mixtura.cli.regress_picture import draw

        draw(plot, job, target, held, models, band)
    shown.print(_summary(job.y, held, band))
    written = [str(path) for path in (out, plot) if path is not None]
    say(f"{' and '.join(written)} {'is' if len(written) == 1 else 'are'} written")


def _method(context: typer.Context, method: MethodName | None, gate: GateName | None) -> MethodName:
    """The method that was asked for, by name or by a gate; an option of the other one is an error."""
    found = method or (MethodName.gated if gate is not None else MethodName.scale_mixture)
    own = {
        MethodName.scale_mixture: ("prior", "kernel", "depth", "starts"),
        MethodName.gated: ("gate", "experts", "active", "activation"),
        MethodName.pretraining_advantage: ("unlabeled", "factors"),
    }
    for other in own:
        for name in own[other] if other is not found else ():
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                hint = (
                    "; choose one with --gate" if name in ("experts", "active", "activation") and gate is None else ""
                )
                raise ValueError(f"--{name} is for --method {other.value}, not for {found.value}{hint}")
    return found


def _check(depth: int, folds: int, band: float, starts: int) -> None:
    if folds < 2:
        raise ValueError(f"--folds must be >= 2, got {folds}")
    if not 0 < band < 1:
        raise ValueError(f"--band is a share and must be between 0 and 1, got {band}")
    for name, value in (("depth", depth), ("starts", starts)):
        if value < 1:
            raise ValueError(f"--{name} must be >= 1, got {value}")


def _read(path: Path, target: str, ignore: list[str], most: int | None) -> Job:
    import numpy as np

    from mixtura.data.tables import column, numbers, read_table

    table = read_table(path)
    name = str(column(table, target).name)
    without = [str(column(table, other).name) for other in ignore]
    if name in without:
        raise ValueError(f"--ignore {name} is also the target")
    y = numbers(table[[name]], missing="allow")[0][:, 0]
    known = int(np.isfinite(y).sum())
    if known < 4:
        raise ValueError(f"{path}: column {name!r} has {known} values; cross-validation needs at least 4")
    if most is not None and known > most:
        raise ValueError(
            f"{path} has {known:,} rows with {name!r} and an exact process takes at most {most:,}; draw as many "
            "at random, or take lines instead: --gate softmax"
        )
    try:
        X, names = numbers(table, without=[name, *without])
    except ValueError as error:
        hint = " (on the command line: --ignore COLUMN)" if "no column of numbers" in str(error) else ""
        raise ValueError(f"{path}: {error}{hint}") from error
    return Job(table, X, names, y)


def _processes(rivals: dict[str, str], options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """How to make each rival, from the name of its prior; features are scaled by the training rows alone."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from mixtura.density import ScaleMixtureRegressor

    return {
        name: lambda prior=prior: make_pipeline(  # type: ignore[misc]
            StandardScaler(), ScaleMixtureRegressor(scale_prior=prior, **options)
        )
        for name, prior in rivals.items()
    }


def _ask(model: Any, X: np.ndarray, y: np.ndarray, band: float) -> tuple[np.ndarray, ...]:
    """Prediction, ends of the band, and log density of the targets."""
    found = model[-1].predict_distribution(model[0].transform(X))
    return found.location, *found.interval(band), found.log_prob(y)


def _held_out(
    job: Job, makers: dict[str, Callable[[], Any]], ask: Callable[..., Any], folds: int, band: float, seed: int
) -> tuple[dict[str, Held], dict[str, Any]]:
    """What each rival says of rows that it did not see, and each rival fitted to all rows with a target."""
    import numpy as np

    from mixtura.core.progress import bar

    known = np.flatnonzero(np.isfinite(job.y))
    parts = np.array_split(np.random.default_rng(seed).permutation(known), folds)
    rounds = [(np.setdiff1d(known, part), part) for part in parts]
    rounds.append((known, np.flatnonzero(~np.isfinite(job.y))))
    held = {name: Held(*(np.full(len(job.y), np.nan) for _ in range(4))) for name in makers}
    models = {}
    with bar(desc="regress", unit="fit", total=len(rounds) * len(makers)) as shown:
        for train, asked in rounds:
            for name, make in makers.items():
                model = models[name] = make().fit(job.X[train], job.y[train])
                if len(asked):
                    answers = ask(model, job.X[asked], job.y[asked], band)
                    into = (held[name].location, held[name].low, held[name].high, held[name].log_density)
                    for column, answer in zip(into, answers, strict=True):
                        column[asked] = answer
                shown.update()
    return held, models


def _digits(values: np.ndarray) -> np.ndarray:
    """Seven significant digits: more would be a promise."""
    import numpy as np

    return np.array([float(f"{v:.7g}") for v in values])


def _summary(y: np.ndarray, held: dict[str, Held], band: float) -> Table:
    import numpy as np

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("held out")
    for name in ("NLL", "RMSE", f"inside {band:.0%}", "width of the band"):
        table.add_column(name, justify="right")
    known = np.isfinite(y)
    for name, found in held.items():
        inside = ((found.low <= y) & (y <= found.high))[known].mean()
        error = np.sqrt(((found.location - y)[known] ** 2).mean())
        width = (found.high - found.low)[known].mean()
        table.add_row(name, f"{-found.log_density[known].mean():.3f}", f"{error:.4g}", f"{inside:.1%}", f"{width:.4g}")
    return table
