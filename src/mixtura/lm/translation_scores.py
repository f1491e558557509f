"""How good translations are: chrF and BLEU by sacrebleu, for every pair of languages.

Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation", eq. 1, with n-grams of 1 to 6 characters and
beta = 2; Papineni et al. 2002, "BLEU"; computed and signed by sacrebleu (Post 2018, 1804.08771), so that figures compare with
published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixtura.core.progress import bar
from mixtura.lm.multitask import translate

__all__ = ["PairScore", "TranslationScores", "score_texts", "score_translations"]

Languages = tuple[str, str]

# Scripts without spaces between words: BLEU counts words, and these need a rule of their own. sacrebleu's analyser of Japanese
# would need a dictionary, so its characters are counted.
WORDS = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char", "my": "char"}


@dataclass(frozen=True)
class PairScore:
    """Scores of one pair of languages, 0 to 100, higher is better.

    Attributes:
        chrf: F-score of character n-grams.
        bleu: precision of word n-grams with the penalty of short texts.
        texts: how many were scored.
        chrf_signature, bleu_signature: what sacrebleu counted, to be reported with the figures.
    """

    chrf: float
    bleu: float
    texts: int
    chrf_signature: str
    bleu_signature: str


@dataclass(frozen=True)
class TranslationScores:
    """Scores by pair of languages.

    Attributes:
        pairs: (source language, target language) -> scores.
        translations: what was scored, by pair, in the order of the texts.
    """

    pairs: Mapping[Languages, PairScore]
    translations: Mapping[Languages, Sequence[str]]

    @property
    def chrf(self) -> float:
        """Mean over pairs of languages, each counting alike."""
        return sum(score.chrf for score in self.pairs.values()) / len(self.pairs)

    @property
    def bleu(self) -> float:
        """Mean over pairs of languages, each counting alike."""
        return sum(score.bleu for score in self.pairs.values()) / len(self.pairs)


def score_texts(
    translations: Mapping[Languages, Sequence[str]], references: Mapping[Languages, Sequence[str]]
) -> TranslationScores:
    """chrF and BLEU of translations that are there already.

    Args:
        translations: (source language, target language) -> texts.
        references: the same pairs -> what they should say, one each.
    Raises:
        ImportError: the package sacrebleu is not installed (the message says how to get it).
        ValueError: no pair, one without texts, or translations and references that do not match.
    Example:
        >>> found = score_texts({("en", "de"): ["ein Haus"]}, {("en", "de"): ["ein Haus"]})
        >>> found.chrf
        100.0
    """
    metrics = _metrics()
    if not references or set(translations) != set(references):
        raise ValueError(
            "translations and references must be of the same pairs of languages, got "
            f"{_names(translations)} and {_names(references)}"
        )
    found = {}
    for languages, wanted in references.items():
        made = translations[languages]
        if len(made) != len(wanted) or not len(wanted):
            raise ValueError(
                f"{'-'.join(languages)} must have as many translations as references and at least one, got {len(made)} and "
                f"{len(wanted)}"
            )
        words = WORDS.get(languages[1].replace("-", "_").split("_")[0], "13a")
        chrf, bleu = metrics.CHRF(), metrics.BLEU(tokenize=words)
        found[languages] = PairScore(
            chrf=float(chrf.corpus_score(list(made), [list(wanted)]).score),
            bleu=float(bleu.corpus_score(list(made), [list(wanted)]).score),
            texts=len(wanted),
            chrf_signature=str(chrf.get_signature()),
            bleu_signature=str(bleu.get_signature()),
        )
    return TranslationScores(found, dict(translations))


def score_translations(
    model: Any,
    tokenizer: Any,
    pairs: Mapping[Languages, Sequence[tuple[str, str]]],
    *,
    batch_size: int = 32,
    length: int = 128,
    **options: Any,
) -> TranslationScores:
    """Translate the sources of pairs and score what comes out against their targets.

    Texts of similar length are translated together; the model is put into evaluation mode and back. Use pairs that it was not
    trained on.

    Args:
        model, tokenizer: of an encoder-decoder, as for :func:`mixtura.lm.multitask.translate`.
        pairs: (source language, target language) -> texts with their translations, as
            :func:`mixtura.data.parallel_texts.read_parallel` gives them.
        batch_size: texts translated at a time.
        length, options: as for :func:`mixtura.lm.multitask.translate`, such as ``num_beams=4``.
    Raises:
        ImportError: the package sacrebleu is not installed; said before anything is translated.
        ValueError: no pair, one without texts, a batch size below 1, or a language that the tokenizer has no token for.
    """
    _metrics()
    if not pairs or (empty := ["-".join(languages) for languages, part in pairs.items() if not len(part)]):
        raise ValueError(f"pairs must hold texts, got {f'none for {empty}' if pairs else 'no pair of languages'}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    mode = model.training
    model.eval()
    made: dict[Languages, list[str]] = {}
    try:
        with torch.inference_mode(), bar(desc="translate", unit="text", total=sum(map(len, pairs.values()))) as shown:
            for languages, part in pairs.items():
                order = sorted(range(len(part)), key=lambda i: len(part[i][0]))
                texts = [""] * len(part)
                for first in range(0, len(order), batch_size):
                    rows = order[first : first + batch_size]
                    sources = [part[i][0] for i in rows]
                    for i, text in zip(
                        rows, translate(model, tokenizer, sources, languages[1], length=length, **options), strict=True
                    ):
                        texts[i] = text
                    shown.update(len(rows))
                made[languages] = texts
    finally:
        model.train(mode)
    return score_texts(made, {languages: [target for _, target in part] for languages, part in pairs.items()})


def _metrics() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ImportError(
            "scores of translations are computed by the package sacrebleu; get it with: pip install 'mixtura[translation]'",
            name="sacrebleu",
        ) from error
    return metrics


def _names(texts: Mapping[Languages, Any]) -> list[str]:
    return ["-".join(languages) for languages in texts]
