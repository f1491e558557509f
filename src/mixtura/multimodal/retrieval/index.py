"""Finding the nearest of many vectors, the best of many texts by their words, and both together.

Shapes: N documents, B queries, D width, K results of a query.
Source: exact search, or cells of faiss where there are millions; BM25 as in Lucene (k1 0.9, b 0.4, the values of BEIR,
2104.08663); reciprocal rank fusion (Cormack et al. 2009) with its constant of 60.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from mixtura.multimodal.retrieval.exact_search import blocked_search
from mixtura.multimodal.retrieval.faiss_search import CellIndex, faiss_installed, faiss_search

__all__ = ["Backend", "DenseIndex", "Found", "LexicalIndex", "fuse", "why_not"]

Backend = Literal["torch", "faiss", "faiss-cells"]
BACKENDS: tuple[Backend, ...] = ("torch", "faiss", "faiss-cells")
BLOCK = 65_536  # documents that are looked at together, at most
MANY = 5_000_000  # documents beyond which an exact search of all is not what is wanted
RRF = 60

log = logging.getLogger(__name__)


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


def why_not(backend: Backend) -> str | None:
    """Reason why a backend cannot be used here, or ``None``."""
    if backend != "torch" and not faiss_installed():
        return "faiss is not installed: pip install faiss-cpu"
    return None


class DenseIndex:
    """Documents by the inner product of their vectors with the query's.

    Args:
        vectors: shape (N, D), float16 or float32; may lie on disk (``np.load(..., mmap_mode="r")``). A document whose vector
            is zero was empty and is never found.
        block: documents at a time, at most; bounds the memory, not the result.
        backend: ``torch`` and ``faiss`` are exact and agree; ``faiss-cells`` is approximate: vectors are put into cells and
            coded when the first question comes, which takes minutes for millions, and a search looks into some of them
            (:class:`~mixtura.multimodal.retrieval.faiss_search.CellIndex`). ``auto`` takes faiss where it is installed, exactly
            up to 5,000,000 documents and by cells beyond.
    Attributes:
        backend: the one in use.
    Raises:
        ImportError: a backend of faiss, which is not installed.
        ValueError: an unknown backend, or ``faiss-cells`` for fewer than 10,000 documents.

    Example:
        >>> DenseIndex(np.eye(3, dtype=np.float32)).search(np.array([[0.1, 0.9, 0.0]], dtype=np.float32), 2).rows
        array([[1, 0]])
    """

    def __init__(self, vectors: np.ndarray, *, block: int = BLOCK, backend: Backend | Literal["auto"] = "auto") -> None:
        if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
            raise ValueError(f"vectors must be a float16 or float32 matrix, got {vectors.dtype} of {vectors.shape}")
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.vectors, self.block = vectors, block
        self.backend: Backend = _chosen(len(vectors)) if backend == "auto" else backend
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
        if (reason := why_not(self.backend)) is not None:
            raise ImportError(f"backend={backend!r}: {reason}")
        self._empty: np.ndarray | None = None
        self._cells: CellIndex | None = None

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
        values, rows = np.full((len(q), k), -np.inf, np.float32), np.full((len(q), k), -1, np.int64)
        asks = q.any(1).numpy()
        if k and asks.any():
            found = self._best(q[asks], k)
            near = [pair.numpy() for pair in found]
            near[1][near[0] == -np.inf] = -1
            width = near[0].shape[1]  # fewer than k where empty documents were left out
            values[asks, :width], rows[asks, :width] = near
        return Found(values, rows)

    def _best(self, q: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.backend == "torch":
            return blocked_search(self._parts, q, k, block=self.block)
        if self.backend == "faiss":
            return faiss_search(self._parts, q, k, block=self.block)
        if self._cells is None:
            self._cells = CellIndex(self._parts, self.vectors)
        return self._cells.search(q, k)

    def _parts(self, rows: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        empties: list[np.ndarray] = []
        for begin in range(0, len(self.vectors), rows):
            part = np.asarray(self.vectors[begin : begin + rows], dtype=np.float32)
            if not part.flags.writeable:  # a map of a file that may not be written to
                part = part.copy()
            if self._empty is None:
                empty = np.flatnonzero(~part.any(1))
                empties.append(empty + begin)
            else:
                low, high = np.searchsorted(self._empty, (begin, begin + len(part)))
                empty = self._empty[low:high] - begin
            yield begin, torch.from_numpy(part), torch.from_numpy(empty)
        if self._empty is None:
            self._empty = np.concatenate(empties)


def _chosen(n: int) -> Backend:
    """What ``auto`` is for n documents."""
    # On macOS the wheels of faiss and torch each bring an OpenMP, and a process with two of them is ended.
    if sys.platform == "darwin" or why_not("faiss") is not None:
        return "torch"
    if n <= MANY:
        return "faiss"
    log.warning("%d documents: searched by cells, approximately; backend='faiss' is exact, and slower", n)
    return "faiss-cells"


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
