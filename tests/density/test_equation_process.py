"""The solver as a person uses it: solutions that are known, conventions, and every error with its message."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError

import mixtura.density
from mixtura.density.equation_process import AliasingWarning, MultiscaleSolver, SpectralProcessSolver
from mixtura.density.grid_equations import Advection, AllenCahn, Helmholtz, Linear, Poisson, Term, Terms

X = np.linspace(0, 1, 60)


def wave(x: np.ndarray) -> np.ndarray:
    return np.sin(30 * x)


def source(x: np.ndarray) -> np.ndarray:
    return -900 * np.sin(30 * x)


def solver(equation=None, **options) -> SpectralProcessSolver:
    return SpectralProcessSolver(
        equation if equation is not None else Poisson(),
        **{"n_steps": 5, "max_frequency": 10.0, "n_components": 12, **options},
    )


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def fitted() -> SpectralProcessSolver:
    return solver().fit([X], source, wave)


@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_a_fast_wave_is_solved_between_its_points_and_so_are_its_derivatives(kind: str):
    fast = np.linspace(0, 2 * np.pi, 400)
    model = SpectralProcessSolver(Poisson(), kind, max_frequency=20.0, n_steps=30)
    model.fit([fast], lambda x: -1e4 * np.sin(100 * x), lambda x: np.sin(100 * x))
    between = np.linspace(0.05, 6.2, 311)
    assert error(model.predict(between), np.sin(100 * between)) < 1e-2
    assert error(model.derivative(1, between), 100 * np.cos(100 * between)) < 3e-2
    assert error(model.derivative(2, between), -1e4 * np.sin(100 * between)) < 3e-2
    assert model.components_()[0].frequency == pytest.approx(100 / (2 * np.pi), rel=0.05)


def test_processes_that_are_blind_to_frequency_fail_where_the_mixture_solves():
    fast = np.linspace(0, 2 * np.pi, 400)
    options = {"max_frequency": 0.0, "n_components": 1, "learn_frequency": False, "log_scale": 0.0, "n_steps": 8}
    for kind in ("gaussian", "student"):
        blind = SpectralProcessSolver(Poisson(), kind, **options)
        blind.fit([fast], lambda x: -1e4 * np.sin(100 * x), lambda x: np.sin(100 * x))
        assert error(blind.predict(), np.sin(100 * fast)) > 0.1


def test_a_nonlinear_equation_is_solved():
    u = wave(X)
    model = solver(AllenCahn()).fit([X], source(X) + u**3 - u, wave)
    assert error(model.predict(), u) < 2e-3


def test_two_dimensions_with_a_callable_equation_are_solved():
    x, y = np.linspace(0, 1, 24), np.linspace(0, 1, 28)
    u = np.sin(12 * x)[:, None] * np.cos(9 * y)
    model = solver(lambda u, x, y: u.laplacian() + (1 + x) * u.value, max_frequency=(4.0, 3.0), n_steps=20)
    model.fit([x, y], (-225 + 1 + x[:, None]) * u, lambda x, y: np.sin(12 * x) * np.cos(9 * y))
    assert error(model.predict(), u) < 1e-2
    fine = model.predict(np.linspace(0, 1, 50), [0.5])
    assert error(fine, (np.sin(12 * np.linspace(0, 1, 50)) * np.cos(4.5))[:, None]) < 1e-2
    assert error(model.derivative((1, 0)), 12 * np.cos(12 * x)[:, None] * np.cos(9 * y)) < 5e-2


def test_three_dimensions_are_solved():
    x = np.linspace(0, 1, 10)
    u = np.sin(3 * x)[:, None, None] * np.cos(2 * x)[:, None] * np.exp(-x)
    ends = lambda x, y, z: np.sin(3 * x) * np.cos(2 * y) * np.exp(-z)  # noqa: E731
    model = solver(max_frequency=1.0, n_components=3, n_steps=2, jitter=1e-8, inner_tol=1e-4)
    model.fit([x, x, x], (-9 - 4 + 1) * u, ends)
    assert error(model.predict(), u) < 1e-2


def test_an_initial_condition_and_a_periodic_axis_carry_a_wave_along():
    x, t = np.linspace(0, 1, 32), np.linspace(0, 0.5, 24)
    shape = lambda x, t: np.sin(2 * np.pi * (x - t))  # noqa: E731
    model = solver(Advection(1.0), max_frequency=3.0, n_steps=10)
    model.fit([x, t], None, {(1, "low"): lambda x, t: np.sin(2 * np.pi * x), 0: "periodic"})
    assert error(model.predict(), shape(x[:, None], t)) < 2e-2


def test_an_initial_value_and_slope_carry_an_oscillation_along():
    t = np.linspace(0, 3, 80)
    model = solver(Linear({(2,): 1.0, (0,): 25.0}), max_frequency=3.0)
    model.fit(t, None, {(0, "low"): 1.0, (0, "low", 1): 10.0})
    assert error(model.predict(), np.cos(5 * t) + 2 * np.sin(5 * t)) < 1e-2
    same = solver(Helmholtz(5.0), max_frequency=3.0).fit(t, None, {(0, "low"): 1.0, (0, "low", 1): 10.0})
    np.testing.assert_allclose(same.predict(), model.predict(), rtol=1e-8, atol=1e-8)


def test_the_trend_under_a_fast_oscillation_is_found_by_itself():
    x = np.linspace(0, 1, 400)
    for options in ({}, {"extra_trend": True}):
        model = SpectralProcessSolver(Poisson(), max_frequency=100.0, n_steps=15, **options)
        model.fit([x], lambda x: -25e4 * np.sin(500 * x) - 4, lambda x: np.sin(500 * x) - 2 * (x - 0.5) ** 2)
        trend = model.predict() - np.sin(500 * x)
        assert error(trend, -2 * (x - 0.5) ** 2) < 3e-2


def test_the_answer_does_not_depend_on_the_unit_of_length(fitted):
    # In millimetres the equation's coefficient is 1e6, so that the residual has the same size.
    thousand = solver(Linear({(2,): 1e6}), max_frequency=0.01)
    thousand.fit([1000 * X], source(X), {(0, "low"): wave(X[0]), (0, "high"): wave(X[-1])})
    np.testing.assert_allclose(thousand.predict(), fitted.predict(), atol=1e-6)


@pytest.mark.parametrize("unit", [1e-7, 1e5])
def test_the_answer_does_not_depend_on_the_unit_of_the_field(fitted, unit: float):
    scaled = solver().fit([X], lambda x: unit * source(x), lambda x: unit * wave(x))
    np.testing.assert_allclose(scaled.predict(), unit * fitted.predict(), rtol=1e-6, atol=1e-8 * unit)
    assert scaled.unit_ == pytest.approx(unit, rel=1e-12) and fitted.unit_ == 1.0
    assert scaled.components_()[0].weight == pytest.approx(unit**2 * fitted.components_()[0].weight, rel=1e-4)
    assert scaled.tau_equation_ == pytest.approx(fitted.tau_equation_ / unit**2, rel=1e-2)
    # Densities of 60 values of the field, of 60 of the equation and, 200 times, of two at the boundary.
    assert scaled.log_joint_ == pytest.approx(fitted.log_joint_ - (120 + 400) * np.log(unit), rel=1e-4)


def test_a_nonlinear_equation_is_solved_in_its_own_unit_too():
    def bent(field, x):
        return field.d(0, 2) + (field.value / 1e4) ** 2 * field.value

    model = solver(bent).fit([X], lambda x: 1e4 * (source(x) + wave(x) ** 3), lambda x: 1e4 * wave(x))
    assert model.unit_ == 1e4
    assert error(model.predict(), 1e4 * wave(X)) < 1e-2


def test_a_point_alone_is_predicted_as_in_a_grid(fitted):
    together = fitted.predict(np.array([0.1, 0.5, 0.77]))
    np.testing.assert_allclose(fitted.predict([0.5]), together[1:2], rtol=1e-12)
    # The jitter stands between a value and its prediction: 1e-6 of the variance, more where the grid barely resolves.
    assert error(fitted.predict(), fitted.solution_) < 1e-2


def test_a_second_fit_forgets_the_first(fitted):
    model = solver().fit([X], 0.0, lambda x: 0 * x)
    model.fit([X], source, wave)
    np.testing.assert_array_equal(model.predict(), fitted.predict())


def test_the_solver_clones_and_names_its_parameters(fitted):
    copy = clone(fitted)
    assert not hasattr(copy, "solution_")
    assert copy.get_params()["max_frequency"] == 10.0
    assert copy.set_params(kind="student").kind == "student"
    assert MultiscaleSolver is SpectralProcessSolver is mixtura.density.MultiscaleSolver


@pytest.mark.parametrize("equation", [Poisson(), Terms((Term((2,), np.ones(60)), Term((0,), 3.0)))])
def test_what_was_saved_answers_the_same_to_the_bit(equation, tmp_path):
    model = solver(equation, extra_trend=True).fit([X], source, {(0, "low"): 0.0, (0, "high"): wave(1.0)})
    model.save(tmp_path / "solver")
    back = SpectralProcessSolver.load(tmp_path / "solver")
    np.testing.assert_array_equal(back.predict([0.3, 0.4]), model.predict([0.3, 0.4]))
    np.testing.assert_array_equal(back.spectrum([1.0, 5.0]), model.spectrum([1.0, 5.0]))
    assert back.components_() == model.components_() and back.history_ == model.history_
    np.testing.assert_array_equal(back.fit([X], source, wave).predict(), clone(model).fit([X], source, wave).predict())


def test_a_callable_equation_is_named_as_what_cannot_be_saved(tmp_path):
    model = solver(lambda u, x: u.d(0, 2)).fit([X], source, wave)
    with pytest.raises(TypeError, match="parameter equation is a function"):
        model.save(tmp_path / "solver")


def test_the_spectrum_that_is_reported_is_that_of_the_components(fitted):
    assert fitted.effective_components() < 12
    s = np.linspace(-60, 60, 20_001)
    total = sum(part.weight for part in fitted.components_())
    assert np.trapezoid(fitted.spectrum(s), s) == pytest.approx(total, rel=1e-3)


def test_half_the_points_that_the_wave_needs_are_refused_and_a_few_too_few_warn():
    coarse = np.linspace(0, 2 * np.pi, 200)
    with pytest.raises(ValueError, match="energy of the source along axis 0 lies above 90% of the highest frequency"):
        solver().fit([coarse], lambda x: -1e4 * np.sin(100 * x), lambda x: np.sin(100 * x))
    noise = np.random.default_rng(0).normal(size=60)
    with pytest.warns(AliasingWarning, match="use a finer grid"):
        solver(n_steps=0).fit([X], noise, wave)
    with pytest.warns(AliasingWarning, match=r"max_frequency=50 is above what axis 0 resolves, 29.5 cycles"):
        solver(n_steps=0, max_frequency=50.0).fit([X], source, wave)


def test_a_field_that_is_not_solved_for_says_so():
    x = np.linspace(0, 1, 30)
    with pytest.warns(ConvergenceWarning, match=r"not solved for to inner_tol=1e-10: .* after 3 iterations"):
        model = solver(inner_iterations=3, n_steps=0).fit([x, x], lambda x, y: np.sin(9 * x) * y, lambda x, y: 0 * x)
    assert not model.converged_


def test_grids_that_cannot_be_used_are_named():
    bent = X.copy()
    bent[7] += 0.004
    with pytest.raises(
        ValueError, match=r"axis 0 is not uniform: the gap between points [67] and [78] .*largest deviation 0.004"
    ):
        solver().fit([bent], source, wave)
    with pytest.raises(ValueError, match="axis 1 has 7 points; at least 8 are needed"):
        solver().fit([X, X[:7]], None, lambda x, y: 0 * x)
    with pytest.raises(ValueError, match="axis 0 must increase"):
        solver().fit([X[::-1]], source, wave)
    with pytest.raises(ValueError, match=r"axis 0 has shape \(60, 1\)"):
        solver().fit([X[:, None]], source, wave)
    with pytest.raises(ValueError, match="grid of axis 0 has 1 values that are NaN or infinite, the first at index"):
        solver().fit([np.where(X > 0.99, np.nan, X)], source, wave)
    with pytest.raises(ValueError, match="at least one axis"):
        solver().fit([], source, wave)


def test_sources_that_cannot_be_used_are_named_with_their_index():
    with pytest.raises(ValueError, match=r"source must have shape \(60,\), got \(59,\)"):
        solver().fit([X], np.zeros(59), wave)
    bad = source(X)
    bad[[4, 9]] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"source has 2 values that are NaN or infinite, the first at index \(4,\)"):
        solver().fit([X], bad, wave)
    with pytest.raises(ValueError, match=r"source has a value beyond 1e\+120, whose square .* at index \(1,\)"):
        solver().fit([X], 1e150 * source(X), wave)
    turned = source(X).astype(complex)
    turned[11] += 1j
    with pytest.raises(ValueError, match=r"source must be real numbers, got complex, first at index \(11,\)"):
        solver().fit([X], turned, wave)


def test_boundaries_that_cannot_be_used_are_named():
    with pytest.raises(ValueError, match=r"boundary is missing: .* allow_free=True"):
        solver().fit([X], source)
    free = solver().fit([X], source, allow_free=True)
    assert np.isfinite(free.predict()).all()
    with pytest.raises(ValueError, match=r"boundary keys are .* between 0 and 0; got \(1, 'low'\)"):
        solver().fit([X], source, {(1, "low"): 0.0})
    with pytest.raises(ValueError, match="got 'left'"):
        solver().fit([X], source, {"left": 0.0})
    with pytest.raises(ValueError, match="boundary at the high face of axis 0 has 1 values that are NaN"):
        solver().fit([X], source, {(0, "high"): np.nan})
    with pytest.raises(ValueError, match=r"boundary at the low face of axis 1 must have shape \(60,\), got \(3,\)"):
        solver().fit([X, X], None, {(1, "low"): np.zeros(3)})
    with pytest.raises(ValueError, match=r"point \(60,\) lies outside the grid \(60,\)"):
        solver().fit([X], source, {"points": ([60], [0.0])})
    with pytest.raises(ValueError, match=r"points must be integer indices of shape \(n, 1\), got float64"):
        solver().fit([X], source, {"points": ([0.5], [0.0])})
    with pytest.raises(ValueError, match="periodic axis must be between 0 and 0, got 1"):
        solver().fit([X], source, {1: "periodic"})
    with pytest.raises(TypeError, match="boundary must be a mapping, a callable or None, got float"):
        solver().fit([X], source, 0.0)


def test_derivatives_that_a_kernel_does_not_have_are_refused_and_doubtful_ones_warn():
    fifth, third = Linear({(5,): 1.0}), Linear({(3,): 1.0, (0,): 1.0})
    for options in ({"kind": "student"}, {"extra_trend": True}):
        with pytest.raises(
            ValueError, match=r"derivative of order 5, a Matern-5/2 decay .* has 4; use kind='gaussian'"
        ):
            solver(fifth, **options).fit([X], source, wave)
    with pytest.warns(UserWarning, match="derivative of order 3: processes with a Matern-5/2 decay have two"):
        solver(third, kind="student", n_steps=0).fit([X], source, wave)
    smooth = solver(fifth, n_steps=0).fit([X], 0.0, wave)
    assert np.isfinite(smooth.predict()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "matern"}, r"kind must be one of \['gaussian', 'student'\], got 'matern'"),
        ({"solver": "newton"}, r"solver must be one of \['profile', 'adam'\], got 'newton'"),
        ({"max_frequency": "high"}, "max_frequency must be 'nyquist' or a number, got 'high'"),
        ({"max_frequency": (1.0, 2.0)}, "max_frequency must be one number or 1, one an axis, got 2"),
        ({"n_steps": -1}, "n_steps must be an integer >= 0, got -1"),
        ({"n_components": 1.5}, "n_components must be an integer >= 1, got 1.5"),
        ({"jitter": 0.0}, "jitter must be a number > 0, got 0.0"),
        ({"jitter": "small"}, "jitter must be a number > 0, got 'small'"),
        ({"boundary_weight": -1.0}, "boundary_weight must be a number > 0, got -1.0"),
    ],
)
def test_a_parameter_out_of_range_is_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        solver(**options).fit([X], source, wave)


def test_what_is_asked_before_or_beside_the_fit_is_refused(fitted):
    with pytest.raises(NotFittedError):
        solver().predict([0.5])
    with pytest.raises(ValueError, match="equation is missing"):
        SpectralProcessSolver().fit([X], source, wave)
    with pytest.raises(ValueError, match="fitted on 1 axes, got 2 axes"):
        fitted.predict([0.1], [0.2])
    with pytest.raises(ValueError, match="fitted on 1 axes, got 2 orders"):
        fitted.derivative((1, 1), [0.1])


def test_the_papers_algorithm_is_there_and_the_profile_is_ahead_of_it():
    few = {"n_steps": 30}
    adam = solver(solver="adam", **few).fit([X], source, wave)
    profile = solver(**few).fit([X], source, wave)
    assert profile.log_joint_ > adam.log_joint_
    assert adam.log_joint_ > adam.history_[0]["log_joint"]


def test_everything_is_computed_in_double_precision(fitted):
    assert fitted.predict().dtype == np.float64
    single = solver().fit([X.astype(np.float32).astype(np.float64)], source, wave)
    assert single.solution_.dtype == np.float64
    assert torch.get_default_dtype() == torch.float32
