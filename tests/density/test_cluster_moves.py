import math

import pytest
import torch

from mixtura.density.cluster_moves import (
    Rules,
    halves,
    halves_of,
    log_split_ratio,
    move_clusters,
    partition_evidence,
)
from mixtura.density.set_evidence import ClusterPrior, log_evidence, set_statistics


def unit_prior(d=2):
    return ClusterPrior(torch.zeros(d).double(), 0.01, d + 10.0, 9.0 * torch.eye(d).double())


def blobs(centres, n=30, seed=0, spread=1.0):
    """n samples around each centre, and the number of each one's centre."""
    g = torch.Generator().manual_seed(seed)
    at = torch.tensor(centres, dtype=torch.float64)
    group = torch.arange(len(at)).repeat_interleave(n)
    return at[group] + spread * torch.randn(len(group), at.shape[1], generator=g, dtype=torch.float64), group


def evidence(x, sets, rules):
    n = int(sets.max()) + 1
    return partition_evidence(set_statistics(x, sets, n, "full"), unit_prior(x.shape[1]), rules)


def nobody(x):
    return torch.zeros(len(x), dtype=torch.bool)


def test_the_ratio_is_that_of_the_paper_by_hand():
    x, group = blobs([[0, 0], [3, 0]], n=12)
    prior = unit_prior()
    a, b = (set_statistics(x[group == c], torch.zeros(12).long(), 1, "full") for c in (0, 1))
    whole = set_statistics(x, torch.zeros(24).long(), 1, "full")
    gain = float(log_evidence(a, prior) + log_evidence(b, prior) - log_evidence(whole, prior))
    for alpha, temper in ((1.0, 1.0), (0.2, 1.0), (1.0, 3.5)):
        want = math.log(alpha) + 2 * math.lgamma(12) - math.lgamma(24) + gain / temper
        got = float(log_split_ratio(a, b, prior, Rules(n_known=0, alpha=alpha, temper=temper)))
        assert got == pytest.approx(want, abs=1e-9)


def test_a_merge_has_exactly_the_inverse_ratio_of_the_split():
    x, group = blobs([[0, 0], [1, 0]], n=20)
    rules = Rules(n_known=0)
    found = set_statistics(x, group, 2, "full")
    _, n, moves = move_clusters(
        x, group, nobody(x), 2, unit_prior(), rules, generator=torch.Generator().manual_seed(0), greedy=True
    )
    a = set_statistics(x[group == 0], torch.zeros(20).long(), 1, "full")
    b = set_statistics(x[group == 1], torch.zeros(20).long(), 1, "full")
    assert n == 1 and moves[0].kind == "merge"
    assert moves[0].log_ratio == -float(log_split_ratio(a, b, unit_prior(), rules))
    assert float(found.weight.sum()) == 40


@pytest.mark.parametrize("temper", [1.0, 2.5])
def test_a_rounds_moves_change_the_evidence_of_the_partition_by_the_sum_of_their_ratios(temper):
    # Some blobs are two clusters, some clusters are two blobs, so there are splits and merges in one round.
    x, group = blobs([[-90, 0], [9, 0], [0, 9], [9, 9], [20, 0], [20, 9]])
    sets = torch.tensor([0, 0, 1, 2, 3, 4])[group]
    side = (x[:, 0] > 9).long()
    sets = torch.where((group == 3) & (side == 1), 5, sets)  # blob 3 cut in two
    rules = Rules(n_known=0, temper=temper)
    after, n, moves = move_clusters(
        x, sets, nobody(x), 6, unit_prior(), rules, generator=torch.Generator().manual_seed(1), greedy=True
    )
    assert {move.kind for move in moves} == {"split", "merge"} and n == 6
    gained = evidence(x, after, rules) - evidence(x, sets, rules)
    assert gained == pytest.approx(sum(move.log_ratio for move in moves), abs=1e-8)
    touched = [c for move in moves for c in move.clusters]
    assert len(touched) == len(set(touched))  # at most one move a cluster
    # And the blobs are the clusters.
    assert len({(a, b) for a, b in zip(group.tolist(), after.tolist(), strict=True)}) == 6


def test_a_merge_lowers_the_number_of_clusters_by_one():
    x, group = blobs([[0, 0], [0.2, 0], [30, 0]])
    after, n, moves = move_clusters(
        x, group, nobody(x), 3, unit_prior(), Rules(n_known=0), generator=torch.Generator().manual_seed(0), greedy=True
    )
    assert n == 2 and set(after.tolist()) == {0, 1}
    assert [move.kind for move in moves] == ["merge"]


@pytest.mark.parametrize("chance", [0.25, 0.7])
def test_a_split_is_accepted_as_often_as_its_ratio_says(chance):
    x, _ = blobs([[0.0], [3.0]], n=8)
    one, prior = torch.zeros(16).long(), unit_prior(1)
    first, second = halves_of(x, one, 1, "full", torch.Generator().manual_seed(0))
    plain = float(log_split_ratio(first, second, prior, Rules(n_known=0)))
    rules = Rules(n_known=0, alpha=chance / math.exp(plain))
    g, n = torch.Generator().manual_seed(7), 300
    hits = sum(move_clusters(x, one, nobody(x), 1, prior, rules, generator=g)[1] == 2 for _ in range(n))
    # Three standard errors: one false alarm in 370 over seeds, and the seed is fixed.
    assert abs(hits / n - chance) < 3 * math.sqrt(chance * (1 - chance) / n)


def test_certain_moves_are_always_made_and_hopeless_ones_never():
    x, _ = blobs([[0, 0], [40, 0]])
    one = torch.zeros(len(x)).long()
    ball, _ = blobs([[0, 0]], n=200)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        assert move_clusters(x, one, nobody(x), 1, unit_prior(), Rules(n_known=0), generator=g)[1] == 2
        zero = torch.zeros(200).long()
        assert move_clusters(ball, zero, nobody(ball), 1, unit_prior(), Rules(n_known=0), generator=g)[1] == 1


def test_an_elongated_gaussian_is_not_split():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=g, dtype=torch.float64) * torch.tensor([20.0, 1.0, 0.3]).double()
    first, second = halves_of(x, torch.zeros(400).long(), 1, "full", g)
    assert min(float(first.weight), float(second.weight)) > 100
    assert float(log_split_ratio(first, second, unit_prior(3), Rules(n_known=0))) < -20


def test_known_clusters_neither_split_nor_merge_by_the_papers_rule():
    # Known cluster 0 is two far blobs, known cluster 1 sits on new cluster 2.
    x, group = blobs([[0, 0], [30, 0], [0, 50], [0.1, 50]])
    sets = torch.tensor([0, 0, 1, 2])[group]
    labelled = torch.zeros(len(x), dtype=torch.bool)
    labelled[[0, 1, 2, 61, 62]] = True
    g = torch.Generator().manual_seed(0)
    after, n, moves = move_clusters(x, sets, labelled, 3, unit_prior(), Rules(n_known=2), generator=g, greedy=True)
    assert n == 3 and moves == [] and (after == sets).all()


def test_a_known_cluster_sheds_the_half_without_its_labels_and_absorbs_a_new_one():
    x, group = blobs([[0, 0], [30, 0], [0, 50], [0.1, 50]])
    sets = torch.tensor([0, 0, 1, 2])[group]
    labelled = torch.zeros(len(x), dtype=torch.bool)
    labelled[[30, 31, 32, 61, 62]] = True  # class 0 lives in the second blob
    rules = Rules(n_known=2, shed=0.95, absorb=True)
    g = torch.Generator().manual_seed(0)
    after, n, moves = move_clusters(x, sets, labelled, 3, unit_prior(), rules, generator=g, greedy=True)
    assert sorted(move.kind for move in moves) == ["absorb", "shed"] and n == 3
    assert (after[group == 1] == 0).all() and (after[group == 0] == 2).all() and (after[group >= 2] == 1).all()


def test_a_known_cluster_whose_labels_lie_in_both_halves_stays_whole():
    x, _ = blobs([[0, 0], [30, 0]])
    labelled = torch.zeros(len(x), dtype=torch.bool)
    labelled[[0, 1, 30, 31]] = True
    g = torch.Generator().manual_seed(0)
    sets = torch.zeros(len(x)).long()
    rules = Rules(n_known=1, shed=0.95)
    assert move_clusters(x, sets, labelled, 1, unit_prior(), rules, generator=g, greedy=True)[1] == 1


def test_a_stray_labelled_sample_of_the_half_that_goes_stays_with_its_class():
    x, group = blobs([[0, 0], [30, 0]])
    labelled = torch.zeros(len(x), dtype=torch.bool)
    labelled[:25] = True
    labelled[59] = True  # in the far blob: 25 of 26 labels are in the near one
    rules = Rules(n_known=1, shed=0.95)
    g = torch.Generator().manual_seed(0)
    after, n, moves = move_clusters(
        x, torch.zeros(60).long(), labelled, 1, unit_prior(), rules, generator=g, greedy=True
    )
    assert n == 2 and moves[0].kind == "shed"
    assert (after[labelled] == 0).all() and (after[group == 1] == 1).sum() == 29


def test_two_known_classes_on_one_spot_never_merge():
    x, group = blobs([[0, 0], [0, 0], [0, 0]], n=40)
    labelled = (torch.arange(120) % 3 == 0) & (group < 2)
    rules = Rules(n_known=2, shed=0.95, absorb=True)
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        after, n, _ = move_clusters(x, group, labelled, 3, unit_prior(), rules, generator=g)
        assert n >= 2 and (after[labelled] == group[labelled]).all()


def test_no_more_clusters_than_allowed():
    x, _ = blobs([[0, 0], [30, 0], [0, 30], [30, 30]])
    sets = torch.tensor([0, 0, 1, 1]).repeat_interleave(30)
    g = torch.Generator().manual_seed(0)
    assert move_clusters(x, sets, nobody(x), 2, unit_prior(), Rules(n_known=0, most=3), generator=g)[1] == 3


def test_halves_of_two_blobs_are_the_blobs_in_every_set_at_once():
    x, group = blobs([[0, 0], [9, 0], [100, 0], [100, 9]], n=25)
    half = halves(x, group // 2, 2, torch.Generator().manual_seed(0))
    for a, b in ((0, 1), (2, 3)):
        assert len(set(half[group == a].tolist())) == 1 and set(half[group == a].tolist()) != set(
            half[group == b].tolist()
        )


def test_halves_do_not_mind_sets_of_one_sample_or_of_equal_samples():
    x = torch.tensor([[1.0, 2.0], [5.0, 5.0], [5.0, 5.0], [5.0, 5.0]]).double()
    half = halves(x, torch.tensor([0, 2, 2, 2]), 3, torch.Generator().manual_seed(0))
    assert half.shape == (4,) and set(half.tolist()) <= {0, 1}
