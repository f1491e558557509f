"""Figures equal trec_eval's, ties included; the bootstrap finds a difference that is there and none that is not."""

import numpy as np
import pytest

from mixtura.multimodal.retrieval.evaluate import evaluate, paired_bootstrap


def random_case(seed):
    rng = np.random.default_rng(seed)
    documents = [f"d{i}" for i in rng.permutation(60)]
    qrels = {f"q{q}": {d: int(rng.integers(0, 3)) for d in rng.choice(documents, 12, replace=False)} for q in range(25)}
    # Few distinct scores, so that ties abound; some differ below single precision only.
    run = {
        f"q{q}": {
            d: float(rng.integers(0, 6)) / 3 + 1e-12 * i for i, d in enumerate(rng.choice(documents, 30, replace=False))
        }
        for q in range(24)
    }
    return run, qrels


def by_hand(run, qrels, query, k):
    order = sorted(run.get(query, {}).items(), key=lambda p: (np.float32(p[1]), p[0]), reverse=True)[:k]
    gain = sum(qrels[query].get(d, 0) / np.log2(i + 2) for i, (d, _) in enumerate(order))
    ideal = sum(g / np.log2(i + 2) for i, g in enumerate(sorted(qrels[query].values(), reverse=True)[:k]))
    there = sum(g > 0 for g in qrels[query].values())
    first = next((i for i, (d, _) in enumerate(order) if qrels[query].get(d, 0) > 0), None)
    found = sum(qrels[query].get(d, 0) > 0 for d, _ in order)
    return gain / ideal, found / there, 0.0 if first is None else 1 / (first + 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_equal_those_computed_by_hand(seed):
    run, qrels = random_case(seed)
    scores = evaluate(run, qrels, ndcg=[5, 10], recall=[5, 10], mrr=[5, 10])
    for i, query in enumerate(scores.queries):
        for k in (5, 10):
            got = [scores.figures[f"{name}@{k}"][i] for name in ("nDCG", "R", "MRR")]
            np.testing.assert_allclose(got, by_hand(run, qrels, query, k), atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_figures_equal_trec_eval(seed):
    ir = pytest.importorskip("ir_measures", reason="the peer is not installed: pip install ir-measures")
    pytest.importorskip("pytrec_eval", reason="the peer is not installed: pip install pytrec-eval-terrier")
    run, qrels = random_case(seed)
    ours = evaluate(run, qrels, ndcg=[10, 30], recall=[1, 10], mrr=[30])
    peers = {"nDCG@10": ir.nDCG @ 10, "nDCG@30": ir.nDCG @ 30, "R@1": ir.R @ 1, "R@10": ir.R @ 10, "MRR@30": ir.RR}
    theirs = {(str(m.measure), m.query_id): m.value for m in ir.iter_calc(list(peers.values()), qrels, run)}
    for name, measure in peers.items():
        for query, value in zip(ours.queries, ours.figures[name], strict=True):
            assert abs(value - theirs[str(measure), query]) < 1e-9


def test_a_query_without_an_answer_in_the_run_counts_zero_and_one_without_a_relevant_document_is_left_out():
    scores = evaluate({"a": {"x": 1.0}}, {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 0}})
    assert scores.queries == ["a", "b"] and scores.means["R@1"] == 0.5
    with pytest.raises(ValueError, match="at least one query, got none"):
        evaluate({}, {"c": {"x": 0}})
    with pytest.raises(ValueError, match="cut-offs must be at least 1"):
        evaluate({}, {"a": {"x": 1}}, recall=[0])


def test_the_bootstrap_agrees_with_the_normal_limit_and_with_certainty():
    rng = np.random.default_rng(0)
    b = rng.random(1000)
    assert paired_bootstrap(b + 0.1, b) < 2e-4 and paired_bootstrap(b, b) == 1.0
    noise = rng.normal(size=1000)
    from scipy.stats import norm

    noise += 1.5 / 1000**0.5 * noise.std() - noise.mean()  # mean 1.5 standard errors above 0
    assert (
        abs(paired_bootstrap(b + noise, b, samples=3000) - norm.sf(1.5)) < 0.02
    )  # over four standard errors of the draws
    with pytest.raises(ValueError, match="figures of the same queries"):
        paired_bootstrap(b, b[:5])
