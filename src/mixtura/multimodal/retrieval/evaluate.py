"""How good a search is: what stands high in its list, and whether one search is better than another.

Shapes: N queries.
Source: trec_eval 9 (measures ndcg_cut, recall, recip_rank), its order of ties included; Sakai 2006 (paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Scores", "evaluate", "paired_bootstrap"]


@dataclass(frozen=True)
class Scores:
    """Figures of every judged query.

    Attributes:
        queries: ids, N of them.
        figures: name such as ``nDCG@10`` -> shape (N,), each between 0 and 1.
    """

    queries: list[str]
    figures: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, float]:
        """The mean of each figure over the queries."""
        return {name: float(values.mean()) for name, values in self.figures.items()}


def evaluate(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    ndcg: Sequence[int] = (10,),
    recall: Sequence[int] = (1, 10, 100),
    mrr: Sequence[int] = (10,),
) -> Scores:
    """Judge a search; a judged query that the run does not answer counts 0.

    Args:
        run: query -> document -> score. Of equal scores (in single precision, as trec_eval keeps them) the document with
            the larger id comes first, as in trec_eval.
        qrels: query -> document -> grade; above 0 is relevant, and the grade is the gain.
        ndcg, recall, mrr: how far down the list each figure looks.
    Returns:
        Figures named nDCG@k, R@k and MRR@k; queries without any relevant document are left out.
    Raises:
        ValueError: no query has a relevant document.
    Example:
        >>> evaluate({"q": {"a": 2.0, "b": 1.0}}, {"q": {"b": 1}}, ndcg=[], recall=[1, 2], mrr=[2]).means
        {'R@1': 0.0, 'R@2': 1.0, 'MRR@2': 0.5}
    """
    queries = [q for q, judged in qrels.items() if any(grade > 0 for grade in judged.values())]
    if not queries:
        raise ValueError("qrels must name a relevant document for at least one query, got none")
    names = [f"nDCG@{k}" for k in ndcg] + [f"R@{k}" for k in recall] + [f"MRR@{k}" for k in mrr]
    if any(k < 1 for k in (*ndcg, *recall, *mrr)):
        raise ValueError(f"cut-offs must be at least 1, got {names}")
    rows = []
    for query in queries:
        judged, answered = qrels[query], run.get(query, {})
        # Python's order is stable: by id first, then by score.
        ranked = sorted(sorted(answered, reverse=True), key=lambda d: -np.float32(answered[d]))
        gains = np.array([max(0, judged.get(document, 0)) for document in ranked], dtype=float)
        ideal = np.sort([max(0, grade) for grade in judged.values()])[::-1].astype(float)
        first = np.flatnonzero(gains > 0)
        row = [_dcg(gains, k) / _dcg(ideal, k) for k in ndcg]
        row += [float((gains[:k] > 0).sum() / (ideal > 0).sum()) for k in recall]
        row += [1.0 / (first[0] + 1) if len(first) and first[0] < k else 0.0 for k in mrr]
        rows.append(row)
    table = np.array(rows).reshape(len(queries), len(names))
    return Scores(queries, {name: table[:, i] for i, name in enumerate(names)})


def paired_bootstrap(a: np.ndarray, b: np.ndarray, *, samples: int = 10_000, seed: int = 0) -> float:
    """Probability that a is no better than b, by drawing the queries anew.

    Args:
        a, b: a figure of the same N queries under two searches, shape (N,).
        samples: times the queries are drawn, with replacement.
        seed: of the draws.
    Returns:
        Share of the draws in which the mean of a - b is not above 0, one-sided, with the observed sample counted in.
    """
    if np.ndim(a) != 1 or np.shape(a) != np.shape(b) or not len(a):
        raise ValueError(f"a and b must be figures of the same queries, got {np.shape(a)} and {np.shape(b)}")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    rng = np.random.default_rng(seed)
    # Only how often each difference is drawn matters, and figures of one relevant document take few values.
    values, counts = np.unique(difference, return_counts=True)
    drawn = rng.multinomial(len(difference), counts / counts.sum(), size=samples)
    return float((1 + (drawn @ values <= 0).sum()) / (samples + 1))


def _dcg(gains: np.ndarray, k: int) -> float:
    top = gains[:k]
    return float((top / np.log2(np.arange(2, len(top) + 2))).sum())
