"""Rate experiments: draws from the right law, slopes and intervals, a run that goes on where it was cut off."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_cases import RULES, two_lines
from scipy.stats import norm

from mixtura.core.checkpoint import read_json
from mixtura.density.gated_law import GateRule, Likelihood, Pairs
from mixtura.density.rates import Fits, RateResult, Truth, fit_near, rate_experiment, total_variation
from mixtura.density.voronoi import MixingMeasure, voronoi_loss

LOSS = {"loss": lambda fits, truth: [voronoi_loss(m, truth.measure, "linear-gate") for m in fits.measures()]}


@pytest.mark.parametrize("name", sorted(RULES))
def test_at_the_truth_the_mean_gradient_of_draws_is_zero(name):
    base = two_lines(RULES[name])
    truth = Truth(base.measure.pick([0, 1, 1])._replace(intercept=np.array([1.0, -3.0, -1.0])), RULES[name])
    X, y = truth.sample(20_000, [torch.Generator().manual_seed(0)])
    likelihood = Likelihood(truth.rule, truth.layout, Pairs.of(X, y))
    gradient = likelihood.at(truth.theta)[1][0]
    spread = likelihood.information(truth.theta)[0].diagonal().sqrt()
    # Scores have mean 0 under their own law; 5 standard errors over 16 parameters: one false alarm in 100,000.
    assert (gradient.abs() <= 5 * spread / 20_000**0.5 + 1e-12).all()


def test_total_variation_is_the_double_integral():
    truth = two_lines(GateRule("activation"))
    theta = truth.theta + 0.1 * torch.randn(1, truth.layout.n_parameters, generator=torch.Generator().manual_seed(2))
    fits = Fits(truth.rule, truth.layout, theta, torch.zeros(1), torch.zeros(1))
    x, y = (np.arange(n) + 0.5 for n in (400, 4000))
    x, y = (-1 + 2 * x / 400)[:, None], -9 + 18 * y / 4000  # midpoints; lines and ten standard deviations lie within

    def density(row):
        parts = truth.layout.split(row[None])
        tau, sd = float(parts.log_temperature.exp()), (parts.log_variance[0] / 2).exp().numpy()
        logit = (np.tanh(x * parts.slope[0, :, 0].numpy()) + parts.bias[0].numpy()) / tau
        gate = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
        lines = x * parts.coef[0, :, 0].numpy() + parts.intercept[0].numpy()
        return sum(gate[:, i, None] * norm.pdf(y, lines[:, i, None], sd[i]) for i in range(2))

    want = np.abs(density(theta[0]) - density(truth.theta[0])).mean() * 18 / 2
    # The difference has kinks, at which trapezoids of a thirtieth of a standard deviation are off by 1e-4 or so.
    assert total_variation(fits, truth)[0] == pytest.approx(want, abs=3e-4)
    same = Fits(truth.rule, truth.layout, truth.theta, torch.zeros(1), torch.zeros(1))
    assert total_variation(same, truth)[0] < 1e-12


def test_slopes_and_intervals_of_errors_with_a_known_rate():
    rng = np.random.default_rng(0)
    sizes = (100, 1000, 10_000)
    values = {"root": [(np.abs(rng.normal(size=200)) * n**-0.5).tolist() for n in sizes]}
    result = RateResult(sizes, values)
    low, high = result.interval("root")
    # The mean of 200 half-normals is off by 5 %: the slope over a factor of 100 by 0.02.
    assert low < -0.5 < high and abs(result.slope("root") + 0.5) < 0.06 and high - low < 0.1
    assert result.slopes["root"]["median"] == result.slope("root", "median")
    back = RateResult.from_json(result.to_json())
    assert back.slope("root") == result.slope("root") and back.interval("root") == (low, high)


def test_a_run_that_was_cut_off_goes_on_and_ends_as_one_that_was_not(tmp_path):
    truth = two_lines(GateRule("temperature"))
    fit, calls = fit_near(truth), []

    def counted(X, y, generators):
        calls.append(len(y))
        return fit(X, y, generators)

    whole = rate_experiment(truth, counted, (100, 200), 4, LOSS, 1)
    assert calls == [4, 4]
    rate_experiment(truth, counted, (100, 200), 3, LOSS, 1, folder=tmp_path, at_once=2)
    calls.clear()
    more = rate_experiment(truth, counted, (100, 200), 4, LOSS, 1, folder=tmp_path)
    assert calls == [1, 1]
    # Fitted together or alone, sums are ordered differently in the last digits.
    np.testing.assert_allclose(more.values["loss"], whole.values["loss"], rtol=1e-4)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from gated_cases import two_lines
from mixtura.core.checkpoint import write_json
from mixtura.density.gated_law import GateRule
from mixtura.core.processes import join
from mixtura.density.rates import fit_near, rate_experiment
from mixtura.density.voronoi import voronoi_loss

LOSS = {"loss": lambda fits, truth: [voronoi_loss(m, truth.measure, "linear-gate") for m in fits.measures()]}
truth, folder = two_lines(GateRule("temperature")), Path(sys.argv[2])
result = rate_experiment(truth, fit_near(truth), (100, 200), 5, LOSS, 1, folder=folder, at_once=2, distributed=True)
write_json(folder / f"rank{join(True).rank}.json", result.to_json())
try:
    rate_experiment(truth, fit_near(truth), (100, 200), 5, {"odd": lambda fits, truth: [1.0]}, 1, distributed=True)
except ValueError as error:
    write_json(folder / f"error{join(True).rank}.json", {"said": str(error)})
"""


def test_two_processes_share_the_replicates_and_both_have_the_result_of_one(tmp_path):
    truth = two_lines(GateRule("temperature"))
    alone = rate_experiment(truth, fit_near(truth), (100, 200), 5, LOSS, 1)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = RateResult.from_json(read_json(tmp_path / f"rank{rank}.json"))
        # Fitted together or alone, sums are ordered differently in the last digits.
        np.testing.assert_allclose(found.values["loss"], alone.values["loss"], rtol=1e-4)
        assert "process 0: metric 'odd' gave 1 numbers for 3 fits" in read_json(tmp_path / f"error{rank}.json")["said"]
    kept = read_json(next(tmp_path.glob("n100-*")))
    assert sorted(kept) == ["0", "1", "2", "3", "4"]
    with pytest.raises(ValueError, match="needs a process group"):
        rate_experiment(truth, fit_near(truth), (100, 200), 5, LOSS, 1, distributed=True)


def test_copies_and_omissions_start_where_they_should():
    truth = two_lines(GateRule("top-k", top_k=1))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    X, y = truth.sample(300, generators)
    over = fit_near(truth, rule=GateRule("top-k", top_k=2), copies=(0,), em_iterations=0)(X, y, generators)
    assert over.layout.n_experts == 3 and len(over.measures()) == 2
    one = fit_near(truth, rule=GateRule("softmax"), drop=(0,))(X, y, generators)
    assert one.layout.n_experts == 1
    assert bool((over.value > one.value).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicates": 2}, "replicates must be at least 3"),
        ({"sizes": (100,)}, "sizes must be at least 2 and rise"),
        ({"sizes": (200, 100)}, "sizes must be at least 2 and rise"),
        ({"metrics": {"odd": lambda fits, truth: [1.0]}}, "gave 1 numbers for 3 fits"),
    ],
)
def test_an_experiment_that_cannot_be_run_says_why(change, message):
    truth = two_lines(GateRule("softmax"))
    arguments = {"sizes": (50, 100), "replicates": 3, "metrics": LOSS} | change
    with pytest.raises(ValueError, match=message):
        rate_experiment(truth, fit_near(truth), **arguments)


def test_questions_that_a_result_cannot_answer_say_why():
    with pytest.raises(ValueError, match="at least 3 replicates and 2 sizes"):
        RateResult((10, 20), {"a": [[1.0], [1.0]]}).slope("a")
    with pytest.raises(ValueError, match="metric must be one of"):
        RateResult((10, 20), {"a": [[1.0] * 3] * 2}).summary("b")
    wide = Truth(MixingMeasure.of([1, 1], [[1, 0], [0, 0]], 1, [[1, 0], [0, 1]], [0, 0], [1, 1]), GateRule())
    with pytest.raises(ValueError, match="quadrature in one feature"):
        total_variation(Fits(wide.rule, wide.layout, wide.theta, torch.zeros(1), torch.zeros(1)), wide)
