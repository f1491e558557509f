"""Scores of translations: sacrebleu's own figures, by pair of languages, of texts that come back in their order."""

import builtins
from collections import Counter

import pytest
import torch

from mixtura.lm.multitask import multitask_tokenizer, translate
from mixtura.lm.translation_scores import score_texts, score_translations

GERMAN = ["Das Haus steht am See.", "Ein Werkzeug zum Stimmen von Lauten", "nichts"]
OTHER = ["Das Haus liegt an einem See.", "Werkzeug, das Lauten stimmt", "etwas"]


def chrf_by_hand(made, wanted, beta=2.0):
    """Popović's F-score of one text: precision and recall of n-grams averaged over the orders that both have."""
    a, b = made.replace(" ", ""), wanted.replace(" ", "")
    precision, recall = [], []
    for n in range(1, 7):
        x, y = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (a, b))
        if x and y:
            same = (x & y).total()
            precision.append(same / x.total())
            recall.append(same / y.total())
    p, r = sum(precision) / len(precision), sum(recall) / len(recall)
    return 100 * (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0.0


def test_identical_texts_have_one_hundred_and_foreign_ones_nothing():
    pytest.importorskip("sacrebleu")
    same = score_texts({("en", "de"): GERMAN}, {("en", "de"): GERMAN})
    assert same.chrf == pytest.approx(100) and same.bleu == pytest.approx(100)
    other = score_texts({("en", "ru"): ["qqqq", "qq"]}, {("en", "ru"): ["шшшш", "шш"]})
    assert other.chrf == 0 and other.bleu == 0


@pytest.mark.parametrize("i", range(3))
def test_chrf_of_one_text_is_its_definition(i):
    pytest.importorskip("sacrebleu")
    found = score_texts({("en", "de"): OTHER[i : i + 1]}, {("en", "de"): GERMAN[i : i + 1]})
    assert found.chrf == pytest.approx(chrf_by_hand(OTHER[i], GERMAN[i]), abs=1e-9)


def test_figures_are_those_of_sacrebleu_by_pair_and_the_mean_counts_pairs_alike():
    sacrebleu = pytest.importorskip("sacrebleu")
    wanted = {("en", "de"): GERMAN, ("en", "ja"): ["湖のそばの家", "何もない"]}
    made = {("en", "de"): OTHER, ("en", "ja"): ["湖の家", "何もない"]}
    found = score_texts(made, wanted)
    for languages in wanted:
        score = found.pairs[languages]
        words = "13a" if languages[1] == "de" else "char"
        assert score.chrf == pytest.approx(sacrebleu.corpus_chrf(made[languages], [wanted[languages]]).score)
        assert score.bleu == pytest.approx(
            sacrebleu.corpus_bleu(made[languages], [wanted[languages]], tokenize=words).score
        )
        assert f"tok:{words}" in score.bleu_signature and "nc:6" in score.chrf_signature
        assert score.texts == len(wanted[languages])
    assert found.chrf == pytest.approx(sum(score.chrf for score in found.pairs.values()) / 2)


@pytest.fixture(scope="module")
def tiny():
    from mixtura.lm.model import MultitaskMoEConfig, MultitaskMoEForConditionalGeneration

    texts = ["a house by the lake", "ein Haus am See", "une maison au bord du lac"]
    tokenizer = multitask_tokenizer(texts, 300, ["en", "de", "fr"])
    torch.manual_seed(0)
    config = MultitaskMoEConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        heads=2,
        ffn=32,
        encoder_layers=2,
        decoder_layers=2,
        num_experts=2,
        eval_capacity_factor=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    return MultitaskMoEForConditionalGeneration(config), tokenizer


def test_what_a_model_writes_is_scored_in_the_order_of_its_texts(tiny):
    pytest.importorskip("sacrebleu")
    model, tokenizer = tiny
    sources = ["a house by the lake and more", "a", "the lake", "by the house", "lake"]
    model.eval()
    own = {t: [translate(model, tokenizer, [s], t, max_new_tokens=5)[0] for s in sources] for t in ("de", "fr")}
    assert len(set(own["de"])) > 1, "the texts must differ, or their order would not show"
    model.train()
    pairs = {("en", t): list(zip(sources, own[t], strict=True)) for t in own}
    found = score_translations(model, tokenizer, pairs, batch_size=2, max_new_tokens=5)
    assert {t: list(found.translations["en", t]) for t in own} == own
    assert model.training, "the mode is given back"


def test_mistakes_are_named(tiny):
    pytest.importorskip("sacrebleu")
    with pytest.raises(ValueError, match="no pair of languages"):
        score_translations(*tiny, {})
    with pytest.raises(ValueError, match=r"none for \['en-fr'\]"):
        score_translations(*tiny, {("en", "de"): [("a", "b")], ("en", "fr"): []})
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_translations(*tiny, {("en", "de"): [("a", "b")]}, batch_size=0)
    with pytest.raises(ValueError, match="languages must be among"):
        score_translations(*tiny, {("en", "it"): [("a", "b")]})
    with pytest.raises(ValueError, match="en-de must have as many translations as references"):
        score_texts({("en", "de"): ["a"]}, {("en", "de"): ["a", "b"]})
    with pytest.raises(ValueError, match=r"same pairs of languages, got \['en-de'\] and \['en-fr'\]"):
        score_texts({("en", "de"): ["a"]}, {("en", "fr"): ["a"]})


def test_without_sacrebleu_it_says_what_to_install_before_any_work(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "sacrebleu":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"sacrebleu; get it with: pip install 'mixtura\[translation\]'"):
        score_translations(None, None, {("en", "de"): [("a", "b")]})
