"""Solvers of the membership program agree with brute force, with each other and with another's code; certificates hold."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch
from heterogeneous import error, groups
from sklearn.exceptions import ConvergenceWarning

from mixtura.density import kmeans_sdp, membership_lower_bound, solve_membership_sdp
from mixtura.density.exact_memberships import certify, why_not_exact
from mixtura.density.low_rank_memberships import _Lagrangian, _State, solve_low_rank
from mixtura.density.membership_program import MembershipProgram, partition_factors


def best_partition(program: MembershipProgram) -> float:
    n, k = program.n_samples, program.n_clusters
    return min(program.partition_value(np.array(labels)) for labels in itertools.product(range(k), repeat=n))


def test_the_optimum_is_below_every_partition_and_is_one_where_groups_are_apart():
    close, _, covariances = groups(8, 2, 3, apart=1.0, spread=1.0, seed=0)
    program = MembershipProgram.build(close, covariances)
    assert solve_membership_sdp(close, covariances, solver="admm", tol=1e-7).value <= best_partition(program) + 1e-5
    far, labels, covariances = groups(9, 2, 3, apart=40.0, spread=0.5, seed=1)
    found = solve_membership_sdp(far, covariances, solver="admm", tol=1e-9, max_iter=20_000)
    # So far apart a best partition keeps the groups whole; which shape suits which of three samples is left.
    program, names = MembershipProgram.build(far, covariances), [np.array(p) for p in itertools.permutations(range(3))]
    want = min(names, key=lambda name: program.partition_value(name[labels]))[labels]
    assert abs(found.value - program.partition_value(want)) < 1e-6 * abs(found.value)
    assert (found.memberships.argmax(1) == want).all()


@pytest.mark.parametrize(("n", "k"), [(40, 2), (40, 3), (90, 3)])
def test_thin_factors_end_just_above_the_exact_optimum_and_with_its_labels(n: int, k: int):
    X, labels, covariances = groups(n, 4, k, apart=4.0, spread=1.0, seed=n + k)
    exact = solve_membership_sdp(X, covariances, solver="admm", certify=True)
    thin = solve_membership_sdp(X, covariances, rank=2 * k, certify=True)
    assert exact.gap < 1e-4  # of the solver's own dual, so the optimum is known
    np.testing.assert_allclose(exact.blocks.sum((0, 2)), 1.0, atol=1e-4)
    np.testing.assert_allclose(np.trace(exact.blocks, axis1=1, axis2=2), 1.0, atol=1e-4)
    assert exact.blocks.min() > -1e-4 and np.linalg.eigvalsh(exact.blocks).min() > -1e-4
    assert exact.lower_bound - 1e-4 * abs(exact.value) < thin.value < exact.value + 2e-3 * abs(exact.value)
    assert thin.lower_bound <= exact.value + 1e-4 * abs(exact.value)
    assert thin.primal_residual < 1e-5 and (thin.factors >= 0).all()
    assert (thin.memberships.argmax(1) == exact.memberships.argmax(1)).mean() == 1.0
    assert error(exact.memberships.argmax(1), labels) < 0.1


@pytest.mark.skipif(importlib.util.find_spec("cvxpy") is None, reason="cvxpy is not installed")
@pytest.mark.parametrize(("n", "k", "blocks"), [(40, 2, 1), (40, 2, 2), (40, 3, 3)])
def test_another_s_code_finds_the_same_optimum(n: int, k: int, blocks: int):
    X, _, covariances = groups(n, 3, k, apart=4.0, spread=1.0, seed=7)
    given = (covariances, None) if blocks > 1 else (None, k)
    scs = solve_membership_sdp(X, *given, solver="scs", tol=1e-6, certify=True)
    admm = solve_membership_sdp(X, *given, solver="admm", certify=True)
    assert abs(admm.value - scs.value) < 1e-4 * abs(scs.value)
    assert scs.gap < 1e-3
    assert (admm.memberships.argmax(1) == scs.memberships.argmax(1)).all()
    thin = solve_membership_sdp(X, *given, rank=2 * k, certify=True)
    assert -1e-4 < (thin.value - scs.value) / abs(scs.value) < 2e-3


def test_the_gradient_of_the_lagrangian_is_its_derivative():
    X, _, covariances = groups(9, 2, 3, apart=2.0, spread=1.0, seed=2)
    for program in (MembershipProgram.build(X, covariances), MembershipProgram.build(X, None, 3)):
        step, generator = _Lagrangian(program, 2), torch.Generator().manual_seed(0)
        v = torch.rand(program.n_blocks, 9, 2, dtype=torch.float64, generator=generator)
        y, t = torch.randn(9, dtype=torch.float64), torch.randn(program.n_blocks, dtype=torch.float64)
        state = _State(v, y, t, 3.0, 1.0, 0)
        gradient = step._value(v, state)[1]
        for b, i, r in itertools.product(range(program.n_blocks), range(0, 9, 4), range(2)):
            nudge = torch.zeros_like(v)
            nudge[b, i, r] = 1e-5
            slope = (step._value(v + nudge, state)[0] - step._value(v - nudge, state)[0]) / 2e-5
            assert abs(slope - gradient[b, i, r]) < 1e-5 * max(
                1, abs(slope)
            )  # central difference: error of order 1e-10 a^3


def test_one_block_and_equal_shapes_have_one_optimum():
    X, _, _ = groups(24, 2, 2, apart=2.0, spread=0.0, seed=3)
    one = solve_membership_sdp(X, None, 2, solver="admm").value
    many = solve_membership_sdp(X, np.stack([np.eye(2)] * 2), solver="admm").value
    assert abs(one - many) < 1e-4 * abs(one)


def test_groups_that_start_under_each_other_s_shape_trade_places():
    X, labels, covariances = groups(60, 3, 3, apart=3.0, spread=2.0, seed=4)
    program, rng = MembershipProgram.build(X, covariances), np.random.RandomState(0)
    right = solve_low_rank(program, rank=2, rng=rng, start=partition_factors(labels, 3).numpy())
    turned = solve_low_rank(program, rank=2, rng=rng, start=partition_factors((labels + 1) % 3, 3).numpy())
    assert abs(program.value(turned.factors) - program.value(right.factors)) < 1e-3 * abs(program.value(right.factors))


def test_a_certificate_is_tight_for_an_optimum_and_wide_for_a_wrong_answer():
    X, labels, covariances = groups(90, 4, 3, apart=4.0, spread=1.0, seed=5)
    good = solve_membership_sdp(X, covariances, rank=6, certify=True)
    assert 0 <= good.gap + 1e-6 < 2e-3
    # Two groups merged, the third cut in two.
    wrong = np.where(labels == 2, np.arange(90) % 2, 2)
    program = MembershipProgram.build(X, covariances)
    value = program.partition_value(wrong)
    proof = certify(program, value, partition_factors(wrong, 3).numpy(), good.prices)
    assert (value - proof.bound) / abs(value) > 0.02
    assert proof.bound <= good.value


@pytest.mark.parametrize("solver", ["lowrank", "admm"])
def test_prices_and_slack_of_an_answer_prove_its_bound(solver: str):
    X, _, covariances = groups(40, 2, 2, apart=4.0, spread=1.0, seed=6)
    found = solve_membership_sdp(X, covariances, solver=solver, certify=True)
    assert membership_lower_bound(X, covariances, found.prices, found.slack) == pytest.approx(found.lower_bound)
    assert found.value * (1 - 2e-3) < found.lower_bound < found.value * (1 + 1e-4)
    plain = solve_membership_sdp(X, covariances)
    assert plain.slack is None and membership_lower_bound(X, covariances, plain.prices) <= plain.value


def test_shifts_do_not_move_the_optimum_and_order_does_not_either():
    X, _, covariances = groups(30, 2, 2, apart=4.0, spread=1.0, seed=8)
    plain = solve_membership_sdp(X, covariances, solver="admm").value
    assert abs(solve_membership_sdp(X + 1e4, covariances, solver="admm").value - plain) < 1e-4 * abs(plain)
    assert abs(solve_membership_sdp(X[::-1].copy(), covariances, solver="admm").value - plain) < 1e-4 * abs(plain)


def test_limits_one_cluster_and_as_many_as_samples():
    X, _, covariances = groups(6, 2, 1, apart=1.0, spread=1.0, seed=9)
    program = MembershipProgram.build(X, covariances)
    for solver in ("admm", "lowrank"):
        found = solve_membership_sdp(X, covariances, solver=solver)
        assert abs(found.value - program.partition_value(np.zeros(6, dtype=int))) < 1e-3 * abs(found.value)
    # Every sample on its own costs nothing.
    assert abs(solve_membership_sdp(X, None, 6, solver="admm").value) < 1e-3


def test_k_means_by_its_relaxation_finds_what_is_apart():
    X, labels, _ = groups(60, 3, 4, apart=12.0, spread=0.0, seed=10)
    assert error(kmeans_sdp(X, 4), labels) == 0
    assert error(kmeans_sdp(X, 4, solver="admm"), labels) == 0


def test_a_warm_start_from_an_answer_takes_fewer_rounds():
    X, _, covariances = groups(60, 4, 2, apart=2.0, spread=1.0, seed=11)
    cold = solve_membership_sdp(X, covariances, solver="admm")
    assert solve_membership_sdp(X, covariances, solver="admm", start=cold).iterations < cold.iterations / 2
    thin = solve_membership_sdp(X, covariances)
    again = solve_membership_sdp(X, covariances, start=thin)
    assert abs(again.value - thin.value) < 1e-3 * abs(thin.value)
    assert solve_membership_sdp(X, covariances, start=cold).factors.shape == (2, 60, 2)


def test_bad_input_is_named(monkeypatch):
    X, _, covariances = groups(20, 2, 2, apart=3.0, spread=1.0, seed=12)
    with pytest.raises(ValueError, match="solver must be one of"):
        solve_membership_sdp(X, covariances, solver="simplex")
    with pytest.raises(ValueError, match="rank must be a whole number >= 1, got 0"):
        solve_membership_sdp(X, covariances, rank=0)
    with pytest.raises(ValueError, match="at least 2 samples"):
        solve_membership_sdp(X[:1], None, 1)
    with pytest.raises(ValueError, match=r"start must have shape \(2, 20\)"):
        solve_membership_sdp(X, covariances, start=np.ones((2, 5, 2)))
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mixtura\[sdp\]'"):
        solve_membership_sdp(X, covariances, solver="scs")


def test_too_many_samples_for_n_by_n_matrices_says_what_it_would_take():
    assert why_not_exact(1000, 3) is None
    X = np.random.default_rng(0).normal(size=(20_000, 2))
    for options in ({"solver": "admm"}, {"certify": True}):
        with pytest.raises(ValueError, match=r"would take 58 GB .* solver='lowrank' without certify"):
            solve_membership_sdp(X, np.stack([np.eye(2)] * 3), **options)


def test_rounds_that_run_out_are_told_with_the_residuals():
    X, _, covariances = groups(40, 2, 2, apart=2.0, spread=1.0, seed=13)
    with pytest.warns(
        ConvergenceWarning, match=r"solver='admm' did not converge in 20 rounds: primal residual .*, dual"
    ):
        solve_membership_sdp(X, covariances, solver="admm", max_iter=20)
    with pytest.warns(ConvergenceWarning, match=r"solver='lowrank' did not converge in 2 rounds"):
        solve_membership_sdp(X, covariances, max_iter=2, n_starts=1)
