"""Scores and their metrics: against scikit-learn, brute force, and what no monotone map may change."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from mixtura.robust.ood import SCORES, holdout_split, keep_threshold, ood_metrics, score


def drawn(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ours, others = rng.normal(1, 1, 137), rng.normal(0, 1.5, 53)
    return (ours.round(1), others.round(1)) if ties else (ours, others)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_scikit_learns(seed, ties):
    ours, others = drawn(seed, ties)
    values, positive = np.concatenate([ours, others]), np.repeat([1, 0], [len(ours), len(others)])
    got = ood_metrics(ours, others)
    assert got.auroc == pytest.approx(roc_auc_score(positive, values), abs=1e-12)
    assert got.aupr_in == pytest.approx(average_precision_score(positive, values), abs=1e-12)
    assert got.aupr_out == pytest.approx(average_precision_score(1 - positive, -values), abs=1e-12)
    weight = np.where(positive == 1, 1.0, len(ours) / len(others))
    even = ood_metrics(ours, others, balanced=True)
    assert even.aupr_in == pytest.approx(average_precision_score(positive, values, sample_weight=weight), abs=1e-12)
    assert even.aupr_out == pytest.approx(
        average_precision_score(1 - positive, -values, sample_weight=weight), abs=1e-12
    )


@pytest.mark.parametrize("level", [0.5, 0.95, 1.0])
def test_the_threshold_is_the_largest_that_keeps_the_level_by_trying_all(level):
    for seed in range(6):
        ours, others = drawn(seed, ties=True)
        best = max(t for t in np.unique(np.concatenate([ours, others])) if (ours >= t).mean() >= level - 1e-12)
        found = ood_metrics(ours, others, level)
        # Any threshold between two scores rejects the same rows; ours is the highest score that is still kept.
        assert found.tnr == (others < best).mean()
        assert (ours >= found.threshold).mean() >= level
        assert (ours > found.threshold).mean() < level


def test_nineteen_of_twenty_is_95_percent_in_spite_of_rounding():
    assert keep_threshold(np.arange(20.0)) == 1.0


def test_monotone_maps_change_nothing_and_ties_are_not_counted_for_the_method():
    ours, others = drawn(0, ties=False)
    a, b = ood_metrics(ours, others), ood_metrics(np.exp(ours), np.exp(others))
    assert (a.auroc, a.aupr_in, a.aupr_out, a.tnr) == (b.auroc, b.aupr_in, b.aupr_out, b.tnr)
    same = ood_metrics(np.ones(10), np.ones(7))
    assert same.auroc == 0.5 and same.tnr == 0.0


def test_scores_are_their_formulas_in_double_precision():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * 3
    z = logits.double().numpy()
    soft = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(score(logits).numpy(), soft.max(1), rtol=1e-12)
    np.testing.assert_array_equal(score(logits, "max_logit").numpy(), z.max(1))
    np.testing.assert_allclose(score(logits, "energy", 2.0), 2 * np.log(np.exp(z / 2).sum(1)), rtol=1e-12)
    odin = np.exp(z / 1000) / np.exp(z / 1000).sum(1, keepdims=True)
    np.testing.assert_allclose(score(logits, "odin_temperature"), odin.max(1), rtol=1e-12)
    assert (score(logits + 7.0) - score(logits)).abs().max() < 1e-6  # softmax does not see a constant


def test_sure_rows_do_not_tie_as_they_would_in_single_precision():
    assert score(torch.tensor([[18.0, 0.0], [19.0, 0.0]])).unique().numel() == 2


def test_the_split_is_the_official_rule():
    known, held = holdout_split(np.repeat(np.arange(10), 3), 7, 1)
    assert known.tolist() == sorted(np.random.RandomState(1).choice(np.arange(10), 7, replace=False).tolist())
    assert sorted([*known, *held]) == list(range(10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score(torch.zeros(2, 3), "sure"), r"kind must be one of \['msp'"),
        (lambda: score(torch.zeros(2, 3), "msp", 2.0), "temperature has no effect on 'msp'"),
        (lambda: score(torch.zeros(2, 3), "energy", 0.0), "temperature must be > 0, got 0"),
        (lambda: score(torch.zeros(3)), r"must have shape \(N, K\), got \(3,\)"),
        (lambda: score(torch.full((1, 2), float("nan"))), "logits must be finite"),
        (lambda: ood_metrics([], [1.0]), "id_scores must be a list of at least one score"),
        (lambda: ood_metrics([1.0], [float("inf")]), "ood_scores must be finite, got 1 NaN or infinite"),
        (lambda: ood_metrics([1.0], [1.0], 0.0), r"level must be in \(0, 1\], got 0"),
        (lambda: holdout_split([1, 2, 3], 3, 0), "n_id must be between 1 and 2, one less than the classes, got 3"),
    ],
)
def test_errors_name_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_score_is_higher_for_a_clearer_row():
    sure, unsure = torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.9, 0.8]])
    assert all(score(sure, kind) > score(unsure, kind) for kind in SCORES)
