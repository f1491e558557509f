"""EM and the climb: the experts' step, the gate's step, and a likelihood that never falls."""

import numpy as np
import pytest
import torch
from gated_cases import RULES, law, two_lines
from scipy.optimize import minimize
from sklearn.linear_model import LinearRegression, LogisticRegression

from mixtura.core.gates import log_weights
from mixtura.density.ascent import ascend
from mixtura.density.gated_em import (
    Box,
    GateBound,
    Given,
    expectation,
    experts_step,
    fit_em,
    gate_step,
)
from mixtura.density.gated_law import GateRule, Layout, Likelihood, Pairs, evaluate, gate_logits
from mixtura.density.gated_polish import best_shift, move_regions, polish

each_rule = pytest.mark.parametrize("name", sorted(RULES))


def given(rule, layout, pairs):
    return Given(rule, layout, pairs, layout.free(rule, temperature=True), Box())


def test_the_experts_step_is_weighted_least_squares():
    layout, theta, X, y, weight, pairs = law(n_features=3)
    g = given(RULES["softmax"], layout, pairs)
    _, r_REN, _, _ = expectation(g, theta)
    parts = layout.split(experts_step(g, theta, r_REN))
    for fit in range(2):
        for i in range(3):
            w = (r_REN[fit, i] * weight[fit]).numpy()
            line = LinearRegression().fit(X[fit].numpy(), y[fit].numpy(), sample_weight=w)
            np.testing.assert_allclose(parts.coef[fit, i], line.coef_, atol=1e-8)
            np.testing.assert_allclose(parts.intercept[fit, i], line.intercept_, atol=1e-8)
            residual = y[fit].numpy() - line.predict(X[fit].numpy())
            np.testing.assert_allclose(parts.log_variance[fit, i].exp(), w @ residual**2 / w.sum(), rtol=1e-8)


def test_the_gate_step_is_multinomial_logistic_regression_with_weights():
    layout, theta, X, _, _, pairs = law(n_features=2, n=300, n_fits=1, weighted=False)
    g = given(RULES["softmax"], layout, pairs)
    r_REN = torch.rand(1, 3, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4
    r_REN = r_REN / r_REN.sum(1, keepdim=True)
    parts = layout.split(theta)
    start = layout.join(parts._replace(slope=parts.slope * 0, bias=parts.bias * 0))
    found = layout.split(gate_step(g, start, r_REN, None, max_iter=100, learn_temperature=False))
    rows = np.tile(X[0].numpy(), (3, 1))
    peer = LogisticRegression(C=1e12, tol=1e-12, max_iter=5000).fit(
        rows, np.repeat(np.arange(3), 300), sample_weight=r_REN[0].numpy().ravel()
    )
    np.testing.assert_allclose(found.slope[0], peer.coef_ - peer.coef_[-1], atol=1e-5)
    np.testing.assert_allclose(found.bias[0], peer.intercept_ - peer.intercept_[-1], atol=1e-5)


@each_rule
def test_the_gates_bound_has_the_gradient_of_autograd_and_where_logits_are_linear_minus_its_curvature_as_metric(name):
    rule = RULES[name]
    layout, theta, _, _, _, pairs = law(n_fits=1)
    _, r_REN, mask, _ = expectation(given(rule, layout, pairs), theta)
    bound = GateBound(rule, layout, pairs, r_REN, mask)

    def value(t):
        parts = layout.split(t)
        log_gate = log_weights(gate_logits(rule, parts, pairs.x)[1], mask, dim=1)
        return (torch.where(r_REN > 0, r_REN * log_gate, 0.0) * pairs.weight[:, None]).sum()

    leaf = theta.clone().requires_grad_()
    (auto,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(bound.at(theta)[0].sum(), value(theta), rtol=1e-12, atol=0)
    torch.testing.assert_close(bound.at(theta)[1], auto, rtol=1e-10, atol=1e-13)
    if name in ("softmax", "top-k"):
        curvature = torch.autograd.functional.hessian(value, theta)[0, :, 0]
        torch.testing.assert_close(bound.information(theta)[0], -curvature, rtol=1e-9, atol=1e-12)


@each_rule
@pytest.mark.parametrize("n_features", [1, 2])
def test_the_likelihood_never_falls_through_em_and_the_climb(name, n_features):
    layout, theta, _, _, _, pairs = law(n_features, n=200)
    g = given(RULES[name], layout, pairs)
    theta = theta * 0.5
    theta[:, ~g.free] = 0.0
    theta, values = fit_em(g, theta, max_iter=15, tol=0.0)
    rises = torch.stack(values).diff(dim=0)
    assert rises.min() > -1e-10
    end = polish(g, theta, max_iter=40)
    assert (end.value >= values[-1] - 1e-12).all()


@each_rule
def test_neither_part_of_ems_bound_falls_in_a_step(name):
    rule = RULES[name]
    layout, theta, _, _, _, pairs = law(n=200)
    g = given(rule, layout, pairs)
    theta = (theta * 0.5).masked_fill(~g.free, 0.0)

    def experts_part(t):
        found = evaluate(GateRule("softmax"), layout, t, pairs)  # its densities are those of every rule
        return ((found.joint - found.log_gate) * r_REN * pairs.weight[:, None]).sum((1, 2))

    for _ in range(5):
        _, r_REN, mask, _ = expectation(g, theta)
        moved = experts_step(g, theta, r_REN)
        assert (experts_part(moved) >= experts_part(theta) - 1e-10).all()
        bound = GateBound(rule, layout, pairs, r_REN, mask)
        stepped = gate_step(g, moved, r_REN, mask, max_iter=4, learn_temperature=rule.kind == "activation")
        assert (bound.value(stepped) >= bound.value(moved) - 1e-10).all()
        theta = stepped


def test_the_climb_ends_where_scipys_ends():
    rule = GateRule("activation")
    truth = two_lines(rule)
    X, y = truth.sample(2000, [torch.Generator().manual_seed(3)])
    likelihood = Likelihood(rule, truth.layout, Pairs.of(X, y))
    free = truth.layout.free(rule, temperature=True)
    lower, upper = Box().edges(truth.layout)
    end = ascend(likelihood, truth.theta, free=free, lower=lower, upper=upper)

    def loss(values):
        theta = truth.theta.clone()
        theta[0, free] = torch.from_numpy(values)
        value, gradient = likelihood.at(theta)
        return -value.item(), -gradient[0, free].numpy()

    peer = minimize(loss, truth.theta[0, free].numpy(), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-8})
    assert end.gradient.item() < 1e-7
    assert end.value.item() >= -peer.fun - 1e-12
    np.testing.assert_allclose(end.theta[0, free], peer.x, atol=1e-4)


def test_fits_climbed_together_end_where_each_ends_alone():
    rule = GateRule("temperature")
    truth = two_lines(rule)
    X, y = truth.sample(500, [torch.Generator().manual_seed(s) for s in range(4)])
    free = truth.layout.free(rule, temperature=True)
    lower, upper = Box().edges(truth.layout)
    climb = {"free": free, "lower": lower, "upper": upper}
    start = truth.theta.expand(4, -1) + 0.2 * free * torch.randn(
        4, len(free), generator=torch.Generator().manual_seed(1)
    )
    together = ascend(Likelihood(rule, truth.layout, Pairs.of(X, y)), start, **climb)
    for i in range(4):
        alone = ascend(Likelihood(rule, truth.layout, Pairs.of(X[i], y[i])), start[i : i + 1], **climb)
        torch.testing.assert_close(together.value[i : i + 1], alone.value, rtol=1e-10, atol=0)


def test_an_expert_without_pairs_keeps_what_it_had_and_a_parameter_stays_in_its_box():
    layout, theta, _, _, _, pairs = law()
    g = given(RULES["softmax"], layout, pairs)
    r_REN = torch.zeros(2, 3, pairs.n, dtype=torch.float64)
    r_REN[:, 0] = 1.0
    moved = layout.split(experts_step(g, theta, r_REN))
    torch.testing.assert_close(moved.coef[:, 1:], layout.split(theta).coef[:, 1:])
    box = Box(largest=0.1)
    lower, upper = box.edges(layout)
    end = ascend(g.likelihood, theta.clamp(lower, upper), free=g.free, lower=lower, upper=upper, max_iter=30)
    assert (end.theta >= lower).all() and (end.theta <= upper).all()


def test_moving_regions_finds_a_border_that_the_gradient_cannot_see():
    rule, layout = GateRule("top-k", top_k=1, top_k_bias=True), Layout(2, 1)
    x = torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None]
    y = torch.where(x[:, 0] > 0.3, 5.0, -5.0) + 0.1 * torch.sin(50 * x[:, 0])
    theta = torch.tensor([[4.0, 0.0, -2.0, 0.0, 0.0, 0.0, 5.0, -5.0, -2.0, -2.0, 0.0]], dtype=torch.float64)
    g = given(rule, layout, Pairs.of(x, y))
    assert g.likelihood.at(theta)[1][0, [0, 2]].abs().max() == 0
    moved = layout.split(move_regions(g, theta))
    assert abs(float(-moved.bias[0, 0] / moved.slope[0, 0, 0]) - 0.3) < 0.005  # the spacing of the inputs


def test_the_best_shift_is_that_of_a_search_over_all_places():
    g = torch.Generator().manual_seed(0)
    behind, along, gain = (torch.randn(20, 9, generator=g, dtype=torch.float64) for _ in range(3))
    along[:, 0] = 0.0

    def total(t):
        return torch.where(t[:, None] * along > behind, gain, 0.0).sum(1)

    edges = (behind[:, 1:] / along[:, 1:]).sort(1).values
    places = torch.cat([edges[:, :1] - 1, (edges[:, 1:] + edges[:, :-1]) / 2, edges[:, -1:] + 1], 1)
    best = torch.stack([total(t) for t in places.T]).amax(0)
    torch.testing.assert_close(total(best_shift(behind, along, gain)), best, rtol=0, atol=1e-12)


def test_with_one_active_expert_borders_end_where_no_single_parameter_can_raise_the_likelihood():
    rule, layout = GateRule("top-k", top_k=1, top_k_bias=True), Layout(3, 2)
    _, theta, _, _, _, pairs = law(2, n=150)
    g = given(rule, layout, pairs)
    theta = theta.masked_fill(~g.free, 0.0)
    moved = move_regions(g, theta)
    value = g.likelihood.value(moved)
    assert (value > g.likelihood.value(theta) + 0.1).all()
    for p in (g.free & layout.mask("slope", "bias")).nonzero()[:, 0].tolist():
        for shift in np.linspace(-3, 3, 61):
            tried = moved.clone()
            tried[:, p] += shift
            assert (g.likelihood.value(tried) <= value + 1e-9).all()
