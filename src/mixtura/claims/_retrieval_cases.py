"""What the claim of dense retrieval searches in: package descriptions in English, and questions in other languages.

Shapes: N documents, Q questions; every question has one document that answers it, given by its row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixtura.claims.framework import Scale
from mixtura.data.package_descriptions import Description, answers_in_english, debian_descriptions, questions_of
from mixtura.multimodal.retrieval.index import Found, LexicalIndex
from mixtura.multimodal.retrieval.tokenizer import SearchTokenizer, train_tokenizer

__all__ = ["ABROAD", "Asked", "Prepared", "Size", "prepared"]

ABROAD = ("da", "it", "fr", "de", "ru", "ja")  # languages of the questions; the documents are English
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


@dataclass(frozen=True)
class Size:
    """How much a scale runs.

    Attributes:
        asked, tuned: questions to judge on, and others to choose the weight of a fusion on, in English.
        asked_abroad, tuned_abroad: the same in each other language, at most.
        vocab, vocab_all: tokens, English and of all languages.
        steps, steps_all: of a training.
        batch, queue: of the contrast.
        depth: documents that each search brings to a fusion.
        languages: of the questions, beside English.
        device: where encoders are trained.
    """

    asked: int = 2000
    tuned: int = 1000
    asked_abroad: int = 2000
    tuned_abroad: int = 150
    vocab: int = 16_000
    vocab_all: int = 24_000
    steps: int = 1500
    steps_all: int = 2250
    batch: int = 256
    queue: int = 8192
    depth: int = 1000
    languages: tuple[str, ...] = ABROAD
    device: str = "cpu"


SIZES: dict[Scale, Size] = {
    "smoke": Size(60, 40, 40, 10, 400, 500, 30, 30, 32, 64, 50, ("da", "ru")),
    "cpu": Size(),
    "gpu": Size(steps=4000, steps_all=4000, batch=1024, queue=65_536, device="cuda"),
}


@dataclass(frozen=True)
class Asked:
    """Questions in one language.

    Attributes:
        texts: Q questions.
        answers: row of the document that answers each, shape (Q,).
        words: BM25's run for them.
        shared: whether a question shares a stemmed word with its document, shape (Q,); else BM25 can never find it.
    """

    texts: list[str]
    answers: np.ndarray
    words: Found
    shared: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the seed of a training.

    Attributes:
        documents: N English texts.
        tokenizer, tokens: learned on them, and their ids.
        tokenizer_all, training_all, groups: of all languages: the ids of each text to train on, and its language's number.
        documents_all: ids of the documents under that tokenizer.
        test, dev: English questions.
        test_abroad, dev_abroad: questions of each other language.
        excluded: translations left out of the training text, by language.
    """

    documents: list[str]
    tokenizer: SearchTokenizer
    tokens: list[list[int]]
    tokenizer_all: SearchTokenizer
    training_all: list[list[int]]
    groups: list[int]
    test: Asked
    dev: Asked
    test_abroad: dict[str, Asked]
    dev_abroad: dict[str, Asked]
    excluded: dict[str, int]


@functools.cache
def prepared(scale: Scale) -> Prepared:
    """Texts, tokens, questions and BM25's answers of a scale; the questions are the same for every seed."""
    size = SIZES[scale]
    wanted = ("en", *size.languages)
    found = made_up(300) if scale == "smoke" else debian_descriptions(wanted)
    ids, documents, behind = answers_in_english(found["en"])
    row = {key: i for i, key in enumerate(ids)}
    lexical = LexicalIndex(documents)
    words = lexical.words(documents)

    def asked(entries: Sequence[Description]) -> Asked:
        texts = [entry.short for entry in entries]
        answers = np.array([row[behind[entry.key]] for entry in entries], dtype=np.int64)
        own = lexical.words(texts)
        shared = np.array([bool(mine & words[at]) for mine, at in zip(own, answers, strict=True)])
        return Asked(texts, answers, lexical.search(texts, size.depth), shared)

    # One order of the packages for all languages, so that the same ones answer in many, and few translations are lost.
    rng = np.random.default_rng(0)
    keys = sorted(behind)
    place = dict(zip(keys, rng.permutation(len(keys)).tolist(), strict=True))

    def drawn(language: str) -> list[Description]:
        entries = [e for e in questions_of(found[language], language=language) if e.key in behind]
        return sorted(entries, key=lambda e: place[e.key])

    english = drawn("en")
    abroad = {language: drawn(language)[: size.asked_abroad + size.tuned_abroad] for language in size.languages}
    answering = {behind[e.key] for entries in abroad.values() for e in entries}
    training: list[str] = list(documents)
    groups = [0] * len(documents)
    excluded = {}
    for number, language in enumerate(size.languages, 1):
        kept = sorted({e.long for e in found[language] if behind.get(e.key) not in answering})
        excluded[language] = len({e.long for e in found[language]}) - len(kept)
        training += kept
        groups += [number] * len(kept)
    tokenizer = train_tokenizer(documents, size.vocab)
    # As the training does, so that no language has more of the vocabulary for having more text.
    tokenizer_all = train_tokenizer(_evenly(training, groups), size.vocab_all)
    # The last ones set the weight of the fusion and are judged on nothing.
    abroad_test = {name: entries[: -size.tuned_abroad] for name, entries in abroad.items()}
    abroad_dev = {name: entries[-size.tuned_abroad :] for name, entries in abroad.items()}
    return Prepared(
        documents=documents,
        tokenizer=tokenizer,
        tokens=tokenizer.ids(documents),
        tokenizer_all=tokenizer_all,
        training_all=tokenizer_all.ids(training),
        groups=groups,
        test=asked(english[: size.asked]),
        dev=asked(english[size.asked : size.asked + size.tuned]),
        test_abroad={name: asked(entries) for name, entries in abroad_test.items()},
        dev_abroad={name: asked(entries) for name, entries in abroad_dev.items()},
        excluded=excluded,
    )


def _evenly(texts: Sequence[str], groups: Sequence[int], most: int = 8000) -> list[str]:
    """At most so many texts of each group, in an order drawn once."""
    rng, of = np.random.default_rng(0), np.asarray(groups)
    rows = [rng.permutation(np.flatnonzero(of == group))[:most] for group in np.unique(of)]
    return [texts[i] for i in np.concatenate(rows)]


def made_up(n: int) -> Mapping[str, list[Description]]:
    """Descriptions that nobody wrote, in English and in two languages that spell its words anew; names stay.

    For the smoke scale and the tests: they run without Debian's lists, and show nothing about language.
    """
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice(SYLLABLES, 3)) for _ in range(240)]
    common, topics = vocabulary[:40], np.array(vocabulary[40:]).reshape(20, 10)
    entries: dict[str, list[Description]] = {"en": [], "da": [], "ru": []}
    spelled = {
        "da": str.maketrans("aeioubdg", "æøåyaptk"),
        "ru": str.maketrans("aeioubdfgklmnprstvz", "аеиоубдфгклмнпрствз"),
    }
    for i in range(n):
        topic, name = topics[i % 20], "x" + "".join(rng.choice(SYLLABLES, 2))
        words = [*rng.choice(topic, 20), *rng.choice(common, 20)]
        long = " ".join([name, *rng.permutation(words)])
        short = " ".join([*rng.choice(topic, 3), name])
        entries["en"].append(Description(f"p{i}", f"{i:04d}", short, long))
        for language, table in spelled.items():
            there = " ".join(w if w == name else str(w).translate(table) for w in long.split())
            asks = " ".join(w if w == name and i % 2 else str(w).translate(table) for w in short.split())
            entries[language].append(Description(f"p{i}", f"{i:04d}", asks, there))
    return entries
