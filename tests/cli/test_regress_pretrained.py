"""``mixtura regress --method pretraining-advantage``: few targets, many rows, a report, errors of one line."""

import numpy as np
import pandas as pd
import pytest
from test_cli import here  # noqa: F401 (a fixture)

NAMES = [f"x{i}" for i in range(30)]


@pytest.fixture
def tables(tmp_path):
    """Thirty columns of three factors in odd units; 24 rows with a target, two without, 500 in another file."""
    rng = np.random.default_rng(0)
    B, units = rng.normal(size=(3, 30)), 10.0 ** rng.integers(-2, 3, size=30)
    z = rng.normal(size=(526, 3))
    X = (z @ B + rng.normal(size=(526, 30))) * units
    few = pd.DataFrame(X[:26], columns=NAMES).assign(y=z[:26] @ [2.0, -1.0, 1.0] + 0.2 * rng.normal(size=26))
    few.loc[:1, "y"] = np.nan
    few.to_csv(tmp_path / "few.csv", index=False)
    pd.DataFrame(X[26:], columns=NAMES)[NAMES[::-1]].assign(note="free").to_csv(tmp_path / "many.csv", index=False)
    return few


def options(*more: object) -> tuple:
    return ("regress", "few.csv", "--target", "y", "--method", "pretraining-advantage", *more)


def test_factors_of_many_rows_beat_ridge_and_the_report_says_so(here, tables, tmp_path):  # noqa: F811
    done = here(*options("--unlabeled", "many.csv", "--plot", "y.png"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = pd.read_csv(tmp_path / "few-predicted.csv")
    pd.testing.assert_frame_equal(written[tables.columns.tolist()], tables)
    assert ((written["low"] < written["predicted"]) & (written["predicted"] < written["high"])).all()
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert float(rows["factors"][2]) < float(rows["ridge"][2])
    assert "-> pretrained" in done.stdout and "24 labelled and 502 unlabelled rows" in done.stdout
    assert (tmp_path / "y.png").stat().st_size > 10_000


def test_a_dry_run_says_what_it_would_do(here, tables, tmp_path):  # noqa: F811
    done = here(*options("--dry-run"), cwd=tmp_path)
    assert "factors of 2 rows without y, and ridge" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--unlabeled", "other.csv"], "other.csv lacks the column 'x0'"),
        (["--unlabeled", "none.csv"], "none.csv does not exist"),
        (["--unlabeled", "many.csv", "--factors", 30], "n_factors must be below the n_features = 30 of X, got 30"),
        (["--unlabeled", "many.csv", "--factors", 0], "--factors must be >= 1, got 0"),
        (["--gate", "topk"], "--gate is for --method gated, not for pretraining-advantage"),
    ],
)
def test_bad_input_is_one_clear_line(more, message, here, tables, tmp_path):  # noqa: F811
    (tmp_path / "other.csv").write_text("a,b\n1,2\n3,4\n")
    done = here(*options(*more), cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_table_without_gaps_asks_for_rows(here, tables, tmp_path):  # noqa: F811
    tables.dropna().to_csv(tmp_path / "few.csv", index=False)
    done = here(*options(), cwd=tmp_path)
    assert done.returncode == 1 and "give more rows with --unlabeled FILE" in done.stderr
