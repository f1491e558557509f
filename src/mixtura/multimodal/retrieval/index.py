"""Finding the nearest of many vectors, the best of many texts by their words, and both together.

Shapes: N documents, B queries, D width, K results of a query.
Source: exact search; BM25 as in Lucene (k1 0.9, b 0.4, the values of BEIR, 2104.08663); reciprocal rank fusion (Cormack et
al. 2009) with its constant of 60.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

__all__ = ["DenseIndex", "Found", "LexicalIndex", "fuse", "merge_best"]

BLOCK = 65_536  # documents whose similarities to all queries of a batch are held at a time
QUERIES = 256  # of a batch
RRF = 60


@dataclass(frozen=True)
class Found:
    """The best documents of each query.

    Attributes:
        scores: shape (B, K), falling along a row; -inf where there was nothing more to find.
        rows: number of the document, shape (B, K), int64; -1 where there was nothing more.
    """

    scores: np.ndarray
    rows: np.ndarray

    def run(self, queries: Sequence[str], documents: Sequence[str]) -> dict[str, dict[str, float]]:
        """Query id -> document id -> score, as :func:`~mixtura.multimodal.retrieval.evaluate.evaluate` reads it."""
        return {
            query: {documents[row]: float(score) for score, row in zip(scores, rows, strict=True) if row >= 0}
            for query, scores, rows in zip(queries, self.scores, self.rows, strict=True)
        }


class DenseIndex:
    """Documents by the inner product of their vectors with the query's, exactly, a block at a time.

    Args:
        vectors: shape (N, D), float16 or float32; may lie on disk (``np.load(..., mmap_mode="r")``). A document whose vector
            is zero was empty and is never found.
        block: documents at a time; bounds the memory, not the result.

    Example:
        >>> DenseIndex(np.eye(3, dtype=np.float32)).search(np.array([[0.1, 0.9, 0.0]], dtype=np.float32), 2).rows
        array([[1, 0]])
    """

    def __init__(self, vectors: np.ndarray, *, block: int = BLOCK) -> None:
        if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
            raise ValueError(f"vectors must be a float16 or float32 matrix, got {vectors.dtype} of {vectors.shape}")
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.vectors, self.block = vectors, block
        self._empty: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> Found:
        """The k nearest documents of each query.

        Args:
            queries: shape (B, D), float32. A query whose vector is zero finds nothing.
            k: results of a query, >= 1; of fewer documents all are returned.
        """
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries must have shape (B, {self.vectors.shape[1]}), got {queries.shape}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        q = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        k = min(k, len(self.vectors))
        best: list[tuple[torch.Tensor, torch.Tensor]] = []
        for begin, block, empty in self._blocks():
            for at in range(0, len(q), QUERIES):
                scores = q[at : at + QUERIES] @ block.mT
                if len(empty):
                    scores[:, empty] = -torch.inf
                top = scores.topk(min(k, scores.shape[1]))
                found = (top.values, top.indices + begin)
                place = at // QUERIES
                if place == len(best):
                    best.append(found)
                else:
                    best[place] = merge_best(best[place], found, k)
        if not best:
            return Found(np.zeros((len(q), 0), np.float32), np.zeros((len(q), 0), np.int64))
        values: np.ndarray = torch.cat([pair[0] for pair in best]).numpy()
        rows: np.ndarray = torch.cat([pair[1] for pair in best]).numpy()
        values[~q.numpy().any(1)] = -np.inf
        rows[values == -np.inf] = -1
        return Found(values, rows)

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        first = self._empty is None
        empties: list[np.ndarray] = [] if self._empty is None else self._empty
        for number, begin in enumerate(range(0, len(self.vectors), self.block)):
            part = np.asarray(self.vectors[begin : begin + self.block], dtype=np.float32)
            if not part.flags.writeable:  # a map of a file that may not be written to
                part = part.copy()
            if first:
                empties.append(np.flatnonzero(~part.any(1)))
            yield begin, torch.from_numpy(part), torch.from_numpy(empties[number])
        self._empty = empties


def merge_best(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of two lists of scores and rows, each of shape (B, <= k)."""
    scores, rows = torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)
    top = scores.topk(min(k, scores.shape[1]))
    return top.values, rows.gather(1, top.indices)


class LexicalIndex:
    """Documents by the words they share with the query: BM25, through bm25s, with stemming and without stop words.

    Args:
        texts: documents.
        language: of the stop words and of the stemmer, both of the documents.
        k1, b: how soon a repeated word counts no more, and how much long documents are held back.
    Raises:
        ImportError: bm25s or PyStemmer is missing.
    """

    def __init__(self, texts: Sequence[str], *, language: str = "english", k1: float = 0.9, b: float = 0.4) -> None:
        import bm25s
        import Stemmer

        # It logs every step at DEBUG whatever the caller's level is.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._bm25s, self._stemmer = bm25s, Stemmer.Stemmer(language)
        self._model = bm25s.BM25(method="lucene", k1=k1, b=b)
        self._model.index(self._words(texts), show_progress=False)
        self.n = len(texts)

    def _words(self, texts: Sequence[str], ids: bool = True) -> Any:
        return self._bm25s.tokenize(
            list(texts), stopwords="en", stemmer=self._stemmer, show_progress=False, return_ids=ids
        )

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k best documents of each query; one that shares no word with it is not found."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        k = min(k, self.n)
        rows, scores = self._model.retrieve(self._words(queries, ids=False), k=k, show_progress=False)
        scores, rows = np.asarray(scores, dtype=np.float32), np.asarray(rows, dtype=np.int64)
        return Found(np.where(scores > 0, scores, -np.inf), np.where(scores > 0, rows, -1))

    def words(self, texts: Sequence[str]) -> list[set[str]]:
        """The stemmed words of each text, stop words left out: what decides whether BM25 can find it."""
        return [set(words) for words in self._words(texts, ids=False)]


def fuse(runs: Sequence[Found], weights: Sequence[float] | Literal["rrf"] = "rrf", *, k: int | None = None) -> Found:
    """Several searches of the same queries as one.

    Args:
        runs: of the same queries in the same documents.
        weights: of each run's scores, scaled to between 0 and 1 within a query, where a document that a run did not find
            has 0; or ``"rrf"``, the sum of 1 / (60 + rank).
        k: results of a query; ``None`` keeps as many as the longest run has.
    Raises:
        ValueError: no run, runs of different queries, or another number of weights than runs.
    Example:
        >>> a = Found(np.array([[3.0, 1.0]]), np.array([[0, 1]]))
        >>> b = Found(np.array([[9.0, 8.0]]), np.array([[1, 2]]))
        >>> fuse([a, b], [0.5, 0.5], k=2)
        Found(scores=array([[0.5, 0.5]]), rows=array([[0, 1]]))
    """
    if not runs or len({len(run.rows) for run in runs}) != 1:
        raise ValueError(f"runs must be at least one and of the same queries, got {[len(run.rows) for run in runs]}")
    if weights != "rrf" and len(weights) != len(runs):
        raise ValueError(f"weights must be 'rrf' or one number a run, got {weights!r} for {len(runs)} runs")
    k = max(run.rows.shape[1] for run in runs) if k is None else k
    scores, rows = np.full((len(runs[0].rows), k), -np.inf), np.full((len(runs[0].rows), k), -1, dtype=np.int64)
    parts = [_shares(run, "rrf" if weights == "rrf" else float(weights[i])) for i, run in enumerate(runs)]
    for q in range(len(scores)):
        at = np.concatenate([run.rows[q] for run in runs])
        value = np.concatenate([part[q] for part in parts])[at >= 0]
        there, place = np.unique(at[at >= 0], return_inverse=True)
        total = np.bincount(place, value, minlength=len(there))
        order = np.argsort(-total, kind="stable")[:k]
        scores[q, : len(order)], rows[q, : len(order)] = total[order], there[order]
    return Found(scores, rows)


def _shares(run: Found, weight: float | Literal["rrf"]) -> np.ndarray:
    """What each result adds, shape (B, K)."""
    if weight == "rrf":
        return np.broadcast_to(1 / (RRF + 1 + np.arange(run.rows.shape[1])), run.rows.shape)
    there = run.rows >= 0
    low = np.where(there, run.scores, np.inf).min(1, keepdims=True, initial=np.inf)
    high = np.where(there, run.scores, -np.inf).max(1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Where all scores of a query are alike, all count in full.
        scaled = np.where(high > low, (run.scores - low) / (high - low), 1.0)
    return weight * np.where(there, scaled, 0.0)
