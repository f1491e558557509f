"""``mixtura search``: an index and its answers, a training, a judgement; errors of one line."""

import json

import numpy as np
import pytest
from test_cli import here  # noqa: F401 (a fixture)

from mixtura.multimodal.retrieval.encoder import TextEncoder

NOTES = {
    "music.txt": "Tuning a lute takes patience: every string of the instrument is tightened by ear.",
    "mail.md": "The mail server refuses messages when the disk is full.",
    "sub/bread.txt": "Flour, water, salt and yeast make bread.",
}


@pytest.fixture
def notes(tmp_path):
    for name, text in NOTES.items():
        path = tmp_path / "notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_folder_is_indexed_asked_and_brought_up_to_date(here, notes):  # noqa: F811
    done = here("search", "index", "notes", cwd=notes)
    assert done.returncode == 0, done.stderr
    assert "notes: 3 new" in done.stdout and "search-index: 3 documents, 3 passages" in done.stdout
    asked = here("search", "how do I tune an instrument", "-k", 2, cwd=notes)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("1. ") and "music.txt:1" in asked.stdout.splitlines()[0] and "2. " in asked.stdout
    for by in ("meaning", "words"):
        line = here("search", "full", "disk", "--by", by, "--json", "-k", 1, cwd=notes).stdout
        assert json.loads(line)["name"] == "mail.md"
    (notes / "notes" / "mail.md").unlink()
    (notes / "notes" / "index.txt").write_text("A question may be named index.")
    (notes / "notes" / "empty.txt").write_text("")
    (notes / "notes" / "broken.txt").write_bytes(b"\xff\xfe\xff")
    again = here("search", "index", "notes", cwd=notes)
    assert "notes: 2 new, 2 unchanged, 1 removed" in again.stdout
    assert "1 empty, which nothing finds: empty.txt" in again.stdout and "1 passed over: broken.txt" in again.stdout
    found = here("search", "ask", "index", "-k", 1, cwd=notes)
    assert "index.txt" in found.stdout


def test_a_dry_run_counts_and_writes_nothing(here, notes):  # noqa: F811
    done = here("search", "index", "notes", "--dry-run", cwd=notes)
    assert done.returncode == 0 and "notes: 3 documents" in done.stdout and not (notes / "search-index").exists()


def test_a_training_gives_an_encoder_that_an_index_remembers(here, notes):  # noqa: F811
    options = ("--vocab", 300, "--width", 16, "--steps", 12, "--batch", 4, "--queue", 8, "--half")
    done = here("search", "train", "notes", *options, "--out", "own", cwd=notes)
    assert done.returncode == 0, done.stderr
    assert "notes: 3 documents" in done.stdout and "use it: mixtura search index DIR --model own" in done.stdout
    facts = json.loads((notes / "own" / "encoder.json").read_text())["facts"]
    assert facts["command"].startswith("mixtura search train notes --vocab 300") and facts["steps"] == 12
    assert sorted(p.name for p in notes.iterdir()) == ["notes", "own"]
    assert here("search", "index", "notes", "--model", "own", cwd=notes).returncode == 0
    assert "1. " in here("search", "bread", cwd=notes).stdout
    other = here("search", "bread", "--model", "", cwd=notes)
    assert other.returncode == 1
    TextEncoder.from_pretrained(notes / "own").save_pretrained(notes / "moved")
    (notes / "own" / "encoder.json").unlink()
    assert here("search", "bread", "--model", "moved", cwd=notes).returncode == 0


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    texts = list(NOTES.values())
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": " ".join(text.split()[:3])} for i, text in enumerate(texts)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "qrels" / "test.tsv").write_text("q\td\ts\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(3)))
    return tmp_path


def test_a_set_is_judged_with_a_table_figures_and_a_picture(here, beir):  # noqa: F811
    pytest.importorskip("bm25s", reason="needs mixtura[search]: pip install bm25s PyStemmer")
    done = here("search", "eval", "set", "--fuse", "bm25", cwd=beir)
    assert done.returncode == 0, done.stderr
    assert "3 documents, 3 judged questions" in done.stdout and "words (BM25)" in done.stdout
    record = json.loads((beir / "search-eval.json").read_text())
    assert record["figures"]["words (BM25)"]["R@1"] == 1.0 and set(record["figures"]) == {
        "meaning",
        "words (BM25)",
        "both",
    }
    assert (beir / "search-eval.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "gone"], "gone does not exist"),
        (["index", "hollow"], "hollow: no document with text was found"),
        (["index", "notes", "--model", "./gone"], "gone does not exist"),
        (["index", "notes", "--out", "notes"], "notes exists and is no index"),
        (["a question", "--index", "gone"], "gone does not exist; make an index first: mixtura search index DIR"),
        (["a question", "--index", "notes"], "notes holds no index"),
        (["  "], "the question is empty"),
        (["train", "gone"], "gone does not exist, and the corpora known by name are: debian"),
        (["train", "notes", "--out", "notes"], "notes exists and is not empty"),
        (["train", "notes", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["train", "notes", "--batch", "1"], "batch >= 2"),
        (["train", "notes", "--vocab", "100"], "vocab_size must be at least 259"),
        (["eval", "notes"], "notes/corpus.jsonl does not exist"),
        (["eval", "notes", "--fuse", "words"], "--fuse must be bm25, got 'words'"),
        (["eval", "notes", "--plot", "x.gif"], "--plot must end in .png, .svg or .pdf"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(here, notes, arguments, message):  # noqa: F811
    (notes / "hollow").mkdir()
    done = here("search", *arguments, cwd=notes)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_default_encoder_is_small_and_knows_that_words_differ():
    from mixtura.multimodal.retrieval.encoder import DEFAULT

    assert sum(file.stat().st_size for file in DEFAULT.iterdir()) < 4_500_000
    facts = json.loads((DEFAULT / "encoder.json").read_text())["facts"]
    assert facts["command"].startswith("mixtura search train ")
    z = TextEncoder.from_pretrained().encode(["play music files", "an audio player", "a web server for large sites"])
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    assert z[0] @ z[1] > z[0] @ z[2] + 0.2  # no word is shared by any two
