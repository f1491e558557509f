"""``mixtura regress``: from a table to held-out predictions with a band, a summary and a picture; errors of one line."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from test_cli import here  # noqa: F401 (a fixture)


@pytest.fixture
def table(tmp_path):
    """Two features in different units, a name, and a target that four rows lack."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(24, 2)) * [1.0, 1000.0], columns=["length", "mass"])
    frame["name"] = [f"n{i}" for i in range(24)]
    frame["price"] = 5 + 2 * frame["length"] - frame["mass"] / 500 + 0.1 * rng.normal(size=24)
    frame.loc[:3, "price"] = np.nan
    frame.to_csv(tmp_path / "goods.csv", index=False)
    return frame


def options(*more: object) -> tuple:
    return ("regress", "goods.csv", "--target", "price", "--ignore", "name", "--folds", 3, "--starts", 1, *more)


def test_every_row_gets_a_prediction_with_its_band_and_held_out_ones_are_near(here, table, tmp_path):  # noqa: F811
    done = here(*options("--plot", "goods.png"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = pd.read_csv(tmp_path / "goods-predicted.csv")
    pd.testing.assert_frame_equal(written[table.columns.tolist()], table)
    assert written[["predicted", "low", "high"]].notna().all().all()
    assert ((written["low"] < written["predicted"]) & (written["predicted"] < written["high"])).all()
    error = (written["predicted"] - table["price"]).std()
    assert error < 0.5 * table["price"].std()
    assert (
        "4 of them without price" in done.stdout and "scale-mixture" in done.stdout and "plain process" in done.stdout
    )
    assert (tmp_path / "goods.png").stat().st_size > 5000


def test_a_rows_own_target_has_no_part_in_its_prediction(here, table, tmp_path):  # noqa: F811
    here(*options(), cwd=tmp_path)
    before = pd.read_csv(tmp_path / "goods-predicted.csv")
    table.loc[10, "price"] += 50.0
    table.to_csv(tmp_path / "goods.csv", index=False)
    here(*options(), cwd=tmp_path)
    after = pd.read_csv(tmp_path / "goods-predicted.csv")
    assert after.loc[10, "predicted"] == before.loc[10, "predicted"]
    assert (after["predicted"] != before["predicted"]).any()


def test_one_feature_is_drawn_as_a_band_over_it(here, table, tmp_path):  # noqa: F811
    table[["length", "price"]].to_csv(tmp_path / "goods.csv", index=False)
    done = here("regress", "goods.csv", "--target", "price", "--starts", 1, "--plot", "p.svg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.svg").read_text().count("<path") > 5


@pytest.mark.parametrize("prior", ["burr", "fixed"])
def test_other_priors_and_formats_work(here, table, tmp_path, prior):  # noqa: F811
    done = here(*options("--prior", prior, "--kernel", "erf", "--depth", 1, "--out", "o.parquet"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(tmp_path / "o.parquet")) == 24


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(here, table, tmp_path):  # noqa: F811
    done = here(*options("--dry-run"), cwd=tmp_path)
    assert "24 rows of 2 numeric columns" in done.stdout and "would write goods-predicted.csv" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["goods.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["regress", "nothing.csv", "--target", "price"], "nothing.csv does not exist"),
        (["regress", "goods.csv", "--target", "prise"], "no column 'prise'; close are 'price'"),
        (["regress", "goods.csv", "--target", "price"], "--ignore COLUMN"),
        (["regress", "goods.csv", "--target", "name"], "column 'name' is no column of numbers"),
        (["regress", "goods.csv", "--target", "price", "--ignore", "price"], "is also the target"),
        ([*options("--folds", 1)], "--folds must be >= 2"),
        ([*options("--band", 1.5)], "--band is a share"),
        ([*options("--depth", 0)], "--depth must be >= 1"),
        ([*options("--out", "goods.csv")], "is also the table that is read"),
        ([*options("--out", "goods.txt")], "--out must end in"),
        ([*options("--plot", "goods.bmp")], "--plot must end in"),
        ([*options("--device", "warp")], "device must be"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(arguments, message, here, table, tmp_path):  # noqa: F811
    done = here(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr and "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["goods.csv"]


def test_too_few_targets_are_named(here, table, tmp_path):  # noqa: F811
    table.loc[3:, "price"] = np.nan
    table.to_csv(tmp_path / "goods.csv", index=False)
    assert "cross-validation needs at least 4" in here(*options(), cwd=tmp_path).stderr


def test_help_teaches_with_examples(here, tmp_path):  # noqa: F811
    assert "mixtura regress cars.csv --target mpg" in here("regress", "--help", cwd=tmp_path).stdout


def test_nothing_heavy_is_imported_for_it():
    code = "import sys, mixtura.cli.regress; print([m for m in ('torch', 'pandas', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
