"""The retriever as one object: an encoder, the documents it has read, and ``search``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtura.multimodal.retrieval.encoder import TextEncoder
from mixtura.multimodal.retrieval.index import DenseIndex

__all__ = ["Match", "Retriever"]


@dataclass(frozen=True)
class Match:
    """A document that was found.

    Attributes:
        id: its id, or its place as text where none was given.
        score: inner product with the question; the cosine where the encoder normalises.
        text: the document.
    """

    id: str
    score: float
    text: str


class Retriever:
    """Search by meaning in documents held in memory; :class:`~mixtura.multimodal.SearchIndex` is the one on disk.

    Args:
        encoder: embeds documents and questions.

    Example:
        >>> retriever = Retriever.from_pretrained()
        >>> _ = retriever.read(["A tuner for guitars and violins.", "A mail server for large sites."])
        >>> retriever.search("tune a musical instrument", k=1)[0].text
        'A tuner for guitars and violins.'
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.ids: list[str] = []
        self.texts: list[str] = []
        self._index = DenseIndex(np.zeros((0, encoder.width), dtype=np.float32))

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, *, device: str = "cpu") -> Retriever:
        """A retriever with the encoder at ``path`` (see :meth:`TextEncoder.from_pretrained`), which has read nothing yet."""
        return cls(TextEncoder.from_pretrained(path, device=device))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the encoder; documents are not kept."""
        self.encoder.save_pretrained(path)

    def read(self, documents: Mapping[str, str] | Sequence[str]) -> Retriever:
        """Take in documents, in addition to those it has.

        Args:
            documents: id -> text, or texts, whose ids are then their places.
        Raises:
            ValueError: an id that is there already.
        """
        if isinstance(documents, Mapping):
            ids, texts = list(documents), list(documents.values())
        else:
            ids, texts = [str(len(self.ids) + i) for i in range(len(documents))], list(documents)
        if known := sorted(set(ids) & set(self.ids)):
            raise ValueError(f"ids must differ from those already read, got {known[:5]} again")
        vectors = self.encoder.encode(texts)
        self._index = DenseIndex(np.concatenate([self._index.vectors, vectors]))
        self.ids, self.texts = self.ids + ids, self.texts + texts
        return self

    def search(self, query: str, k: int = 10) -> list[Match]:
        """The k documents nearest to a question, best first; none for an empty one."""
        found = self._index.search(self.encoder.encode([query], label=None), k)
        pairs = zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True)
        return [Match(self.ids[row], score, self.texts[row]) for row, score in pairs if row >= 0]
