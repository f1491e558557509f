"""The gate that reads sparsity off the experts' weights, against measured activity, finite differences and its sign."""

import pytest
import torch

from mixtura.core.sparsity_gate import SparsityAwareGate, column_statistics, expected_active, sparsity_scores


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal_experts(n_units=20_000, width=6, n_experts=3):
    """Columns drawn from normals of their own means and spreads, which is what the diagonal statistics assume."""
    g = seeded()
    means, spreads = torch.randn(n_experts, 1, width, generator=g), torch.rand(n_experts, 1, width, generator=g) + 0.2
    weight = torch.randn(n_experts, n_units, width, generator=g) * spreads + 0.4 * means
    bias = torch.randn(n_experts, n_units, generator=g) * 0.5 + 0.3
    return weight, bias


@pytest.mark.parametrize("statistics", ["diagonal", "full"])
@pytest.mark.parametrize("biased", [True, False])
def test_expected_activity_is_the_measured_share_of_active_units(statistics, biased):
    weight, bias = normal_experts()
    bias = bias if biased else None
    x = torch.randn(200, 6, generator=seeded(1))
    z = torch.einsum("td,ehd->teh", x, weight) + (0 if bias is None else bias)
    fired = (z > 0).float().mean(-1)
    assert fired.std() > 0.1  # there is something to tell apart
    # Standard error of a share of 20,000 is at most 0.0035; 600 shares lie within three and a half of them.
    assert (expected_active(x, weight, bias, statistics=statistics) - fired).abs().max() <= 0.0125
    assert (expected_active(x, weight, bias, statistics=statistics) - fired).abs().mean() <= 0.004


def test_full_statistics_are_the_exact_mean_and_variance_over_the_units_of_any_weights():
    weight, bias, x = (torch.rand(s, generator=seeded(), dtype=torch.float64) ** 3 for s in [(2, 7, 3), (2, 7), (5, 3)])
    z = torch.einsum("td,ehd->teh", x, weight) + bias
    want = -torch.erf(z.mean(-1) / (2 * (z.var(-1, correction=0) + 1e-6)).sqrt())
    torch.testing.assert_close(sparsity_scores(x, weight, bias, statistics="full"), want, rtol=1e-10, atol=1e-10)
    assert (sparsity_scores(x, weight, bias) - want).abs().max() > 1e-3  # the diagonal leaves out the covariances


def test_the_diagonal_score_by_hand():
    # Columns (1, 3) and (0, -2): means 2, -1 and variances 1, 1. At x = (2, 1): m = 3, v = 5; erf(3 / sqrt 10) = 0.82029.
    weight = torch.tensor([[[1.0, 0.0], [3.0, -2.0]]], dtype=torch.float64)
    score = sparsity_scores(torch.tensor([[2.0, 1.0]], dtype=torch.float64), weight)
    assert score.item() == pytest.approx(-0.82029, abs=1e-5)


def test_a_token_of_zeros_is_expected_to_fire_half_of_the_units_and_a_constant_expert_is_no_nan():
    x = torch.zeros(2, 4)
    assert torch.equal(expected_active(x, torch.randn(3, 5, 4)), torch.full((2, 3), 0.5))
    weight = torch.ones(3, 5, 4, requires_grad=True)
    sparsity_scores(torch.ones(2, 4), weight).sum().backward()
    assert weight.grad.isfinite().all()


def test_the_experts_that_would_fire_least_are_chosen():
    weight = torch.randn(3, 50, 4, generator=seeded()) + torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    x = torch.rand(20, 4, generator=seeded(1)) + 0.5
    routing = SparsityAwareGate(2)(x, weight)
    assert torch.equal(routing.indices, torch.tensor([[1, 2]]).expand(20, 2))
    torch.testing.assert_close(routing.weights, routing.logits.gather(-1, routing.indices).softmax(-1))
    torch.testing.assert_close(routing.probs, routing.logits.softmax(-1))
    assert (routing.weights[:, 0] > routing.weights[:, 1]).all()


@pytest.mark.parametrize("statistics", ["diagonal", "full"])
def test_the_gate_has_no_parameters_and_teaches_weights_biases_and_input(statistics):
    gate = SparsityAwareGate(2, statistics=statistics)
    weight = torch.randn(4, 6, 5, dtype=torch.float64, generator=seeded(), requires_grad=True)
    bias = torch.randn(4, 6, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    x = torch.randn(3, 5, dtype=torch.float64, generator=seeded(2), requires_grad=True)
    assert not list(gate.parameters())
    order = gate(x, weight, bias).logits.sort(-1).values
    assert order.diff(dim=-1).min() > 1e-4  # away from ties, where the choice jumps
    assert torch.autograd.gradcheck(lambda *t: gate(*t).weights, (x, weight, bias))


def test_the_names_of_the_experts_do_not_matter_and_neither_does_the_batch():
    weight, x = torch.randn(5, 9, 4, generator=seeded()), torch.randn(30, 4, generator=seeded(1))
    order = torch.tensor([3, 0, 4, 1, 2])
    gate = SparsityAwareGate(2)
    torch.testing.assert_close(gate(x, weight[order]).logits, gate(x, weight).logits[:, order])
    torch.testing.assert_close(gate(x[7:8], weight).weights, gate(x, weight).weights[7:8])


def test_scores_are_float32_under_autocast():
    weight, x = torch.randn(3, 8, 4, generator=seeded()), torch.randn(6, 4, generator=seeded(1))
    want = sparsity_scores(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sparsity_scores(x, weight), want, rtol=0, atol=0)


@pytest.mark.parametrize("statistics", ["diagonal", "full"])
def test_experts_that_lie_elsewhere_are_asked_for_in_every_pass_and_taught(statistics):
    weight, x = (
        torch.randn(4, 8, 3, generator=seeded(), dtype=torch.float64).requires_grad_(),
        torch.randn(6, 3).double(),
    )
    gate, asked = SparsityAwareGate(2, statistics=statistics).eval(), []

    def gather(mean, spread):
        asked.append(mean.shape)
        parts = (mean, spread), column_statistics(weight[1:], None, statistics)
        return tuple(torch.cat(found) for found in zip(*parts, strict=True))

    want, got = gate(x, weight), gate(x, weight[:1], gather=gather)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.logits, want.logits)
    grads = [torch.autograd.grad((r.weights[:, 0] + r.logits.sum(1)).sum(), weight)[0] for r in (want, got)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        gate(x, weight[:1], gather=gather)
        gate(x, weight[:1], gather=gather)
    assert asked == [(1, 3)] * 3


def test_kept_statistics_follow_the_weights(monkeypatch):
    import mixtura.core.sparsity_gate as module

    calls = []
    real = module.column_statistics
    monkeypatch.setattr(module, "column_statistics", lambda *a: calls.append(1) or real(*a))
    weight = torch.nn.Parameter(torch.randn(3, 8, 4, generator=seeded()))
    x, gate = torch.randn(6, 4, generator=seeded(1)), SparsityAwareGate(1).eval()
    with torch.no_grad():
        first = gate(x, weight).logits
        gate(x[:1], weight)
        assert len(calls) == 1
        weight.add_(torch.randn(3, 8, 4, generator=seeded(2)))
        changed = gate(x, weight).logits
        assert len(calls) == 2 and not torch.allclose(first, changed)
    torch.testing.assert_close(gate(x, weight).logits, changed)  # a gradient is wanted: computed anew
    assert gate(x, weight).logits.requires_grad and len(calls) == 4
    gate.train()
    with torch.no_grad():
        gate(x, weight)
        gate(x, weight)
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparsityAwareGate(0), "k must be at least 1, got 0"),
        (lambda: SparsityAwareGate(1, statistics="robust"), r"statistics must be one of \['diagonal', 'full'\]"),
        (lambda: sparsity_scores(torch.zeros(2, 3), torch.zeros(2, 4, 5)), "must share D"),
        (
            lambda: sparsity_scores(torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.zeros(4)),
            r"bias must have shape \(E, H\)",
        ),
        (lambda: SparsityAwareGate(3)(torch.zeros(2, 3), torch.zeros(2, 4, 3)), "k must be between 1 and n_experts=2"),
        (
            lambda: SparsityAwareGate(1)(
                torch.ones(2, 3), torch.ones(3, 4, 3).index_fill(0, torch.tensor(1), torch.nan)
            ),
            r"scores of experts \[1\] are NaN",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
