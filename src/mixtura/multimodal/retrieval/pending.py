"""Passages on their way into an index: read, then encoded by the batch, then made to last.

One batch of passages and the vectors of a few batches are in memory at a time, whatever comes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixtura.multimodal.retrieval.passages import Passage

__all__ = ["Pending"]

SAVE = 16_384  # passages after which what is done is made to last

Row = tuple[int, int, str]  # document, line, text


class Pending:
    """What was read and does not last yet.

    Args:
        encode: embeds texts, shape (texts, D), float16.
        batch: passages to embed at a time.
        keep: makes vectors, shape (rows, D), float16, and as many rows last.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], np.ndarray],
        batch: int,
        keep: Callable[[np.ndarray, list[Row]], None],
    ) -> None:
        self.encode, self.batch, self.keep, self.total = encode, batch, keep, 0
        self.read: list[tuple[int, Passage]] = []
        self.rows: list[Row] = []
        self.vectors: list[np.ndarray] = []

    def put(self, document: int, passage: Passage) -> None:
        """Take a passage in; before it, now and then, what came so far is encoded and kept."""
        # Before and not after: then documents of one passage are whole when they are kept, and none is read again.
        if len(self.read) >= self.batch:
            self._encode()
        if len(self.rows) >= SAVE:
            self.save()
        self.read.append((document, passage))
        self.total += 1

    def drop(self, document: int) -> None:
        """Forget passages of a document that turned out to be none."""
        before = len(self.read) + len(self.rows)
        self.read = [waiting for waiting in self.read if waiting[0] != document]
        keep = [i for i, row in enumerate(self.rows) if row[0] != document]
        if len(keep) < len(self.rows):
            self.vectors = [np.concatenate(self.vectors)[keep]]
            self.rows = [self.rows[i] for i in keep]
        self.total -= before - len(self.read) - len(self.rows)

    def save(self) -> None:
        """Encode and keep what there is."""
        self._encode()
        if self.rows:
            self.keep(np.concatenate(self.vectors), self.rows)
            self.rows, self.vectors = [], []

    def _encode(self) -> None:
        if not self.read:
            return
        texts = [passage.text for _, passage in self.read]
        self.vectors.append(self.encode(texts))
        self.rows += [(document, passage.line, passage.text) for document, passage in self.read]
        self.read = []
