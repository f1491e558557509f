"""An index on disk: vectors in files of float16, everything else in SQLite, and no moment at which half of it is there.

::

    index.sqlite          what is indexed: settings, sources, documents, passages and their words
    vectors-000001.npy    float16, shape (rows, D), one row a passage

A file of vectors is whole before the database names it, and the database changes in one transaction. So an interrupt leaves
the index as it was at the last of these, and the same command goes on from there. Files that the database does not name are
of no account and are removed.

Memory: one batch of passages and one file of vectors at a time, whatever the number of documents.
"""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mixtura.core.checkpoint import atomic_file
from mixtura.core.progress import bar
from mixtura.multimodal.retrieval.encoder import TextEncoder
from mixtura.multimodal.retrieval.exact_search import merge_best
from mixtura.multimodal.retrieval.index import DenseIndex, Found, fuse
from mixtura.multimodal.retrieval.passages import Document, Unreadable, readable_passages
from mixtura.multimodal.retrieval.pending import Pending, Row
from mixtura.multimodal.retrieval.shared_encoding import BATCH, EncodingTeam, encode_half
from mixtura.multimodal.retrieval.word_search import by_words

__all__ = ["Added", "Hit", "SearchIndex"]

log = logging.getLogger(__name__)

KIND, VERSION = "mixtura-search-index", 1
DATABASE = "index.sqlite"
SHARD = 65_536  # passages of a file of vectors, at most
DEPTH = 200  # passages that each way of searching brings to the fusion, at least
DENSE_WEIGHT = 0.3  # of meaning beside words; chosen on questions that no claim is measured on

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE shards (shard INTEGER PRIMARY KEY, file TEXT NOT NULL, first INTEGER NOT NULL, rows INTEGER NOT NULL);
CREATE TABLE documents (document INTEGER PRIMARY KEY, source TEXT NOT NULL, name TEXT NOT NULL, stamp TEXT NOT NULL,
                        visit INTEGER NOT NULL, UNIQUE (source, name));
CREATE TABLE passages (row INTEGER PRIMARY KEY, document INTEGER NOT NULL, line INTEGER NOT NULL, text TEXT NOT NULL);
CREATE TABLE forgotten (row INTEGER PRIMARY KEY);
CREATE INDEX passages_of ON passages (document);
CREATE VIRTUAL TABLE words USING fts5 (text, content='passages', content_rowid='row', tokenize='porter unicode61');
"""


@dataclass
class Added:
    """What a run of :meth:`SearchIndex.add` did.

    Attributes:
        added, changed, unchanged, removed: documents.
        passages: encoded in this run.
        empty: names of documents without any text, which nothing finds; at most the first hundred.
        n_empty: how many there are.
        refused: name and reason of documents that could not be read; at most the first hundred.
        n_refused: how many there are.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    passages: int = 0
    empty: list[str] = field(default_factory=list)
    n_empty: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    n_refused: int = 0


@dataclass(frozen=True)
class Hit:
    """A document that was found, by its best passage.

    Attributes:
        source, name: where it came from, and its name there.
        line: on which the passage begins.
        text: of the passage.
        score: cosine for meaning, BM25 for words, the fused score for both.
    """

    source: str
    name: str
    line: int
    text: str
    score: float


class SearchIndex:
    """An index in a directory.

    Args:
        path: the directory.
        encoder: what embeds passages and questions; must be the one that the index was made with.
        create: make an index where there is none.
        model: how the encoder was named, for whoever opens the index next; see :meth:`model_of`.
        team: processes that encode together, of which this one leads; ``None``: it encodes alone.
    Raises:
        FileNotFoundError: there is none, and ``create`` is off.
        ValueError: an index of another encoder, of another version, damaged, or half copied.
    """

    def __init__(
        self,
        path: str | Path,
        encoder: TextEncoder,
        *,
        create: bool = False,
        model: str = "",
        team: EncodingTeam | None = None,
    ) -> None:
        self.path, self.encoder, self.model, self.team = Path(path), encoder, model, team
        made = self.path / DATABASE
        if not made.exists():
            leftovers = sorted(self.path.glob("vectors-*.npy")) if self.path.is_dir() else []
            if leftovers:
                raise ValueError(
                    f"{self.path} holds vectors but no {DATABASE}: half an index; delete it and index again"
                )
            if not create:
                raise FileNotFoundError(f"{self.path} holds no index; make one with: mixtura search index DIR")
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ValueError(f"{self.path} exists and is no index; give another place for it")
            self.path.mkdir(parents=True, exist_ok=True)
            self._make(made)
        try:
            self.db = sqlite3.connect(made)
            self.db.execute("PRAGMA foreign_keys = OFF")
            self._check()
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{made} is damaged ({error}); delete {self.path} and index again") from error

    def _make(self, made: Path) -> None:
        # Under another name until it is whole: an interrupt must not leave a database without tables.
        with atomic_file(made) as beside:
            db = sqlite3.connect(beside)
            try:
                db.executescript(SCHEMA)
            except sqlite3.OperationalError as error:
                raise RuntimeError(f"this Python's SQLite cannot index words ({error}); it needs FTS5") from error
            settings = {"kind": KIND, "version": VERSION, "encoder": self.encoder.fingerprint()}
            settings |= {"width": self.encoder.width, "normalize": self.encoder.config.normalize, "visit": 0}
            settings |= {"model": self.model}
            db.executemany("INSERT INTO settings VALUES (?, ?)", [(k, str(v)) for k, v in settings.items()])
            db.commit()
            db.close()

    @staticmethod
    def model_of(path: str | Path) -> str | None:
        """Name of the encoder that an index was made with, empty for the default one; ``None`` where there is no index."""
        made = Path(path) / DATABASE
        if not made.exists():
            return None
        try:
            db = sqlite3.connect(made)
            row = db.execute("SELECT value FROM settings WHERE name = 'model'").fetchone()
            db.close()
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{made} is damaged ({error}); delete {path} and index again") from error
        return str(row[0]) if row else ""

    def _check(self) -> None:
        settings = dict(self.db.execute("SELECT name, value FROM settings"))
        if settings.get("kind") != KIND or settings.get("version") != str(VERSION):
            came = f"{settings.get('kind')}, version {settings.get('version')}"
            raise ValueError(f"{self.path} holds {came}; this mixtura reads {KIND}, version {VERSION}: index again")
        if settings["normalize"] != str(self.encoder.config.normalize):
            raise ValueError(
                f"{self.path} was made with normalize={settings['normalize']}, the encoder has "
                f"normalize={self.encoder.config.normalize}; scores of the two do not compare"
            )
        if settings["encoder"] != (mine := self.encoder.fingerprint()):
            raise ValueError(
                f"{self.path} was made with another encoder (its mark is {settings['encoder']}, this one's {mine}); give "
                "that one with --model, or index into another place"
            )
        for file, rows in self.db.execute("SELECT file, rows FROM shards"):
            vectors = self._vectors(file)
            if vectors.shape != (rows, self.encoder.width) or vectors.dtype != np.float16:
                raise ValueError(
                    f"{self.path / file} holds {vectors.dtype} of {vectors.shape}, the index says {rows} rows of "
                    f"{self.encoder.width}; it was copied in part, copy it again or index again"
                )

    def _vectors(self, file: str) -> np.ndarray:
        try:
            found: np.ndarray = np.load(self.path / file, mmap_mode="r", allow_pickle=False)
            return found
        except FileNotFoundError as error:
            raise ValueError(f"{self.path / file} is missing: half an index; copy it again or index again") from error
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{self.path / file} is cut off or damaged ({error}); index again") from error

    def __len__(self) -> int:
        """Documents in it."""
        return int(self.db.execute("SELECT count(*) FROM documents WHERE stamp != ''").fetchone()[0])

    @property
    def n_passages(self) -> int:
        """Passages in it."""
        return int(self.db.execute("SELECT count(*) FROM passages").fetchone()[0])

    def sources(self) -> list[tuple[str, int]]:
        """What was indexed, and how many documents of it there are."""
        return [
            (str(s), int(n)) for s, n in self.db.execute("SELECT source, count(*) FROM documents GROUP BY 1 ORDER BY 1")
        ]

    def close(self) -> None:
        """Let go of the files."""
        self.db.close()

    # ---- adding

    def add(self, documents: Iterable[Document], source: str, *, prune: bool = True, label: str = "index") -> Added:
        """Bring a source up to date: new and changed documents are encoded, unchanged ones are not read.

        Args:
            documents: all of the source, one at a time; of two with one name the first counts.
            source: name of where they come from, such as a folder.
            prune: remove documents of this source that did not come.
            label: on the progress bar.
        Raises:
            KeyboardInterrupt: what was finished lasts, and another call goes on from there, alone or with others.
        """
        done = Added()
        visit = 1 + int(self.db.execute("SELECT value FROM settings WHERE name = 'visit'").fetchone()[0])
        if self.team is None:
            pending = Pending(partial(encode_half, self.encoder), BATCH, self._append)
        else:
            pending = Pending(self.team.encode, self.team.load, self._append)
        try:
            self.db.execute("UPDATE settings SET value = ? WHERE name = 'visit'", (str(visit),))
            self._visit(documents, source, visit, pending, done, prune=prune, label=label)
        except sqlite3.OperationalError as error:
            raise OSError(
                f"{self.path}: {error}; is another run at work on this index, or the disk full? What was finished is kept"
            ) from error
        self._sweep()
        return done

    def _visit(
        self,
        documents: Iterable[Document],
        source: str,
        visit: int,
        pending: Pending,
        done: Added,
        *,
        prune: bool,
        label: str,
    ) -> None:
        try:
            with bar(desc=label, unit="document") as shown:
                for document in documents:
                    self._add_one(document, source, visit, pending, done)
                    shown.update()
            if prune:
                gone = self.db.execute(
                    "SELECT document FROM documents WHERE source = ? AND visit < ?", (source, visit)
                ).fetchall()
                for (document,) in gone:
                    self._forget(document)
                done.removed = len(gone)
        except BaseException:
            if self.team is None:
                self._keep(pending)  # also on an interrupt: what was read is not lost
            else:
                self.db.rollback()  # the others may be gone, and what waits is too much for one
            raise
        self._keep(pending)

    def _keep(self, pending: Pending) -> None:
        try:
            pending.save()
            self.db.commit()
        except BaseException:
            self.db.rollback()  # or documents would count as read whose passages are not there
            raise

    def _add_one(self, document: Document, source: str, visit: int, pending: Pending, done: Added) -> None:
        known = self.db.execute(
            "SELECT document, stamp, visit FROM documents WHERE source = ? AND name = ?", (source, document.name)
        ).fetchone()
        if known and known[2] == visit:
            _note(done, document.name, "its name comes twice; the first counts")
            return
        if known and known[1] == document.stamp:
            self.db.execute("UPDATE documents SET visit = ? WHERE document = ?", (visit, known[0]))
            done.unchanged += 1
            return
        if known:
            self._forget(known[0])
        # Without a stamp until its last passage is in: a document broken off is read anew.
        cursor = self.db.execute(
            "INSERT INTO documents (source, name, stamp, visit) VALUES (?, ?, '', ?)", (source, document.name, visit)
        )
        number, before = int(cursor.lastrowid or 0), pending.total
        try:
            for passage in readable_passages(document):
                pending.put(number, passage)
        except Unreadable as error:
            pending.drop(number)
            self._forget(number)
            _note(done, document.name, str(error))
            return
        self.db.execute("UPDATE documents SET stamp = ? WHERE document = ?", (document.stamp, number))
        done.passages += pending.total - before
        if pending.total == before:
            done.n_empty += 1
            done.empty += [document.name] * (len(done.empty) < 100)
        finished = bool(known and known[1])
        done.added += not finished
        done.changed += finished

    def _forget(self, document: int) -> None:
        rows = self.db.execute("SELECT row, text FROM passages WHERE document = ?", (document,)).fetchall()
        self.db.executemany("INSERT INTO words (words, rowid, text) VALUES ('delete', ?, ?)", rows)
        self.db.executemany("INSERT INTO forgotten VALUES (?)", [(row,) for row, _ in rows])
        self.db.execute("DELETE FROM passages WHERE document = ?", (document,))
        self.db.execute("DELETE FROM documents WHERE document = ?", (document,))

    def _append(self, vectors: np.ndarray, rows: list[Row]) -> None:
        """Make passages last: their vectors in a file, then one transaction."""
        last = self.db.execute("SELECT shard, file, first, rows FROM shards ORDER BY shard DESC LIMIT 1").fetchone()
        first = 0 if last is None else last[2] + last[3]
        stale = None
        if last is not None and last[3] + len(vectors) <= SHARD:
            # A small last file is written again with the new rows, so that many small runs do not leave many files.
            shard, stale, begin, _ = last
            whole = np.concatenate([self._vectors(stale), vectors])
        else:
            shard, begin, whole = (1 if last is None else last[0] + 1), first, vectors
        file = f"vectors-{self._unused():06d}.npy"
        with atomic_file(self.path / file) as beside, beside.open("wb") as handle:
            np.save(handle, whole, allow_pickle=False)
        self.db.execute("INSERT OR REPLACE INTO shards VALUES (?, ?, ?, ?)", (shard, file, begin, len(whole)))
        numbered = [(first + i, *row) for i, row in enumerate(rows)]
        self.db.executemany("INSERT INTO passages VALUES (?, ?, ?, ?)", numbered)
        self.db.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", [(row[0], row[3]) for row in numbered])
        self.db.commit()
        if stale is not None:
            (self.path / stale).unlink(missing_ok=True)

    def _unused(self) -> int:
        numbers = [int(m[1]) for p in self.path.iterdir() if (m := re.fullmatch(r"vectors-(\d+)\.npy", p.name))]
        return max(numbers, default=0) + 1

    def _sweep(self) -> None:
        """Remove files of vectors that nothing names."""
        named = {file for (file,) in self.db.execute("SELECT file FROM shards")}
        for path in self.path.glob("vectors-*.npy"):
            if path.name not in named:
                path.unlink(missing_ok=True)

    # ---- finding

    def search(self, query: str, k: int = 10, *, by: Literal["both", "meaning", "words"] = "both") -> list[Hit]:
        """The k documents that answer a question best, each by its best passage.

        Args:
            query: the question.
            k: documents, >= 1.
            by: ``meaning`` (vectors), ``words`` (BM25 on stemmed words), or ``both``, their scores scaled and added.
        Returns:
            Best first; fewer than k where there are fewer, none for an empty question.
        """
        if by not in ("both", "meaning", "words"):
            raise ValueError(f"by must be 'both', 'meaning' or 'words', got {by!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        depth, total = max(DEPTH, 4 * k), max(1, self.n_passages)
        while True:
            parts = []
            if by != "words":
                parts.append(self._by_meaning(query, min(depth, total)))
            if by != "meaning":
                parts.append(by_words(self.db, query, min(depth, total)))
            found = parts[0] if len(parts) == 1 else fuse(parts, [DENSE_WEIGHT, 1 - DENSE_WEIGHT])
            hits = self._hits(found, k)
            # Many passages of one document may fill the list.
            if len(hits) >= k or depth >= total or not (found.rows >= 0).any():
                return hits
            depth *= 8

    def _hits(self, found: Found, k: int) -> list[Hit]:
        seen: set[int] = set()
        hits: list[Hit] = []
        for row, score in zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True):
            if row < 0:
                continue
            document, line, text = self.db.execute(
                "SELECT document, line, text FROM passages WHERE row = ?", (row,)
            ).fetchone()
            if document in seen:
                continue
            seen.add(document)
            source, name = self.db.execute(
                "SELECT source, name FROM documents WHERE document = ?", (document,)
            ).fetchone()
            hits.append(Hit(source, name, line, text, score))
            if len(hits) == k:
                break
        return hits

    def _by_meaning(self, query: str, k: int) -> Found:
        q = self.encoder.encode([query])
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        for first, file in self.db.execute("SELECT first, file FROM shards ORDER BY shard").fetchall():
            vectors = self._vectors(file)
            gone = self.db.execute(
                "SELECT row FROM forgotten WHERE row >= ? AND row < ?", (first, first + len(vectors))
            )
            if at := [row - first for (row,) in gone]:
                vectors = np.array(vectors)
                vectors[at] = 0  # as an empty document's: never found
            # One question: nothing is won that would pay for importing faiss.
            found = DenseIndex(vectors, backend="torch").search(q, k)
            rows = np.where(found.rows >= 0, found.rows + first, -1)
            pair = (torch.from_numpy(found.scores), torch.from_numpy(rows))
            best = pair if best is None else merge_best(best, pair, k)
        if best is None:
            return Found(np.zeros((1, 0), np.float32), np.zeros((1, 0), np.int64))
        return Found(best[0].numpy(), best[1].numpy())


def _note(done: Added, name: str, reason: str) -> None:
    done.n_refused += 1
    done.refused += [(name, reason)] * (len(done.refused) < 100)
