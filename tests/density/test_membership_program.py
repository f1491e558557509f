"""The program is the profile likelihood: brute force over all partitions, and bounds that nothing falls below."""

import itertools

import numpy as np
import pytest
import torch
from heterogeneous import groups

from mixtura.density.exact_memberships import solve_exactly
from mixtura.density.membership_program import (
    MembershipProgram,
    lower_bound,
    membership_lower_bound,
    partition_factors,
)


def profile(X, labels, covariances):
    """Twice the negative log likelihood around the groups' means, sample by sample, without N F log 2 pi."""
    total = 0.0
    for k, sigma in enumerate(covariances):
        mine = X[labels == k]
        for x in mine:
            apart = x - mine.mean(0)
            total += np.linalg.slogdet(sigma)[1] + apart @ np.linalg.solve(sigma, apart)
    return total


def test_the_trace_form_is_the_profile_likelihood_of_every_partition():
    X, _, covariances = groups(8, 2, 3, apart=2.0, spread=1.0, seed=0)
    program = MembershipProgram.build(X + 5, covariances)
    for labels in itertools.product(range(3), repeat=8):
        want = profile(X, np.array(labels), covariances)
        # Sums of about forty terms of order ten.
        assert abs(program.partition_value(np.array(labels)) - want) < 1e-10 * max(1, abs(want))


def test_factors_cost_what_their_matrices_cost():
    X, _, covariances = groups(12, 3, 2, apart=2.0, spread=1.0, seed=1)
    program = MembershipProgram.build(X, covariances)
    factors = np.random.default_rng(0).random((2, 12, 4))
    np.testing.assert_allclose(
        program.value(factors), (program.costs() * (factors @ factors.transpose(0, 2, 1))).sum(), rtol=1e-12
    )


def test_costs_are_half_squared_distances_and_log_determinants():
    X, _, covariances = groups(6, 3, 2, apart=2.0, spread=1.0, seed=2)
    costs = MembershipProgram.build(X, covariances).costs()
    for k, i, j in itertools.product(range(2), range(6), range(6)):
        apart = X[i] - X[j]
        want = np.linalg.slogdet(covariances[k])[1] + apart @ np.linalg.solve(covariances[k], apart) / 2
        assert abs(costs[k, i, j] - want) < 1e-10


def test_equal_shapes_cost_the_same_in_one_block_and_in_many():
    X, labels, _ = groups(12, 2, 3, apart=3.0, spread=0.0, seed=3)
    many, one = MembershipProgram.build(X, np.stack([np.eye(2)] * 3)), MembershipProgram.build(X, None, 3)
    assert abs(many.partition_value(labels) - one.partition_value(labels)) < 1e-10
    assert (many.trace, one.trace) == (1.0, 3.0) and (many.n_clusters, one.n_clusters) == (3, 3)


def test_a_partition_is_feasible_and_an_empty_group_adds_nothing():
    factors = partition_factors(np.array([0, 2, 0, 2]), 3)
    blocks = factors @ factors.mT
    np.testing.assert_allclose(blocks.sum((0, 2)), 1.0)
    np.testing.assert_allclose(torch.diagonal(blocks, dim1=1, dim2=2).sum(1), [1, 0, 1])


def test_no_choice_of_prices_and_slack_gives_a_bound_above_the_optimum():
    X, _, covariances = groups(14, 2, 2, apart=1.5, spread=1.0, seed=4)
    program = MembershipProgram.build(X, covariances)
    optimum = float((program.costs() * solve_exactly(program, tol=1e-7).blocks).sum())
    rng = np.random.default_rng(0)
    exact = solve_exactly(program, tol=1e-7)
    for _ in range(20):
        v = exact.prices + rng.normal(size=14) * rng.choice([0.01, 1.0, 10.0])
        slack = exact.slack + np.abs(rng.normal(size=(2, 14, 14))) * rng.choice([0.0, 0.01, 1.0])
        slack = (slack + slack.transpose(0, 2, 1)) / 2
        assert membership_lower_bound(X, covariances, v, slack) <= optimum + 1e-5 * abs(optimum)
    assert membership_lower_bound(X, covariances, exact.prices, exact.slack) > optimum - 1e-3 * abs(optimum)


def test_the_bound_is_that_of_its_definition():
    X, _, covariances = groups(7, 2, 2, apart=1.5, spread=1.0, seed=5)
    program, rng = MembershipProgram.build(X, covariances), np.random.default_rng(1)
    v, slack = rng.normal(size=7), np.zeros((2, 7, 7))
    want = v.sum()
    for cost in program.costs():
        want += np.linalg.eigvalsh(cost - (v[:, None] + v[None]) / 2)[0]
    assert abs(lower_bound(program.costs(), 1.0, v, slack) - want) < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": [[0.0, 1.0], [np.nan, 2.0]]}, r"X must be finite: 1 missing \(NaN\) values, the first in row 1, column 0"),
        ({"X": [0.0, 1.0]}, "X must have shape"),
        ({"n_clusters": 4}, r"covariances must have shape \(4, 2, 2\)"),
        ({"covariances": None}, "n_clusters must be given"),
        ({"covariances": None, "n_clusters": 3}, "n_clusters must be between 1 and n_samples=2, got 3"),
        ({"covariances": [np.eye(2), np.diag([1.0, -2.0])]}, "group 1 is not positive definite: its smallest eigenvalue is -2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    given = {"X": [[0.0, 1.0], [1.0, 2.0]], "covariances": [np.eye(2)] * 2, "n_clusters": None} | change
    X = np.array(given.pop("X"))
    covariances = given["covariances"]
    with pytest.raises(ValueError, match=message):
        MembershipProgram.build(X, None if covariances is None else np.array(covariances), given["n_clusters"])


def test_a_bound_from_negative_slack_is_refused():
    X = np.array([[0.0], [1.0], [5.0]])
    with pytest.raises(ValueError, match=r"N must be >= 0, got -0\.1"):
        membership_lower_bound(X, None, np.zeros(3), np.full((1, 3, 3), -0.1), 2)
    with pytest.raises(ValueError, match="v and N must be finite"):
        membership_lower_bound(X, None, np.array([0.0, np.nan, 0.0]), None, 2)
    with pytest.raises(ValueError, match=r"v must have shape \(3,\)"):
        membership_lower_bound(X, None, np.zeros(2), None, 2)
    with pytest.raises(ValueError, match=r"N must have shape \(1, 3, 3\)"):
        membership_lower_bound(X, None, np.zeros(3), np.zeros((3, 3)), 2)
