"""Corpora: disjoint parts, the same for the same seed, and errors that say what is missing."""

from pathlib import Path

import pytest

from mixtura.data import texts
from mixtura.data.texts import MissingData, corpus, read_texts, split

ALWAYS = ("code", "prose", "arithmetic")


@pytest.mark.parametrize("name", ALWAYS)
def test_parts_are_disjoint_and_reproducible(name: str):
    once, again = corpus(name, characters=200_000), corpus(name, characters=200_000)
    assert once == again
    assert once.train and once.held_out
    assert not set(once.train) & set(once.held_out)
    assert sum(map(len, once.train + once.held_out)) <= 200_000


def test_no_held_out_problem_was_trained_on_and_every_result_is_right():
    found = corpus("arithmetic", characters=60_000)
    trained = {line for document in found.train for line in document.splitlines()}
    held = [line for document in found.held_out for line in document.splitlines()]
    assert held and not trained & set(held)
    for line in held:
        sides = line.split(": ")[-1].removesuffix(" nuts").split("; ")[0].split(" = ")
        if "x" not in line:
            values = {int(_value(side)) for side in sides}
            assert len(values) == 1, line


def _value(expression: str) -> float:
    """Left to right with precedence, by hand: the tests do not evaluate text as code either."""
    expression = expression.strip()
    if expression.startswith("("):
        inside, rest = expression[1:].split(")", 1)
        return _value(f"{int(_value(inside))}{rest}")
    for operator in ("+", "-", "*", "/"):
        if f" {operator} " in expression:
            left, right = expression.rsplit(f" {operator} ", 1)
            a, b = _value(left), _value(right)
            return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
    return float(expression)


def test_seeds_differ():
    assert corpus("arithmetic", characters=5000, seed=0) != corpus("arithmetic", characters=5000, seed=1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts, "GCIDE", Path("/nowhere"))
    with pytest.raises(MissingData, match="apt-get install dict-gcide"):
        corpus("dictionary")
    monkeypatch.setattr(texts, "WORDNET", Path("/nowhere"))
    with pytest.raises(MissingData, match="apt-get install wordnet-base"):
        corpus("glosses")


def test_an_unknown_corpus_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of \['arithmetic', 'code'"):
        corpus("poems")


def test_a_single_document_is_cut_at_a_line():
    text = "\n".join(f"line {i}" for i in range(100))
    found = split("one", [text])
    assert found.train[0] + found.held_out[0] == text
    assert found.held_out[0].startswith("line ")


def test_texts_are_read_from_files_and_directories(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("alpha")
    (tmp_path / "d" / "b.bin").write_bytes(b"\0\1\2")
    (tmp_path / "c.txt").write_text("gamma")
    assert read_texts([tmp_path / "d", tmp_path / "c.txt"]) == ["alpha", "gamma"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"  \n", "is empty"), (b"\0\1", "is not UTF-8 text"), (b"\xff\xfe", "is not UTF-8")],
)
def test_a_named_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts([tmp_path / "x"])


def test_an_empty_directory_and_a_missing_path_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no UTF-8 text file"):
        read_texts([tmp_path])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_texts([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="name at least one"):
        read_texts([])
