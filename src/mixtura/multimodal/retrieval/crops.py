"""Two pieces of one document: what a search learns from where nobody wrote a question.

Both pieces are cut alike and on their own, so they may overlap (which teaches that words match) or not (which teaches that
meanings do). Lengths vary from a few tokens to half a chunk, since questions are short and documents long.

Shapes: N documents, B pairs of a batch, S tokens of a batch. Texts of different lengths lie in one row, ``Tokens``.
Source: Contriever (2112.09118), sec. 3.1 (independent cropping, deletion; inverse cloze task as the rival).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["WAYS", "CropDataset", "Tokens", "independent_crops", "inverse_cloze"]

Way = Literal["independent", "cloze", "identical"]
WAYS: tuple[Way, ...] = ("independent", "cloze", "identical")
CHUNK = 256  # tokens


@dataclass(frozen=True)
class Tokens:
    """Texts of a batch, one after another.

    Attributes:
        ids: shape (S,), int64.
        lengths: tokens of each text, shape (B,), int64, >= 0; they sum to S.
    """

    ids: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """Where each text begins, shape (B,)."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    def padded(self, value: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, L) filled up with ``value``, and where there is text (bool, same shape)."""
        there = np.arange(max(1, int(self.lengths.max(initial=0))))[None, :] < self.lengths[:, None]
        ids = np.full(there.shape, value, dtype=np.int64)
        ids[there] = self.ids
        return ids, there

    @classmethod
    def of(cls, texts: Iterable[Sequence[int] | np.ndarray]) -> Tokens:
        """From one sequence of ids a text."""
        parts = [np.asarray(text, dtype=np.int64) for text in texts]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return cls(np.concatenate(parts) if parts else np.zeros(0, np.int64), lengths)


def independent_crops(
    tokens: np.ndarray, ratio: tuple[float, float] = (0.05, 0.5), delete: float = 0.1, *, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two crops of one document, drawn alike and independently of each other.

    Args:
        tokens: ids of the document, shape (n,), n >= 1.
        ratio: the length of a crop is this share of the document, uniform between the two; at least one token.
        delete: probability with which each token is left out; where all would go, the first stays.
        rng: where chance comes from.
    Source:
        Contriever (2112.09118), sec. 3.1 and appendix A.1.
    """
    _check(ratio, delete)
    if len(tokens) < 1:
        raise ValueError("tokens must hold at least one token to crop from, got none")
    one = Tokens.of([tokens])
    first, second = (_crops(one, ratio, delete, rng) for _ in range(2))
    return first.ids, second.ids


def inverse_cloze(
    tokens: np.ndarray, ratio: tuple[float, float] = (0.05, 0.5), delete: float = 0.1, *, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A span of a document and everything around it: the rival of :func:`independent_crops`, with the same arguments.

    Source:
        Lee et al. 2019 (1906.00300), as in Contriever's ablation (2112.09118, table 5).
    """
    _check(ratio, delete)
    if len(tokens) < 2:
        raise ValueError(f"tokens must hold at least two tokens, a span and its surroundings, got {len(tokens)}")
    span, around = _cloze(Tokens.of([tokens]), ratio, delete, rng)
    return span.ids, around.ids


class CropDataset:
    """Batches of pairs from documents; the batch of a step depends on the step and the seed alone.

    Args:
        documents: ids of each document; those of fewer than two tokens are passed over and counted in ``skipped``.
        chunk: longest stretch that both pieces come from; where in a longer document it lies is drawn anew each time.
        ratio, delete: as in :func:`independent_crops`.
        way: ``independent`` crops, ``cloze`` (a span and its surroundings), or ``identical`` (one crop twice, as
            in SimCSE; what then differs is the encoder's dropout alone).
        cross_documents: cut chunks from all documents joined, as the paper does, so that one may hold the end of a document
            and the start of the next.
        groups: a number for each document, such as its language: a batch draws groups uniformly, then documents.
    Raises:
        ValueError: no document of two tokens, or an option out of its range.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int] | np.ndarray],
        *,
        chunk: int = CHUNK,
        ratio: tuple[float, float] = (0.05, 0.5),
        delete: float = 0.1,
        way: Way = "independent",
        cross_documents: bool = False,
        groups: Sequence[int] | None = None,
    ) -> None:
        _check(ratio, delete)
        if way not in WAYS:
            raise ValueError(f"way must be one of {list(WAYS)}, got {way!r}")
        if chunk < 2:
            raise ValueError(f"chunk must be at least 2 tokens, got {chunk}")
        parts = [np.asarray(document, dtype=np.int32) for document in documents]
        kept = [i for i, part in enumerate(parts) if len(part) >= 2]
        self.skipped = len(parts) - len(kept)
        if not kept:
            raise ValueError(f"none of the {len(parts)} documents has two tokens to learn from; give more text")
        if groups is not None and len(groups) != len(parts):
            raise ValueError(f"groups must name one group a document, got {len(groups)} for {len(parts)}")
        self.ids = np.concatenate([parts[i] for i in kept])
        lengths = np.array([len(parts[i]) for i in kept], dtype=np.int64)
        self.groups = None if groups is None else [np.flatnonzero(_of(groups, kept) == g) for g in sorted(set(groups))]
        if self.groups is not None:
            self.groups = [members for members in self.groups if len(members)]
        if cross_documents:
            if self.groups is not None:
                raise ValueError("chunks that cross documents have no group; give groups or cross_documents, not both")
            n = max(1, len(self.ids) // chunk)
            lengths = np.full(n, min(chunk, len(self.ids)), dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.lengths, self.cross = lengths, cross_documents
        self.chunk, self.ratio, self.delete, self.way = chunk, ratio, delete, way

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, step: int, size: int, *, seed: int) -> tuple[Tokens, Tokens]:
        """The pairs of a step, drawn from the step and the seed alone."""
        rng = np.random.default_rng([seed, step])
        chunks = self._chunks(rng, size)
        if self.way == "independent":
            return _crops(chunks, self.ratio, self.delete, rng), _crops(chunks, self.ratio, self.delete, rng)
        if self.way == "cloze":
            return _cloze(chunks, self.ratio, self.delete, rng)
        same = _crops(chunks, self.ratio, self.delete, rng)
        return same, same

    def _chunks(self, rng: np.random.Generator, size: int) -> Tokens:
        if self.groups is None:
            rows = rng.integers(len(self.lengths), size=size)
        else:
            sizes = np.array([len(g) for g in self.groups])
            drawn = rng.integers(len(self.groups), size=size)
            at = rng.integers(sizes[drawn])
            rows = np.array([self.groups[g][i] for g, i in zip(drawn, at, strict=True)])
        lengths = np.minimum(self.lengths[rows], self.chunk)
        if self.cross:
            starts = rng.integers(len(self.ids) - lengths + 1)
        else:
            starts = self.starts[rows] + rng.integers(self.lengths[rows] - lengths + 1)
        return Tokens(self.ids[_ranges(starts, lengths)].astype(np.int64), lengths)


def _of(groups: Sequence[int], kept: Sequence[int]) -> np.ndarray:
    return np.asarray(groups)[np.asarray(kept)]


def _check(ratio: tuple[float, float], delete: float) -> None:
    if not 0 < ratio[0] <= ratio[1] <= 1:
        raise ValueError(f"ratio must be two shares with 0 < first <= second <= 1, got {ratio}")
    if not 0 <= delete < 1:
        raise ValueError(f"delete must be a probability below 1, got {delete}")


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of every text in one row, shape (S,)."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _spans(lengths: np.ndarray, ratio: tuple[float, float], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    share = rng.uniform(*ratio, size=len(lengths))
    taken = np.maximum(1, np.floor(lengths * share).astype(np.int64))
    return rng.integers(lengths - taken + 1), taken


def _crops(chunks: Tokens, ratio: tuple[float, float], delete: float, rng: np.random.Generator) -> Tokens:
    begin, taken = _spans(chunks.lengths, ratio, rng)
    return _thinned(Tokens(chunks.ids[_ranges(chunks.starts + begin, taken)], taken), delete, rng)


def _cloze(
    chunks: Tokens, ratio: tuple[float, float], delete: float, rng: np.random.Generator
) -> tuple[Tokens, Tokens]:
    begin, taken = _spans(chunks.lengths, ratio, rng)
    taken = np.minimum(taken, chunks.lengths - 1)  # something must remain around it
    inside = _ranges(chunks.starts + begin, taken)
    outside = np.ones(len(chunks.ids), dtype=bool)
    outside[inside] = False
    span = Tokens(chunks.ids[inside], taken)
    around = Tokens(chunks.ids[outside], chunks.lengths - taken)
    return _thinned(span, delete, rng), _thinned(around, delete, rng)


def _thinned(texts: Tokens, delete: float, rng: np.random.Generator) -> Tokens:
    """Each token left out with probability ``delete``; no text is left empty."""
    if delete == 0:
        return texts
    keep = rng.random(len(texts.ids)) >= delete
    # Not the first token: it would be kept more often than its neighbours in every text, not in the emptied ones alone.
    left = np.add.reduceat(keep, texts.starts)
    keep[texts.starts[left == 0]] = True
    return Tokens(texts.ids[keep], np.maximum(left, 1))
