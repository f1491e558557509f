import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mixtura.core.capacity import capacity, capacity_select
from mixtura.core.gates import (
    Gate,
    GateConfig,
    TemperatureSchedule,
    activation_gate,
    best_experts,
    limit_capacity,
    log_weights,
    soft,
    temperature_gate,
    top_k,
)


def logits(n_tokens=50, n_experts=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    # Rounded to halves, so that about every other row has a tie.
    return (torch.randn(n_tokens, n_experts, generator=g, dtype=dtype) * 2).round() / 2


# --- oracle ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("renormalise", [True, False])
def test_top_k_equals_a_sort_by_value_and_then_by_index(k, renormalise):
    x = logits()
    routing = top_k(x, k, renormalise=renormalise)
    for row, indices, weights in zip(x.tolist(), routing.indices.tolist(), routing.weights.tolist(), strict=True):
        want = sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]
        assert indices == want
        below = want if renormalise else range(len(row))
        total = sum(math.exp(row[e]) for e in below)
        assert weights == pytest.approx([math.exp(row[e]) / total for e in want], rel=1e-12)


def test_renormalised_weights_are_those_of_mixtral_and_the_others_those_of_switch():
    x = torch.randn(20, 8, dtype=torch.float64)
    probs, chosen = F.softmax(x, -1).topk(2)
    torch.testing.assert_close(top_k(x, 2).weights, probs / probs.sum(-1, keepdim=True))
    torch.testing.assert_close(top_k(x, 2, renormalise=False).weights, probs)
    assert torch.equal(top_k(x, 2).indices, chosen)


@pytest.mark.parametrize(("n_experts", "k"), [(4, 1), (5, 3), (5, 5), (12, 2), (12, 12)])
def test_the_mask_of_the_best_and_their_log_weights_are_those_of_top_k(n_experts, k):
    x = logits(n_tokens=10_000, n_experts=n_experts)
    routing = top_k(x, k)
    chosen = torch.zeros_like(x, dtype=torch.bool).scatter(-1, routing.indices, True)
    assert torch.equal(best_experts(x, k), chosen)
    assert torch.equal(best_experts(x.T.contiguous(), k, dim=0), chosen.T)
    log_weights_TE = log_weights(x, chosen)
    torch.testing.assert_close(log_weights_TE.exp().gather(-1, routing.indices), routing.weights, rtol=1e-14, atol=0)
    assert torch.isneginf(log_weights_TE[~chosen]).all()
    if k == n_experts:
        assert torch.equal(log_weights_TE, log_weights(x))


def test_log_weights_keep_the_size_of_weights_that_underflow_and_give_the_unchosen_no_gradient():
    x = torch.tensor([[0.0, -2000.0, 3.0]], dtype=torch.float64, requires_grad=True)
    found = log_weights(x, torch.tensor([[True, True, False]]))
    assert found[0, 1].item() == -2000.0
    (grad,) = torch.autograd.grad(found[0, 0], x)
    assert grad[0, 2] == 0 and grad.isfinite().all()


def test_gradients_agree_with_finite_differences_and_unchosen_experts_get_none():
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: top_k(x, 2).weights, x)
    assert torch.autograd.gradcheck(lambda x: temperature_gate(x, 0.7).weights, x)
    routing = top_k(x, 2)
    (grad,) = torch.autograd.grad(routing.weights[:, 0].sum(), x)
    unchosen = torch.ones_like(grad, dtype=torch.bool).scatter(-1, routing.indices, False)
    assert grad[unchosen].abs().max() == 0


def test_capacity_keeps_the_first_the_best_or_a_random_few():
    indices = torch.tensor([[0], [1], [0], [0], [2], [0]])  # 2 is the sentinel
    probs = torch.tensor([[0.1], [0.9], [0.3], [0.3], [0.8], [0.2]])
    first = capacity_select(indices, 2, 2, policy="prefix")
    assert first.flatten().tolist() == [True, True, True, False, False, False]
    best = capacity_select(indices, 2, 2, policy="probs", probs=probs)
    assert best.flatten().tolist() == [False, True, True, True, False, False]
    spans = capacity_select(indices, 2, 2, policy="group", groups=2)  # one place each in tokens 0-2 and 3-5
    assert spans.flatten().tolist() == [True, True, False, True, False, False]
    chance = capacity_select(indices, 2, 2, generator=torch.Generator().manual_seed(0))
    assert int(chance[[0, 2, 3, 5]].sum()) == 2 and bool(chance[1]) and not bool(chance[4])


def test_random_selection_favours_no_position():
    g = torch.Generator().manual_seed(0)
    indices, n = torch.zeros(8, 1, dtype=torch.long), 4000
    kept = sum(capacity_select(indices, 1, 2, generator=g).flatten().float() for _ in range(n)) / n
    # Each position stays with probability 1/4; five standard errors are 5 * sqrt(3/16 / 4000) = 0.034.
    assert (kept - 0.25).abs().max() < 0.034


# --- invariance -----------------------------------------------------------------------------------------------------


def test_a_row_alone_is_routed_as_in_its_batch_also_under_autocast_in_bfloat16():
    gate = Gate(16, 8, GateConfig(k=2), generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = gate(x)
        assert together.logits.dtype == torch.float32 and together.weights.dtype == torch.float32
        for t in range(64):
            alone = gate(x[t : t + 1])
            assert torch.equal(alone.indices[0], together.indices[t])
            torch.testing.assert_close(alone.weights[0], together.weights[t])


def test_the_same_seed_gives_the_same_choice():
    def choose(seed):
        return top_k(torch.zeros(30, 4), 1, noise=1.0, generator=torch.Generator().manual_seed(seed)).indices

    assert torch.equal(choose(0), choose(0)) and not torch.equal(choose(0), choose(1))


def test_leading_dimensions_are_flattened():
    gate = Gate(5, 4, GateConfig(k=2))
    x = torch.randn(2, 3, 5)
    assert torch.equal(gate(x).indices, gate(x.view(6, 5)).indices)


# --- limit ----------------------------------------------------------------------------------------------------------


def test_top_k_of_all_experts_is_the_soft_gate():
    x = logits()
    every, routing = soft(x), top_k(x, 6)
    torch.testing.assert_close(torch.zeros_like(x).scatter(-1, routing.indices, routing.weights), every.weights)
    torch.testing.assert_close(routing.probs, every.probs)


def test_noise_of_zero_is_no_noise_and_much_noise_is_a_fair_lottery():
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_k(x, 2, noise=0.0).indices, top_k(x, 2).indices)
    chosen = top_k(x, 1, noise=1e6, generator=torch.Generator().manual_seed(0)).indices
    # Five standard errors of a share of 1/4 over 4000 tokens: 5 * sqrt(3/16 / 4000) = 0.034.
    assert (chosen.flatten().bincount() / 4000 - 0.25).abs().max() < 0.034


def test_noise_moves_the_choice_but_not_the_logits():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    noisy = top_k(x, 1, renormalise=False, noise=3.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noisy.logits, x)
    torch.testing.assert_close(noisy.weights, x.softmax(-1).gather(-1, noisy.indices))


def test_temperature_goes_from_even_to_one_hot_and_the_threshold_cuts():
    x = torch.tensor([[0.0, 1.0, 2.0]])
    torch.testing.assert_close(temperature_gate(x, 1e6).weights, torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(temperature_gate(x, 1e-3).weights, torch.tensor([[0.0, 0.0, 1.0]]))
    cut = temperature_gate(x, 0.5, threshold=0.05)
    assert cut.indices.tolist() == [[3, 1, 2]] and cut.weights[0, 0] == 0
    torch.testing.assert_close(cut.weights[0, 1:], (x / 0.5).softmax(-1)[0, 1:])
    only_best = temperature_gate(torch.zeros(1, 3), 1.0, threshold=0.9)
    assert only_best.indices.tolist() == [[0, 3, 3]]


def test_a_temperature_can_be_learned():
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: temperature_gate(x, t).weights, temperature)


@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_the_schedule_starts_ends_and_falls(shape):
    schedule = TemperatureSchedule(start=2.0, end=0.5, steps=10, shape=shape)
    values = [schedule.at(step) for step in range(13)]
    assert values[0] == pytest.approx(2.0) and values[10:] == pytest.approx([0.5] * 3)
    assert all(a > b for a, b in itertools.pairwise(values[:11]))
    assert schedule.at(5) == pytest.approx(1.25 if shape == "linear" else 1.0)


def test_the_activation_gate_with_the_identity_is_the_softmax_of_slopes_and_bias():
    slopes, bias = logits(dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    routing = activation_gate(slopes, bias, activation=lambda x: x)
    torch.testing.assert_close(routing.weights, (slopes + bias).softmax(-1))
    bent = activation_gate(slopes, bias, temperature=0.5)
    torch.testing.assert_close(bent.weights, ((slopes.tanh() + bias) / 0.5).softmax(-1))


def test_a_capacity_no_expert_reaches_changes_nothing():
    routing = top_k(logits(), 2)
    limited = limit_capacity(routing, 100)
    assert torch.equal(limited.indices, routing.indices) and torch.equal(limited.weights, routing.weights)


def test_over_capacity_becomes_the_sentinel_at_weight_zero_without_renormalising():
    x = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    routing = limit_capacity(top_k(x, 2), 2)
    assert routing.indices.tolist() == [[0, 1], [0, 1], [2, 2]]
    assert routing.weights[2].tolist() == [0, 0]
    torch.testing.assert_close(routing.weights[:2].sum(-1), torch.ones(2))


def test_the_gate_limits_capacity_at_random_in_training_and_by_position_in_evaluation():
    config = GateConfig(k=1, capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=0)
    gate = Gate(3, 2, config)
    x = torch.ones(10, 3)  # every token wants the same expert, which has 5 places
    gate.eval()
    assert gate(x).indices.flatten().eq(2).tolist() == [False] * 5 + [True] * 5
    gate.train()
    dropped = gate(x, torch.Generator().manual_seed(0)).indices.flatten().eq(2)
    assert int(dropped.sum()) == 5 and dropped.tolist() != [False] * 5 + [True] * 5


def test_the_balance_bias_moves_the_choice_and_not_the_weight():
    gate = Gate(3, 2, GateConfig(k=1, renormalise=False))
    x = torch.randn(6, 3)
    before = gate(x)
    gate.balance_bias += torch.tensor([100.0, 0.0])
    after = gate(x)
    assert after.indices.eq(0).all()
    torch.testing.assert_close(after.weights[:, 0], before.probs[:, 0])


# --- contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(torch.zeros(1, 3), 4), "k must be between 1 and n_experts=3, got 4"),
        (lambda: top_k(torch.zeros(1, 3), 0), "k must be between 1 and n_experts=3, got 0"),
        (lambda: top_k(torch.zeros(3), 1), r"logits must have shape \(T, E\), got \(3,\)"),
        (lambda: top_k(torch.zeros(1, 3), 1, noise=-1), "noise must be >= 0, got -1"),
        (lambda: top_k(torch.zeros(1, 3), 1, select_by=torch.zeros(2)), "select_by must end in E=3"),
        (lambda: temperature_gate(torch.zeros(1, 3), 0.0), "temperature must be > 0, got 0.0"),
        (lambda: temperature_gate(torch.zeros(1, 3), 1.0, threshold=1.0), r"threshold must be in \[0, 1\)"),
        (lambda: TemperatureSchedule(end=0.0), "start and end must be > 0"),
        (lambda: TemperatureSchedule(steps=0), "steps must be at least 1, got 0"),
        (lambda: TemperatureSchedule(shape="cosine"), "shape must be one of"),
        (lambda: GateConfig(k=0), "k must be at least 1, got 0"),
        (lambda: GateConfig(k=1, noise=-1.0), "noise must be >= 0, got -1.0"),
        (lambda: GateConfig(k=1, policy="fair"), r"policy must be one of \['prefix', 'probs', 'random'\], got 'fair'"),
        (lambda: Gate(3, 2, GateConfig(k=3)), "k must be between 1 and n_experts=2, got 3"),
        (lambda: capacity(8, 2, 0.0), "factor must be > 0, got 0.0"),
        (lambda: capacity_select(torch.zeros(1, 1).long(), 1, 1, policy="fair"), "policy must be one of"),
        (lambda: capacity_select(torch.zeros(1, 1).long(), 1, 1, policy="probs"), "probs goes with policy 'probs'"),
        (lambda: capacity_select(torch.zeros(1, 1).long(), 1, -1), "limit must be >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integer_logits_are_a_type_error():
    with pytest.raises(TypeError, match="floating point"):
        top_k(torch.zeros(1, 3, dtype=torch.long), 1)


@pytest.mark.parametrize(("factor", "minimum", "places"), [(1.0, 4, 13), (1.25, 4, 16), (0.1, 4, 4), (0.1, 0, 2)])
def test_capacity_is_the_share_rounded_up_and_at_least_the_minimum(factor, minimum, places):
    assert capacity(100, 8, factor, minimum=minimum) == places


def test_no_tokens_are_routed_nowhere():
    routing = top_k(torch.zeros(0, 3), 2)
    assert routing.indices.shape == (0, 2)
    assert capacity_select(routing.indices, 3, 2, policy="prefix").shape == (0, 2)
