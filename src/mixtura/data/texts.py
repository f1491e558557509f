"""Texts by domain: what every machine has, what a Debian package gives, and what the user brings.

=============  ==========================================================================  ======================
name           what it is                                                                  where it comes from
=============  ==========================================================================  ======================
code           sources of Python's standard library, one document a module                 this interpreter
prose          topics of the Python language reference, one document a topic               this interpreter
arithmetic     worked arithmetic, a new problem every line                                 generated from the seed
dictionary     entries of the GNU Collaborative International Dictionary of English        Debian: dict-gcide
glosses        WordNet 3.0: words with their definitions                                   Debian: wordnet-base
=============  ==========================================================================  ======================

Every corpus is split once, by document, into a part to train on and a held-out part that nothing trains on.
"""

import gzip
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CORPORA", "Corpus", "MissingData", "corpus", "read_texts", "split"]

HELD_OUT = 0.05  # share of the characters
# Tables and tests: millions of characters that are data more than code; pydoc_data holds what `prose` is made of.
NOT_CODE = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "turtledemo",
}
GCIDE = Path("/usr/share/dictd/gcide.dict.dz")
WORDNET = Path("/usr/share/wordnet")


class MissingData(FileNotFoundError):
    """A named corpus is not on this machine; the message says in one sentence how to get it."""


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain.

    Attributes:
        name: the domain.
        train: documents to train and calibrate on.
        held_out: documents to measure on; disjoint from ``train``.
    """

    name: str
    train: list[str]
    held_out: list[str]


def corpus(name: str, *, characters: int = 4_000_000, seed: int = 0) -> Corpus:
    """A corpus by name, shuffled by document and cut to a size.

    Args:
        name: one of :data:`CORPORA`.
        characters: largest number of characters in both parts together.
        seed: order of the documents, and the problems of ``arithmetic``.
    Raises:
        ValueError: an unknown name (the known ones are listed).
        MissingData: the corpus needs a package that is not installed (it is named).
    Example:
        >>> part = corpus("arithmetic", characters=10_000)
        >>> len(part.held_out) > 0 and not set(part.train) & set(part.held_out)
        True
    """
    if name not in CORPORA:
        raise ValueError(f"name must be one of {sorted(CORPORA)}, got {name!r}")
    if characters < 1000:
        raise ValueError(f"characters must be at least 1000 to hold a training and a held-out part, got {characters}")
    documents = list(CORPORA[name](characters, seed))
    # Sorted first, so that the order of the file system plays no part.
    documents = sorted(set(documents))
    random.Random(seed).shuffle(documents)
    kept, total = [], 0
    for document in documents:
        room = characters - total
        if room <= 0:
            break
        kept.append(document[:room])
        total += len(kept[-1])
    return split(name, kept)


def split(name: str, documents: list[str], *, share: float = HELD_OUT) -> Corpus:
    """Hold out the last documents, at least one, until they make up ``share`` of the characters.

    A single document is cut at a line instead.
    """
    if len(documents) == 1:
        text = documents[0]
        cut = text.rfind("\n", 0, int(len(text) * (1 - share))) + 1 or int(len(text) * (1 - share))
        documents = [text[:cut], text[cut:]]
    wanted, held = share * sum(map(len, documents)), 0.0
    first = len(documents)
    while first > 1 and (held < wanted or first == len(documents)):
        first -= 1
        held += len(documents[first])
    return Corpus(name, documents[:first], documents[first:])


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """Read text files, and every text file below directories, one document a file.

    A file that is empty or not UTF-8 text is an error when it was named, and passed over inside a directory.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a named file is empty or is not text, or a directory holds no text; the path is named.
    """
    texts: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [text for file in sorted(path.rglob("*")) if file.is_file() and (text := _text(file))]
            if not found:
                raise ValueError(f"{path} holds no UTF-8 text file; give a directory with text, code or markdown")
            texts.extend(found)
        elif path.is_file():
            text = _text(path)
            if text is None:
                raise ValueError(f"{path} is not UTF-8 text; convert it first, for example with iconv or pandoc")
            if not text.strip():
                raise ValueError(f"{path} is empty, so there is nothing to read from it")
            texts.append(text)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    if not texts:
        raise ValueError("no text was given; name at least one file or directory")
    return texts


def _text(file: Path) -> str | None:
    raw = file.read_bytes()
    if b"\0" in raw[:8192]:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _code(characters: int, seed: int) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if not NOT_CODE & set(file.relative_to(root).parts) and (text := _text(file)) and len(text) > 200:
            yield text


def _prose(characters: int, seed: int) -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()


def _dictionary(characters: int, seed: int) -> Iterator[str]:
    if not GCIDE.exists():
        raise MissingData("the corpus 'dictionary' is Debian's GCIDE; install it with: apt-get install dict-gcide")
    with gzip.open(GCIDE, "rt", encoding="utf-8", errors="replace") as handle:
        text = handle.read()
    # An entry starts at the left margin with its headword and pronunciation, Word \Word\, and runs to the next one.
    for entry in re.split(r"\n(?=[A-Z][\w'-]* \\)", text)[1:]:
        yield re.sub(r"\s*\[1913 Webster\]", "", entry).strip()


def _glosses(characters: int, seed: int) -> Iterator[str]:
    if not (WORDNET / "data.noun").exists():
        raise MissingData("the corpus 'glosses' is Debian's WordNet; install it with: apt-get install wordnet-base")
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue  # the licence at the head of the file
            fields, gloss = line.split(" | ", 1)
            words = fields.split()
            count = int(words[3], 16)
            names = ", ".join(words[4 + 2 * i].replace("_", " ") for i in range(count))
            yield f"{names}: {gloss.strip()}."


def _arithmetic(characters: int, seed: int) -> Iterator[str]:
    draw, seen, total = random.Random(seed), set[str](), 0
    while total < characters:
        lines: list[str] = []
        while len(lines) < 24:
            line = _problem(draw)
            # A line stands once in the whole corpus, so no held-out problem was trained on.
            if line not in seen:
                seen.add(line)
                lines.append(line)
        document = "\n".join(lines) + "\n"
        total += len(document)
        yield document


def _problem(draw: random.Random) -> str:
    a, b, c = draw.randint(2, 999), draw.randint(2, 99), draw.randint(2, 99)
    kind = draw.randrange(6)
    if kind == 0:
        return f"{a} + {b} + {c} = {a + b} + {c} = {a + b + c}"
    if kind == 1:
        return f"{a} - {b} * {c} = {a} - {b * c} = {a - b * c}"
    if kind == 2:
        return f"({a} + {b}) * {c} = {a + b} * {c} = {(a + b) * c}"
    if kind == 3:
        return f"{b} * x + {c} = {a * b + c}; {b} * x = {a * b}; x = {a}"
    if kind == 4:
        return (
            f"{a} boxes hold {b} nuts each and {c} nuts are loose: {a} * {b} + {c} = {a * b} + {c} = {a * b + c} nuts"
        )
    return f"{a * b} / {b} + {c} = {a} + {c} = {a + c}"


CORPORA: dict[str, Callable[[int, int], Iterator[str]]] = {
    "code": _code,
    "prose": _prose,
    "arithmetic": _arithmetic,
    "dictionary": _dictionary,
    "glosses": _glosses,
}
