"""``mixtura classify``: a folder in, a classifier, a picture and answers out; errors of one line."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_cli import here  # noqa: F401 (a fixture)

Image = pytest.importorskip("PIL.Image", reason="images are read by Pillow: pip install 'mixtura[vision]'")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(low, low + 90, (9, 12, 3), dtype=np.uint8)).save(
                tmp_path / "in" / name / f"{i}.png"
            )
    (tmp_path / "in" / "dark" / "bad.png").write_bytes(b"no image")
    return tmp_path


def test_a_folder_is_learned_and_asked(here, folder):  # noqa: F811
    network = ["--side", "8", "--stride", "1", "--width", "8", "--depth", "1"]
    done = here("classify", "train", "in", "--out", "m", *network, "--epochs", "8", "--batch-size", "8", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "21 images of 2 classes" in done.stdout and "bad.png: is no image" in done.stdout
    assert "of 4 held-out images told right" in done.stdout
    assert (folder / "m" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    done = here("classify", "predict", "in", "--model", "m", "--out", "c.csv", "--plot", "c.svg", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((folder / "c.csv").open()))
    assert len(rows) == 20 and set(rows[0]) == {"file", "class", "probability", "dark", "light"}
    assert sum(Path(row["file"]).parent.name == row["class"] for row in rows) >= 18
    assert (folder / "c.svg").exists()
    done = here("classify", "predict", "in/light/0.png", "--model", "m", "--out", "one.csv", cwd=folder)
    assert done.returncode == 0 and len((folder / "one.csv").read_text().splitlines()) == 2


def test_names_of_classes_are_printed_and_drawn_as_they_are(here, folder):  # noqa: F811
    names = ("[/b] :cat: $x_{$ 音", "[red]")
    for before, after in zip(("dark", "light"), names, strict=True):
        (folder / "in" / before).rename(folder / "in" / after.replace("/", "∕"))
    network = ["--side", "8", "--stride", "1", "--width", "8", "--depth", "1", "--epochs", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done = here("classify", "train", "in", "--out", "m", *network, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "[∕b] :cat: $x_{$ 音" in done.stdout and "[red]" in done.stdout
    assert (folder / "m" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(here, folder):  # noqa: F811
    (folder / "one" / "a").mkdir(parents=True)
    for name in "01":
        Image.new("L", (8, 8)).save(folder / "one" / "a" / f"{name}.png")
    for arguments, message in (
        ("classify train one --side 8 --stride 1", "must hold at least two class folders, got one, a"),
        ("classify train nowhere", "nowhere does not exist"),
        ("classify train in --levels 4 --side 32", "side must be at least 64"),
        ("classify train in --out one", "one holds other files, which would be lost"),
        ("classify train in/dark --out in", "in holds in/dark, which would be lost"),
        ("classify predict in --model nowhere", "holds no image classifier"),
    ):
        done = here(*arguments.split(), cwd=folder)
        assert done.returncode == 1 and done.stderr.startswith("error") and message in done.stderr
        assert done.stderr.count("\n") == 1
    assert (
        (folder / "one" / "a").exists()
        and not (folder / "classifier").exists()
        and not (folder / "classes.csv").exists()
    )
