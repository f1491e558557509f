"""``mixtura discover``: from partly labelled rows to the classes of all rows; errors of one line."""

import numpy as np
import pandas as pd
import pytest
from test_cli import here  # noqa: F401 (a fixture)

from mixtura.density import CategoryDiscovery

KINDS = np.array(["ant", "bee", "cow", "dog"])


@pytest.fixture
def table(tmp_path):
    """Four clouds of two columns in different units; half of the rows of two of them have their class."""
    rng = np.random.default_rng(0)
    cloud = rng.integers(4, size=320)
    centre = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9000.0], [9.0, 9000.0]])[cloud]
    frame = pd.DataFrame(centre + rng.normal(size=(320, 2)) * [1.0, 1000.0], columns=["length", "mass"])
    frame["kind"] = np.where((rng.random(320) < 0.5) & (cloud < 2), KINDS[cloud], "")
    frame.to_csv(tmp_path / "t.csv", index=False)
    return frame.assign(truth=KINDS[cloud])


def test_a_table_gets_the_class_of_every_row_a_summary_and_a_picture(here, table, tmp_path):  # noqa: F811
    done = here("discover", "t.csv", "--labels", "kind", "--plot", "t.png", "--save", "kept", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "320 rows of 2 columns" in done.stdout and "labelled with 2 classes" in done.stdout
    assert "4 classes, 2 of them new" in done.stdout
    assert "t-classes.csv and t.png and kept are written" in done.stdout
    found = pd.read_csv(tmp_path / "t-classes.csv")
    assert found.columns.tolist() == ["length", "mass", "kind", "class", "probability"]
    told = table["kind"] != ""
    assert (found["class"][told] == table["kind"][told]).all()
    assert set(found["class"]) == {"ant", "bee", "new 1", "new 2"}
    assert found.groupby("class")["class"].size().min() > 50
    assert pd.crosstab(found["class"], table["truth"]).max(axis=1).sum() > 315
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    kept = CategoryDiscovery.load(tmp_path / "kept")
    assert kept.n_novel_ == 2
    # The saved model takes the table's own units, though it was fitted to columns of variance 1.
    names = np.array(["ant", "bee", "new 1", "new 2"])[
        np.searchsorted(kept.classes_, kept.predict(table[["length", "mass"]].to_numpy()))
    ]
    assert (names[~told] == found["class"][~told]).all()
    assert np.ptp(kept.prototypes_[:, 1]) > 8000


def test_embeddings_come_from_npz_and_npy_and_give_the_same_classes(here, table, tmp_path):  # noqa: F811
    X, kind = table[["length", "mass"]].to_numpy() / [1.0, 1000.0], table["kind"].to_numpy(dtype=str)
    np.savez(tmp_path / "e.npz", z=X, kind=kind)
    np.save(tmp_path / "e.npy", X.astype(np.float32))
    np.save(tmp_path / "k.npy", kind)
    one = here("discover", "e.npz", "--labels", "kind", "--out", "one.csv", cwd=tmp_path)
    two = here("discover", "e.npy", "--labels", "k.npy", "--out", "two.csv", cwd=tmp_path)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    first, second = pd.read_csv(tmp_path / "one.csv"), pd.read_csv(tmp_path / "two.csv")
    assert first.columns.tolist() == ["row", "label", "class", "probability"]
    assert (first["class"] == second["class"]).mean() > 0.99 and first["class"].nunique() == 4


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(here, table, tmp_path):  # noqa: F811
    done = here("discover", "t.csv", "--labels", "kind", "--dry-run", "--plot", "t.png", cwd=tmp_path)
    assert done.returncode == 0 and "would write t-classes.csv and t.png" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t.csv", "--labels", "sort"], "has no column 'sort'"),
        (["gone.csv", "--labels", "kind"], "gone.csv does not exist"),
        (["t.csv", "--labels", "kind", "--start", "many"], "--start must be auto or a number >= 0, got 'many'"),
        (["t.csv", "--labels", "kind", "--max", "-1"], "--max must be >= 0, got -1"),
        (["t.csv", "--labels", "kind", "--out", "t.csv"], "t.csv is also the table that is read"),
        (["t.csv", "--labels", "kind", "--plot", "t.gif"], "--plot must end in .png, .svg or .pdf"),
        (["e.npz", "--labels", "y"], "e.npz has no array 'y'; it has 'a', 'b', 'kind'"),
        (["e.npz", "--labels", "kind"], "must hold one matrix beside 'kind', got 2: a, b"),
        (["e.npy", "--labels", "short.npy"], "must have shape (5,), one a row, got (3,)"),
        (["o.npy", "--labels", "short.npy"], "o.npy is no NumPy file of plain arrays"),
        (["e.npy", "--labels", "short.npy", "--ignore", "x"], "--ignore names columns"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(here, table, tmp_path, arguments, message):  # noqa: F811
    np.savez(tmp_path / "e.npz", a=np.zeros((5, 2)), b=np.zeros((5, 2)), kind=np.zeros(5))
    np.save(tmp_path / "e.npy", np.zeros((5, 2)))
    np.save(tmp_path / "short.npy", np.zeros(3))
    np.save(tmp_path / "o.npy", np.array([{}, {}]), allow_pickle=True)
    done = here("discover", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
