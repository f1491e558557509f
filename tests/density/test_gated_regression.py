"""`GatedRegression`: the four gates end to end, in the user's units, with error bars and errors that say what to do."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression

from mixtura.core.gates import TemperatureSchedule
from mixtura.density import GatedRegression, suggest_active


def crossing(n=600, seed=0, gate="softmax"):
    """Two lines that a gate tells apart: a sigmoid of the input, or of its tanh."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, 1))
    logit = (np.tanh(3 * x[:, 0]) + 0.2) / 0.4 if gate == "activation" else 5 * x[:, 0] + 0.5
    first = rng.random(n) < 1 / (1 + np.exp(-logit))
    y = np.where(first, 2 * x[:, 0] + 1, -1.5 * x[:, 0] - 1) + 0.5 * rng.normal(size=n)
    return x, y


GATES = {
    "softmax": {},
    "temperature": {"gate": "temperature"},
    "activation": {"gate": "activation", "origin": "zero"},
    "top-k": {"gate": "top-k", "top_k": 2, "n_experts": 3},
}
each_gate = pytest.mark.parametrize("name", sorted(GATES))


def made(name, **more):
    return GatedRegression(**{"n_experts": 2, "n_init": 3, **GATES[name], **more})


# --- oracle ---------------------------------------------------------------------------------------------------------


def test_one_expert_is_linear_regression_with_its_standard_errors():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 3)) * [1.0, 100.0, 0.01] + [0.0, 1e4, 0.0]
    y = X @ [1.0, 0.02, 50.0] + 7 + rng.normal(size=400)
    model, line = GatedRegression(1).fit(X, y), LinearRegression().fit(X, y)
    np.testing.assert_allclose(model.coef_[0], line.coef_, rtol=1e-6)
    np.testing.assert_allclose(model.predict(X), line.predict(X), rtol=1e-8)
    residual = y - line.predict(X)
    np.testing.assert_allclose(model.variance_[0], np.mean(residual**2), rtol=1e-6)
    np.testing.assert_allclose(model.score_samples(X, y), norm(0, residual.std()).logpdf(residual), atol=1e-6)
    design = np.column_stack([X - X.mean(0)])
    errors = np.sqrt(np.diagonal(np.linalg.inv(design.T @ design)) * residual.var())
    # The information is the observed outer product, whose own error is sqrt(2 / n) and more.
    np.testing.assert_allclose(model.standard_errors_["coef"][0], errors, rtol=0.3)


def test_with_one_active_expert_and_regions_apart_each_expert_is_the_line_of_its_region():
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (400, 1))
    y = np.where(x[:, 0] > 0.2, 5 + 2 * x[:, 0], -5 - 3 * x[:, 0]) + 0.1 * rng.normal(size=400)
    model = GatedRegression(2, gate="top-k", top_k=1, top_k_bias=True).fit(x, y)
    active = model.active_sets(x)
    assert (active.sum(1) == 1).all()
    for i in range(2):
        line = LinearRegression().fit(x[active[:, i]], y[active[:, i]])
        np.testing.assert_allclose(model.coef_[i], line.coef_, atol=1e-6)
        np.testing.assert_allclose(model.intercept_[i], line.intercept_, atol=1e-6)
    assert np.array_equal(active[:, 0] == active[0, 0], (x[:, 0] > 0.2) == (x[0, 0] > 0.2))
    borders = [edge for low, high, _ in model.regions_ for edge in (low, high)]
    gap = np.sort(x[:, 0])
    low, high = gap[gap <= 0.2].max(), gap[gap > 0.2].min()
    assert low <= borders[1] <= high and [len(r[2]) for r in model.regions_] == [1, 1]


@each_gate
def test_mean_quantiles_and_draws_are_those_of_the_density(name):
    X, y = crossing(gate=name)
    model = made(name).fit(X, y)
    at = X[:3]
    grid = np.linspace(-8, 8, 4001)
    for i, x in enumerate(at):
        density = np.exp(model.score_samples(np.repeat(x[None], len(grid), 0), grid))
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-8)
        assert np.trapezoid(density * grid, grid) == pytest.approx(model.predict(at)[i], abs=1e-7)
        below = np.trapezoid(np.where(grid <= model.predict_quantile(at, 0.3)[i], density, 0), grid)
        assert below == pytest.approx(0.3, abs=0.005)  # one cell of the grid
    draws = model.sample(np.repeat(at[:1], 20_000, 0))
    spread = np.std(draws)
    assert abs(draws.mean() - model.predict(at)[0]) < 5 * spread / np.sqrt(20_000)
    np.testing.assert_allclose(model.responsibilities(X, y).sum(1), 1)
    assert model.predict_quantile(at, [0.1, 0.9]).shape == (3, 2)


@each_gate
def test_the_search_ends_at_a_maximum_and_its_history_does_not_fall(name):
    X, y = crossing(gate=name)
    model = made(name).fit(X, y)
    assert (np.diff(model.history_) > -1e-10).all()
    assert model.log_likelihood_ == pytest.approx(model.score_samples(X, y).mean(), abs=1e-10)
    for part in ("coef_", "intercept_", "variance_", "gate_bias_"):
        kept = getattr(model, part)
        for factor in (0.999, 1.001):
            setattr(model, part, kept * factor)
            assert model.score_samples(X, y).mean() <= model.log_likelihood_ + 1e-9, part
        setattr(model, part, kept)


def test_standard_errors_are_the_spread_of_estimates_and_nan_along_the_flat_ray():
    fits = [made("temperature", n_init=1).fit(*crossing(800, seed)) for seed in range(12)]
    errors = fits[0].standard_errors_
    assert (
        np.isnan(errors["temperature"]) and np.isnan(errors["gate_weights"][0, 0]) and np.isnan(errors["gate_bias"][0])
    )
    ratios = [abs(fit.scale_free_["weights"][0, 0]) for fit in fits]
    # Of twelve estimates, the standard deviation is within a factor 2 of the truth but once in a thousand times.
    assert 0.5 < np.std(ratios) / errors["scale_free_weights"][0, 0] < 2
    model = made("activation").fit(*crossing(800, gate="activation"))
    assert np.isfinite(model.standard_errors_["temperature"]) and model.standard_errors_["temperature"] > 0


# --- invariance -----------------------------------------------------------------------------------------------------


@each_gate
def test_units_of_inputs_and_target_do_not_matter(name):
    X, y = crossing(gate=name)
    model = made(name, origin="mean").fit(X, y)
    other = made(name, origin="mean").fit(1000 * X + 5e4, 1e-3 * y - 7)
    np.testing.assert_allclose(other.predict(1000 * X + 5e4), 1e-3 * model.predict(X) - 7, rtol=1e-6)
    assert other.log_likelihood_ == pytest.approx(model.log_likelihood_ + np.log(1e3), abs=1e-6)
    np.testing.assert_allclose(other.standard_errors_["coef"], 1e-6 * model.standard_errors_["coef"], rtol=1e-3)


def test_weights_are_repetitions():
    X, y = crossing(300)
    w = np.random.default_rng(0).integers(0, 3, 300)
    start = GatedRegression(2).fit(X, y)
    init = {k: getattr(start, f"{k}_") for k in ("gate_weights", "gate_bias", "coef", "intercept", "variance")}
    weighted = GatedRegression(2, init=init).fit(X, y, sample_weight=w)
    repeated = GatedRegression(2, init=init).fit(np.repeat(X, w, 0), np.repeat(y, w))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-5)
    assert weighted.log_likelihood_ == pytest.approx(repeated.log_likelihood_, abs=1e-9)


@each_gate
def test_a_row_is_answered_alone_as_in_a_batch_and_a_start_from_the_fit_stays_there(name):
    X, y = crossing(gate=name)
    model = made(name).fit(X, y)
    np.testing.assert_allclose(model.predict(X[:1]), model.predict(X)[:1], rtol=1e-12)
    parts = ("gate_weights", "gate_bias", "temperature", "coef", "intercept", "variance")
    again = made(name, init={k: getattr(model, f"{k}_") for k in parts}).fit(X, y)
    assert again.log_likelihood_ == pytest.approx(model.log_likelihood_, abs=1e-9)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_all_experts_active_is_the_softmax_gate_and_a_fixed_temperature_changes_units_only():
    X, y = crossing()
    soft = made("softmax").fit(X, y)
    every = GatedRegression(2, gate="top-k", top_k=2, n_init=3).fit(X, y)
    assert every.log_likelihood_ == pytest.approx(soft.log_likelihood_, abs=1e-8)
    held = made("temperature", temperature=0.5).fit(X, y)
    assert held.temperature_ == 0.5
    np.testing.assert_allclose(held.scale_free_["weights"], soft.gate_weights_, rtol=1e-3)
    annealed = made("temperature", temperature=TemperatureSchedule(start=2.0, end=0.3, steps=10)).fit(X, y)
    assert annealed.temperature_ == pytest.approx(0.3)
    assert annealed.log_likelihood_ == pytest.approx(soft.log_likelihood_, abs=1e-6)


def test_where_regions_are_apart_one_active_expert_explains_as_much_as_a_gate_in_which_all_answer():
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (300, 2))
    regime = (X[:, 0] > -0.3).astype(int) + (X[:, 0] > 0.4)
    slopes = np.array([[2.0, 1.0], [-1.0, 0.0], [0.5, -2.0]])
    y = (slopes[regime] * X).sum(1) + np.array([2.0, -1.0, 1.0])[regime] + 0.2 * rng.normal(size=300)
    one = GatedRegression(3, gate="top-k", top_k=1, top_k_bias=True).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # slopes at the edge of their range: no border is steep enough
        dense = GatedRegression(3).fit(X, y)
    assert one.log_likelihood_ > dense.log_likelihood_


def test_inactive_experts_have_weight_zero_exactly_and_shares_are_told():
    X, y = crossing()
    model = made("top-k").fit(X, y)
    gate = model.predict_proba(X)
    assert ((gate > 0).sum(1) == 2).all() and np.allclose(gate.sum(1), 1)
    np.testing.assert_allclose(model.active_share_, (gate > 0).mean(0))
    assert sum(high - low for low, high, _ in model.regions_) == pytest.approx(np.ptp(X))


def test_a_table_of_active_experts_prefers_the_number_that_the_data_have():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (300, 1))
    y = np.where(x[:, 0] > 0, 4 * x[:, 0] + 2, -2.0) + 0.2 * rng.normal(size=300)
    table = suggest_active(x, y, 2, [1, 2], n_init=2, origin="zero")
    assert [row.active for row in table] == [1, 2] and sum(row.best for row in table) == 1
    assert table[0].best  # a sharp border at 0: a soft gate cannot do better
    with pytest.raises(ValueError, match="candidates must be between 1 and n_experts=2"):
        suggest_active(x, y, 2, [3])
    with pytest.raises(ValueError, match="criterion must be"):
        suggest_active(x, y, 2, [1], criterion="aic")


def test_a_start_with_an_expert_of_two_rows_is_passed_over_and_counted_where_there_is_no_other():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(-1, 1, (80, 1)), 0)
    y = np.where(x[:, 0] > 0.1, 3 - 2 * x[:, 0], x[:, 0]) + 0.1 * rng.normal(size=80)
    y[-2:] = 9.0  # two rows on a line of their own, with no spread at all
    model = GatedRegression(3, gate="top-k", top_k=1, top_k_bias=True, n_init=10).fit(x, y)
    assert model.responsibilities(x, y).sum(0).min() >= 3 and model.variance_.min() > 1e-4
    with pytest.warns(UserWarning, match="all 5 fits that were tried are degenerate"):
        GatedRegression(2).fit(x, 3 * x[:, 0])


# --- errors and warnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": "hard"}, "gate must be one of"),
        ({"n_experts": 0}, "n_experts must be >= 1"),
        ({"gate": "top-k"}, "top_k must be between 1 and n_experts=2, got None"),
        ({"gate": "top-k", "top_k": 3}, "top_k must be between 1 and n_experts=2, got 3"),
        ({"top_k": 1}, "has no effect with gate='softmax'"),
        ({"temperature": 2.0}, "has no effect with gate='softmax'"),
        ({"gate": "temperature", "temperature": 0.0}, "temperature must be > 0"),
        ({"gate": "temperature", "temperature": TemperatureSchedule(steps=500)}, "max_iter=500 ends before"),
        ({"gate": "temperature", "temperature": "cold"}, "temperature must be 'learned'"),
        ({"gate": "activation", "activation": "swish"}, "activation must be one of"),
        ({"origin": "median"}, "origin must be"),
        ({"tol": 0.0}, "tol must be > 0"),
        ({"init": "near"}, "init must be 'kmeans' or a dict"),
        ({"init": {"coef": 1}}, "init must be a dict with"),
        ({"n_experts": 200}, "fewer than the"),
        ({"device": "warp"}, "device must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    X, y = crossing(60)
    with pytest.raises(ValueError, match=message):
        GatedRegression(**{"n_experts": 2, **arguments}).fit(X, y)


def test_data_that_do_not_fit_are_named():
    X, y = crossing(60)
    broken = X.copy()
    broken[7, 0] = np.nan
    with pytest.raises(ValueError, match=r"X contains 1 missing \(NaN\) values, the first in row 7"):
        GatedRegression().fit(broken, y)
    with pytest.raises(ValueError, match=r"y contains 1 infinite \(inf\) values, the first in row 3"):
        GatedRegression().fit(X, np.where(np.arange(60) == 3, np.inf, y))
    with pytest.raises(ValueError, match="y must have one column"):
        GatedRegression().fit(X, np.column_stack([y, y]))
    with pytest.raises(ValueError, match=r"(?i)sample.weights? must"):  # ours, or that of scikit-learn from 1.7 on
        GatedRegression().fit(X, y, sample_weight=np.zeros(60))
    with pytest.raises(ValueError, match="q must be between 0 and 1"):
        GatedRegression().fit(X, y).predict_quantile(X, 1.0)


def test_what_a_fit_cannot_determine_is_warned_about():
    X, y = crossing(200)
    with pytest.warns(UserWarning, match="homogeneous"):
        GatedRegression(2, gate="activation", activation="relu", n_init=1).fit(X, y)
    with pytest.warns(UserWarning, match="ended at the edge"):
        GatedRegression(2, bounds=0.5, n_init=1).fit(X, y)
    with pytest.warns(ConvergenceWarning, match="its last was a change of"):
        GatedRegression(2, polish=False, max_iter=2, n_init=1).fit(X, y)
    apart = {"gate_weights": [[1.0], [0.5], [0.0]], "gate_bias": [9, -90, 0], "coef": [[2], [0], [-1.5]]}
    apart |= {"intercept": [1, 0, -1], "variance": [0.3, 0.3, 0.3]}
    with pytest.warns(UserWarning, match=r"experts \[1, 2\] answer at no training input"):
        GatedRegression(
            3, gate="top-k", top_k=1, top_k_bias=True, init=apart, max_iter=1, polish=False, origin="zero"
        ).fit(X, np.where(X[:, 0] > -9, 2 * X[:, 0] + 1 + 0.1 * y, y))
    level = {
        "gate_weights": [[0.0]] * 2,
        "gate_bias": [0, 0],
        "coef": [[0.0]] * 2,
        "intercept": [-1, 1],
        "variance": [1, 1],
    }
    with pytest.warns(UserWarning, match="the choice is by ties"):
        GatedRegression(2, gate="top-k", top_k=1, init=level).fit(np.ones_like(X), y)


def test_a_fit_is_the_same_twice_and_warns_of_nothing():
    X, y = crossing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (made("softmax").fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(first.coef_, second.coef_)
    assert torch.get_default_dtype() == torch.float32
