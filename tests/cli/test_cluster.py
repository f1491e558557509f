"""``mixtura cluster``: from a table to a labelled table, a summary and a picture; errors of one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_cli import here  # noqa: F401 (a fixture)

from mixtura.cli.added_columns import check_places
from mixtura.density import AdjustedSDPClustering, GaussianMixture


@pytest.fixture
def table(tmp_path):
    """Three clouds of two numeric columns in different units, a name and a class that some rows have."""
    rng = np.random.default_rng(0)
    cloud = rng.integers(3, size=240)
    centre = np.array([[0.0, 0.0], [8.0, 4000.0], [0.0, 8000.0]])[cloud]
    frame = pd.DataFrame(centre + rng.normal(size=(240, 2)) * [1.0, 500.0], columns=["length", "mass"])
    frame["name"] = [f"row {i}" for i in range(240)]
    frame["kind"] = np.where(rng.random(240) < 0.1, np.array(["ant", "bee", "cow"])[cloud], "")
    frame["truth"] = np.array(["ant", "bee", "cow"])[cloud]
    frame.to_csv(tmp_path / "t.csv", index=False)
    return frame


def test_a_table_becomes_a_labelled_table_a_summary_and_a_picture(here, table, tmp_path):  # noqa: F811
    done = here(
        "cluster", "t.csv", "--ignore", "name", "--ignore", "kind", "--ignore", "truth", "--plot", "t.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "240 rows of 2 numeric columns" in done.stdout
    assert "t-clusters.csv and t.png are written" in done.stdout
    found = pd.read_csv(tmp_path / "t-clusters.csv")
    assert found.columns.tolist() == [*table.columns, "cluster", "probability", "p(1)", "p(2)", "p(3)"]
    assert found.groupby("truth")["cluster"].nunique().tolist() == [1, 1, 1] and found["cluster"].nunique() == 3
    np.testing.assert_allclose(found.filter(like="p(").sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(found["probability"], found.filter(like="p(").max(axis=1))
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_labels_name_the_clusters_and_hold(here, table, tmp_path):  # noqa: F811
    done = here(
        "cluster", "t.csv", "--labels", "kind", "--ignore", "name", "--ignore", "truth", "--components", 3,
        "--out", "o.parquet", "--save", "kept", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "labelled with 3 classes" in done.stdout and "bee" in done.stdout
    found = pd.read_parquet(tmp_path / "o.parquet")
    assert (found["cluster"] == table["truth"]).mean() > 0.98
    some = table["kind"] != ""
    assert (found["cluster"][some] == table["kind"][some]).all()
    kept = GaussianMixture.load(tmp_path / "kept")
    assert kept.n_components == 3 and kept.feature_names_in_.tolist() == ["length", "mass"]
    assert kept.predict(table[["length", "mass"]]).shape == (240,)


def test_known_classes_leave_room_for_new_ones(here, table, tmp_path):  # noqa: F811
    table["kind"] = table["kind"].where(table["kind"] != "cow", "")
    table.drop(columns=["name", "truth"]).to_csv(tmp_path / "two.csv", index=False)
    done = here("cluster", "two.csv", "--labels", "kind", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "two-clusters.csv")
    assert sorted(found["cluster"].unique()) == ["3", "ant", "bee"]
    assert (found["cluster"][table["truth"] == "cow"] == "3").mean() > 0.98


def test_whole_numbers_as_labels_and_gaps_and_one_column(here, table, tmp_path):  # noqa: F811
    table["class"] = np.where(table["kind"] == "", -1, table["truth"].map({"ant": 7, "bee": 8, "cow": 9}))
    table.loc[::9, "length"] = np.nan
    table[["length", "mass", "class"]].to_csv(tmp_path / "n.csv", index=False)
    done = here(
        "cluster", "n.csv", "--labels", "class", "--missing", "--components", 3, "--plot", "n.svg", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert set(pd.read_csv(tmp_path / "n-clusters.csv")["cluster"]) == {7, 8, 9}
    assert "<svg" in (tmp_path / "n.svg").read_text()
    done = here("cluster", "n.csv", "--ignore", "length", "--ignore", "class", "--plot", "one.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_same_seed_gives_the_same_table(here, table, tmp_path):  # noqa: F811
    rest = ("--ignore", "name", "--ignore", "kind", "--ignore", "truth", "--components", 4, "--seed", 3)
    for name in ("a.csv", "b.csv"):
        assert here("cluster", "t.csv", *rest, "--out", name, cwd=tmp_path).returncode == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_a_dry_run_writes_nothing(here, table, tmp_path):  # noqa: F811
    before = sorted(tmp_path.iterdir())
    done = here(
        "cluster", "t.csv", "--labels", "truth", "--ignore", "name", "--ignore", "kind", "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "trying 3 to 12 clusters by bic" in done.stdout and "would write t-clusters.csv" in done.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_the_semidefinite_program_writes_the_same_table_with_a_certificate(here, table, tmp_path):  # noqa: F811
    table.drop(columns=["name", "kind"]).iloc[:90].to_csv(tmp_path / "few.csv", index=False)
    done = here(
        "cluster", "few.csv", "--method", "adjusted-sdp", "--components", 3, "--ignore", "truth",
        "--plot", "few.png", "--save", "kept", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "certificate: the program's optimum is at most 0." in " ".join(done.stdout.split())
    found = pd.read_csv(tmp_path / "few-clusters.csv")
    assert found.columns.tolist() == ["length", "mass", "truth", "cluster", "probability", "p(1)", "p(2)", "p(3)"]
    assert found.groupby("truth")["cluster"].nunique().tolist() == [1, 1, 1] and found["cluster"].nunique() == 3
    assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")
    assert AdjustedSDPClustering.load(tmp_path / "kept").n_clusters == 3


def test_help_teaches_with_examples_and_is_quick(here, tmp_path):  # noqa: F811
    assert "mixtura cluster flowers.csv" in here("cluster", "--help", cwd=tmp_path).stdout
    code = "import sys; import mixtura.cli.app; print({'torch', 'pandas', 'sklearn'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "none.csv does not exist"),
        (["t.csv"], "column 'name' is no column of numbers: row 0 (counted from 0) holds 'row 0'"),
        (["t.csv", "--ignore", "nam"], "the table has no column 'nam'; close are 'name'"),
        (["t.csv", "--labels", "knd"], "the table has no column 'knd'; close are 'kind'"),
        (["t.csv", "--components", "few"], "--components must be auto or a number >= 1, got 'few'"),
        (["t.csv", "--components", "0"], "--components must be auto or a number >= 1, got '0'"),
        (["t.csv", "--max", "0"], "--max must be >= 1, got 0"),
        (["t.csv", "--out", "t.csv"], "is also the table that is read"),
        (["t.csv", "--out", "t.xlsx"], "--out must end in .csv, .tsv or .parquet"),
        (["t.csv", "--plot", "t.gif"], "--plot must end in .png, .svg or .pdf"),
        (["t.csv", "--out", "gap.csv/o.csv"], "gap.csv is a file, not a directory"),
        (["t.csv", "--out", "kept.csv"], "--out kept.csv is a directory; name a file"),
        (["t.csv", "--save", "kept.csv"], "kept.csv is a directory with other files in it (notes.txt)"),
        (["t.csv", "--save", "gap.csv"], "gap.csv exists and is not a directory"),
        (["t.csv", "--save", "t-clusters.csv"], "--save t-clusters.csv is also a table"),
        (["t.csv", "--save", "t.csv"], "--save t.csv is also a table"),
        (["wide.csv", "--components", "2"], "column 'b' has values from -1e+200 to 1e+200"),
        (["void.csv", "--missing", "--components", "2"], "column 'b' holds no value at all"),
        (["cut.csv"], "ends in the middle of a line"),
        (["gap.csv"], "1 missing (NaN) values, the first in row 1, column 'b'"),
        (["gap.csv"], "--missing takes empty fields as missing values"),
        (["full.csv", "--labels", "a"], "--labels a must hold classes, names or whole numbers, got 1.5"),
        (["full.csv", "--components", "9"], "n_components=9 needs as many samples"),
        (["full.csv", "--device", "warp"], "device must be 'auto', 'cpu', 'cuda' or the like, got 'warp'"),
        (["full.csv", "--method", "adjusted-sdp"], "--method adjusted-sdp needs --components K"),
        (
            ["full.csv", "--method", "adjusted-sdp", "--components", "2", "--labels", "c"],
            "--labels has no effect with --method adjusted-sdp",
        ),
        (["full.csv", "--method", "adjusted-sdp", "--components", "9"], "n_clusters=9 needs as many samples"),
        (["full.csv", "--components", "1", "--labels", "c"], "y has 2 classes and there are n_components=1"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(arguments, message, here, table, tmp_path):  # noqa: F811
    (tmp_path / "cut.csv").write_text("a,b\n1,2\n3")
    (tmp_path / "gap.csv").write_text("a,b\n1,2\n3,\n4,5\n")
    (tmp_path / "full.csv").write_text("a,b,c\n1.5,2,0\n3,4,1\n4,5,0\n")
    (tmp_path / "wide.csv").write_text("a,b\n1,1e200\n3,-1e200\n4,5\n")
    (tmp_path / "void.csv").write_text("a,b\n1,\n3,\n4,\n")
    (tmp_path / "kept.csv").mkdir()
    (tmp_path / "kept.csv" / "notes.txt").write_text("of a person")
    before = {path: path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file()}
    done = here("cluster", *arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert message in " ".join(done.stderr.split())
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file()} == before


def test_a_place_that_may_not_be_written_to_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(ValueError, match=f"--plot .* cannot be written: {tmp_path} may not be written to"):
        check_places(tmp_path / "t.csv", Path("o.csv"), tmp_path / "new" / "p.png")
