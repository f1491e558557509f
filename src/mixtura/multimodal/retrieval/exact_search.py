"""The best rows of a matrix for each query by inner product, exactly: a product in blocks and a floor that rises.

Shapes: N rows, B queries, D width, K results of a query, R rows of a chunk, G groups of 16 rows of a chunk.

A row is of account only if it beats the K-th best seen so far. That floor soon stands so high that hardly anything of a chunk
passes, so choosing costs little beside the product. The highest score of each group of rows is taken while the product lies
in the cache; only groups whose highest beats the floor are looked into. Where there is no floor yet, the K-th highest of the
groups is one: K rows at least are as high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["Best", "Parts", "blocked_search", "merge_best"]

QUERIES = 256  # of a batch
PRODUCT = 1 << 18  # similarities multiplied at a time; a megabyte
CHUNK = 8_192  # rows that are chosen from at a time, at least
GROUP = 16

Best = tuple[Tensor, Tensor]  # scores and rows, each of shape (B, <= K)
# For a number of rows, yields them so many at a time: number of the first, the rows as float32, and which of them to pass over.
Parts = Callable[[int], Iterator[tuple[int, Tensor, Tensor]]]


def merge_best(a: Best, b: Best, k: int) -> Best:
    """The k best of two lists of scores and rows, each of shape (B, <= k)."""
    scores, rows = torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)
    top = scores.topk(min(k, scores.shape[1]))
    return top.values, rows.gather(1, top.indices)


def blocked_search(parts: Parts, queries: Tensor, k: int, *, block: int) -> Best:
    """The k best rows of each query, best first.

    Args:
        parts: gives the rows; those passed over are not found.
        queries: shape (B, D), float32, B >= 1.
        k: results of a query.
        block: rows at a time, at most.
    Returns:
        Scores, float32, and rows, int64, each of shape (B, <= k); fewer than k, or scores of -inf, where there are no more.
    """
    # Five times as many groups as results, so that the K-th highest group is close below the K-th highest row.
    size = min(block, max(CHUNK, 5 * GROUP * k))
    lists = [_Rising(part, k) for part in queries.split(QUERIES)]
    scores_RB = torch.empty(-(-size // GROUP) * GROUP, min(len(queries), QUERIES))  # one for all: fresh memory is slow
    for first, part, without in parts(size):
        for found in lists:
            found.see(first, part, without, scores_RB[:, : len(found.queries)])
    best = [found.best() for found in lists]
    width = max(scores.shape[1] for scores, _ in best)
    padded = [torch.nn.functional.pad(scores, (0, width - scores.shape[1]), value=-torch.inf) for scores, _ in best]
    return torch.cat(padded), torch.cat([torch.nn.functional.pad(rows, (0, width - rows.shape[1])) for _, rows in best])


class _Rising:
    """The best rows of one batch of queries so far, and what has beaten the floor since they were last put in order."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries, self.k = queries, k
        self.kept: Best = (torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64))
        self.floor = torch.full((len(queries),), -torch.inf)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # query, score, row
        self.n_waiting = 0

    def see(self, first: int, part: Tensor, without: Tensor, scores_RB: Tensor) -> None:
        """Look at rows; ``scores_RB`` is room for their scores."""
        n = len(part)
        whole = -(-n // GROUP) * GROUP
        scores_RB[n:whole] = -torch.inf
        step = max(GROUP, PRODUCT // len(self.queries) // GROUP * GROUP)
        highest = []
        for begin in range(0, whole, step):
            scores = scores_RB[begin : min(begin + step, whole)]
            # Rows by queries: the floor is then one vector beside every row.
            torch.mm(part[begin : begin + step], self.queries.mT, out=scores[: n - begin])
            if len(without):
                scores[without[(without >= begin) & (without < begin + step)] - begin] = -torch.inf
            highest.append(scores.view(-1, GROUP, scores.shape[1]).amax(1))
        self._choose(first, scores_RB[:whole].view(-1, GROUP, len(self.queries)), torch.cat(highest))

    def _choose(self, first: int, scores: Tensor, highest_GB: Tensor) -> None:
        passing = highest_GB > self.floor
        # At the first chunk, and where rows come in rising order.
        if len(highest_GB) > self.k and int(passing.sum()) > 2 * self.k * len(self.floor):
            lowest = highest_GB.mT.contiguous().topk(self.k, sorted=False).values.amin(1)
            # A little below, since a row that is as high as the floor counts here.
            self.floor = torch.maximum(self.floor, lowest.nextafter(torch.tensor(-torch.inf)))
            passing = highest_GB > self.floor
        group, query = passing.nonzero(as_tuple=True)
        values = scores[group, :, query]
        which, inside = (values > self.floor[query, None]).nonzero(as_tuple=True)
        self.waiting.append((query[which], values[which, inside], first + group[which] * GROUP + inside))
        self.n_waiting += len(which)
        if self.n_waiting > self.k * len(self.floor):
            self.settle()

    def settle(self) -> None:
        """Put what waits in rows of one length, and keep the best."""
        query, score, row = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting, self.n_waiting = [], 0
        order = query.argsort()
        query = query[order]
        counts = query.bincount(minlength=len(self.floor))
        place = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
        scores = torch.full((len(counts), int(counts.max())), -torch.inf)
        rows = torch.zeros(scores.shape, dtype=torch.int64)
        scores[query, place], rows[query, place] = score[order], row[order]
        self.kept = merge_best(self.kept, (scores, rows), self.k)
        if self.kept[0].shape[1] == self.k:
            self.floor = torch.maximum(self.floor, self.kept[0][:, -1])

    def best(self) -> Best:
        """The best rows, best first."""
        if self.waiting:
            self.settle()
        return self.kept
