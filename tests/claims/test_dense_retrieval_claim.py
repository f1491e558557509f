"""What the claim of dense retrieval judges: figures as trec_eval's, and no text in training that would give answers away."""

import numpy as np
import pytest

from mixtura.claims import _retrieval_cases as cases
from mixtura.claims import dense_retrieval as claim
from mixtura.multimodal.retrieval.evaluate import evaluate
from mixtura.multimodal.retrieval.index import DenseIndex


@pytest.fixture(scope="module")
def ready():
    return cases.prepared("smoke")


def test_figures_of_one_relevant_document_are_those_of_the_general_measure():
    rng = np.random.default_rng(0)
    answers = rng.integers(200, size=40)
    found = DenseIndex(rng.normal(size=(200, 8)).astype(np.float32)).search(
        rng.normal(size=(40, 8)).astype(np.float32), 60
    )
    place = claim.places(found, answers)
    names, queries = [f"d{i}" for i in range(200)], [f"q{i}" for i in range(40)]
    qrels = {q: {names[a]: 1} for q, a in zip(queries, answers, strict=True)}
    want = evaluate(found.run(queries, names), qrels, recall=[1, 10, 50])
    for k in (1, 10, 50):
        assert claim.recall(place, k) == pytest.approx(want.means[f"R@{k}"], abs=1e-12)
    np.testing.assert_allclose(claim.gain(place), want.figures["nDCG@10"], atol=1e-12)


def test_no_translation_of_a_document_that_answers_is_trained_on_and_no_short_description_is(ready):
    made = cases.made_up(300)
    trained = {tuple(ids) for ids in ready.training_all}
    spelled = {language: {e.key: e for e in made[language]} for language in ("en", "da", "ru")}
    by_text = {e.long: e.key for e in made["en"]}
    for asked in (*ready.test_abroad.values(), *ready.dev_abroad.values()):
        for row in asked.answers:
            key = by_text[ready.documents[row]]
            for language in ("da", "ru"):
                assert tuple(ready.tokenizer_all.ids([spelled[language][key].long])[0]) not in trained
    shorts = [e.short for entries in made.values() for e in entries]
    assert not trained & {tuple(ids) for ids in ready.tokenizer_all.ids(shorts)}
    assert ready.excluded["da"] == 50 and len(trained) == 300 + 2 * 250


def test_the_weight_is_chosen_on_other_questions_than_are_judged(ready):
    assert not set(ready.test.texts) & set(ready.dev.texts)
    for language in ready.test_abroad:
        assert not set(ready.test_abroad[language].texts) & set(ready.dev_abroad[language].texts)
    pairs = [(ready.dev.words, ready.dev)]
    assert claim.chosen_weight(pairs) in claim.WEIGHTS


def test_questions_that_share_no_word_are_those_that_word_matching_cannot_find(ready):
    for asked in ready.test_abroad.values():
        place = claim.places(asked.words, asked.answers)
        assert np.isinf(place[~asked.shared]).all() and (~asked.shared).any()
        assert np.isfinite(place[asked.shared]).mean() > 0.9  # the list is 50 of 300 long
