"""The words of an index on disk: BM25 by SQLite, on stemmed words."""

from __future__ import annotations

import re
import sqlite3

import numpy as np

from mixtura.multimodal.retrieval.index import Found

__all__ = ["by_words"]

COMMON = (
    "a an and are as at be by can do does for from has have how i if in is it my not of on or that the their there this to "
    "was what when where which who why will with you your"
)
STOP = frozenset(COMMON.split())


def by_words(db: sqlite3.Connection, query: str, k: int) -> Found:
    """The k best passages by the words of the query, from the table ``words`` (FTS5); rows are those of the passages."""
    asked = list(dict.fromkeys(re.findall(r"\w+", query.lower())))
    # What stands in every text tells nothing and costs most.
    telling = [word for word in asked if word not in STOP] or asked
    # Quoted, so that no word of a question is an operator.
    words = " OR ".join(f'"{word}"' for word in telling)
    pairs = []
    if words:
        pairs = db.execute(
            "SELECT rowid, -bm25(words) FROM words WHERE words MATCH ? ORDER BY bm25(words) LIMIT ?", (words, k)
        ).fetchall()
    scores, rows = [score for _, score in pairs], [row for row, _ in pairs]
    return Found(np.array([scores], dtype=np.float64), np.array([rows], dtype=np.int64))
