"""Which tokens an expert takes when it cannot take all, against brute force, counting and statistics."""

import pytest
import torch
from scipy.stats import chisquare

from mixtura.core.capacity import capacity, capacity_select
from mixtura.core.gates import limit_capacity, top_k

POLICIES = ("random", "prefix", "group", "probs")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chosen(n_tokens=200, n_experts=5, k=1, seed=0, sentinels=True):
    """Uneven choices, some of them no expert at all."""
    weights = torch.arange(1.0, n_experts + 2 if sentinels else n_experts + 1)
    return torch.multinomial(weights.flip(0), n_tokens * k, replacement=True, generator=seeded(seed)).view(-1, k)


def select(indices, n_experts, limit, policy, seed=0, groups=1):
    probs = torch.rand(indices.shape, generator=seeded(7)) if policy == "probs" else None
    return capacity_select(indices, n_experts, limit, policy=policy, probs=probs, groups=groups, generator=seeded(seed))


def routed(indices, kept, n_experts):
    return torch.bincount(indices[kept], minlength=n_experts)[:n_experts]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("limit", [0, 1, 13, 10_000])
def test_an_expert_keeps_as_many_as_came_and_at_most_its_limit(policy, limit, k):
    indices = chosen(k=k)
    kept = select(indices, 5, limit, policy)
    came = routed(indices, torch.ones_like(kept), 5)
    assert routed(indices, kept, 5).tolist() == came.clamp(max=limit).tolist()
    assert not kept[indices == 5].any()  # no expert is no token


def test_prefix_is_the_running_count():
    indices = chosen(k=2)
    flat = indices.flatten()
    hits = torch.nn.functional.one_hot(flat, 6).cumsum(0).gather(1, flat[:, None]).squeeze(1)
    want = ((hits <= 7) & (flat < 5)).view_as(indices)
    assert torch.equal(select(indices, 5, 7, "prefix"), want)


def test_random_is_the_ranking_of_the_same_draw_by_brute_force():
    indices = chosen(k=2)
    flat = indices.flatten()
    u = torch.empty(len(flat))
    u[torch.randperm(len(flat), generator=seeded(3))] = torch.linspace(
        1, 0, len(flat)
    )  # who stands first drew the most
    want = torch.zeros_like(flat, dtype=torch.bool)
    for e in range(5):
        mine = (flat == e).nonzero().flatten()
        want[sorted(mine.tolist(), key=lambda i: -float(u[i]))[:11]] = True
    assert torch.equal(select(indices, 5, 11, "random", seed=3), want.view_as(indices))


def test_probs_is_the_ranking_of_the_weights_with_ties_by_position():
    indices, probs = torch.zeros(6, 1, dtype=torch.long), torch.tensor([[0.2], [0.9], [0.5], [0.5], [0.5], [0.1]])
    assert capacity_select(indices, 1, 3, policy="probs", probs=probs).flatten().nonzero().flatten().tolist() == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("groups", [1, 3, 4, 200])
def test_groups_share_the_limit_out_to_the_last_place(groups):
    limit, indices = 10, chosen(sentinels=False)
    kept = select(indices, 5, limit, "group", groups=groups)
    span = torch.arange(200) * groups // 200
    parts = [limit * (g + 1) // groups - limit * g // groups for g in range(groups)]
    assert sum(parts) == limit
    for g, part in enumerate(parts):
        inside = span == g
        came = torch.bincount(indices[inside].flatten(), minlength=5)
        assert routed(indices[inside], kept[inside], 5).tolist() == came.clamp(max=part).tolist()
    if groups == 1:
        assert torch.equal(kept, select(indices, 5, limit, "prefix"))


def test_a_routing_is_limited_by_group_too():
    routing = top_k(torch.zeros(8, 2), 1)  # all want expert 0
    limited = limit_capacity(routing, 4, policy="group", groups=2)
    assert limited.indices.flatten().tolist() == [0, 0, 2, 2, 0, 0, 2, 2]
    assert limited.weights.flatten().tolist() == [1, 1, 0, 0, 1, 1, 0, 0]


def test_random_selection_is_uniform_over_the_candidates():
    # 2,000 draws of 10 out of 40. Under uniformity the statistic is below its 0.01 quantile in one seed of a hundred: the seed
    # is fixed, and the smaller variance of draws without replacement only makes p larger.
    indices, draws = torch.zeros(40, 1, dtype=torch.long), seeded(11)
    counts = sum(capacity_select(indices, 1, 10, generator=draws).flatten().long() for _ in range(2000))
    assert counts.sum() == 20_000
    assert chisquare(counts.numpy()).pvalue > 0.01


def test_the_same_seed_gives_the_same_mask_and_the_next_draw_another():
    indices, draws = chosen(), seeded(5)
    first, second = capacity_select(indices, 5, 9, generator=draws), capacity_select(indices, 5, 9, generator=draws)
    assert torch.equal(first, select(indices, 5, 9, "random", seed=5)) and not torch.equal(first, second)


def dropped_by_quarter(policy, length=64, batch=32, n_experts=8, trials=40):
    """Share of dropped tokens by quarter of the sequence; gates are random, tokens lie sequence-major, capacity factor 1."""
    draws, total = seeded(0), torch.zeros(4)
    for _ in range(trials):
        logits = 0.7 * torch.randn(length * batch, n_experts, generator=draws)
        logits += 0.7 * torch.randn(n_experts, generator=draws)  # experts that all tokens like more
        indices = logits.argmax(-1, keepdim=True)
        limit = capacity(len(indices), n_experts, 1.0)
        kept = capacity_select(
            indices, n_experts, limit, policy=policy, generator=draws if policy == "random" else None
        )
        total += (~kept).view(4, -1).float().mean(1)
    return total / trials


def test_random_selection_spares_no_position_and_first_come_starves_the_last():
    # 40 trials of 512 tokens a quarter: the standard error of a quarter's share is below 0.004, of 0.25.
    random, prefix = dropped_by_quarter("random"), dropped_by_quarter("prefix")
    assert (random - random.mean()).abs().max() < 0.05 * random.mean()
    assert prefix[3] >= 5 * prefix[0] and prefix[3] > 0.4
    assert abs(float(random.mean() - prefix.mean())) < 1e-6 + 0.05 * float(prefix.mean())  # as many in all


def test_no_tokens_and_fewer_tokens_than_experts_are_legal():
    empty = torch.zeros(0, 2, dtype=torch.long)
    for policy in ("random", "prefix", "group"):
        assert select(empty, 8, 4, policy).shape == (0, 2)
    assert select(torch.tensor([[6], [6]]), 8, capacity(2, 8, 1.0, minimum=1), "random").sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "prefix", "groups": 2}, "groups goes with policy 'group' and with no other, got groups=2"),
        ({"policy": "group", "groups": 0}, "groups must be at least 1, got 0"),
        ({"policy": "probs", "probs": torch.ones(3, 1)}, r"probs must have the shape of indices \(2, 1\)"),
        ({"policy": "first"}, r"policy must be one of \['group', 'prefix', 'probs', 'random'\], got 'first'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        capacity_select(torch.zeros(2, 1, dtype=torch.long), 2, 1, **options)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_tensor_of_tokens_times_experts_is_made(policy):
    indices = chosen(n_tokens=4096, n_experts=64, sentinels=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        select(indices, 64, 64, policy)
    assert max(event.self_cpu_memory_usage for event in seen.events()) <= 4096 * 16
