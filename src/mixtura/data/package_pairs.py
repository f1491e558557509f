"""What Debian says of its packages in two languages at once: parallel text, split so that nothing leaks.

Many descriptions are near copies of each other: the packages of one source begin alike, fonts and plugins differ in a word. So
not texts are split but *families*: descriptions of one source package, or with the same first paragraph, stay together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtura.data.package_descriptions import Description, debian_descriptions, source_packages

__all__ = ["Pairs", "families", "package_pairs"]

LEAST_SHARED = 60  # characters of a first paragraph that marks its descriptions as one family
LARGEST, FEW = 0.001, 20  # share and number of descriptions above which a family is only trained on
SHARES = (0.04, 0.04)  # of the families: to choose on, to measure on

Pair = tuple[str, str]


@dataclass(frozen=True)
class Pairs:
    """Texts in English with their translations, of families that are in one part only.

    Attributes:
        train: to train on.
        choose: to choose settings on.
        test: to measure on.
    """

    train: list[Pair]
    choose: list[Pair]
    test: list[Pair]


def package_pairs(
    languages: Sequence[str], *, folder: str | Path | None = None, cache: str | Path | None = None, seed: int = 0
) -> dict[str, Pairs]:
    """English descriptions (short line, then the long text) and their translations, by language.

    A pair of which the English or the translated text has come before is dropped, so that no text stands twice. A family is in
    the same part in every language.

    Args:
        languages: codes of :data:`mixtura.data.package_descriptions.LANGUAGES` without ``en``.
        folder, cache: see :func:`~mixtura.data.package_descriptions.debian_descriptions`. A folder may hold Debian's
            ``Packages`` as well, which names the source packages; without it only first paragraphs make families.
        seed: which families are held out.
    Raises:
        ValueError: no language, English, or an unknown one.
        MissingData: no lists, and no apt to fetch them; it says what to supply.
    """
    if not languages or "en" in languages:
        raise ValueError(f"languages must name at least one translation, and en is not one, got {list(languages)}")
    found = debian_descriptions(("en", *languages), folder=folder, cache=cache)
    family = families(found["en"], source_packages(folder=folder, cache=cache))
    sizes = Counter(family.values())
    largest = max(FEW, LARGEST * len(family))
    parts = {name: _part(name, seed) if size <= largest else "train" for name, size in sizes.items()}
    english = {entry.key: entry for entry in found["en"]}
    return {language: _pairs(found[language], english, family, parts) for language in languages}


def families(entries: Sequence[Description], sources: Mapping[str, str]) -> dict[str, str]:
    """Family of every description, by key: a name that those share which must not be parted.

    Args:
        entries: descriptions in English.
        sources: binary -> source package, where they differ.
    Example:
        >>> one = Description("lute", "k1", "tuner", "Tunes."), Description("lute-doc", "k2", "manual", "Explains.")
        >>> len(set(families(one, {"lute-doc": "lute"}).values()))
        1
    """
    above: dict[str, str] = {}

    def root(name: str) -> str:
        while above.setdefault(name, name) != name:
            above[name] = above[above[name]]
            name = above[name]
        return name

    for entry in entries:
        for label in _labels(entry, sources):
            above[root(label)] = root(f"key {entry.key}")
    return {entry.key: root(f"key {entry.key}") for entry in entries}


def _labels(entry: Description, sources: Mapping[str, str]) -> Iterable[str]:
    yield f"source {sources.get(entry.package, entry.package)}"
    first = entry.long.split("\n", 1)[0]
    if len(first) >= LEAST_SHARED:
        yield f"text {first.casefold()}"


def _part(family: str, seed: int) -> str:
    place = int.from_bytes(hashlib.sha256(f"{seed} {family}".encode()).digest()[:8], "big") / 2**64
    return "choose" if place < SHARES[0] else "test" if place < sum(SHARES) else "train"


def _pairs(
    entries: Sequence[Description],
    english: Mapping[str, Description],
    family: Mapping[str, str],
    parts: Mapping[str, str],
) -> Pairs:
    seen: set[str] = set()
    found: dict[str, list[Pair]] = {"train": [], "choose": [], "test": []}
    for entry in entries:
        own = english[entry.key]
        pair = (f"{own.short}\n{own.long}", f"{entry.short}\n{entry.long}")
        if not seen & set(pair):
            found[parts[family[entry.key]]].append(pair)
        seen |= set(pair)
    return Pairs(**found)
