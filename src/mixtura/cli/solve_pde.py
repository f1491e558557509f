"""``solve-pde``: a differential equation in a small file, solved where its solution oscillates fast."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from mixtura.cli.added_columns import check_places, write_beside

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np

    from mixtura.density.equation_process import SpectralProcessSolver
    from mixtura.density.problem_file import FileProblem
    from mixtura.density.spectral_mixture import Kind

__all__ = ["Found", "add_to"]


class KindName(StrEnum):
    """Shapes of a bump of the spectrum."""

    auto = "auto"
    gaussian = "gaussian"
    student = "student"


@dataclass(frozen=True)
class Found:
    """One kind's solution.

    Attributes:
        u: the process on the grid, without the jitter that the solver's own values carry.
        truth: the solution on the grid where the problem names it.
    """

    kind: str
    model: SpectralProcessSolver
    seconds: float
    u: np.ndarray
    truth: np.ndarray | None

    @property
    def error(self) -> float | None:
        """Relative error on the grid; None where the truth is not known, or zero everywhere."""
        import numpy as np

        if self.truth is None or not self.truth.any():
            return None
        return float(np.linalg.norm(self.u - self.truth) / np.linalg.norm(self.truth))


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("solve-pde")(solve_pde)


def solve_pde(
    problem: Annotated[
        Path | None, typer.Argument(help="Problem file, TOML: axes, terms of the operator, source, boundary.")
    ] = None,
    example: Annotated[
        str | None, typer.Option(help="A problem of the paper instead: P1 to P5, Q1, Q2, A1 to A3, T1.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the example as a problem file, and stop.")] = False,
    points: Annotated[int | None, typer.Option(help="Points along each axis of the example.")] = None,
    kind: Annotated[
        KindName | None, typer.Option(help="Shape of a bump of the spectrum; auto tries both and keeps the likelier.")
    ] = None,
    components: Annotated[int | None, typer.Option(help="Bumps of the spectrum along each axis.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of learning the spectrum.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Table to write, .csv, .tsv or .parquet. Default: PROBLEM-solved.csv, here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .png, .svg or .pdf.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, auto.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Kept for a common interface; the solver draws nothing.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Solve a differential equation on a grid, with the frequencies of its solution learned.

    The problem is a small file: the axes, the operator as a sum of terms (a coefficient, a power of u, a derivative of u),
    source and boundary as arithmetic over the coordinates. To begin with one, print an example and change it. Options given
    here win over those in the file.

    Writes a table with one row a point of the grid: coordinates, solution u, residual of the equation, and the true solution
    where the file names it. The summary says how well the equation is met and which frequencies carry the solution. It helps
    to know the highest frequency: max_frequency in the file, in cycles per unit of length.

    Examples:

        mixtura solve-pde --example P5 --plot p5.png

        mixtura solve-pde --example A1 --show > mine.toml

        mixtura solve-pde mine.toml --kind gaussian --steps 100 --out mine.csv --plot mine.png
    """
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    _check(problem, example, show, points)
    if show:
        assert example is not None
        _show(example, points)
        return
    asked, name = _read(problem, example, points)
    out = out or Path(f"{name}-solved.csv")
    check_places(problem or Path(name), out, plot)
    options = asked.options | {
        key: value for key, value in {"n_components": components, "n_steps": steps}.items() if value is not None
    }
    kinds = _kinds(kind, options.pop("kind", None))
    say(_announced(asked, name, kinds, options))
    if dry_run:
        say(f"would write {out}" + (f" and {plot}" if plot else ""))
        return
    found = _solve(asked, kinds, {**options, "device": device, "seed": seed}, say)
    best = max(found, key=lambda one: one.model.log_joint_)
    _write(out, asked, best)
    if plot is not None:
        from mixtura.cli.equation_picture import draw

        draw(plot, asked, best)
    Console(highlight=False, width=max(console.width, 100)).print(_summary(asked, found, best))
    for line in _frequencies(asked, best):
        say(line)
    written = [str(path) for path in (out, plot) if path is not None]
    say(f"{' and '.join(written)} {'is' if len(written) == 1 else 'are'} written")


def _check(problem: Path | None, example: str | None, show: bool, points: int | None) -> None:
    if (problem is None) == (example is None):
        raise ValueError(
            "give a problem file or --example, one of the two; mixtura solve-pde --example P1 is a beginning"
        )
    if example is None and (show or points is not None):
        raise ValueError(f"{'--show' if show else '--points'} is for an --example; a problem file names its own points")
    if points is not None and points < 8:
        raise ValueError(f"--points must be >= 8, got {points}")


def _show(example: str, points: int | None) -> None:
    from mixtura.density.ready_problems import ready_problem

    typer.echo(ready_problem(example).toml(points), nl=False)


def _read(problem: Path | None, example: str | None, points: int | None) -> tuple[FileProblem, str]:
    if problem is not None:
        from mixtura.density.problem_file import read_problem

        return read_problem(problem), problem.stem
    from mixtura.density.ready_problems import ready_problem

    assert example is not None
    return ready_problem(example).problem(points), example.upper()


def _kinds(asked: KindName | None, in_file: str | None) -> list[Kind]:
    kind = asked.value if asked is not None else in_file or KindName.auto.value
    names = [name.value for name in KindName if name is not KindName.auto] if kind == KindName.auto.value else [kind]
    return cast("list[Kind]", names)  # the solver refuses what a file may say instead


def _announced(problem: FileProblem, name: str, kinds: Sequence[str], options: dict[str, Any]) -> str:
    sizes = [len(grid) for grid in problem.grids]
    orders = 1 + max(max(term.orders) for term in problem.equation.terms)
    # What a million points were measured to need beyond the program itself (1.3 GB), shared out between matrices and fields.
    gigabytes = 8 * (sum(8 * (orders + 2) * size**2 for size in sizes) + 80 * math.prod(sizes)) / 1e9
    grid = " x ".join(str(size) for size in sizes)
    linear = "linear" if problem.equation.linear else "nonlinear"
    return (
        f"{name}: {problem.title or 'a problem'}, {linear}, {grid} points over {', '.join(problem.names)}; "
        f"{' and '.join(kinds)}, {options.get('n_steps', 60)} steps, about {max(gigabytes, 0.01):.2f} GB of memory"
    )


def _solve(problem: FileProblem, kinds: Sequence[Kind], options: dict[str, Any], say: Any) -> list[Found]:
    import numpy as np

    from mixtura.density.equation_process import SpectralProcessSolver

    truth = None
    if problem.truth is not None:
        truth = problem.truth.on(*np.meshgrid(*problem.grids, indexing="ij"))
    found = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for kind in kinds:
            began = time.perf_counter()
            model = SpectralProcessSolver(problem.equation, kind, **options)
            model.fit(problem.grids, problem.source, problem.boundary)
            found.append(Found(kind, model, time.perf_counter() - began, model.predict(), truth))
    for message in dict.fromkeys(
        str(warning.message) for warning in heard if issubclass(warning.category, UserWarning)
    ):
        say(f"note: {message}")
    return found


def _write(out: Path, problem: FileProblem, found: Found) -> None:
    import numpy as np
    import pandas as pd

    coordinates = np.meshgrid(*problem.grids, indexing="ij")
    table = pd.DataFrame({name: c.reshape(-1) for name, c in zip(problem.names, coordinates, strict=True)})
    columns = {"u": found.u, "residual": found.model.residual_}
    if found.truth is not None:
        columns["truth"] = found.truth
    write_beside(out, table, {name: values.reshape(-1) for name, values in columns.items()})


def _summary(problem: FileProblem, found: list[Found], best: Found) -> Table:
    import numpy as np

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("spectrum")
    for name in ("log joint", "residual", "of the source", "relative error", "bumps left", "seconds"):
        table.add_column(name, justify="right")
    source = float(np.sqrt(np.mean(problem.source**2)))
    for one in found:
        residual = float(np.sqrt(np.mean(one.model.residual_**2)))
        left = [one.model.effective_components(axis) for axis in range(len(one.model.grids_))]
        table.add_row(
            one.kind + (" (kept)" if one is best and len(found) > 1 else ""),
            f"{one.model.log_joint_:.1f}",
            f"{residual:.3g}",
            f"{residual / source:.1e}" if source > 0 else "-",
            "-" if one.error is None else f"{one.error:.2e}",
            ", ".join(f"{n:.1f}" for n in left),
            f"{one.seconds:.1f}",
        )
    return table


def _frequencies(problem: FileProblem, found: Found) -> list[str]:
    lines = []
    for axis, name in enumerate(problem.names):
        parts = found.model.components_(axis)
        total = sum(part.weight for part in parts)
        shown = ", ".join(f"{part.frequency:.4g} ({part.weight / total:.0%})" for part in parts[:4])
        lines.append(f"heaviest frequencies along {name}, cycles per unit of length: {shown}")
    return lines
