"""``mixtura regress --gate``: lines and a gate from a table, a picture of both, errors of one line."""

import numpy as np
import pandas as pd
import pytest
from test_cli import here  # noqa: F401 (a fixture)


@pytest.fixture
def table(tmp_path):
    """A price that rises by the length up to 2 and falls beyond, with a second feature, a name and three gaps."""
    rng = np.random.default_rng(0)
    length, mass = rng.uniform(0, 4, 90), 1000 * rng.normal(size=90)
    price = np.where(length < 2, 3 * length, 20 - 4 * length) + mass / 2000 + 0.2 * rng.normal(size=90)
    price[:3] = np.nan
    frame = pd.DataFrame({"length": length, "mass": mass, "name": [f"n{i}" for i in range(90)], "price": price})
    frame.to_csv(tmp_path / "goods.csv", index=False)
    return frame


def options(*more: object) -> tuple:
    return ("regress", "goods.csv", "--target", "price", "--ignore", "name", "--folds", 3, *more)


def test_two_lines_are_found_held_out_better_than_one_named_and_drawn(here, table, tmp_path):  # noqa: F811
    done = here(*options("--gate", "topk", "--experts", 2, "--plot", "goods.png"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = pd.read_csv(tmp_path / "goods-predicted.csv")
    pd.testing.assert_frame_equal(written[table.columns.tolist()], table)
    assert ((written["low"] < written["predicted"]) & (written["predicted"] < written["high"])).all()
    assert set(written["expert"]) == {1, 2} and (written["expert_weight"] == 1).all()
    short = written["length"] < 1.9
    assert written.loc[short, "expert"].nunique() == 1
    assert (written["predicted"] - table["price"]).std() < 0.3 * table["price"].std()
    rows = {line.split("  ")[0].strip(): line.split() for line in done.stdout.splitlines()}
    assert float(rows["topk gate"][2]) < float(rows["one line"][2]) - 0.5  # nats a target
    assert "3 of them without price" in done.stdout and "in charge of" in done.stdout
    assert (tmp_path / "goods.png").stat().st_size > 10_000


@pytest.mark.parametrize("gate", ["softmax", "temperature", "activation"])
def test_one_feature_is_drawn_as_lines_over_their_gate(gate, here, table, tmp_path):  # noqa: F811
    table[["length", "price"]].to_csv(tmp_path / "goods.csv", index=False)
    arguments = ("--gate", gate, "--experts", 2, "--folds", 2, "--plot", "p.svg", "--out", "o.parquet")
    done = here("regress", "goods.csv", "--target", "price", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.svg").read_text().count("<path") > 10
    assert len(pd.read_parquet(tmp_path / "o.parquet")) == 90


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(here, table, tmp_path):  # noqa: F811
    done = here(*options("--gate", "activation", "--dry-run"), cwd=tmp_path)
    assert "3 lines, activation gate, and one line" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["goods.csv"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gate", "topk", "--active", 4], "--active must be between 1 and the 3 experts, got 4"),
        (["--gate", "softmax", "--active", 1], "--active is for --gate topk"),
        (["--gate", "topk", "--activation", "tanh"], "--activation is for --gate activation"),
        (["--gate", "activation", "--activation", "swish"], "activation must be one of"),
        (["--gate", "softmax", "--experts", 1], "--experts must be >= 2"),
        (["--gate", "softmax", "--experts", 40], "fewer than the"),
        (["--gate", "softmax", "--kernel", "erf"], "--kernel is for --method scale-mixture, not for gated"),
        (["--experts", 2], "--experts is for --method gated, not for scale-mixture; choose one with --gate"),
        (["--method", "scale-mixture", "--gate", "topk"], "--gate is for --method gated"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(more, message, here, table, tmp_path):  # noqa: F811
    done = here(*options(*more), cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr and "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["goods.csv"]


def test_help_teaches_the_gates(here, tmp_path):  # noqa: F811
    assert "--gate topk --experts 2" in here("regress", "--help", cwd=tmp_path).stdout
