"""Problems as text: the reader of expressions, files and what they may not say, and the paper's problems by id."""

import tomllib

import mpmath
import numpy as np
import pytest

from mixtura.density.equation_process import SpectralProcessSolver
from mixtura.density.expressions import FUNCTIONS, Expression
from mixtura.density.grid_equations import AllenCahn, Field
from mixtura.density.problem_file import problem_from, read_problem
from mixtura.density.ready_problems import READY, ready_problem

MP = {name: getattr(mpmath, "fabs" if name == "abs" else name) for name in FUNCTIONS}


def content(**changes):
    """A small problem, changed at the top level."""
    base = {
        "axis": [{"name": "x", "from": 0, "to": "pi/2", "points": 20}],
        "term": [{"derivative": {"x": 2}}],
        "equation": {"source": "-9*sin(3*x)"},
        "boundary": {"x low": 0, "x high": "sin(3*x)"},
    }
    return base | changes


# --- expressions


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1 + 2*3**2/4 - -1", 6.5),
        ("2**3**2", 512.0),
        ("-x**2", -0.25),
        ("sin(pi*x) + cos(0)*e", 1 + np.e),
        ("abs(-x)*sqrt(4) + log(exp(x)) + tanh(0) + sinh(0) + cosh(0) + tan(0)", 2.5),
        (" (x) ", 0.5),
        ("1e3", 1000.0),
    ],
)
def test_an_expression_is_worth_what_arithmetic_says(text: str, want: float):
    assert float(Expression(text, ["x"])(x=0.5)) == pytest.approx(want, rel=1e-15)


def test_an_expression_works_on_arrays_and_a_constant_fills_them():
    x, y = np.meshgrid([0.0, 1.0], [2.0, 3.0, 4.0], indexing="ij")
    np.testing.assert_allclose(Expression("x*y + 1", ["x", "y"]).on(x, y), x * y + 1)
    np.testing.assert_array_equal(Expression(3, ["x", "y"]).on(x, y), np.full((2, 3), 3.0))
    assert np.isnan(Expression("sqrt(x)", ["x"]).on(np.array([-1.0])))[0]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__[0]",
        "x.real",
        "x[0]",
        "[i for i in x]",
        "lambda: 1",
        "x if x else 1",
        "x < 1",
        "x and 1",
        "'text'",
        "1j",
        "True",
        "f'{x}'",
        "x := 1",
        "sin(x, 1)",
        "sin(x=1)",
        "sin(*x)",
        "x @ x",
        "x // 2",
        "~x",
        "open('f')",
        "unknown + 1",
        "sin",
        "x = 1",
        "x; x",
        "",
        "1e999",
        "9" * 400,
        "-" * 300 + "x",
        "1+" * 3000 + "1",
    ],
)
def test_everything_else_is_refused_in_words(text: str):
    with pytest.raises(
        ValueError, match=r"not allowed|not known|no known function|no arithmetic|one argument|deep|longer"
    ):
        Expression(text, ["x"])


def test_a_tower_of_powers_ends_at_once():
    with np.errstate(over="ignore"):
        assert np.isinf(Expression("9**9**9", [])())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'z' in 'x \+ z' is not known; known names are \['x', 'y', 'pi', 'e'\]"):
        Expression("x + z", ["x", "y"])


# --- files


def test_a_file_is_read_and_solved(tmp_path):
    file = tmp_path / "p.toml"
    file.write_text(
        """
        title = "reaction"
        axis = [{ name = "x", from = 0, to = "pi/2", points = 40 }]
        term = [{ derivative = { x = 2 } }, { coefficient = "1 + x", power = 3 }, { coefficient = -2.0 }]
        equation = { source = "-9*sin(3*x) + (1 + x)*sin(3*x)**3 - 2*sin(3*x)" }
        boundary = { "x low" = 0, "x high" = "sin(3*x)", "x low slope" = 3 }
        truth = { solution = "sin(3*x)" }
        solver = { n_steps = 3, n_components = 6, max_frequency = 2 }
        """
    )
    file.write_text(file.read_text(), encoding="utf-8-sig")  # as some editors save it, with a mark at the beginning
    problem = read_problem(file)
    assert problem.title == "reaction" and not problem.equation.linear
    model = SpectralProcessSolver(problem.equation, **problem.options)
    model.fit(problem.grids, problem.source, problem.boundary)
    assert problem.truth is not None
    np.testing.assert_allclose(model.predict(), problem.truth.on(*problem.grids), atol=1e-2)


def test_terms_of_a_file_are_the_equation_they_spell():
    two = content(
        axis=[{"name": "x", "from": 0, "to": 1, "points": 8}, {"name": "t", "from": 0, "to": 2, "points": 9}],
        term=[{"coefficient": "x + t", "derivative": {"x": 1, "t": 2}}, {"derivative": {"x": 1}, "power": 2}],
        boundary={"all": "x*t", "periodic": ["t"]},
        equation={},
    )
    problem = problem_from(two)
    first, second = problem.equation.terms
    x, t = np.meshgrid(*problem.grids, indexing="ij")
    assert first.orders == (1, 2) and first.power == 0 and second.orders == (1, 0) and second.power == 2
    np.testing.assert_allclose(first.coefficient, x + t)
    assert second.coefficient == 1.0
    assert not problem.source.any()
    assert problem.boundary[1] == "periodic" and (0, "low") in problem.boundary
    cubic = problem_from(content(term=[{"power": 3}])).equation.terms[0]
    assert cubic.orders == (0,) and cubic.power == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundaries": {}}, "'boundaries' in file is not known; known are .*'boundary'"),
        ({"axis": []}, r"\[\[axis\]\] is missing"),
        ({"axis": {"name": "x"}}, r"axis must be written as \[\[axis\]\]"),
        ({"axis": [{"name": "x", "from": 0, "points": 20}]}, "axis 'x' has no 'to'"),
        (
            {"axis": [{"name": "2x", "from": 0, "to": 1, "points": 20}]},
            "must be a word other than u, pi and e, got '2x'",
        ),
        (
            {"axis": [{"name": "x", "from": 0, "to": 1, "points": 7}]},
            "points of axis 'x' must be an integer >= 8, got 7",
        ),
        ({"axis": [{"name": "x", "from": 1, "to": 0, "points": 9}]}, "axis 'x' must go upwards, got from 1 to 0"),
        ({"axis": [{"name": "x", "from": 0, "to": 1, "points": 9}] * 2}, "axes must have different names"),
        ({"axis": [{"name": "x", "from": 0, "to": 1, "points": 9, "step": 1}]}, "'step' in .*number 1 is not known"),
        (
            {"axis": [{"name": "x", "from": 0, "to": 1, "points": 10**9}]},
            "points of axis 'x' must be at most 20,000, got 1,000,000,000",
        ),
        (
            {"axis": [{"name": n, "from": 0, "to": 1, "points": 9000} for n in "xy"]},
            "the grid has 9,000 x 9,000 points, and the solver takes at most 20,000,000",
        ),
        ({"truth": {"solution": "log(x)"}}, r"solution in \[truth\] is not finite everywhere on the grid: 'log\(x\)'"),
        ({"term": []}, r"\[\[term\]\] is missing: .* covered are sums of coefficient\(x\) \* u\^power"),
        ({"term": [{"integral": "x"}]}, r"'integral' in \[\[term\]\] number 1 is not covered; covered are sums"),
        ({"term": [{"derivative": {"x": 0.5}}]}, "order of x .* must be an integer >= 0, got 0.5; fractional"),
        ({"term": [{"derivative": {"y": 2}}]}, r"is along 'y'; the axes are \['x'\]"),
        ({"term": [{"derivative": 2}]}, r"must be a table of orders such as \{ x = 2 \}, got 2"),
        (
            {"term": [{"power": -1}]},
            "power in .* must be an integer >= 0, got -1; other functions of u are not covered",
        ),
        ({"term": [{"power": 0}]}, "does not contain u"),
        ({"term": [{"coefficient": "u"}]}, r"coefficient in \[\[term\]\] number 1: 'u' in 'u' is not known"),
        ({"term": [{"coefficient": "1/x"}]}, "is not finite everywhere on the grid: '1/x'"),
        ({"equation": {"source": "sin(y)"}}, r"source in \[equation\]: 'y' in 'sin\(y\)' is not known"),
        ({"equation": {"source": True}}, "must be a number or text, got True"),
        ({"equation": {"sauce": 1}}, r"'sauce' in \[equation\] is not known"),
        ({"equation": 3}, r"equation must be a table, \[equation\], got 3"),
        (
            {"boundary": {"x left": 0}},
            r"'x left' in \[boundary\] is not known; known are all, periodic, .*'x low slope'",
        ),
        ({"boundary": {"periodic": ["y"]}}, "periodic in .* names 'y'"),
        ({"solver": {"device": "cuda"}}, r"'device' in \[solver\] is not known"),
    ],
)
def test_what_a_file_may_not_say_is_named_with_its_place(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        problem_from(content(**changes))


def test_a_file_that_is_no_toml_or_not_there_is_named(tmp_path):
    (tmp_path / "p.toml").write_text("axis = [")
    with pytest.raises(ValueError, match=r"p\.toml is not valid TOML"):
        read_problem(tmp_path / "p.toml")
    with pytest.raises(ValueError, match=r"no problem file at .*q\.toml"):
        read_problem(tmp_path / "q.toml")


# --- the paper's problems


@pytest.mark.parametrize("name", READY)
def test_the_source_is_what_the_equation_makes_of_the_solution(name: str):
    """Derivatives by mpmath in 30 digits, from the solution alone."""
    ready = ready_problem(name)
    solution, source = Expression(ready.solution, ready.names), Expression(ready.source, ready.names)
    problem = ready.problem(8)

    def u(*at):
        return solution(MP, **dict(zip(ready.names, at, strict=True)))

    with mpmath.workdps(30):
        for point in ((0.3, 0.7), (0.91, 0.12)):
            at = [mpmath.mpf(value) for value in point[: len(ready.names)]]
            total = mpmath.mpf(0)
            for term in problem.equation.terms:
                derivative = mpmath.diff(u, tuple(at), term.orders) if any(term.orders) else u(*at)
                total += float(term.coefficient) * u(*at) ** term.power * derivative
            want = source(MP, **dict(zip(ready.names, at, strict=True)))
            assert abs(total - want) < 1e-6 * (1 + abs(want))


@pytest.mark.parametrize("name", READY)
def test_a_ready_problem_goes_to_a_file_and_back(name: str):
    ready = ready_problem(name)
    assert problem_from(tomllib.loads(ready.toml(12))).title == ready.title
    assert tomllib.loads(ready.toml(12)) == ready.content(12)


@pytest.mark.parametrize(
    ("name", "points", "bound"),
    # A dozen steps; fewer points than the paper has where that leaves more than three a period.
    [
        ("P1", 400, 2e-2),
        ("P2", 128, 2e-2),
        ("P3", 400, 2e-2),
        ("P4", 700, 2e-2),
        ("P5", 400, 5e-2),
        ("A1", 400, 2e-2),
        ("A2", 400, 2e-2),
    ],
)
def test_a_ready_problem_in_one_dimension_is_solved(name: str, points: int, bound: float):
    ready = ready_problem(name)
    problem = ready.problem(points)
    model = SpectralProcessSolver(problem.equation, **problem.options, n_steps=12)
    model.fit(problem.grids, problem.source, problem.boundary)
    between = np.linspace(problem.grids[0][0], problem.grids[0][-1], 301)
    truth = ready.truth(between)
    assert np.linalg.norm(model.predict(between) - truth) / np.linalg.norm(truth) < bound


@pytest.mark.filterwarnings("ignore:the field was not solved for")
@pytest.mark.parametrize("name", ["Q1", "Q2", "A3", "T1"])
def test_a_ready_problem_in_two_dimensions_is_solved_on_a_piece_of_its_domain(name: str):
    """The equation, source and boundary as they are, on a square small enough for its waves to be resolved by 40 points."""
    ready = ready_problem(name)
    whole = ready.content(40)
    size = {"Q1": 0.5, "Q2": 2.0, "A3": 0.5, "T1": 0.2}[name]
    for axis in whole["axis"]:
        axis["to"] = size
    whole["solver"] |= {"max_frequency": 30.0 / size / 2, "n_steps": 8, "n_components": 16, "inner_iterations": 300}
    problem = problem_from(whole)
    model = SpectralProcessSolver(problem.equation, **problem.options)
    model.fit(problem.grids, problem.source, problem.boundary)
    truth = ready.truth(*problem.grids)
    assert np.linalg.norm(model.predict() - truth) / np.linalg.norm(truth) < 5e-2


def test_ready_problems_name_the_equations_of_the_paper_and_an_unknown_one_lists_them():
    assert list(READY) == ["P1", "P2", "P3", "P4", "P5", "Q1", "Q2", "A1", "A2", "A3", "T1"]
    assert ready_problem("p1") is READY["P1"]
    with pytest.raises(ValueError, match="no ready problem is called 'P9'; there are P1, P2"):
        ready_problem("P9")


def test_the_reaction_of_a_file_is_the_allen_cahn_of_the_library():
    import torch

    terms = ready_problem("A1").problem(8).equation
    values = torch.linspace(-2, 2, 8, dtype=torch.float64)
    field = Field(1, lambda orders: values * (1 + orders[0]))
    torch.testing.assert_close(terms.residual(field), AllenCahn().residual(field))
