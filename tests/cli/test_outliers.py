"""``mixtura outliers``: from folders of images to a model, and from a model to a line for every image."""

import csv

import numpy as np
import pytest
from PIL import Image
from test_cli import here  # noqa: F401 (a fixture)

QUICK = ("--side", 12, "--width", 4, "--base-epochs", 6, "--epochs", 6, "--grey")


def bars(n: int, across: bool, rng: np.random.Generator) -> list[np.ndarray]:
    made = []
    for _ in range(n):
        image = rng.integers(0, 40, (12, 12), dtype=np.uint8)
        at = rng.integers(2, 9)
        if across:
            image[at : at + 2] = 255
        else:
            image[:, at : at + 2] = 255
        made.append(image)
    return made


def write(folder, images) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Bars along rows and along columns, noise as outliers, and new ones of each with files that are no images."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("test", 12)):
        write(root / part / "across", bars(n, True, rng))
        write(root / part / "down", bars(n, False, rng))
    write(root / "noise", rng.integers(0, 256, (60, 12, 12), dtype=np.uint8))
    write(root / "test" / "noise", rng.integers(0, 256, (12, 12, 12), dtype=np.uint8))
    (root / "train" / "down" / "broken.png").write_bytes((root / "train" / "down" / "000.png").read_bytes()[:60])
    (root / "test" / "down" / "text.jpg").write_text("no image")
    return root


@pytest.fixture(scope="module")
def model(folders):
    """A model of the training folder."""
    from mixtura.cli.outliers_work import fit

    options = {
        "objective": "mixoe",
        "mix": "mixup",
        "alpha": 1.0,
        "beta": 1.0,
        "epochs": 6,
        "base_epochs": 6,
        "width": 4,
    }
    options |= {"level": 0.95, "device": "cpu", "seed": 0}
    fit(
        folders / "train",
        folders / "noise",
        folders / "model",
        options,
        exclude=[],
        side=12,
        grey=True,
        plot=None,
        dry_run=False,
        say=lambda line: None,
    )
    return folders / "model"


def test_fit_names_what_it_left_out_and_writes_a_model_with_a_picture(here, folders, tmp_path):  # noqa: F811
    done = here(
        "outliers", "fit", folders / "train", "--outliers", folders / "noise", *QUICK, "--out", "m", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "121 images of 2 classes" in done.stdout and "60 outliers" in done.stdout
    assert done.stdout.count("broken.png: is damaged or breaks off") == 1
    assert "of 12 images set aside are classified right" in done.stdout
    assert "of 6 outliers that were not shown" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    assert (tmp_path / "m" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_score_writes_a_line_for_every_file_and_rejects_what_is_of_no_class(here, folders, model, tmp_path):  # noqa: F811
    arguments = (folders / "test", "--model", model, "--outliers", folders / "noise")
    done = here("outliers", "score", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "AUROC" in done.stdout and "1 file could not be used; the table says why" in done.stdout
    with (tmp_path / "test-scores.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 12 * 3 + 1 + 60
    (bad,) = [row for row in rows if row["problem"]]
    assert bad["file"].endswith("text.jpg") and bad["score"] == "" and bad["problem"].startswith("is no image")
    good = [row for row in rows if not row["problem"]]
    for name in ("across", "down"):
        mine = [row for row in good if f"/test/{name}/" in row["file"]]
        assert len(mine) == 12 and sum(row["class"] == name for row in mine) >= 11
        assert sum(row["known"] == "yes" for row in mine) >= 9
    noise = [row for row in good if "/test/noise/" in row["file"]]
    assert sum(row["known"] == "no" for row in noise) >= 11
    assert (tmp_path / "test-scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_threshold_of_ones_own_decides_what_is_known(here, folders, model, tmp_path):  # noqa: F811
    arguments = (folders / "noise", "--model", model, "--threshold", 0.0, "--out", "t.csv")
    done = here("outliers", "score", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert {row["known"] for row in rows} == {"yes"}


def test_an_interrupted_fit_goes_on_to_the_same_model(here, folders, model, tmp_path, monkeypatch):  # noqa: F811
    import mixtura.robust.exposure_training as training

    monkeypatch.setattr("mixtura.robust.outlier_classifier.CHECKPOINT_EVERY", 5)
    steps, original = [], training._Plan.loss_at

    def stops(self, step):
        steps.append(step)
        if len(steps) == 32:  # in fine-tuning: 4 steps an epoch, 6 epochs before
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(training._Plan, "loss_at", stops)
    fit = ("outliers", "fit", folders / "train", "--outliers", folders / "noise", *QUICK, "--out", "m")
    done = here(*fit, cwd=tmp_path)
    assert done.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["m.state"]
    changed = here(*fit, "--epochs", 9, cwd=tmp_path)
    assert changed.returncode == 1 and "or remove m.state to begin anew" in changed.stderr
    before = len(steps)
    done = here(*fit, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "broken.png" not in done.stdout  # what was read before is not read again
    assert len(steps) - before < 48 - 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    for name in ("arrays.safetensors", "estimator.json"):
        assert (tmp_path / "m" / "classifier" / name).read_bytes() == (model / "classifier" / name).read_bytes()


def test_figures_of_a_few_images_are_not_said_to_be_of_others(here, folders, tmp_path):  # noqa: F811
    for name, across in (("across", True), ("down", False)):
        write(tmp_path / "few" / name, bars(6, across, np.random.default_rng(0)))
    arguments = ("fit", tmp_path / "few", "--outliers", folders / "noise", *QUICK, "--out", "m")
    done = here("outliers", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 images are too few to set any aside" in done.stdout and "images set aside" not in done.stdout


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(here, folders, model, tmp_path):  # noqa: F811
    fit = here("outliers", "fit", folders / "train", "--outliers", folders / "noise", "--dry-run", cwd=tmp_path)
    assert fit.returncode == 0 and "would train on 32 x 32 pixels for 30 + 10 epochs" in fit.stdout
    score = here("outliers", "score", folders / "test", "--model", model, "--dry-run", cwd=tmp_path)
    assert score.returncode == 0 and "would write test-scores.csv and test-scores.png" in score.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nowhere", "--outliers", "{noise}"], "nowhere does not exist"),
        (["fit", "{train}", "--outliers", "nowhere"], "nowhere does not exist"),
        (["fit", "{noise}", "--outliers", "{train}"], "has no class folder with images"),
        (["fit", "{one}", "--outliers", "{noise}"], "has one class folder (across); at least two are needed"),
        (["fit", "{train}", "--outliers", "{train}"], "121 of the outliers are images of the classes"),
        (["fit", "{train}", "--outliers", "{noise}", "--side", "4"], "--side must be at least 8 pixels, got 4"),
        (["fit", "{train}", "--outliers", "{noise}", "--alpha", "0", "--dry-run"], "alpha must be > 0, got 0.0"),
        (["fit", "{train}", "--outliers", "{noise}", "--exclude", "trucs"], "exclude names 'trucs', and"),
        (["fit", "{train}", "--outliers", "{noise}", "--plot", "a.gif"], "--plot must end in .png, .svg or .pdf"),
        (["fit", "{train}", "--outliers", "{noise}", "--device", "warp"], "--device must be cpu, cuda"),
        (
            ["fit", "{train}", "--outliers", "{noise}", "--out", "{noise}"],
            "holds the outliers; write to another directory",
        ),
        (["fit", "{train}", "--outliers", "{noise}", "--out", "{one}/.."], "holds other files, which would be lost"),
        (["fit", "{one}/across", "--outliers", "{noise}", "--out", "{one}"], "holds the images; write to another"),
        (["score", "{test}", "--model", "nowhere"], "nowhere does not exist; make it with: mixtura outliers fit"),
        (["score", "{test}", "--model", "{noise}"], "is no model of `mixtura outliers fit`"),
        (["score", "{bad}", "--model", "{model}"], "none of the images could be read"),
        (["score", "{test}", "--model", "{model}", "--out", "a.txt"], "--out must end in .csv, got 'a.txt'"),
    ],
)
def test_bad_input_is_one_clear_line(here, folders, model, tmp_path, arguments, message):  # noqa: F811
    places = {name: folders / name for name in ("train", "noise", "test", "model")}
    for name in ("one", "bad"):
        places[name] = tmp_path / "in" / name
        places[name].mkdir(parents=True)
    write(places["one"] / "across", bars(3, True, np.random.default_rng(0)))
    (places["bad"] / "a.png").write_text("no image")
    (tmp_path / "cwd").mkdir()
    done = here("outliers", *(a.format(**places) for a in arguments), cwd=tmp_path / "cwd")
    assert done.returncode == 1 and message in done.stderr, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize("command", ["fit", "score"])
def test_help_teaches_with_examples(here, tmp_path, command):  # noqa: F811
    shown = here("outliers", command, "--help", cwd=tmp_path).stdout
    assert shown.count(f"mixtura outliers {command}") >= 2
