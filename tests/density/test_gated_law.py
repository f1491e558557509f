"""The law of a gated regression, its gradient and information, and the flat ray of a linear gate with temperature."""

import numpy as np
import pytest
import torch
from gated_cases import RULES, law, two_lines
from scipy.optimize import approx_fprime

from mixtura.density.activations import ACTIVATIONS, activation_independence
from mixtura.density.gated_errors import flat_directions
from mixtura.density.gated_law import GateRule, Likelihood, Pairs, evaluate, slow_log_density

each_rule = pytest.mark.parametrize("name", sorted(RULES))


# --- oracle ---------------------------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("n_features", [1, 3])
def test_the_density_is_that_of_a_double_loop_and_its_gradient_that_of_autograd_and_of_differences(name, n_features):
    layout, theta, X, y, weight, pairs = law(n_features)
    likelihood = Likelihood(RULES[name], layout, pairs)
    slow = [slow_log_density(RULES[name], layout, *row) for row in zip(theta, X, y, strict=True)]
    want = (torch.stack(slow) * weight).sum(-1) / weight.sum(-1)
    torch.testing.assert_close(likelihood.value(theta), want, rtol=1e-12, atol=1e-13)
    leaf = theta.clone().requires_grad_()
    (auto,) = torch.autograd.grad(likelihood.value(leaf).sum(), leaf)
    value, gradient = likelihood.at(theta)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, auto, rtol=1e-10, atol=1e-13)
    one = Likelihood(RULES[name], layout, pairs.take(torch.tensor([0])))
    differences = approx_fprime(theta[0].numpy(), lambda t: one.value(torch.from_numpy(t)[None]).item(), 1e-7)
    np.testing.assert_allclose(gradient[0], differences, atol=1e-5)  # half a step times a curvature of up to 100


@each_rule
def test_the_density_integrates_to_one(name):
    layout, theta, *_ = law(n_features=2, n_fits=1)
    y = torch.linspace(-80, 80, 200_001, dtype=torch.float64)
    for x in torch.randn(3, 2, dtype=torch.float64):
        pairs = Pairs.of(x.expand(len(y), 2), y)
        density = evaluate(RULES[name], layout, theta, pairs).log_density[0].exp()
        assert abs(float(torch.trapezoid(density, y)) - 1) < 1e-8


@each_rule
def test_the_information_is_the_mean_outer_product_of_gradients_and_blocks_do_not_show(name, monkeypatch):
    layout, theta, X, y, weight, pairs = law()
    likelihood = Likelihood(RULES[name], layout, pairs)
    want = torch.zeros(2, layout.n_parameters, layout.n_parameters, dtype=torch.float64)
    for n in range(X.shape[1]):
        _, g = Likelihood(RULES[name], layout, Pairs.of(X[:, n : n + 1], y[:, n : n + 1])).at(theta)
        want += (weight[:, n] / weight.sum(-1))[:, None, None] * g[:, :, None] * g[:, None]
    torch.testing.assert_close(likelihood.information(theta), want, rtol=1e-10, atol=1e-13)
    monkeypatch.setattr(Likelihood, "width", lambda *_: 7)
    torch.testing.assert_close(likelihood.at(theta)[1], Likelihood(RULES[name], layout, pairs).at(theta)[1])
    torch.testing.assert_close(likelihood.information(theta), want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activations_slope_is_its_derivative(name):
    z = torch.linspace(-4, 4, 57, dtype=torch.float64).requires_grad_()  # not 0, where ReLU has none
    z = (z + 0.01).detach().requires_grad_()
    (want,) = torch.autograd.grad(ACTIVATIONS[name].value(z).sum(), z)
    torch.testing.assert_close(ACTIVATIONS[name].slope(z.detach()), want, rtol=1e-12, atol=1e-15)


# --- the flat ray ---------------------------------------------------------------------------------------------------


def test_along_the_ray_of_slopes_bias_and_temperature_a_linear_gate_does_not_change_and_a_tanh_gate_does():
    values = {}
    for rule in (GateRule("temperature"), GateRule("activation")):
        truth = two_lines(rule)
        X, y = truth.sample(100_000, [torch.Generator().manual_seed(0)])
        likelihood = Likelihood(rule, truth.layout, Pairs.of(X, y))
        gradient = likelihood.at(truth.theta)[1][0]
        parts = truth.layout.split(gradient[None])
        own = truth.layout.split(truth.theta)
        along = (parts.slope * own.slope).sum() + (parts.bias * own.bias).sum() + parts.log_temperature.sum()
        free = truth.layout.free(rule, temperature=True).numpy()
        values[rule.kind] = (
            abs(float(along)),
            flat_directions(likelihood.information(truth.theta)[0].numpy(), free)[0][0],
        )
    assert values["temperature"][0] < 1e-12 and values["temperature"][1] < 1e-10
    assert values["activation"][1] > 1e-4


def test_homogeneous_activations_have_no_independence_and_the_others_rank_as_they_behave():
    found = {name: activation_independence(name) for name in ACTIVATIONS}
    assert all(found[name] < 1e-8 for name in ("identity", "relu", "square"))
    assert found["tanh"] > found["sigmoid"] > found["softplus"] > found["gelu"] > 1e-4
    assert activation_independence("tanh", order=2) > 1e-8 > activation_independence("relu", order=2)


def test_the_activations_own_flag_agrees_with_the_measured_independence():
    for name, activation in ACTIVATIONS.items():
        assert activation.homogeneous == (activation_independence(name) < 1e-8), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "swish"}, "activation must be one of"),
        ({"activation": "tanh", "order": 3}, "order must be 1 or 2"),
        ({"activation": "tanh", "slopes": (1.0, 1.0)}, "slopes must be different"),
        ({"activation": "tanh", "interval": (1.0, 1.0)}, "interval must rise"),
    ],
)
def test_a_test_of_an_activation_that_cannot_be_made_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        activation_independence(**arguments)


def test_pairs_that_are_thinned_are_spread_evenly_and_weigh_one_together():
    *_, pairs = law(n=60)
    few = pairs.thinned(20)
    assert few.n == 20
    torch.testing.assert_close(few.x, pairs.x[..., ::3])
    torch.testing.assert_close(few.weight.sum(-1), torch.ones(2, dtype=torch.float64))
    assert pairs.thinned(60) is pairs
