"""Exact search is brute force whatever the block; BM25 is bm25s; fusions by hand."""

import numpy as np
import pytest

from mixtura.multimodal.retrieval.index import DenseIndex, Found, LexicalIndex, fuse


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return rng.normal(size=(1000, 16)).astype(np.float32), rng.normal(size=(300, 16)).astype(np.float32)


def test_it_is_brute_force_and_blocks_change_nothing(vectors):
    x, q = vectors
    order = np.argsort(-(q @ x.T), axis=1)[:, :7]
    whole, blocked = DenseIndex(x).search(q, 7), DenseIndex(x, block=37).search(q, 7)
    assert np.array_equal(whole.rows, order) and np.array_equal(blocked.rows, order)
    np.testing.assert_allclose(whole.scores, np.take_along_axis(q @ x.T, order, 1), rtol=1e-5, atol=1e-5)


def test_vectors_may_lie_on_disk_in_half_precision(vectors, tmp_path):
    x, q = vectors
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    on_disk = DenseIndex(np.load(tmp_path / "x.npy", mmap_mode="r"), block=100)
    assert np.array_equal(
        on_disk.search(q, 5).rows, DenseIndex(x.astype(np.float16).astype(np.float32)).search(q, 5).rows
    )


def test_empty_documents_are_never_found_and_an_empty_query_finds_nothing(vectors):
    x, q = vectors[0].copy(), vectors[1].copy()
    x[[3, 500]] = 0
    q[0] = 0
    found = DenseIndex(-abs(x), block=300).search(abs(q), 1000)
    assert (found.rows[0] == -1).all() and (found.scores[0] == -np.inf).all()
    assert not np.isin([3, 500], found.rows[1:]).any()
    assert ((found.rows[1:] == -1).sum(1) == 2).all() and (found.scores[1:, -1] == -np.inf).all()
    assert DenseIndex(x[:0]).search(q, 3).rows.shape == (300, 0)
    assert DenseIndex(x[:2]).search(q, 3).rows.shape == (300, 2)


def test_bm25_is_that_of_bm25s():
    bm25s = pytest.importorskip("bm25s", reason="needs mixtura[search]: pip install bm25s PyStemmer")
    stemmer = pytest.importorskip("Stemmer", reason="needs mixtura[search]: pip install PyStemmer")
    texts = ["tuning lutes by ear", "a boat, a lute and a tuner", "boats and boats and boats", "bread"]
    mine = LexicalIndex(texts).search(["lute tuner", "boat", "zebra"], 3)
    peer = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    stem = stemmer.Stemmer("english")
    peer.index(bm25s.tokenize(texts, stopwords="en", stemmer=stem, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(["lute tuner", "boat"], stopwords="en", stemmer=stem, show_progress=False)
    rows, scores = peer.retrieve(tokens, k=3, show_progress=False)
    there = scores > 0
    assert np.array_equal(mine.rows[:2][there], rows[there]) and (mine.rows[:2][~there] == -1).all()
    np.testing.assert_allclose(mine.scores[:2][there], scores[there])
    assert (mine.rows[2] == -1).all()
    assert LexicalIndex(texts).words(["The tuned boats"]) == [{"tune", "boat"}]


def test_fusions_by_hand():
    a = Found(np.array([[4.0, 2.0, 0.0]]), np.array([[10, 11, 12]]))
    b = Found(np.array([[7.0, 5.0, -np.inf]]), np.array([[12, 10, -1]]))
    both = fuse([a, b], [0.25, 0.75])
    assert both.rows.tolist() == [[12, 10, 11]]
    np.testing.assert_allclose(both.scores, [[0.75, 0.25, 0.125]])
    ranks = fuse([a, b], "rrf", k=2)
    assert ranks.rows.tolist() == [[10, 12]]
    np.testing.assert_allclose(ranks.scores, [[1 / 61 + 1 / 62, 1 / 63 + 1 / 61]])
    alike = fuse([Found(np.array([[2.0, 2.0]]), np.array([[0, 1]]))], [1.0])
    assert alike.scores.tolist() == [[1.0, 1.0]]
    assert Found(a.scores, a.rows).run(["q"], ["d"] * 13) == {"q": {"d": 0.0}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: DenseIndex(x.astype(np.float64)), "vectors must be a float16 or float32 matrix, got float64"),
        (lambda x: DenseIndex(x).search(x[:, :3], 1), r"queries must have shape \(B, 16\), got \(1000, 3\)"),
        (lambda x: DenseIndex(x).search(x, 0), "k must be at least 1, got 0"),
        (lambda x: fuse([]), "runs must be at least one"),
        (lambda x: fuse([DenseIndex(x).search(x[:2], 1)], [1.0, 2.0]), "one number a run"),
    ],
)
def test_what_does_not_fit_is_named(vectors, call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors[0])
