"""Passages on their way into an index: read, then encoded by the batch, then made to last.

One batch of passages and the vectors of a few batches are in memory at a time, whatever comes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixtura.multimodal.retrieval.encoder import TextEncoder
from mixtura.multimodal.retrieval.passages import Passage

__all__ = ["Pending"]

BATCH = 1_024  # passages encoded at a time
SAVE = 16_384  # passages after which what is done is made to last

Row = tuple[int, int, str]  # document, line, text


class Pending:
    """What was read and does not last yet.

    Args:
        encoder: embeds passages.
        keep: makes vectors, shape (rows, D), float16, and as many rows last.
    """

    def __init__(self, encoder: TextEncoder, keep: Callable[[np.ndarray, list[Row]], None]) -> None:
        self.encoder, self.keep, self.total = encoder, keep, 0
        self.read: list[tuple[int, Passage]] = []
        self.rows: list[Row] = []
        self.vectors: list[np.ndarray] = []

    def put(self, document: int, passage: Passage) -> None:
        """Take a passage in; now and then what came so far is encoded and kept."""
        self.read.append((document, passage))
        self.total += 1
        if len(self.read) >= BATCH:
            self._encode()
        if len(self.rows) >= SAVE:
            self.save()

    def drop(self, document: int) -> None:
        """Forget passages of a document that turned out to be none."""
        self._encode()
        keep = [i for i, row in enumerate(self.rows) if row[0] != document]
        self.total -= len(self.rows) - len(keep)
        if self.vectors:
            self.vectors = [np.concatenate(self.vectors)[keep]]
        self.rows = [self.rows[i] for i in keep]

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
        self.vectors.append(self.encoder.encode(texts, 256, label=None).astype(np.float16))
        self.rows += [(document, passage.line, passage.text) for document, passage in self.read]
        self.read = []
