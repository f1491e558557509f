"""A byte-pair tokenizer for search: case does not count, and a word is the same token wherever it stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mixtura.multimodal.retrieval.crops import Tokens

__all__ = ["PAD", "SearchTokenizer", "train_tokenizer"]

PAD, FIRST, LAST = "[PAD]", "[CLS]", "[SEP]"
LONGEST = 1 << 20  # characters of one text that are tokenized: far beyond what an encoder reads of it


def train_tokenizer(texts: Iterable[str], vocab_size: int = 16_000) -> SearchTokenizer:
    """Learn the merges from texts.

    Args:
        texts: documents.
        vocab_size: tokens, the 256 bytes and three marks included; at least 259.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if vocab_size < 259:
        raise ValueError(f"vocab_size must be at least 259 (256 bytes and three marks), got {vocab_size}")
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, FIRST, LAST],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return SearchTokenizer(made)


class SearchTokenizer:
    """Texts to ids.

    Args:
        inner: a ``tokenizers.Tokenizer``.
        marks: put [CLS] before and [SEP] behind each text, where the vocabulary has them.
    """

    def __init__(self, inner: Any, *, marks: bool = False) -> None:
        self.inner = inner
        self.first, self.last = inner.token_to_id(FIRST), inner.token_to_id(LAST)
        self.pad = inner.token_to_id(PAD) or 0
        self.marks = marks and self.first is not None and self.last is not None

    def __len__(self) -> int:
        return int(self.inner.get_vocab_size())

    def ids(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Ids of each text, cut to ``max_length`` with its marks.

        Raises:
            TypeError: a text that is no string (its place is named).
        """
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts must be strings, got {type(text).__name__} at place {i}")
        room = None if max_length is None else max_length - 2 * self.marks
        # A word is seldom longer than its letters: what lies far beyond the room need not be tokenized.
        most = LONGEST if room is None else min(LONGEST, 24 * room + 64)
        found = [e.ids[:room] for e in self.inner.encode_batch([t[:most] for t in texts], add_special_tokens=False)]
        if self.marks:
            found = [[self.first, *ids, self.last] for ids in found]
        return found

    def tokens(self, texts: Sequence[str], max_length: int | None = None) -> Tokens:
        """The same as one row."""
        return Tokens.of(self.ids(texts, max_length))

    def marked(self, texts: Tokens) -> Tokens:
        """Texts with [CLS] and [SEP] where this tokenizer puts them."""
        if not self.marks:
            return texts
        parts = zip(texts.starts, texts.starts + texts.lengths, strict=True)
        return Tokens.of([[self.first, *texts.ids[a:b], self.last] for a, b in parts])

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``."""
        # Without indentation: half the size.
        Path(path).write_text(self.inner.to_str(pretty=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, marks: bool = False) -> SearchTokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            ValueError: it is no tokenizer.
        """
        from tokenizers import Tokenizer

        text = Path(path).read_text(encoding="utf-8")
        try:
            inner = Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is no tokenizer ({error})") from error
        inner.no_padding()
        inner.no_truncation()
        return cls(inner, marks=marks)
