"""An index on disk: incremental, never half written, and of one encoder."""

import json

import numpy as np
import pytest

from mixtura.multimodal.retrieval import pending, store
from mixtura.multimodal.retrieval.encoder import EncoderConfig, TextEncoder
from mixtura.multimodal.retrieval.passages import Document, NotText, documents_of, passages
from mixtura.multimodal.retrieval.shared_encoding import encode_half
from mixtura.multimodal.retrieval.store import SearchIndex
from mixtura.multimodal.retrieval.tokenizer import train_tokenizer

TEXTS = {"lute.txt": "A lute is plucked.", "boat.txt": "A boat sails on the river.", "sub/bread.md": "Bread is baked."}


@pytest.fixture(scope="module")
def encoder():
    tokenizer = train_tokenizer(list(TEXTS.values()), 300)
    return TextEncoder(EncoderConfig(vocab_size=len(tokenizer), width=32), tokenizer).eval()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notes"
    for name, text in TEXTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def indexed(folder, encoder, **options):
    index = SearchIndex(folder.parent / "index", encoder, create=True)
    return index, index.add(documents_of(folder), str(folder), **options)


def names(hits):
    return [hit.name for hit in hits]


def test_what_changed_is_encoded_what_did_not_is_not_read_and_what_went_is_forgotten(folder, encoder, monkeypatch):
    index, first = indexed(folder, encoder)
    assert (first.added, first.passages, len(index)) == (3, 3, 3)
    (folder / "boat.txt").write_text("A boat is a vessel, and a harp is not.")
    (folder / "lute.txt").unlink()
    (folder / "star.txt").write_text("Stars shine at night.")
    encoded = []
    monkeypatch.setattr(encoder, "encode", lambda texts, *a, **k: encoded.extend(texts) or _encode(encoder, texts))
    _, second = indexed(folder, encoder)
    assert (second.added, second.changed, second.unchanged, second.removed) == (1, 1, 1, 1)
    assert sorted(encoded) == ["A boat is a vessel, and a harp is not.", "Stars shine at night."]
    again = SearchIndex(folder.parent / "index", encoder)
    assert names(again.search("harp", by="words")) == ["boat.txt"] and names(again.search("plucked", by="words")) == []
    assert sorted(names(again.search("lute", by="meaning"))) == ["boat.txt", "star.txt", "sub/bread.md"]
    _, third = indexed(folder, encoder)
    assert (third.added, third.changed, third.unchanged, third.removed, third.passages) == (0, 0, 3, 0, 0)


def _encode(encoder, texts):
    return type(encoder).encode(encoder, texts)


def test_small_runs_do_not_leave_many_files_and_rows_stay_right(folder, encoder, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 5)
    for i in range(9):
        (folder / f"n{i}.txt").write_text(f"number {i} of the lutes")
        index, _ = indexed(folder, encoder)
    assert len(list(index.path.glob("vectors-*.npy"))) == 3 and index.n_passages == 12
    for i in range(9):
        hit = index.search(f"number {i} of the lutes", 1, by="meaning")[0]
        assert hit.name == f"n{i}.txt" and hit.score > 0.999


def test_the_search_by_meaning_is_brute_force_over_documents(folder, encoder):
    (folder / "long.txt").write_text("\n\n".join(f"paragraph {i} " + "about boats and bread. " * 30 for i in range(40)))
    index, done = indexed(folder, encoder)
    assert done.passages >= 40
    q = encoder.encode(["bread and boats"])[0]
    best = {}
    for name in [*TEXTS, "long.txt"]:
        texts = [p.text for p in passages([(folder / name).read_text()])]
        best[name] = float((encoder.encode(texts) @ q).max())
    hits = index.search("bread and boats", 10, by="meaning")
    assert names(hits) == sorted(best, key=best.__getitem__, reverse=True)
    np.testing.assert_allclose([hit.score for hit in hits], sorted(best.values(), reverse=True), atol=2e-3)  # float16


def test_an_interrupt_keeps_what_is_done_and_the_next_run_goes_on(folder, encoder, monkeypatch):
    for i in range(20):
        (folder / f"x{i:02d}.txt").write_text(f"text {i}")
    monkeypatch.setattr(store, "BATCH", 2)
    monkeypatch.setattr(pending, "SAVE", 4)
    index = SearchIndex(folder.parent / "index", encoder, create=True)

    def stops():
        for i, document in enumerate(documents_of(folder)):
            if i == 11:
                raise KeyboardInterrupt
            yield document

    with pytest.raises(KeyboardInterrupt):
        index.add(stops(), str(folder))
    index.close()
    index, done = indexed(folder, encoder)
    assert (done.unchanged, done.added, len(index), index.n_passages) == (11, 12, 23, 23)


def test_a_document_broken_off_in_the_middle_is_read_again(folder, encoder, monkeypatch):
    (folder / "a-long.txt").write_text("\n\n".join(f"paragraph {i} " + "of a long text. " * 60 for i in range(9)))
    monkeypatch.setattr(store, "BATCH", 1)

    class Broken(Document):
        def passages(self):
            yield from list(super().passages())[:4]
            raise KeyboardInterrupt

    index = SearchIndex(folder.parent / "index", encoder, create=True)
    first = next(documents_of(folder))
    with pytest.raises(KeyboardInterrupt):
        index.add([Broken(first.name, first.stamp, first.path)], str(folder))
    assert len(index) == 0 and index.n_passages == 4
    index.close()
    index, done = indexed(folder, encoder)
    assert done.unchanged == 0 and len(index) == 4
    assert index.n_passages == 3 + len(list(first.passages()))


def test_a_full_disk_stops_the_run_and_is_not_taken_for_a_document_that_cannot_be_read(folder, encoder, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 1)
    monkeypatch.setattr(pending, "SAVE", 1)
    index = SearchIndex(folder.parent / "index", encoder, create=True)

    def full(path):
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(store, "atomic_file", full)
        with pytest.raises(OSError, match="No space left on device"):
            index.add(documents_of(folder), str(folder))
    assert index.add(documents_of(folder), str(folder)).added == 3 and index.n_passages == 3


def test_a_kill_in_the_middle_leaves_the_index_as_it_was(folder, encoder):
    index, _ = indexed(folder, encoder)
    (folder / "new.txt").write_text("new text")
    (folder / "boat.txt").write_text("changed")
    held = pending.Pending(lambda texts: encode_half(encoder, texts), 1024, index._append)
    for document in documents_of(folder):
        index._add_one(document, str(folder), 99, held, store.Added())
    index.db.close()  # without a commit, as when the process is killed
    (index.path / "vectors-000077.npy").write_bytes(b"left over")
    again = SearchIndex(index.path, encoder)
    assert names(again.search("river", by="words")) == ["boat.txt"] and len(again) == 3
    _, done = indexed(folder, encoder)
    assert (done.added, done.changed) == (1, 1) and not (index.path / "vectors-000077.npy").exists()


def test_a_second_run_at_the_same_time_is_refused_and_the_first_goes_on(folder, encoder):
    index, _ = indexed(folder, encoder)
    (folder / "new.txt").write_text("new text")
    other = SearchIndex(index.path, encoder)
    other.db.execute("PRAGMA busy_timeout = 10")
    index.db.execute("UPDATE settings SET value = value WHERE name = 'visit'")  # in the middle of a transaction
    with pytest.raises(OSError, match="database is locked; is another run at work on this index"):
        other.add(documents_of(folder), str(folder))
    assert index.add(documents_of(folder), str(folder)).added == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_marks_of_an_encoding_are_no_text(tmp_path, encoding):
    text = "Größe\r\n\r\n" + "waves on the sea 音 \U0001f30a " * 3000  # longer than what is read at a time
    (tmp_path / "notes.txt").write_bytes(text.encode(encoding))
    (document,) = documents_of(tmp_path)
    assert list(document.passages()) == list(passages([text.replace("\r\n", "\n")]))
    (tmp_path / "notes.txt").write_bytes(text.encode("utf-32"))
    with pytest.raises(NotText, match="is a binary file"):
        list(document.passages())


def test_empty_binary_and_foreign_files_are_counted_and_the_rest_goes_on(folder, encoder):
    (folder / "empty.txt").write_text("  \n ")
    (folder / "none.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "latin.txt").write_bytes("größe".encode("latin-1"))
    (folder / ".hidden").write_text("secret lute")
    index, done = indexed(folder, encoder)
    assert sorted(done.empty) == ["empty.txt", "none.txt"] and done.n_empty == 2 and done.added == 5
    reasons = dict(done.refused)
    assert "is a binary file" in reasons["picture.png"] and "is not UTF-8 text" in reasons["latin.txt"]
    assert names(index.search("secret", by="words")) == [] and len(index.search("boat", 99, by="meaning")) == 3
    assert index.search("  ") == [] and index.search('"NEAR( * lute') != []


def test_a_document_of_ten_megabytes_is_cut_and_found_by_line(folder, encoder):
    lines = ["nothing of note here"] * 480_000
    lines[300_000] = "a needle, a lute"
    (folder / "big.txt").write_text("\n".join(lines))
    assert (folder / "big.txt").stat().st_size > 10_000_000
    found = list(passages(_pieces(folder / "big.txt")))
    assert sum(len(p.text) for p in found) > 9_500_000 and max(len(p.text) for p in found) <= 1200
    at = next(p for p in found if "needle" in p.text)
    assert at.line <= 300_001 <= at.line + at.text.count("\n")


def _pieces(path):
    from mixtura.multimodal.retrieval.passages import _pieces as pieces

    return pieces(path)


@pytest.mark.parametrize("size", [1, 7, 100, 100_000])
def test_passages_do_not_depend_on_how_the_text_came_in(size):
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(["word ", "Ende. ", "\n", "\n\n", "x" * 300], p=[0.8, 0.1, 0.05, 0.03, 0.02], size=3000))
    whole = list(passages([text]))
    assert list(passages(text[i : i + size] for i in range(0, len(text), size))) == whole
    assert "".join("".join(p.text for p in whole).split()) == "".join(text.split())
    assert all(text.split("\n")[p.line - 1].find(p.text.split("\n")[0][:20]) >= 0 for p in whole)


def test_a_beir_set_is_indexed_by_its_ids(tmp_path, encoder):
    rows = [
        {"_id": "a", "title": "Lute", "text": "is plucked"},
        {"_id": "b", "text": ""},
        {"_id": "a", "text": "twice"},
    ]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    index = SearchIndex(tmp_path / "index", encoder, create=True)
    done = index.add(documents_of(tmp_path / "set"), "set")
    assert done.empty == ["b"] and done.refused == [("a", "its name comes twice; the first counts")]
    assert names(index.search("plucked lute")) == ["a"]


def test_an_index_of_another_encoder_or_in_part_is_refused(folder, encoder, tmp_path):
    index, _ = indexed(folder, encoder)
    other = TextEncoder(encoder.config, encoder.tokenizer, seed=1)
    with pytest.raises(ValueError, match="was made with another encoder"):
        SearchIndex(index.path, other)
    raw = TextEncoder(EncoderConfig(vocab_size=encoder.config.vocab_size, width=32, normalize=False), encoder.tokenizer)
    with pytest.raises(ValueError, match="was made with normalize=True"):
        SearchIndex(index.path, raw)
    index.close()
    vectors = next(index.path.glob("vectors-*.npy"))
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        SearchIndex(index.path, encoder)
    vectors.unlink()
    with pytest.raises(ValueError, match="is missing: half an index"):
        SearchIndex(index.path, encoder)
    vectors.write_bytes(whole)
    database = index.path / "index.sqlite"
    kept = database.read_bytes()
    database.write_bytes(kept[:3000])
    with pytest.raises(ValueError, match="damaged"):
        SearchIndex(index.path, encoder)
    database.unlink()
    with pytest.raises(ValueError, match=r"holds vectors but no index.sqlite"):
        SearchIndex(index.path, encoder, create=True)
    with pytest.raises(FileNotFoundError, match="holds no index; make one with: mixtura search index DIR"):
        SearchIndex(tmp_path / "nowhere", encoder)
    with pytest.raises(ValueError, match="exists and is no index"):
        SearchIndex(folder, encoder, create=True)
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        next(documents_of(tmp_path / "gone"))
