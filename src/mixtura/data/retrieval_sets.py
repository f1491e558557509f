"""Sets to measure a search on: documents, queries, and which document answers which query.

The layout of BEIR: ``corpus.jsonl`` and ``queries.jsonl`` with ``_id``, ``title``, ``text``; ``qrels/test.tsv`` with
query, document and grade, tab-separated, under a header. Documents read as "title + space + text", as BEIR has it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RetrievalSet", "beir_documents", "is_beir", "load_beir", "read_qrels"]

log = logging.getLogger(__name__)

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class RetrievalSet:
    """Documents, queries and judgements.

    Attributes:
        documents: id -> text.
        queries: id -> text.
        qrels: id of a query -> id of a document -> grade; above 0 is relevant.
    """

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]


def is_beir(folder: str | Path) -> bool:
    """Whether a folder holds a set in BEIR's layout, at least its corpus."""
    return (Path(folder) / "corpus.jsonl").is_file()


def load_beir(folder: str | Path, *, split: str = "test") -> RetrievalSet:
    """Read a set in BEIR's layout; only judged queries are kept.

    Args:
        folder: holds ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.
        split: name of the judgements.
    Raises:
        FileNotFoundError: a file is missing (it is named; other splits are listed).
        ValueError: a line that is no JSON object with ``_id`` and ``text``, an id that comes twice, or judgements of no
            query that there is.
    """
    folder = Path(folder)
    documents = dict(_once(beir_documents(folder), folder / "corpus.jsonl"))
    queries = dict(_once(_records(folder / "queries.jsonl"), folder / "queries.jsonl"))
    path = folder / "qrels" / f"{split}.tsv"
    if not path.exists():
        others = sorted(p.stem for p in (folder / "qrels").glob("*.tsv"))
        has = f"; there is {', '.join(others)}" if others else ""
        raise FileNotFoundError(f"{path} does not exist, and without judgements nothing can be measured{has}")
    qrels = read_qrels(path)
    unknown = sorted({d for judged in qrels.values() for d in judged if d not in documents})
    if unknown:
        log.warning(
            "%s judges %d documents that the corpus does not hold, among them %s; they count as not found",
            path,
            len(unknown),
            ", ".join(unknown[:5]),
        )
    qrels = {q: judged for q, judged in qrels.items() if q in queries}
    if not qrels:
        raise ValueError(f"{path} judges no query of {folder / 'queries.jsonl'}; the ids of the two must agree")
    return RetrievalSet(documents, {q: queries[q] for q in qrels}, qrels)


def read_qrels(path: str | Path) -> Qrels:
    """Judgements from a file: three columns under a header (BEIR), or TREC's four (query, iteration, document, grade).

    Raises:
        ValueError: a line with another number of fields, or a grade that is no whole number; the line is named.
    """
    qrels: Qrels = {}
    with Path(path).open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) not in (3, 4):
                raise ValueError(f"{path}, line {number}: judgements have 3 or 4 fields, got {len(fields)}")
            query, document, grade = fields[0], fields[-2], fields[-1]
            try:
                qrels.setdefault(query, {})[document] = int(grade)
            except ValueError as error:
                if number == 1:
                    continue  # the header
                raise ValueError(f"{path}, line {number}: a grade is a whole number, got {grade!r}") from error
    return qrels


def beir_documents(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Id and text of every document of a set, one at a time, so that a corpus of any size streams."""
    return _records(Path(folder) / "corpus.jsonl")


def _records(path: Path) -> Iterator[tuple[str, str]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a set in BEIR's layout holds corpus.jsonl and queries.jsonl")
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text, title = record["text"], record.get("title") or ""
                if not isinstance(text, str) or not isinstance(title, str):
                    raise TypeError("text is no string")
                yield str(record["_id"]), f"{title} {text}".strip()
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: need a JSON object with _id and text, got {line.strip()[:60]!r}"
                ) from error


def _once(pairs: Iterator[tuple[str, str]], path: Path) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name, text in pairs:
        if name in seen:
            raise ValueError(f"{path}: the id {name!r} comes twice; ids must differ")
        seen.add(name)
        yield name, text
