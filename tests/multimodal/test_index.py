"""Exact search is brute force whatever the block; BM25 is bm25s; fusions by hand."""

import numpy as np
import pytest

from mixtura.multimodal.retrieval import exact_search, index
from mixtura.multimodal.retrieval.index import DenseIndex, Found, LexicalIndex, fuse

EXACT = ("torch", "faiss")


def backend_or_skip(backend):
    if backend != "torch":
        pytest.importorskip("faiss", reason="needs faiss: pip install faiss-cpu")
    return backend


@pytest.fixture(params=EXACT)
def exact(request):
    return backend_or_skip(request.param)


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return rng.normal(size=(1000, 16)).astype(np.float32), rng.normal(size=(300, 16)).astype(np.float32)


def test_it_is_brute_force_and_blocks_change_nothing(vectors, exact):
    x, q = vectors
    order = np.argsort(-(q @ x.T), axis=1)[:, :7]
    whole, blocked = (DenseIndex(x, block=n, backend=exact).search(q, 7) for n in (1000, 37))
    few = DenseIndex(x, backend=exact).search(q[:3], 7)  # faiss takes another way for a few
    assert np.array_equal(few.rows, order[:3])
    assert np.array_equal(whole.rows, order) and np.array_equal(blocked.rows, order)
    np.testing.assert_allclose(whole.scores, np.take_along_axis(q @ x.T, order, 1), rtol=1e-5, atol=1e-5)


def test_vectors_may_lie_on_disk_in_half_precision(vectors, exact, tmp_path):
    x, q = vectors
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    on_disk = DenseIndex(np.load(tmp_path / "x.npy", mmap_mode="r"), block=100, backend=exact)
    assert np.array_equal(
        on_disk.search(q, 5).rows, DenseIndex(x.astype(np.float16).astype(np.float32)).search(q, 5).rows
    )


@pytest.mark.parametrize("order", ["as drawn", "rising", "falling", "alike", "mostly alike"])
@pytest.mark.parametrize("k", [1, 30, 400])
def test_the_floor_drops_nothing_whatever_the_order_of_the_documents(order, k, exact, monkeypatch):
    # Chunks of 5 * 16 * k rows at most, so that there are many of them, the last one broken.
    monkeypatch.setattr(exact_search, "CHUNK", 128)
    rng = np.random.default_rng(1)
    x = rng.integers(-4, 5, size=(3001, 6)).astype(
        np.float32
    )  # whole numbers, so that scores are exact and many are equal
    x[:, 0] = {"as drawn": x[:, 0], "rising": np.arange(3001) // 3, "falling": -np.arange(3001) // 3}.get(order, 1)
    if order.endswith("alike"):
        x[:] = 1
    if order == "mostly alike":
        x[rng.choice(3001, 40, replace=False), 1] = 2
    x[::7] = 0
    q = rng.integers(1, 4, size=(300, 6)).astype(np.float32)
    found = DenseIndex(x, block=160, backend=exact).search(q, k)
    scores = q @ x.T
    scores[:, ::7] = -np.inf
    # Of equal scores either document may come, so it is the scores that must be those of brute force.
    assert np.array_equal(found.scores, -np.sort(-scores, axis=1)[:, :k])
    assert np.array_equal(np.take_along_axis(scores, found.rows, 1), found.scores)
    assert all(len(set(rows)) == k for rows in found.rows.tolist())


def test_auto_takes_faiss_where_it_is_and_cells_beyond_five_million(vectors, monkeypatch, caplog):
    x, _ = vectors
    monkeypatch.setattr(index, "MANY", 999)
    monkeypatch.setattr(index.sys, "platform", "linux")
    monkeypatch.setattr(index, "faiss_installed", lambda: True)
    assert DenseIndex(x[:999]).backend == "faiss" and not caplog.records
    assert DenseIndex(x).backend == "faiss-cells" and "backend='faiss' is exact" in caplog.text
    monkeypatch.setattr(index.sys, "platform", "darwin")
    assert DenseIndex(x).backend == "torch"
    monkeypatch.setattr(index, "faiss_installed", lambda: False)
    monkeypatch.setattr(index.sys, "platform", "linux")
    assert DenseIndex(x).backend == "torch"
    with pytest.raises(ImportError, match="backend='faiss': faiss is not installed: pip install faiss-cpu"):
        DenseIndex(x, backend="faiss")


def test_settings_of_faiss_are_the_callers_again_after_a_search(vectors):
    backend_or_skip("faiss")
    import faiss

    x, q = vectors
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    DenseIndex(x, backend="faiss").search(q, 2)
    assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == before


def test_cells_find_nearly_what_brute_force_finds_with_exact_scores():
    backend_or_skip("faiss-cells")
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(300, 32))
    x = (middles[rng.integers(0, 300, 12_000)] + 0.4 * rng.normal(size=(12_000, 32))).astype(np.float16)
    q = (middles[rng.integers(0, 300, 100)] + 0.4 * rng.normal(size=(100, 32))).astype(np.float32)
    x[::50] = 0
    x, q[3] = x / np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True).clip(1).astype(np.float16), 0
    cells, brute = DenseIndex(x, backend="faiss-cells").search(q, 10), DenseIndex(x, backend="torch").search(q, 10)
    assert (cells.rows[3] == -1).all() and not np.isin(cells.rows, np.arange(0, 12_000, 50)).any()
    asked = np.delete(np.arange(100), 3)
    shared = [len(set(cells.rows[i]) & set(brute.rows[i])) for i in asked]
    assert np.mean(shared) > 9.0, np.mean(shared)
    own = np.einsum("bd,bkd->bk", q, x[cells.rows].astype(np.float32))
    np.testing.assert_allclose(cells.scores[asked], own[asked], rtol=1e-4, atol=1e-5)
    assert (np.diff(cells.scores[asked], axis=1) <= 0).all()
    with pytest.raises(ValueError, match="needs at least 10,000 vectors to learn its codes from, got 9,999"):
        DenseIndex(x[:9_999], backend="faiss-cells").search(q, 1)


def test_empty_documents_are_never_found_and_an_empty_query_finds_nothing(vectors, exact):
    x, q = vectors[0].copy(), vectors[1].copy()
    x[[3, 500]] = 0
    q[0] = 0
    found = DenseIndex(-abs(x), block=300, backend=exact).search(abs(q), 1000)
    assert (found.rows[0] == -1).all() and (found.scores[0] == -np.inf).all()
    assert not np.isin([3, 500], found.rows[1:]).any()
    assert ((found.rows[1:] == -1).sum(1) == 2).all() and (found.scores[1:, -1] == -np.inf).all()
    assert DenseIndex(x[:0], backend=exact).search(q, 3).rows.shape == (300, 0)
    assert DenseIndex(x[:2], backend=exact).search(q, 3).rows.shape == (300, 2)
    assert (DenseIndex(x[3:4], backend=exact).search(q, 3).rows == -1).all()


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
        (lambda x: DenseIndex(x, backend="gpu"), "backend must be auto or one of torch, faiss, faiss-cells, got 'gpu'"),
        (lambda x: DenseIndex(x).search(x[:, :3], 1), r"queries must have shape \(B, 16\), got \(1000, 3\)"),
        (lambda x: DenseIndex(x).search(x, 0), "k must be at least 1, got 0"),
        (lambda x: fuse([]), "runs must be at least one"),
        (lambda x: fuse([DenseIndex(x).search(x[:2], 1)], [1.0, 2.0]), "one number a run"),
    ],
)
def test_what_does_not_fit_is_named(vectors, call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors[0])
