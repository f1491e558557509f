"""What the claims of the temperature and the top-k gate measure."""

import numpy as np
import pytest
import torch

from mixtura.claims import temperature_gate, topk_gate
from mixtura.claims._gate_rates import told
from mixtura.density.rates import Fits, RateResult, theta_of


def fits_of(measure, truth):
    return Fits(truth.rule, truth.layout, theta_of(measure)[None], torch.zeros(1), torch.zeros(1, dtype=torch.bool))


def test_experts_that_swapped_their_names_have_no_error_where_the_gate_is_the_same():
    truth = temperature_gate.truth("linear")
    swapped = truth.measure.pick([1, 0]).gauge()
    for name in ("tau", "b1", "b0", "a", "b", "v", "ratio", "TV"):
        assert temperature_gate.METRICS[name](fits_of(swapped, truth), truth)[0] == pytest.approx(0, abs=1e-9), name


def test_each_error_is_that_of_its_own_parameter():
    truth = temperature_gate.truth("tanh")
    off = truth.measure._replace(
        slope=truth.measure.slope + np.array([[0.5], [0.0]]), variance=truth.measure.variance + 0.1
    )
    found = {
        name: temperature_gate.METRICS[name](fits_of(off, truth), truth)[0] for name in ("tau", "b1", "b0", "a", "v")
    }
    assert found == pytest.approx({"tau": 0, "b1": 0.5, "b0": 0, "a": 0, "v": 0.1}, abs=1e-9)


def test_ranks_agree_where_the_more_independent_activation_errs_less():
    gates = ("linear", "tanh", "gelu", "relu")
    assert temperature_gate.rank_agreement(gates, {"linear": 4, "tanh": 1, "gelu": 2, "relu": 3}) == 1
    # Of tanh over three and gelu over two, those of gelu are wrong.
    assert temperature_gate.rank_agreement(gates, {"linear": 4, "tanh": 1, "gelu": 5, "relu": 3}) == pytest.approx(
        3 / 5
    )


def test_of_three_experts_the_shared_one_answers_everywhere_and_each_other_one_on_its_side():
    assert {frozenset({0, 2}): 0.5, frozenset({1, 2}): 0.5} == topk_gate.REGIONS
    truth = topk_gate.PAPER
    X, y = truth.sample(2000, [torch.Generator().manual_seed(0)])
    above = X[0, :, 0] > 8 / 25
    lines = torch.where(above, -20 * X[0, :, 0] + 15, 20 * X[0, :, 0] - 5)
    spread = torch.where(above, 0.3, 0.4)
    assert abs(float(((y[0] - lines) / spread).std()) - 1) < 5 / np.sqrt(2 * 2000)


def test_figures_are_slopes_with_the_ends_of_their_intervals_and_the_errors_at_both_ends():
    rng = np.random.default_rng(0)
    rows = [(np.exp(0.1 * rng.normal(size=20)) * n**-0.5).tolist() for n in (100, 10_000)]
    found = told("x", RateResult((100, 10_000), {"D": rows, "edge": [[0.0, 1.0], [0.0, 0.0]]}))
    assert found["x_D_low"] < found["x_D"] < found["x_D_high"] and abs(found["x_D"] + 0.5) < 0.05
    assert found["x_D_first"] == pytest.approx(np.mean(rows[0])) and found["x_edge"] == 0.25
