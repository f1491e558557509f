"""Samples from anywhere: the same model from an array, a memory map, batches and Parquet, in bounded memory."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from test_mixture import blobs

from mixtura.density import GaussianMixture
from mixtura.density.sources import Arrays, Batches, merge, scan, summarise

NAMES = ("a", "b", "c")


def fit(X, **more):
    return GaussianMixture(3, random_state=0, **more).fit(X)


class Loader:
    """Batches that can be read again, of uneven sizes, one of them empty."""

    def __init__(self, X, wrap=np.asarray):
        self.X, self.wrap = X, wrap

    def __iter__(self):
        for rows in np.split(np.arange(len(self.X)), [1, 100, 100, 555]):
            yield self.wrap(self.X[rows])


@pytest.fixture
def kinds(tmp_path):
    """The same samples in every form: name -> X."""
    X, _ = blobs(900)
    np.save(tmp_path / "x.npy", X)
    folder = tmp_path / "folder"
    folder.mkdir()
    table = pd.DataFrame(X, columns=list(NAMES))
    for i, rows in enumerate(np.array_split(np.arange(900), 3)):
        table.iloc[rows].to_parquet(folder / f"part-{i}.parquet", row_group_size=100)
    return {
        "array": X,
        "table": table,
        "memory map": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "column order": np.asfortranarray(X),
        "list of batches": list(Loader(X)),
        "loader": Loader(X),
        "loader of tensors": Loader(X, torch.from_numpy),
        "loader of tables": Loader(X, lambda x: pd.DataFrame(x)),
        "folder": folder,
        "path": str(folder),
    }


@pytest.mark.filterwarnings("ignore:X has feature names")
@pytest.mark.parametrize(
    "kind",
    [
        "table",
        "memory map",
        "column order",
        "list of batches",
        "loader",
        "loader of tensors",
        "loader of tables",
        "folder",
        "path",
    ],
)
def test_every_form_of_the_samples_gives_the_same_model(kind, kinds):
    X = kinds["array"]
    want, got = fit(X), fit(kinds[kind])
    # The bar is 1e-6 a sample; what differs is the order of float64 sums.
    assert got.lower_bound_ == pytest.approx(want.lower_bound_, abs=1e-10)
    np.testing.assert_allclose(got.means_, want.means_, rtol=1e-8)
    np.testing.assert_array_equal(got.labels_, want.labels_)
    np.testing.assert_allclose(want.score_samples(kinds[kind]), want.score_samples(X), rtol=1e-10)
    np.testing.assert_array_equal(got.predict(kinds[kind]), want.predict(X))


def test_columns_of_a_parquet_folder_name_the_features(kinds):
    assert fit(kinds["folder"]).feature_names_in_.tolist() == list(NAMES)
    assert fit(kinds["table"]).feature_names_in_.tolist() == list(NAMES)


def test_labels_and_weights_go_with_batches():
    X, cloud = blobs(900)
    y = np.where(np.arange(900) % 10 == 0, cloud, -1)
    w = np.random.default_rng(0).uniform(0, 2, size=900)
    want = GaussianMixture(3, random_state=0).fit(X, y, sample_weight=w)
    got = GaussianMixture(3, random_state=0).fit(Loader(X), y, sample_weight=w)
    np.testing.assert_allclose(got.means_, want.means_, rtol=1e-8)
    assert (got.labels_[y >= 0] == y[y >= 0]).all()


def test_whole_numbers_and_float32_are_read_as_they_are():
    X = np.random.default_rng(0).integers(0, 100, size=(300, 3))
    want = fit(X.astype(float))
    np.testing.assert_allclose(fit(X).means_, want.means_, rtol=1e-8)
    np.testing.assert_allclose(fit(X.astype(np.uint8)).means_, want.means_, rtol=1e-8)
    assert fit(X.astype(np.float32)).lower_bound_ == pytest.approx(want.lower_bound_, abs=1e-4)


def test_memory_does_not_grow_with_the_samples(tmp_path):
    # 48 MB of samples come by; a fit may hold 25 MB beside the interpreter and its first, small fit.
    code = """
import sys, numpy as np, torch
from mixtura.core.measure import Meter, resident_memory
from mixtura.density import GaussianMixture
import sklearn.utils.validation
torch.set_num_threads(1)
class Made:
    def __init__(self, n): self.n = n
    def __iter__(self):
        for i in range(self.n):
            rng = np.random.default_rng(i)
            yield rng.normal(size=(3000, 40)) + 8 * rng.integers(2, size=(3000, 1))
GaussianMixture(2, covariance="tied", max_iter=1, random_state=0).fit(Made(2))
before = resident_memory()
with Meter() as meter:
    GaussianMixture(2, covariance="tied", max_iter=1, random_state=0).fit(Made(50))
print(meter.peak_bytes - before)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 25e6, done.stdout


def test_a_generator_is_refused_with_what_would_do():
    X, _ = blobs(90)
    with pytest.raises(ValueError, match=r"generator or iterator, which can be read once.*partial_fit"):
        fit(batch for batch in (X, X))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([np.zeros((3, 2)), np.zeros((3, 3))], "batch 1 has 3 features, those before have 2"),
        ([np.array([["a", "b"]])], "batch 0 must hold numbers, got <U1"),
        ([np.zeros((0, 2)), np.zeros((0, 2))], "every batch is empty"),
        ([np.eye(3), np.array([[1.0, np.nan, 2.0]])], "X contains 1 NaN values, the first in row 3, column 1"),
    ],
)
def test_bad_batches_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        fit(batches)


def test_a_batch_of_another_rank_is_named():
    class Flat:
        def __iter__(self):
            return iter([np.zeros(3)])

    with pytest.raises(ValueError, match=r"batch 0 must have shape \(samples, features\), got \(3,\)"):
        fit(Flat())


def test_samples_that_change_between_readings_are_noticed():
    class Shrinking:
        def __init__(self):
            self.n = 130

        def __iter__(self):
            self.n -= 10
            yield np.random.default_rng(0).normal(size=(self.n, 2))

    with pytest.raises(ValueError, match=r"X gave \d+ samples in this step and \d+ in the first reading"):
        GaussianMixture(2, random_state=0, max_iter=3).fit(Shrinking())


def test_parquet_that_is_none_or_holds_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fit(tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder without Parquet files"):
        fit(tmp_path / "empty")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match="no whole Parquet file"):
        fit(tmp_path / "cut.parquet")
    pd.DataFrame({"x": [1.0], "kind": ["a"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"column 'kind' of .* holds (large_)?string, not numbers"):
        fit(tmp_path / "text.parquet")
    pd.DataFrame({"x": [1.0, None, 3.0], "y": [1, 2, 3]}).to_parquet(tmp_path / "gap.parquet")
    with pytest.raises(ValueError, match="X contains 1 NaN values, the first in row 1, column 'x'"):
        fit(tmp_path / "gap.parquet")


def test_summaries_merge_to_the_whole_and_constants_stay_exact():
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.normal(size=60) + 1e4, np.full(60, 0.1), rng.normal(size=60)])
    w = rng.uniform(0, 2, size=60)
    X[5:9, 2] = np.nan
    whole = summarise(X, w)
    parts = merge(merge(summarise(X[:7], w[:7]), summarise(X[7:30], w[7:30])), summarise(X[30:], w[30:]))
    for name in ("mean", "scatter", "seen", "low", "high", "variance"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-30, err_msg=name)
    assert parts.variance[1] == 0.0
    seen = ~np.isnan(X[:, 2])
    assert parts.mean[2] == pytest.approx(np.average(X[seen, 2], weights=w[seen]))


def test_a_source_of_nothing_has_no_summary():
    assert scan(Batches([np.zeros((0, 2))]), None) is None
    assert scan(Arrays(np.zeros((0, 2))), None) is None


def test_the_index_that_pandas_writes_into_parquet_is_no_feature(tmp_path):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 2)), columns=["x", "y"])
    kept = table[table["x"] > -1]  # its index is no longer 0, 1, 2, so pandas writes it as a column
    kept.to_parquet(tmp_path / "kept.parquet")
    model = fit(tmp_path / "kept.parquet")
    assert model.feature_names_in_.tolist() == ["x", "y"]
    np.testing.assert_allclose(model.means_, fit(kept).means_, rtol=1e-12)
    table.set_index("y").to_parquet(tmp_path / "named.parquet")
    assert fit(tmp_path / "named.parquet").feature_names_in_.tolist() == ["x"]


def test_parquet_columns_in_another_order_than_in_the_fit_are_refused(tmp_path):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 2)) * [1, 9], columns=["x", "y"])
    table[["y", "x"]].to_parquet(tmp_path / "turned.parquet")
    with pytest.raises(
        ValueError, match=r"should match those that were passed during fit: X has the columns \['y', 'x'\]"
    ):
        fit(table).predict(tmp_path / "turned.parquet")
    table.to_parquet(tmp_path / "same.parquet")
    np.testing.assert_array_equal(fit(table).predict(tmp_path / "same.parquet"), fit(table).predict(table))
