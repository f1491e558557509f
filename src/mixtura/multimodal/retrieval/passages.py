"""Documents from folders, one at a time, cut into passages that a search can show.

A file of any size is read in pieces, so that a folder of a million documents, or one document of ten gigabytes, takes the
memory of a few passages.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtura.data.retrieval_sets import beir_documents, is_beir

__all__ = ["Document", "NotText", "Passage", "Unreadable", "documents_of", "passages", "readable_passages"]

log = logging.getLogger(__name__)

LONGEST, LEAST = 1200, 600  # characters of a passage; it ends at a paragraph where one ends behind the least
PIECE = 1 << 16  # bytes read at a time
CARRIED = {".git", ".hg", ".svn", "__pycache__", "node_modules"}


class NotText(ValueError):
    """A file that holds no text in UTF-8, nor in UTF-16 with its mark."""


class Unreadable(Exception):
    """A document cannot be read."""


@dataclass(frozen=True)
class Passage:
    """A stretch of a document.

    Attributes:
        line: of the file on which it begins, from 1.
        text: at most about 1,200 characters.
    """

    line: int
    text: str


@dataclass(frozen=True)
class Document:
    """Something to index.

    Attributes:
        name: unique within its source.
        stamp: differs when the text has changed.
        path: the file to read, or ``None`` where ``text`` holds it.
        text: of a document that is no file of its own.
    """

    name: str
    stamp: str
    path: Path | None = None
    text: str = ""

    def passages(self) -> Iterator[Passage]:
        """Its passages in order; none where it is empty.

        Raises:
            NotText: the file is no text.
            OSError: the file cannot be read.
        """
        return passages([self.text] if self.path is None else _pieces(self.path))


def readable_passages(document: Document) -> Iterator[Passage]:
    """Passages of a document; an error of reading is told apart from one of what is done with them, such as a full disk.

    Raises:
        Unreadable: the file is no text, or cannot be read.
    """
    try:
        yield from document.passages()
    except (NotText, OSError) as error:
        raise Unreadable(str(error)) from error


def documents_of(source: str | Path, *, without: Path | None = None) -> Iterator[Document]:
    """The documents of a folder (each file one), of a set in BEIR's layout (each line one), or of one file.

    Args:
        source: folder or file. Hidden files, and what version control and Python keep, are passed over.
        without: a directory below it to leave out, such as the index.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a damaged line of a BEIR set.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; name a folder of texts, or a set in BEIR's layout")
    if source.is_file():
        yield _of_file(source, source.name)
        return
    if is_beir(source):
        for name, text in beir_documents(source):
            yield Document(name, hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), text=text)
        return
    left_out = without.resolve() if without is not None else None
    for folder, below, files in os.walk(source):
        at = Path(folder)
        below[:] = sorted(
            name
            for name in below
            if not name.startswith(".")
            and name not in CARRIED
            and (left_out is None or (at / name).resolve() != left_out)
        )
        for name in sorted(files):
            path = at / name
            if not name.startswith(".") and path.is_file():
                yield _of_file(path, str(path.relative_to(source)))


def passages(pieces: Iterable[str]) -> Iterator[Passage]:
    """Cut text that comes in pieces of any size; what comes out does not depend on how it came in.

    Example:
        >>> [p.line for p in passages(["one\\n\\n", "two " * 400])]
        [1, 3]
    """
    held, line = "", 1
    for piece in pieces:
        held += piece
        # More than a passage must be in hand, or the cut would depend on where the piece ended.
        while len(held) > 2 * LONGEST:
            cut = _cut(held)
            passage = _passage(held[:cut], line)
            if passage is not None:
                yield passage
            line += held.count("\n", 0, cut)
            held = held[cut:]
    while held:
        cut = _cut(held)
        passage = _passage(held[:cut], line)
        if passage is not None:
            yield passage
        line += held.count("\n", 0, cut)
        held = held[cut:]


def _cut(text: str) -> int:
    """Where the first passage of a text ends."""
    if len(text) <= LONGEST and "\n\n" not in text[LEAST:]:
        return len(text)
    end = text.find("\n\n", LEAST, LONGEST)
    if end < 0:
        end = max(text.rfind(". ", LEAST, LONGEST), text.rfind("\n", LEAST, LONGEST))
    if end < 0:
        end = text.rfind(" ", LEAST, LONGEST)
    return end + 1 if end >= 0 else LONGEST


def _passage(text: str, line: int) -> Passage | None:
    body = text.strip()
    if not body:
        return None
    ahead = text[: len(text) - len(text.lstrip())]
    return Passage(line + ahead.count("\n"), body)


def _of_file(path: Path, name: str) -> Document:
    facts = path.stat()
    return Document(name, f"{facts.st_size}:{facts.st_mtime_ns}", path=path)


def _pieces(path: Path) -> Iterator[str]:
    with path.open("rb") as handle:
        head = handle.read(8192)
        handle.seek(0)
        # Windows writes UTF-16, which says so in its first two bytes; with two zeros behind them it is UTF-32.
        wide = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and head[2:4] != b"\0\0"
        if b"\0" in head and not wide:
            raise NotText(f"{path} is a binary file")
        decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")()
        while raw := handle.read(PIECE):
            try:
                yield decoder.decode(raw).replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise NotText(f"{path} is not {'UTF-16' if wide else 'UTF-8'} text ({error.reason})") from error
    try:
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise NotText(f"{path} ends in the middle of a character") from error
