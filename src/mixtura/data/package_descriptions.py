"""What Debian says of its packages, in many languages: real text to search in, with questions and answers.

A package has a short description (one line) and a long one. The short line asks, the long text answers. A translation
carries the md5 of the English text, so one package's texts in two languages are known to mean the same.

The lists come from the user's apt and stay in mixtura's cache; nothing of the system is touched. Files can also be given:
``Translation-xx`` as apt downloads them, plain or compressed with gzip, bzip2 or xz.
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixtura.core.cache import cache_directory
from mixtura.core.checkpoint import atomic_directory
from mixtura.data.retrieval_sets import RetrievalSet
from mixtura.data.texts import Corpus, MissingData, split

__all__ = [
    "LANGUAGES",
    "Description",
    "answers_in_english",
    "debian_descriptions",
    "description_corpora",
    "parse_descriptions",
    "questions_of",
    "source_packages",
]

log = logging.getLogger(__name__)

LANGUAGES = ("en", "da", "it", "fr", "de", "sk", "pt_BR", "ja", "ko", "uk", "pl", "ru", "es", "zh_CN")
LEAST_WORDS = 20  # of a long description, to be a document
LEAST_QUERY_WORDS = 3  # of a short one, to be a question
SPACELESS = ("ja", "zh_CN")  # written without spaces between words
SOURCES = "sources.gz"  # in the cache: a binary package and its source package a line
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Description:
    """One package in one language.

    Attributes:
        package: name of a package with this text; many may share it.
        key: md5 of the English text, equal in all languages.
        short: one line.
        long: paragraphs, joined by line breaks.
    """

    package: str
    key: str
    short: str
    long: str


def debian_descriptions(
    languages: Sequence[str] = ("en",), *, folder: str | Path | None = None, cache: str | Path | None = None
) -> dict[str, list[Description]]:
    """Descriptions of Debian's packages by language, in the order of the file.

    Translations that leave a part in English are dropped: what remains is translated in both parts.

    Args:
        languages: codes of :data:`LANGUAGES`; English always comes along, since translations are checked against it.
        folder: directory with files whose names end in ``Translation-xx`` (and perhaps .gz, .bz2, .xz) instead of apt's.
        cache: directory to keep the lists in; ``None`` is ``package-descriptions`` in mixtura's cache.
    Raises:
        ValueError: an unknown language (the known ones are listed).
        MissingData: no apt, no network, or no file; it says which file to supply.
    """
    if unknown := sorted(set(languages) - set(LANGUAGES)):
        raise ValueError(f"languages must be among {list(LANGUAGES)}, got {unknown}")
    wanted = list(dict.fromkeys(["en", *languages]))
    kept = Path(folder) if folder is not None else Path(cache or cache_directory() / "package-descriptions")
    if folder is None and any(_found(kept, language) is None for language in wanted):
        _fetch(kept, wanted)
    found: dict[str, list[Description]] = {}
    english: dict[str, Description] = {}
    for language in wanted:
        path = _found(kept, language)
        if path is None:
            raise MissingData(
                f"{kept} holds no Translation-{language}; put there main/i18n/Translation-{language}.bz2 of a Debian mirror "
                "(below dists/bookworm), for example http://deb.debian.org/debian/dists/bookworm/"
                f"main/i18n/Translation-{language}.bz2"
            )
        opener = OPENERS.get(path.suffix, open)
        with opener(path, "rt", encoding="utf-8", errors="replace") as handle:  # type: ignore[operator]
            entries = list(parse_descriptions(handle, language))
        if language == "en":
            english = {entry.key: entry for entry in entries}
        else:
            entries = [entry for entry in entries if _translated(entry, english.get(entry.key))]
        found[language] = entries
    return {language: found[language] for language in dict.fromkeys(languages)}


def description_corpora(
    languages: Sequence[str], *, characters: int, seed: int, folder: str | Path | None = None
) -> dict[str, Corpus]:
    """Package descriptions as text to learn from, short line and long one, shuffled and cut to a size.

    Args:
        languages: codes of :data:`LANGUAGES`; those asked for and no others come back.
        characters: of each language; the document that passes it is kept whole.
        seed: order of the documents.
        folder: as in :func:`debian_descriptions`.
    Raises:
        ValueError, MissingData: as :func:`debian_descriptions`.
    """
    corpora = {}
    for language, entries in debian_descriptions(languages, folder=folder).items():
        documents = sorted({f"{entry.short}\n{entry.long}" for entry in entries})
        kept, total = [], 0
        for i in torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist():
            if total >= characters:
                break
            kept.append(documents[i])
            total += len(documents[i])
        corpora[language] = split(language, kept)
    return corpora


def parse_descriptions(lines: Iterable[str], language: str) -> Iterator[Description]:
    """Read stanzas of a ``Translation-xx`` file; one without a key or a long part is passed over.

    Example:
        >>> text = ["Package: lute", "Description-md5: 0a", "Description-en: tuner for lutes", " Tunes lutes.", " .", " Loud."]
        >>> next(parse_descriptions(text, "en"))
        Description(package='lute', key='0a', short='tuner for lutes', long='Tunes lutes.\\nLoud.')
    """
    field = f"Description-{language}: "
    package = key = short = ""
    long: list[str] = []
    seen: set[str] = set()

    def entry() -> Iterator[Description]:
        text = _joined(long)
        if key and short and text and key not in seen:
            seen.add(key)
            yield Description(package, key, short, text)

    for raw in lines:
        line = raw.rstrip("\n")
        if not line:
            yield from entry()
            package = key = short = ""
            long = []
        elif line.startswith("Package: "):
            package = line[9:].strip()
        elif line.startswith("Description-md5: "):
            key = line[17:].strip()
        elif line.startswith(field):
            short = line[len(field) :].strip()
        elif line.startswith(" ") and short:
            long.append(line[1:])
    yield from entry()


def source_packages(*, folder: str | Path | None = None, cache: str | Path | None = None) -> dict[str, str]:
    """Source package of every binary package whose source has another name.

    Args:
        folder: directory with Debian's ``Packages`` (perhaps .gz, .bz2, .xz); without one in it nothing is known.
        cache: see :func:`debian_descriptions`; apt is asked where it does not hold the list yet.
    """
    if folder is not None:
        path = next(
            (p for p in sorted(Path(folder).iterdir()) if re.search(r"Packages(\.gz|\.bz2|\.xz)?$", p.name)), None
        )
        if path is None:
            return {}
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace") as handle:  # type: ignore[operator]
            return _sources(handle)
    kept = Path(cache or cache_directory() / "package-descriptions")
    if not (kept / SOURCES).exists():
        _fetch(kept, ["en"])
    with gzip.open(kept / SOURCES, "rt", encoding="utf-8") as lines:
        return dict(line.split() for line in lines)


def questions_of(entries: Sequence[Description], *, language: str = "en") -> list[Description]:
    """Entries whose short description can be asked: of three words at least, and of no other package text."""
    counts = Counter(entry.short.casefold() for entry in entries)
    return [e for e in entries if counts[e.short.casefold()] == 1 and _words(e.short, language) >= LEAST_QUERY_WORDS]


def answers_in_english(english: Sequence[Description]) -> tuple[list[str], list[str], dict[str, str]]:
    """Distinct long descriptions of twenty words at least.

    Returns:
        Ids (the key of the first package with the text), texts, and the id of the text behind every key. Many packages
        share a text: it is one document, and all of them answer to it.
    """
    first: dict[str, str] = {}
    behind: dict[str, str] = {}
    for entry in english:
        if len(entry.long.split()) >= LEAST_WORDS:
            behind[entry.key] = first.setdefault(entry.long, entry.key)
    return list(first.values()), list(first), behind


def description_set(
    english: Sequence[Description], asked: Sequence[Description] | None = None, *, language: str = "en"
) -> RetrievalSet:
    """Short descriptions as questions to the English long ones.

    Args:
        english: entries of English, which give the documents.
        asked: entries whose short lines ask; ``None`` takes the English ones.
        language: of the questions.
    """
    ids, texts, behind = answers_in_english(english)
    questions = [e for e in questions_of(asked if asked is not None else english, language=language) if e.key in behind]
    return RetrievalSet(
        documents=dict(zip(ids, texts, strict=True)),
        queries={e.key: e.short for e in questions},
        qrels={e.key: {behind[e.key]: 1} for e in questions},
    )


def _words(text: str, language: str) -> int:
    return len(text) // 2 if language in SPACELESS else len(text.split())


def _joined(lines: Sequence[str]) -> str:
    """Paragraphs without their line breaks; a line of one dot parts them, an indented line stands alone."""
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == ".":
            parts.append([])
        elif line.startswith(" "):
            parts.append([line.strip()])
        else:
            parts[-1].append(line.strip())
    return "\n".join(" ".join(part) for part in parts if part).strip()


def _translated(entry: Description, english: Description | None) -> bool:
    return english is not None and entry.short != english.short and entry.long != english.long


def _found(folder: Path, language: str) -> Path | None:
    if not folder.is_dir():
        return None
    pattern = re.compile(rf"Translation-{language}(\.gz|\.bz2|\.xz)?$")
    return next((path for path in sorted(folder.iterdir()) if pattern.search(path.name)), None)


def _fetch(kept: Path, languages: Sequence[str]) -> None:
    """Let apt download the lists into a place of their own, and keep them as plain files."""
    if shutil.which("apt-get") is None or shutil.which("apt-config") is None:
        raise MissingData(
            f"the descriptions come from Debian's lists, and there is no apt here; put Translation-{languages[-1]} and "
            f"the like into {kept} (dists/bookworm/main/i18n of a Debian mirror)"
        )
    log.info("apt fetches descriptions in %s", ", ".join(languages))
    have = [path for language in LANGUAGES if (path := _found(kept, language)) is not None]
    with tempfile.TemporaryDirectory(prefix="mixtura-apt-") as own, atomic_directory(kept) as beside:
        environment = {**os.environ, "APT_CONFIG": str(_private_apt(Path(own), languages)), "LC_ALL": "C"}
        done = subprocess.run(["apt-get", "update", "-q"], env=environment, capture_output=True, text=True)
        lists = Path(own) / "lists"
        for path in have:
            shutil.copy2(path, beside / path.name)
        _keep_sources(lists, environment, beside / SOURCES)
        for language in languages:
            # The release's own list is the largest; updates and security have none or a short one.
            # apt writes an underscore of an address as %5f.
            pattern = re.compile(rf"_Translation-{language.replace('_', '%5f')}(\.\w+)?$", re.IGNORECASE)
            files = [f for f in lists.iterdir() if pattern.search(f.name)]
            if not files:
                said = next((line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))), "no word")
                raise MissingData(
                    f"apt-get update gave no Translation-{language} ({said}); connect to a Debian mirror, or put "
                    f"main/i18n/Translation-{language}.bz2 of one (below dists/bookworm) into {kept}"
                )
            largest = max(files, key=lambda f: f.stat().st_size)
            text = subprocess.run(
                ["/usr/lib/apt/apt-helper", "cat-file", str(largest)], env=environment, capture_output=True, check=True
            )
            with gzip.open(beside / f"Translation-{language}.gz", "wb", compresslevel=6) as handle:
                handle.write(text.stdout)


def _sources(lines: Iterable[str]) -> dict[str, str]:
    """Binary -> source package, of a ``Packages`` file, where the two names differ."""
    found: dict[str, str] = {}
    package = ""
    for line in lines:
        if line.startswith("Package: "):
            package = line[9:].strip()
        elif line.startswith("Source: "):
            found[package] = line[8:].split()[0]
    return found


def _keep_sources(lists: Path, environment: Mapping[str, str], path: Path) -> None:
    found: dict[str, str] = {}
    for file in sorted(lists.glob("*_Packages*")):
        text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", str(file)], env=environment, capture_output=True)
        found = _sources(text.stdout.decode("utf-8", "replace").splitlines()) | found
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.writelines(f"{binary} {source}\n" for binary, source in sorted(found.items()))


def _private_apt(own: Path, languages: Sequence[str]) -> Path:
    """An apt configuration that downloads these languages and writes below ``own`` only."""
    for name in ("parts", "lists/partial", "cache/archives/partial"):
        (own / name).mkdir(parents=True)
    # Files of container images set Acquire::Languages "none", which a later setting does not override; and hooks that run
    # after an update would write where only the system should.
    clears = ("Acquire::Languages", "APT::Update::Post-Invoke")
    for file in sorted(Path("/etc/apt/apt.conf.d").glob("*")):
        if file.is_file() and not any(word in file.read_text(errors="replace") for word in clears):
            shutil.copy(file, own / "parts" / file.name)
    listed = " ".join(f'"{language}";' for language in languages)
    config = own / "apt.conf"
    config.write_text(
        f'Dir::Etc::parts "{own}/parts/";\nDir::State::lists "{own}/lists/";\nDir::Cache "{own}/cache/";\n'
        f"Acquire::Languages {{ {listed} }};\n"
    )
    return config


def counts(found: Mapping[str, Sequence[Description]]) -> dict[str, int]:
    """How many entries each language has."""
    return {language: len(entries) for language, entries in found.items()}
