"""Parallel text from a folder: ``en-de.src`` and ``en-de.tgt`` line by line, and text of one language in ``de.txt``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["read_parallel", "write_parallel"]

NAME = re.compile(r"(?P<source>[^-]+)-(?P<target>[^-]+)")

Pairs = dict[tuple[str, str], list[tuple[str, str]]]


def read_parallel(folder: str | Path) -> tuple[Pairs, dict[str, list[str]]]:
    """Pairs by (source, target) language, and more text by language; empty lines are passed over with their counterpart.

    Args:
        folder: holds ``A-B.src`` with one text a line and ``A-B.tgt`` with its translations, for any languages A and B, and
            perhaps ``A.txt`` with one text of language A a line.
    Raises:
        FileNotFoundError: no folder, or a file without its counterpart.
        ValueError: no pair, a name that is not two languages, files of different length, or one that is no UTF-8 text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory; give one with files such as en-de.src and en-de.tgt")
    pairs: Pairs = {}
    for path in sorted(folder.glob("*.src")):
        name = NAME.fullmatch(path.stem)
        if name is None:
            raise ValueError(f"{path} must be named by two languages, as in en-de.src")
        beside = path.with_suffix(".tgt")
        if not beside.is_file():
            raise FileNotFoundError(f"{path} has no {beside.name} beside it with the translations")
        sources, targets = _lines(path), _lines(beside)
        if len(sources) != len(targets):
            raise ValueError(
                f"{path} has {len(sources)} lines and {beside.name} has {len(targets)}; they must go in pairs"
            )
        kept = [(a, b) for a, b in zip(sources, targets, strict=True) if a.strip() and b.strip()]
        if not kept:
            raise ValueError(f"{path} holds no text")
        pairs[name["source"], name["target"]] = kept
    if not pairs:
        raise ValueError(f"{folder} holds no pairs; it needs files such as en-de.src and en-de.tgt, one text a line")
    mono = {path.stem: [line for line in _lines(path) if line.strip()] for path in sorted(folder.glob("*.txt"))}
    return pairs, {language: texts for language, texts in mono.items() if texts}


def write_parallel(folder: str | Path, pairs: Mapping[tuple[str, str], list[tuple[str, str]]]) -> None:
    """Write pairs as :func:`read_parallel` reads them; line breaks within a text become spaces."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for (source, target), part in pairs.items():
        for side, suffix in ((0, "src"), (1, "tgt")):
            text = "".join(" ".join(pair[side].split("\n")) + "\n" for pair in part)
            (folder / f"{source}-{target}.{suffix}").write_text(text, encoding="utf-8")


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    return text.removesuffix("\n").split("\n") if text else []
