"""The problems that the paper is measured on, by id: equation, solution, domain and grid.

Each has a known solution; the source is what the equation makes of it, written out by hand.

P1 to P5: Poisson in one dimension. Q1, Q2: in two. A1, A2: Allen-Cahn in one dimension, A3 in two. T1: advection at
speed 200. Source: 2311.04465, sec. 6 and appendix; P2 follows the authors' program (sine), whose comment says cosine.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mixtura.density.expressions import Expression
from mixtura.density.problem_file import FileProblem, problem_from

__all__ = ["READY", "ReadyProblem", "ready_problem"]


@dataclass(frozen=True, kw_only=True)
class ReadyProblem:
    """A problem with a known solution, small enough to be written as a file.

    Attributes:
        title: equation and solution in words.
        names: of the axes; all have the same length and number of points.
        length: of every axis, which begins at 0, as an expression.
        points: of every axis, as in the paper.
        max_frequency: F, the largest initial frequency in the paper.
        terms: of the operator.
        solution, source: expressions over the names.
        boundary_weight: lambda_b in the paper.
    """

    title: str
    names: tuple[str, ...]
    length: str
    points: int
    max_frequency: float
    terms: tuple[Mapping[str, Any], ...]
    solution: str
    source: str
    boundary_weight: float = 200.0

    def content(self, points: int | None = None) -> dict[str, Any]:
        """The problem as the content of a file, on another number of points if one is given."""
        count = points or self.points
        options: dict[str, Any] = {"boundary_weight": self.boundary_weight, "max_frequency": self._frequency(count)}
        return {
            "title": self.title,
            "axis": [{"name": name, "from": 0, "to": self.length, "points": count} for name in self.names],
            "term": [dict(term) for term in self.terms],
            "equation": {"source": self.source},
            "boundary": {"all": self.solution},
            "truth": {"solution": self.solution},
            "solver": options,
        }

    def problem(self, points: int | None = None) -> FileProblem:
        """The problem, ready to be solved."""
        return problem_from(self.content(points))

    def truth(self, *axes: np.ndarray) -> np.ndarray:
        """The solution on the grid that the axes span."""
        return Expression(self.solution, self.names).on(*np.meshgrid(*axes, indexing="ij"))

    def toml(self, points: int | None = None) -> str:
        """The problem file as text."""
        content = self.content(points)
        lines = [f"title = {_toml(content['title'])}"]
        for table in ("axis", "term"):
            for row in content[table]:
                lines += ["", f"[[{table}]]", *(f"{key} = {_toml(value)}" for key, value in row.items())]
        for table in ("equation", "boundary", "truth", "solver"):
            lines += ["", f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in content[table].items())]
        return "\n".join(lines) + "\n"

    def _frequency(self, points: int) -> float:
        # The paper's grid of Q2 resolves less than its F; what lies above are aliases.
        length = float(Expression(self.length, ())())
        return min(self.max_frequency, math.floor(1e6 * (points - 1) / (2 * length)) / 1e6)


def ready_problem(name: str) -> ReadyProblem:
    """The problem of an id.

    Raises:
        ValueError: no such id; all are listed.
    """
    found = READY.get(name.upper())
    if found is None:
        raise ValueError(f"no ready problem is called {name!r}; there are {', '.join(READY)}")
    return found


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _laplacian(names: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    return tuple({"derivative": {name: 2}} for name in names)


X, XY = ("x",), ("x", "y")
REACTION: tuple[dict[str, Any], ...] = ({"power": 3}, {"coefficient": -1})  # u (u^2 - 1)


def _poisson(title: str, length: str, points: int, frequency: float, solution: str, source: str) -> ReadyProblem:
    return ReadyProblem(
        title=f"1-D Poisson, {title}",
        names=X,
        length=length,
        points=points,
        max_frequency=frequency,
        terms=_laplacian(X),
        solution=solution,
        source=source,
    )


_P3 = "-10036*sin(6*x)*cos(100*x) - 1200*cos(6*x)*sin(100*x)"
_MIX = "(sin({0}) + 0.1*sin(20*{0}) + cos(100*{0}))"
_MIX_BENT = "(-sin({0}) - 40*sin(20*{0}) - 10000*cos(100*{0}))"
_A3 = f"{_MIX.format('x')}*{_MIX.format('y')}"

READY: Mapping[str, ReadyProblem] = MappingProxyType(
    {
        "P1": _poisson("one fast wave", "2*pi", 400, 20, "sin(100*x)", "-10000*sin(100*x)"),
        "P2": _poisson(
            "three scales",
            "1",
            900,
            30,
            "sin(x) + 0.1*sin(20*x) + 0.05*sin(100*x)",
            "-sin(x) - 40*sin(20*x) - 500*sin(100*x)",
        ),
        "P3": _poisson("a slow times a fast wave", "2*pi", 400, 20, "sin(6*x)*cos(100*x)", _P3),
        "P4": _poisson("a growing fast wave", "2*pi", 900, 50, "x*sin(200*x)", "400*cos(200*x) - 40000*x*sin(200*x)"),
        "P5": _poisson(
            "a fast wave on a slow trend", "1", 400, 100, "sin(500*x) - 2*(x - 0.5)**2", "-250000*sin(500*x) - 4"
        ),
        "Q1": ReadyProblem(
            title="2-D Poisson, one fast wave",
            names=XY,
            length="2*pi",
            points=400,
            max_frequency=20,
            terms=_laplacian(XY),
            solution="sin(100*x)*sin(100*y)",
            source="-20000*sin(100*x)*sin(100*y)",
        ),
        "Q2": ReadyProblem(
            title="2-D Poisson, a sum of two-scale waves",
            names=XY,
            length="2*pi",
            points=200,
            max_frequency=20,
            terms=_laplacian(XY),
            solution="sin(6*x)*cos(20*x) + sin(6*y)*cos(20*y)",
            source="-436*sin(6*x)*cos(20*x) - 240*cos(6*x)*sin(20*x) - 436*sin(6*y)*cos(20*y) - 240*cos(6*y)*sin(20*y)",
        ),
        "A1": ReadyProblem(
            title="1-D Allen-Cahn, one fast wave",
            names=X,
            length="2*pi",
            points=400,
            max_frequency=20,
            terms=(*_laplacian(X), *REACTION),
            solution="sin(100*x)",
            source="-10000*sin(100*x) + sin(100*x)*(sin(100*x)**2 - 1)",
        ),
        "A2": ReadyProblem(
            title="1-D Allen-Cahn, a slow times a fast wave",
            names=X,
            length="2*pi",
            points=400,
            max_frequency=20,
            terms=(*_laplacian(X), *REACTION),
            solution="sin(6*x)*cos(100*x)",
            source=f"{_P3} + sin(6*x)*cos(100*x)*((sin(6*x)*cos(100*x))**2 - 1)",
        ),
        "A3": ReadyProblem(
            title="2-D Allen-Cahn, a product of three-scale waves",
            names=XY,
            length="1",
            points=400,
            max_frequency=30,
            terms=(*_laplacian(XY), *REACTION),
            solution=_A3,
            source=(
                f"{_MIX_BENT.format('x')}*{_MIX.format('y')} + {_MIX.format('x')}*{_MIX_BENT.format('y')} "
                f"+ {_A3}*(({_A3})**2 - 1)"
            ),
        ),
        "T1": ReadyProblem(
            title="Advection at speed 200",
            names=("x", "t"),
            length="1",
            points=200,
            max_frequency=40,
            terms=({"derivative": {"t": 1}}, {"coefficient": 200, "derivative": {"x": 1}}),
            solution="sin(x - 200*t)",
            source="0",
            boundary_weight=500.0,
        ),
    }
)
