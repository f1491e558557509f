"""Classifiers of image folders: learned, interrupted and resumed, kept, and asked about files that nobody prepared."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtura.core import training
from mixtura.data.images import image_folder
from mixtura.vision.image_classifier import ImageClassifier, Recipe, _augmented, split_rows, train_classifier

Image = pytest.importorskip("PIL.Image", reason="images are read by Pillow: pip install 'mixtura[vision]'")

SMALL = {"side": 8, "channels": 1, "width": 8, "depth": 1, "stride": 1, "epochs": 6, "batch_size": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stripes that lie and stripes that stand, 24 images each, and three files that are no images."""
    rng = np.random.default_rng(0)
    for name, axis in (("lying", 0), ("standing", 1)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(24):
            stripes = np.indices((8, 8))[axis] % 2 * 150 + rng.integers(0, 60, (8, 8))
            Image.fromarray(stripes.astype(np.uint8)).save(tmp_path / "in" / name / f"{i}.png")
    (tmp_path / "in" / "lying" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "standing" / "broken.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "in" / "standing" / "empty.jpg").write_bytes(b"")
    return tmp_path / "in"


def test_stripes_are_told_apart_and_bad_files_named(folder: Path, tmp_path: Path):
    problems: list[str] = []
    images = image_folder(folder, on_problem=lambda p: problems.append(p.path.name))
    found = train_classifier(
        images,
        Recipe(**SMALL | {"epochs": 40, "lr": 1e-2}),
        tmp_path / "state",
        on_problem=lambda p: problems.append(p.path.name),
    )
    assert found.accuracy == 1.0 and found.confusion.sum() == 10 and found.images == 38
    assert sorted(problems) == ["broken.png", "empty.jpg", "notes.txt"]
    assert not (tmp_path / "state").exists()
    found.classifier.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds other files"):
        found.classifier.save_pretrained(folder)
    again = ImageClassifier.from_pretrained(tmp_path / "model")
    assert again.labels == ("lying", "standing")
    quiet = image_folder(folder, on_problem=lambda p: None)
    one, two = (
        np.concatenate([a.probabilities for a in c.classify_folder(quiet, on_problem=lambda p: None)])
        for c in (found.classifier, again)
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one.sum(1), 1, atol=1e-6)


def test_an_interrupted_training_ends_as_an_unbroken_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = image_folder(folder, on_problem=lambda p: None)
    recipe = Recipe(**SMALL)
    whole = train_classifier(images, recipe, tmp_path / "whole", on_problem=lambda p: None)
    step, done = training._step, []

    def broken(*arguments: object) -> float:
        if len(done) == 13:
            raise KeyboardInterrupt
        done.append(1)
        return step(*arguments)

    monkeypatch.setattr(training, "_step", broken)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(images, recipe, tmp_path / "state", on_problem=lambda p: None)
    monkeypatch.setattr(training, "_step", step)
    resumed = train_classifier(images, recipe, tmp_path / "state", on_problem=lambda p: None)
    assert resumed.history.resumed_at > 0
    for name, tensor in whole.classifier.network.state_dict().items():
        torch.testing.assert_close(resumed.classifier.network.state_dict()[name], tensor)


def test_every_class_is_split_by_its_share():
    labels = np.repeat([0, 1, 2], [100, 10, 2])
    train, test = split_rows(labels, 0.2, 0)
    assert sorted(np.concatenate((train, test))) == list(range(112))
    assert np.bincount(labels[test]).tolist() == [20, 2, 1]


def test_images_move_and_mirror_whole():
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(64, 1, 8, 8)
    torch.manual_seed(0)
    out = _augmented(x, Recipe(side=8, stride=1, shift=0.25, flip=True))
    seen = set()
    for image in out[:, 0]:
        core = image[2:-2, 2:-2]  # what no edge has reached
        steps = {float((core[:, 1:] - core[:, :-1]).unique()), float((core[1:] - core[:-1]).unique())}
        assert steps in ({1.0, 8.0}, {-1.0, 8.0})
        seen.add((float(core[0, 0]), min(steps)))
    assert len(seen) > 20  # 5 x 5 places, twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "cnn"}, "arch must be one of .*, got 'cnn'"),
        ({"side": 4, "stride": 2}, "side must be at least 8 for stride 2 and 1 levels, got 4"),
        ({"batch_size": 1}, "batch norm needs two"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"width": 10}, "width must be divisible by 4, got 10"),
        ({"levels": 0}, "levels must be 1 to 4, got 0"),
        ({"lr": -1.0}, "lr must be > 0 and finite, got -1.0"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
    ],
)
def test_bad_recipes_are_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_one_class_and_a_class_of_one_are_refused(tmp_path: Path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "in" / "a" / "0.png")
    with pytest.raises(ValueError, match="at least two class folders, got one, a"):
        train_classifier(image_folder(tmp_path / "in"), Recipe(**SMALL), tmp_path / "state")
    (tmp_path / "in" / "b").mkdir()
    for i in range(2):
        Image.new("L", (8, 8)).save(tmp_path / "in" / "b" / f"{i}.png")
    with pytest.raises(ValueError, match="class a has 1 image that can be read; each class needs at least 2"):
        train_classifier(image_folder(tmp_path / "in"), Recipe(**SMALL), tmp_path / "state")


def test_another_directory_and_other_pixels_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        ImageClassifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="another kind of model"):
        ImageClassifier.from_pretrained(tmp_path)
    recipe = Recipe(**SMALL)
    classifier = ImageClassifier(recipe.network(2), recipe, ("a", "b"), [0.5], [0.2])
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, 1, 8, 8\), got float64"):
        classifier.classify(np.zeros((1, 1, 8, 8)))
