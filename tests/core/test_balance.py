import math

import pytest
import torch

from mixtura.core.balance import (
    device_balance_loss,
    expert_counts,
    load_balance_loss,
    load_statistics,
    router_z_loss,
    sequence_balance_loss,
    updated_bias,
)
from mixtura.core.gates import top_k


def test_three_tokens_by_hand():
    # Visits 2, 1, 0 of 3, times E = 3: load (2, 1, 0). Mean probabilities (1.5, 0.9, 0.6) / 3 = (0.5, 0.3, 0.2).
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.4, 0.5, 0.1]])
    indices = torch.tensor([[0], [0], [1]])
    assert float(load_balance_loss(probs, indices)) == pytest.approx(2 * 0.5 + 1 * 0.3)
    # Devices {0} and {1, 2}: mean loads 2 and 0.5, summed probabilities 0.5 and 0.5.
    assert float(device_balance_loss(probs, indices, [[0], [1, 2]])) == pytest.approx(2 * 0.5 + 0.5 * 0.5)


def test_two_choices_a_token_by_hand():
    # Visits 2, 1, 1 of 4, times E / (K T) = 3/4: load (1.5, 0.75, 0.75). Mean probabilities (0.5, 0.25, 0.25).
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.2, 0.4]])
    indices = torch.tensor([[0, 1], [0, 2]])
    assert float(load_balance_loss(probs, indices)) == pytest.approx(1.5 * 0.5 + 0.75 * 0.25 + 0.75 * 0.25)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert float(router_z_loss(logits)) == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_gradients_agree_with_finite_differences_and_pass_through_probs_only():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    indices = top_k(logits, 2).indices
    assert torch.autograd.gradcheck(lambda x: load_balance_loss(x.softmax(-1), indices), logits)
    assert torch.autograd.gradcheck(lambda x: device_balance_loss(x.softmax(-1), indices, [[0, 3], [1, 2]]), logits)
    assert torch.autograd.gradcheck(router_z_loss, logits)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_even_routing_costs_one_and_one_expert_for_all_costs_their_number(k):
    indices = torch.arange(8 * k).view(8, k) % 4
    assert float(load_balance_loss(torch.full((8, 4), 0.25), indices)) == pytest.approx(1.0)
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert float(load_balance_loss(probs, torch.zeros(8, 1, dtype=torch.long))) == pytest.approx(4.0)


def test_one_device_costs_one_for_any_routing_and_a_device_an_expert_is_the_expert_loss():
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routing = top_k(logits, 2)
    whole = device_balance_loss(routing.probs, routing.indices, [range(6)])
    assert float(whole) == pytest.approx(1.0)
    single = device_balance_loss(routing.probs, routing.indices, [[e] for e in range(6)])
    torch.testing.assert_close(single, load_balance_loss(routing.probs, routing.indices))


def test_losses_do_not_depend_on_the_order_of_tokens_or_the_names_of_experts():
    routing = top_k(torch.randn(20, 5, dtype=torch.float64), 2)
    tokens, new_name = torch.randperm(20), torch.randperm(5)
    want = load_balance_loss(routing.probs, routing.indices)
    torch.testing.assert_close(load_balance_loss(routing.probs[tokens], routing.indices[tokens]), want)
    renamed = load_balance_loss(routing.probs[:, new_name.argsort()], new_name[routing.indices])
    torch.testing.assert_close(renamed, want)


def test_the_sentinel_counts_for_nobody():
    assert expert_counts(torch.tensor([[0, 3], [3, 3]]), 3).tolist() == [1, 0, 0]
    assert load_statistics(torch.tensor([[0, 3], [1, 3]]), 3).share.tolist() == [0.5, 0.5, 0.0]


def test_no_tokens_cost_nothing():
    assert float(load_balance_loss(torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.long))) == 0
    assert float(router_z_loss(torch.zeros(0, 3))) == 0
    assert load_statistics(torch.zeros(0, 2, dtype=torch.long), 3).entropy == 0


def test_statistics_of_an_even_and_a_collapsed_load():
    even = load_statistics(torch.arange(12).view(6, 2) % 4, 4)
    assert (even.entropy, even.variation, even.max_over_mean) == pytest.approx((1.0, 0.0, 1.0))
    collapsed = load_statistics(torch.zeros(6, 1, dtype=torch.long), 4)
    # Shares (1, 0, 0, 0): mean 1/4, variance 3/16, so variation sqrt(3/16) * 4 = sqrt(3).
    assert (collapsed.entropy, collapsed.variation, collapsed.max_over_mean) == pytest.approx((0.0, math.sqrt(3), 4.0))


def test_the_bias_evens_a_gate_out_without_a_loss():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 4, generator=g) + torch.tensor([2.0, 0.0, 0.0, -1.0])
    bias = torch.zeros(4)
    for _ in range(500):
        bias = updated_bias(bias, expert_counts(top_k(logits, 1, select_by=logits + bias).indices, 4), rate=0.01)
    before = load_statistics(top_k(logits, 1).indices, 4)
    after = load_statistics(top_k(logits, 1, select_by=logits + bias).indices, 4)
    # A step of 0.01 logits at the end moves about one token in a hundred.
    assert before.max_over_mean > 2.5 and after.max_over_mean < 1.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: load_balance_loss(torch.ones(2, 3), torch.tensor([[4], [0]])),
            r"indices must be in \[0, 3\], got 0 to 4",
        ),
        (lambda: load_balance_loss(torch.ones(2, 3), torch.tensor([[-1], [0]])), "got -1 to 0"),
        (
            lambda: load_balance_loss(torch.ones(2, 3), torch.tensor([[0]])),
            r"must agree in T, got \(2, 3\) and \(1, 1\)",
        ),
        (lambda: device_balance_loss(torch.ones(1, 3), torch.tensor([[0]]), [[0, 1]]), "each of the 3 experts once"),
        (lambda: device_balance_loss(torch.ones(1, 2), torch.tensor([[0]]), [[0, 1], []]), "none empty"),
        (lambda: updated_bias(torch.zeros(2), torch.zeros(2), rate=-1.0), "rate must be >= 0, got -1.0"),
        (lambda: updated_bias(torch.zeros(2), torch.zeros(3)), r"must have one shape, got \(2,\) and \(3,\)"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3, 4], [5]]])
def test_the_balance_of_sequences_is_the_mean_of_each_by_itself(groups):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(5, 7, 6, dtype=torch.float64, generator=generator).softmax(-1).requires_grad_()
    indices = torch.randint(0, 7, (5, 7, 2), generator=generator)  # 6 is the sentinel
    mask = torch.rand(5, 7, generator=generator) < 0.6
    mask[2] = False
    alone = [
        load_balance_loss(probs[b][mask[b]], indices[b][mask[b]])
        if groups is None
        else device_balance_loss(probs[b][mask[b]], indices[b][mask[b]], groups)
        for b in (0, 1, 3, 4)
    ]
    want, found = torch.stack(alone).mean(), sequence_balance_loss(probs, indices, groups=groups, mask=mask)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, probs)[0] for loss in (found, want)))
