"""Sets in BEIR's layout and package descriptions are read as they are; what is damaged is named."""

import bz2
import json

import pytest

from mixtura.data.package_descriptions import (
    answers_in_english,
    debian_descriptions,
    description_corpora,
    description_set,
    parse_descriptions,
    questions_of,
)
from mixtura.data.retrieval_sets import is_beir, load_beir, read_qrels
from mixtura.data.texts import MissingData

LONG = "It tunes lutes, viols and harps by ear and shows how far each string is from where it should be, in cents."


def stanza(package, key, language, short, long):
    lines = "\n".join(f" {line}" for line in long)
    return f"Package: {package}\nDescription-md5: {key}\nDescription-{language}: {short}\n{lines}\n\n"


@pytest.fixture
def lists(tmp_path):
    english = [
        stanza("lute", "01", "en", "tuner for old lutes", ["It tunes lutes, viols and harps", *LONG[32:].split("\n")]),
        stanza("lute-doc", "02", "en", "manual of a tuner", [LONG]),
        stanza("lute", "01", "en", "tuner for old lutes", ["the newer version of the same"]),
        stanza("short", "03", "en", "too short to answer", ["Few words.", ".", "   a list", "  another"]),
        stanza("twin", "04", "en", "the same question", [LONG + " Really."]),
        stanza("twin2", "05", "en", "The same question", [LONG + " Indeed."]),
        stanza("two", "06", "en", "two words", [LONG + " Two."]),
    ]
    danish = [
        stanza("lute", "01", "da", "stemmer til gamle lutter", ["Den stemmer lutter."]),
        stanza("lute-doc", "02", "da", "manual of a tuner", ["Kun den lange del."]),
        stanza("gone", "99", "da", "ikke i den engelske liste", ["Den findes ikke."]),
    ]
    (tmp_path / "deb_main_i18n_Translation-en").write_text("".join(english))
    (tmp_path / "Translation-da.bz2").write_bytes(bz2.compress("".join(danish).encode()))
    return tmp_path


def test_descriptions_are_read_once_a_key_and_paragraphs_are_kept(lists):
    english = debian_descriptions(folder=lists)["en"]
    assert [e.package for e in english] == ["lute", "lute-doc", "short", "twin", "twin2", "two"]
    assert english[0].long == LONG and english[2].long == "Few words.\na list\nanother"
    assert list(parse_descriptions(["Package: a", "", "Description-en: b"], "en")) == []


def test_a_translation_counts_where_both_parts_are_translated(lists):
    found = debian_descriptions(["da"], folder=lists)
    assert list(found) == ["da"] and [e.key for e in found["da"]] == ["01"]


def test_descriptions_are_text_to_learn_from_split_once_and_cut_to_a_size(lists):
    entries = debian_descriptions(folder=lists)["en"]
    whole = description_corpora(["en"], characters=10**6, seed=0, folder=lists)["en"]
    assert sorted(whole.train + whole.held_out) == sorted({f"{e.short}\n{e.long}" for e in entries})
    assert whole.train and whole.held_out and not set(whole.train) & set(whole.held_out)
    assert whole == description_corpora(["en"], characters=10**6, seed=0, folder=lists)["en"]
    cut = description_corpora(["en"], characters=1, seed=0, folder=lists)["en"]
    assert len(cut.train) + len(cut.held_out) < len(whole.train) + len(whole.held_out)


def test_a_text_is_one_document_and_a_question_is_unique(lists):
    english = debian_descriptions(folder=lists)["en"]
    ids, texts, behind = answers_in_english(english)
    assert ids == ["01", "04", "05", "06"] and texts[0] == LONG and behind["02"] == "01"
    assert [e.key for e in questions_of(english)] == ["01", "02", "03"]
    both = description_set(english, debian_descriptions(["da"], folder=lists)["da"], language="da")
    assert both.queries == {"01": "stemmer til gamle lutter"} and both.qrels == {"01": {"01": 1}}
    assert description_set(english).qrels == {"01": {"01": 1}, "02": {"01": 1}}


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MissingData, match=r"put there main/i18n/Translation-en.bz2 of a Debian mirror"):
        debian_descriptions(folder=tmp_path)
    with pytest.raises(ValueError, match=r"languages must be among .*, got \['tlh'\]"):
        debian_descriptions(["tlh"])


@pytest.fixture
def beir(tmp_path):
    corpus = [{"_id": "d1", "title": "Lutes", "text": "are plucked"}, {"_id": "d2", "text": "boats"}]
    queries = [{"_id": "q1", "text": "what is plucked"}, {"_id": "q2", "text": "not judged"}]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td9\t1\n")
    return tmp_path


def test_a_beir_set_joins_title_and_text_keeps_judged_queries_and_counts_unknown_documents(beir, caplog):
    found = load_beir(beir)
    assert is_beir(beir) and found.documents == {"d1": "Lutes are plucked", "d2": "boats"}
    assert found.queries == {"q1": "what is plucked"} and found.qrels == {"q1": {"d1": 2, "d9": 1}}
    assert "judges 1 documents that the corpus does not hold, among them d9" in caplog.text


def test_damage_to_a_beir_set_is_named(beir):
    with pytest.raises(FileNotFoundError, match=r"qrels/dev.tsv does not exist.*there is test"):
        load_beir(beir, split="dev")
    with (beir / "corpus.jsonl").open("a") as handle:
        handle.write('{"_id": "d1", "text": "again"}\n')
    with pytest.raises(ValueError, match="the id 'd1' comes twice"):
        load_beir(beir)
    (beir / "corpus.jsonl").write_text('{"_id": "d1", "text": "a"}\n{"_id": "d2", "te')
    with pytest.raises(ValueError, match=r"corpus.jsonl, line 2: need a JSON object with _id and text"):
        load_beir(beir)
    (beir / "corpus.jsonl").write_text('{"_id": "d1", "text": "a"}\n')
    (beir / "qrels" / "test.tsv").write_text("q\td\ts\nq7\td1\t1\n")
    with pytest.raises(ValueError, match="judges no query of"):
        load_beir(beir)


def test_judgements_of_trec_are_read_too(tmp_path):
    (tmp_path / "q.txt").write_text("q1 0 d1 1\n\nq1 0 d2 0\n")
    assert read_qrels(tmp_path / "q.txt") == {"q1": {"d1": 1, "d2": 0}}
    (tmp_path / "q.txt").write_text("q1 0 d1 1\nq1 0 d2 yes\n")
    with pytest.raises(ValueError, match="line 2: a grade is a whole number, got 'yes'"):
        read_qrels(tmp_path / "q.txt")
    (tmp_path / "q.txt").write_text("q1 d1\n")
    with pytest.raises(ValueError, match="line 1: judgements have 3 or 4 fields, got 2"):
        read_qrels(tmp_path / "q.txt")
