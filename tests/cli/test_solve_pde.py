"""``mixtura solve-pde``: from a problem file or an example to a table and a picture; errors of one line."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from test_cli import here  # noqa: F401 (a fixture)

WAVE = """
title = "a wave"
axis = [{ name = "x", from = 0, to = 1, points = 40 }]
term = [{ derivative = { x = 2 } }]
equation = { source = "-400*sin(20*x)" }
boundary = { all = "sin(20*x)" }
solver = { n_steps = 2, n_components = 8, max_frequency = 6 }
"""


@pytest.fixture
def wave(tmp_path):
    (tmp_path / "wave.toml").write_text(WAVE)


def test_a_file_becomes_a_table_near_the_solution_and_a_picture(here, wave, tmp_path):  # noqa: F811
    done = here("solve-pde", "wave.toml", "--plot", "wave.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = pd.read_csv(tmp_path / "wave-solved.csv")
    assert list(written.columns) == ["x", "u", "residual"] and len(written) == 40
    np.testing.assert_allclose(written["u"], np.sin(20 * written["x"]), atol=2e-2)
    assert "a wave, linear, 40 points over x; gaussian and student, 2 steps" in done.stdout
    assert "(kept)" in done.stdout and "cycles per unit of length: 3." in done.stdout
    assert (tmp_path / "wave.png").stat().st_size > 5000


def test_an_example_in_two_dimensions_knows_its_error(here, tmp_path):  # noqa: F811
    arguments = ("--example", "t1", "--points", 16, "--steps", 1, "--components", 4, "--kind", "gaussian")
    done = here("solve-pde", *arguments, "--out", "t.parquet", "--plot", "t.svg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = pd.read_parquet(tmp_path / "t.parquet")
    assert list(written.columns) == ["x", "t", "u", "residual", "truth"] and len(written) == 256
    np.testing.assert_allclose(written["truth"], np.sin(written["x"] - 200 * written["t"]), atol=1e-12)
    assert "note: " in done.stdout and "16 points resolve" in done.stdout
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")


def test_an_example_that_is_shown_is_a_problem_file(here, tmp_path):  # noqa: F811
    shown = here("solve-pde", "--example", "P1", "--points", 60, "--show", cwd=tmp_path).stdout
    (tmp_path / "mine.toml").write_text(shown)
    done = here("solve-pde", "mine.toml", "--dry-run", cwd=tmp_path)
    assert "mine: 1-D Poisson, one fast wave, linear, 60 points over x" in done.stdout
    assert "would write mine-solved.csv" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["mine.toml"]


def test_the_kind_of_the_file_holds_unless_another_is_asked_for(here, tmp_path):  # noqa: F811
    (tmp_path / "wave.toml").write_text(WAVE.replace("{ n_steps", '{ kind = "student", n_steps'))
    say = lambda *more: here("solve-pde", "wave.toml", "--dry-run", *more, cwd=tmp_path).stdout  # noqa: E731
    assert "; student, 2 steps" in say()
    assert "; gaussian, 9 steps" in say("--kind", "gaussian", "--steps", 9)
    assert "; gaussian and student, 2 steps" in say("--kind", "auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a problem file or --example"),
        (["wave.toml", "--example", "P1"], "give a problem file or --example"),
        (["nothing.toml"], "no problem file at nothing.toml"),
        (["--example", "P9"], "no ready problem is called 'P9'; there are P1, P2"),
        (["wave.toml", "--points", 20], "--points is for an --example"),
        (["wave.toml", "--show"], "--show is for an --example"),
        (["--example", "P1", "--points", 4], "--points must be >= 8"),
        (["--example", "P1", "--points", 200], "use a finer grid"),
        (["wave.toml", "--steps", -1], "n_steps must be an integer >= 0"),
        (["wave.toml", "--components", 0], "n_components must be an integer >= 1"),
        (["wave.toml", "--out", "wave.toml"], "--out must end in"),
        (["wave.toml", "--plot", "wave.bmp"], "--plot must end in"),
        (["wave.toml", "--device", "warp"], "device must be"),
        (["broken.toml"], "'integral' in [[term]] number 1 is not covered"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(arguments, message, here, wave, tmp_path):  # noqa: F811
    (tmp_path / "broken.toml").write_text(WAVE.replace("derivative = { x = 2 }", "integral = 1"))
    done = here("solve-pde", *arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr and "Traceback" not in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken.toml", "wave.toml"]


def test_help_teaches_with_examples(here, tmp_path):  # noqa: F811
    assert "mixtura solve-pde --example P5 --plot p5.png" in here("solve-pde", "--help", cwd=tmp_path).stdout


def test_nothing_heavy_is_imported_for_it():
    code = "import sys, mixtura.cli.solve_pde; print([m for m in ('torch', 'pandas', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
