"""Search by the library faiss: its exact product, and cells with codes for more documents than an exact search is quick for.

Shapes: N rows, B queries, D width, K results of a query, M bytes of a code.
Source: inverted file with product quantization, Jégou, Douze and Schmid 2011 (IVFADC), as faiss has it. What the codes bring is
scored again with the vectors themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mixtura.core.progress import bar
from mixtura.multimodal.retrieval.exact_search import Best, Parts, merge_best

__all__ = ["LEAST", "CellIndex", "faiss_installed", "faiss_search"]

log = logging.getLogger(__name__)

LEAST = 10_000  # rows from which 256 codes of a part of a vector can be learned; faiss wants 39 a code
AGAIN = 8  # times as many rows as asked for are scored again
PROBED, PROBED_LEAST = 16, 64  # one cell of so many is looked into, and at least so many
HELD = 1 << 24  # numbers of vectors that are scored again at a time
PRODUCT = 8  # queries from which a matrix product is quicker than one query after another
BLOCK = 65_536


def faiss_installed() -> bool:
    """Whether faiss can be imported."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def faiss_search(parts: Parts, queries: Tensor, k: int, *, block: int) -> Best:
    """As :func:`~mixtura.multimodal.retrieval.exact_search.blocked_search`, by the exact product of faiss."""
    import faiss

    best: Best = (torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64))
    with _settings(len(queries)):
        for first, part, without in parts(block):
            there = _others(len(part), without)
            if not len(there):
                continue
            rows = part.numpy() if len(there) == len(part) else part.numpy()[there]
            found = min(k, len(rows))
            scores, at = faiss.knn(queries.numpy(), rows, found, metric=faiss.METRIC_INNER_PRODUCT)
            near = torch.from_numpy(scores), torch.from_numpy(there[at] + first)
            best = merge_best(best, near, k) if best[0].shape[1] else near
    return best


class CellIndex:
    """Rows in cells, each row a code of a few bytes: approximate, and quick where there are millions.

    A query looks into the cells nearest to it, ``8 k`` rows are found by their codes, and these are scored with the vectors
    themselves: scores are exact, and what is missed are rows of cells that were not looked into or whose code is far off. Of the
    ten nearest of 54,000 package descriptions, in 466 cells, it finds 93 %; exact search is quicker there.

    Args:
        parts: gives the rows; is read once to learn cells and codes, once to fill them.
        vectors: the same rows, shape (N, D), from which what is found is scored again.
        seed: of the sample and of the cells.
    Raises:
        ValueError: fewer than 10,000 rows.
    """

    def __init__(self, parts: Parts, vectors: np.ndarray, *, seed: int = 0) -> None:
        import faiss

        n, width = vectors.shape
        if n < LEAST:
            raise ValueError(
                f"backend='faiss-cells' needs at least {LEAST:,} vectors to learn its codes from, got {n:,}; "
                "so few are searched exactly in no time: backend='auto'"
            )
        self.vectors = vectors
        cells = round(2 * n**0.5)
        self.inner = faiss.IndexIVFPQ(
            faiss.IndexFlatIP(width), width, cells, _code_bytes(width), 8, faiss.METRIC_INNER_PRODUCT
        )
        self.inner.cp.seed = self.inner.pq.cp.seed = seed
        self.inner.nprobe = max(PROBED_LEAST, cells // PROBED)
        with _settings():
            self._learn(cells, seed)
            with bar(desc="cells", unit="vector", total=n) as shown:
                for first, part, without in parts(BLOCK):
                    there = _others(len(part), without)
                    self.inner.add_with_ids(part.numpy()[there], there + first)
                    shown.update(len(part))

    def _learn(self, cells: int, seed: int) -> None:
        n = len(self.vectors)
        drawn = np.sort(np.random.default_rng(seed).permutation(n)[: max(LEAST, 50 * cells)])
        sample = np.asarray(self.vectors[drawn], dtype=np.float32)
        sample = sample[sample.any(1)]
        log.info("learning %d cells from %d of %d vectors", cells, len(sample), n)
        if len(sample) < max(256, cells):
            raise ValueError(f"backend='faiss-cells': of {n:,} vectors hardly any is not zero; use backend='faiss'")
        self.inner.train(sample)

    def search(self, queries: Tensor, k: int) -> Best:
        """Rows near each query, best first; shape (B, k), -inf and -1 where fewer were found."""
        q, wide = queries.numpy(), min(AGAIN * k, int(self.inner.ntotal))
        with _settings():
            _, rows = self.inner.search(q, wide)
        scores = np.empty((len(q), wide), dtype=np.float32)
        few = max(1, HELD // (wide * q.shape[1]))
        for begin in range(0, len(q), few):
            part = slice(begin, begin + few)
            near = np.asarray(self.vectors[rows[part].clip(0)], dtype=np.float32)
            scores[part] = (near @ q[part, :, None])[..., 0]
        scores[rows < 0] = -np.inf
        top = torch.from_numpy(scores).topk(min(k, wide))
        return top.values, torch.from_numpy(rows).gather(1, top.indices)


def _code_bytes(width: int) -> int:
    """M: bytes of a code, each for a part of at least four numbers where the width allows it."""
    return next(m for m in range(max(1, width // 4), 0, -1) if width % m == 0)


def _others(n: int, without: Tensor) -> np.ndarray:
    return np.delete(np.arange(n), without.numpy())


@contextmanager
def _settings(queries: int = 0) -> Iterator[None]:
    """faiss with as many threads as torch was told to use, for it counts its own, and a product for a few queries already."""
    import faiss

    threads, least = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    faiss.omp_set_num_threads(torch.get_num_threads())
    if queries >= PRODUCT:
        # Left to itself faiss 1.15 takes queries one by one until queries x width is 128,000: five times as slow at 300 x 128.
        faiss.cvar.distance_compute_blas_threshold = PRODUCT
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
        faiss.cvar.distance_compute_blas_threshold = least
