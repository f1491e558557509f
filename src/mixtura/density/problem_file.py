"""A problem as a small TOML file: axes, the terms of the operator, source and boundary as arithmetic over the coordinates.

    title = "A fast wave"

    [[axis]]
    name = "x"
    from = 0
    to = "2*pi"
    points = 400

    [[term]]                      # u_xx
    derivative = { x = 2 }

    [[term]]                      # + (1 + x) u^3
    coefficient = "1 + x"
    power = 3

    [equation]
    source = "-10000*sin(100*x) + (1 + x)*sin(100*x)**3"

    [boundary]
    all = "sin(100*x)"            # or "x low" = ..., "x high" = ..., "x low slope" = ..., periodic = ["x"]

    [truth]                       # where it is known
    solution = "sin(100*x)"

    [solver]                      # parameters of SpectralProcessSolver
    max_frequency = 20

The operator is a sum of terms coefficient(x) * u^power * (a derivative of u). Anything else is refused by name; such an
equation can be given in Python, as a callable.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.density.expressions import Expression
from mixtura.density.grid_equations import Term, Terms

__all__ = ["FileProblem", "problem_from", "read_problem"]

TABLES = {"title", "axis", "term", "equation", "boundary", "truth", "solver"}
AXIS = {"name", "from", "to", "points"}
TERM = {"coefficient", "derivative", "power"}
SOLVER = {
    "kind",
    "n_components",
    "max_frequency",
    "boundary_weight",
    "solver",
    "n_steps",
    "inner_tol",
    "inner_iterations",
    "extra_trend",
    "jitter",
}
# Beyond these no memory would do: an axis of n points takes some 32 matrices of n^2 numbers, a grid some 80 fields.
MOST_POINTS_OF_AXIS, MOST_POINTS = 20_000, 20_000_000
COVERED = "covered are sums of coefficient(x) * u^power * (a derivative of u); give others as a callable in Python"


@dataclass(frozen=True)
class FileProblem:
    """A problem read from a file, ready for ``SpectralProcessSolver``.

    Attributes:
        names: of the axes. grids: one array an axis. equation: the operator. source: on the grid.
        boundary: as the solver takes it.
        truth: the solution where the file gives it.
        options: parameters of the solver.
    """

    title: str
    names: tuple[str, ...]
    grids: tuple[np.ndarray, ...]
    equation: Terms
    source: np.ndarray
    boundary: dict[Any, Any]
    truth: Expression | None = None
    options: dict[str, Any] = field(default_factory=dict)


def read_problem(path: str | Path) -> FileProblem:
    """Read a problem file.

    Raises:
        ValueError: no such file, no TOML, or something that is not covered; the place in the file is named.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except FileNotFoundError:
        raise ValueError(f"no problem file at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML ({error})") from None
    try:
        return problem_from(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def problem_from(content: Mapping[str, Any]) -> FileProblem:
    """A problem from the content of its file, as :mod:`tomllib` reads it."""
    _known("file", content, TABLES)
    axes = _tables(content, "axis")
    if not axes:
        raise ValueError("[[axis]] is missing: name each axis with from, to and points")
    names = tuple(_axis_name(axis, i) for i, axis in enumerate(axes))
    if len(set(names)) < len(names):
        raise ValueError(f"axes must have different names, got {list(names)}")
    grids = tuple(_grid(axis, name) for axis, name in zip(axes, names, strict=True))
    if math.prod(map(len, grids)) > MOST_POINTS:
        sizes = " x ".join(f"{len(grid):,}" for grid in grids)
        raise ValueError(
            f"the grid has {sizes} points, and the solver takes at most {MOST_POINTS:,}; give fewer points"
        )
    mesh = np.meshgrid(*grids, indexing="ij", sparse=False)
    terms = _tables(content, "term")
    if not terms:
        raise ValueError(f"[[term]] is missing: name each term of the operator; {COVERED}")
    equation = _table(content, "equation")
    _known("[equation]", equation, {"source"})
    solver = _table(content, "solver")
    _known("[solver]", solver, SOLVER)
    truth = _table(content, "truth")
    _known("[truth]", truth, {"solution"})
    solution = _expression(truth["solution"], names, "solution in [truth]") if "solution" in truth else None
    if solution is not None and not np.isfinite(solution.on(*mesh)).all():
        raise ValueError(f"solution in [truth] is not finite everywhere on the grid: {solution.text!r}")
    return FileProblem(
        title=str(content.get("title", "")),
        names=names,
        grids=grids,
        equation=Terms(tuple(_term(term, i + 1, names, mesh) for i, term in enumerate(terms))),
        source=_expression(equation.get("source", 0), names, "source in [equation]").on(*mesh),
        boundary=_boundary(_table(content, "boundary"), names),
        truth=solution,
        options=dict(solver),
    )


def _known(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{key!r} in {where} is not known; known are {sorted(known)}")


def _tables(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = content.get(name, [])
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{name} must be written as [[{name}]], once for each")
    return found


def _table(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a table, [{name}], got {found!r}")
    return found


def _axis_name(axis: Mapping[str, Any], number: int) -> str:
    _known(f"[[axis]] number {number + 1}", axis, AXIS)
    name = axis.get("name")
    if not isinstance(name, str) or not name.isidentifier() or name in ("u", "pi", "e"):
        raise ValueError(f"name of [[axis]] number {number + 1} must be a word other than u, pi and e, got {name!r}")
    return name


def _grid(axis: Mapping[str, Any], name: str) -> np.ndarray:
    ends = []
    for key in ("from", "to"):
        if key not in axis:
            raise ValueError(f"axis {name!r} has no {key!r}")
        ends.append(float(_expression(axis[key], (), f"{key} of axis {name!r}")()))
    points = axis.get("points")
    if not isinstance(points, int) or isinstance(points, bool) or points < 8:
        raise ValueError(f"points of axis {name!r} must be an integer >= 8, got {points!r}")
    if points > MOST_POINTS_OF_AXIS:
        raise ValueError(
            f"points of axis {name!r} must be at most {MOST_POINTS_OF_AXIS:,}, got {points:,}: the solver keeps matrices of "
            "points^2 numbers; give fewer points, or a shorter axis"
        )
    if not ends[1] > ends[0] or not np.isfinite(ends).all():
        raise ValueError(f"axis {name!r} must go upwards, got from {ends[0]:g} to {ends[1]:g}")
    return np.linspace(ends[0], ends[1], points)


def _term(term: Mapping[str, Any], number: int, names: Sequence[str], mesh: Sequence[np.ndarray]) -> Term:
    where = f"[[term]] number {number}"
    for key in term:
        if key not in TERM:
            raise ValueError(f"{key!r} in {where} is not covered; {COVERED}")
    derivative = term.get("derivative", {})
    if not isinstance(derivative, dict):
        raise ValueError(
            f"derivative in {where} must be a table of orders such as {{ {names[0]} = 2 }}, got {derivative!r}"
        )
    for axis, order in derivative.items():
        if axis not in names:
            raise ValueError(f"derivative in {where} is along {axis!r}; the axes are {list(names)}")
        if not isinstance(order, int) or isinstance(order, bool) or order < 0:
            raise ValueError(
                f"order of {axis} in {where} must be an integer >= 0, got {order!r}; fractional derivatives are not covered"
            )
    orders = tuple(derivative.get(name, 0) for name in names)
    power = term.get("power", 0 if any(orders) else 1)
    if not isinstance(power, int) or isinstance(power, bool) or power < 0:
        raise ValueError(
            f"power in {where} must be an integer >= 0, got {power!r}; other functions of u are not covered"
        )
    if not any(orders):
        if power == 0:
            raise ValueError(f"{where} does not contain u; what does not belongs into the source")
        power -= 1  # A term without a derivative is u itself times the rest of the power.
    coefficient = _expression(term.get("coefficient", 1), names, f"coefficient in {where}")
    values = coefficient.on(*mesh)
    if not np.isfinite(values).all():
        raise ValueError(f"coefficient in {where} is not finite everywhere on the grid: {coefficient.text!r}")
    constant = float(values.flat[0])
    return Term(orders, constant if (values == constant).all() else values.copy(), power)


def _boundary(given: Mapping[str, Any], names: Sequence[str]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in given.items():
        words = key.split()
        if key == "all":
            ask = _expression(value, names, "all in [boundary]").on
            found |= {(axis, side): ask for axis in range(len(names)) for side in ("low", "high")}
        elif key == "periodic":
            for name in value if isinstance(value, list) else [value]:
                if name not in names:
                    raise ValueError(f"periodic in [boundary] names {name!r}; the axes are {list(names)}")
                found[names.index(name)] = "periodic"
        elif (
            len(words) in (2, 3) and words[0] in names and words[1] in ("low", "high") and words[2:] in ([], ["slope"])
        ):
            place = (names.index(words[0]), words[1], *([1] if len(words) == 3 else []))
            found[place] = _expression(value, names, f"{key!r} in [boundary]").on
        else:
            raise ValueError(
                f"{key!r} in [boundary] is not known; known are all, periodic, and for each axis such as {names[0]!r}: "
                f"'{names[0]} low', '{names[0]} high', '{names[0]} low slope', '{names[0]} high slope'"
            )
    return found


def _expression(text: Any, names: Sequence[str], where: str) -> Expression:
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ValueError(f"{where} must be a number or text, got {text!r}")
    try:
        return Expression(text, names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
