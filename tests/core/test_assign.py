"""Bit allocation against enumeration of every allocation."""

import itertools
import time

import numpy as np
import pytest

from mixtura.core.assign import Infeasible, allocate_bits, feasible_range

BITS = (1, 2, 3)


def best_by_enumeration(cost, budget, at_least, equality):
    best = np.inf
    for choice in itertools.product(range(3), repeat=len(cost)):
        widths = [BITS[j] for j in choice]
        total = sum(widths)
        if (total == budget if equality else total <= budget) and all(
            widths.count(w) >= c for w, c in at_least.items()
        ):
            best = min(best, sum(cost[i, j] for i, j in enumerate(choice)))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("equality", [False, True])
def test_the_program_finds_what_enumeration_finds(seed: int, equality: bool):
    draw = np.random.default_rng(seed)
    cost = np.sort(draw.exponential(size=(6, 3)), axis=1)[:, ::-1] ** 2
    if seed % 3 == 0:
        cost = draw.exponential(size=(6, 3))  # more bits need not cost less
    at_least = {3: 1, 2: 1} if seed % 2 else {}
    for budget in (9, 11, 15):
        found = allocate_bits(cost, BITS, budget, at_least=at_least, equality=equality)
        total = sum(cost[i, BITS.index(w)] for i, w in enumerate(found))
        want = best_by_enumeration(cost, budget, at_least, equality)
        assert total == pytest.approx(want, rel=1e-5)
        assert found.sum() == budget if equality else found.sum() <= budget
        assert all((found == w).sum() >= c for w, c in at_least.items())


def test_tiny_costs_are_as_good_as_large_ones():
    cost = np.random.default_rng(0).exponential(size=(6, 3))
    assert np.array_equal(allocate_bits(cost, BITS, 12), allocate_bits(cost * 1e-9, BITS, 12))


@pytest.mark.parametrize(("budget", "equality"), [(5, False), (8, False), (40, True)])
def test_a_budget_that_nothing_meets_names_the_range(budget: int, equality: bool):
    with pytest.raises(Infeasible, match=r"average must lie between 1\.5 and 2\.83"):
        allocate_bits(np.ones((6, 3)), BITS, budget, at_least={3: 1, 2: 1}, equality=equality)


def test_the_range_is_met_at_both_ends():
    low, high = feasible_range(6, BITS, at_least={3: 1, 2: 1})
    assert (low, high) == (9, 17)
    for budget in (low, high):
        assert allocate_bits(np.ones((6, 3)), BITS, budget, at_least={3: 1, 2: 1}, equality=True).sum() == budget


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"cost must have shape \(n, 3\)"):
        allocate_bits(np.ones((6, 2)), BITS, 10)
    with pytest.raises(ValueError, match=r"cost\[2, 1\] is nan"):
        cost = np.ones((6, 3))
        cost[2, 1] = np.nan
        allocate_bits(cost, BITS, 10)
    with pytest.raises(ValueError, match=r"widths \[4\]"):
        allocate_bits(np.ones((6, 3)), BITS, 10, at_least={4: 1})
    with pytest.raises(Infeasible, match="asks for 7 items, there are 6"):
        allocate_bits(np.ones((6, 3)), BITS, 10, at_least={3: 7})


def test_two_hundred_blocks_of_64_experts_are_allocated():
    draw = np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(20):
        cost = np.sort(draw.exponential(size=(64, 3)), axis=1)[:, ::-1]
        assert allocate_bits(cost, BITS, 144, at_least={3: 1, 2: 1}).sum() <= 144
    # The aim is ten seconds for 200; this only catches a solver that stopped scaling.
    assert time.perf_counter() - began < 20
