"""The classifier with outliers: scikit-learn's contract, images on disk, resumption, and what it refuses."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from mixtura.robust import OutlierExposedClassifier, ood_metrics
from mixtura.robust.outlier_classifier import SharedRowsWarning


def clouds(seed: int = 0, n: int = 240):
    """Three clouds on a circle, outliers between and beyond them."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    centres = 5 * np.array([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    return centres[y] + rng.normal(size=(n, 2)) * 0.5, np.array(["ant", "bee", "cow"])[y], rng.uniform(-9, 9, (300, 2))


def quick(**options) -> OutlierExposedClassifier:
    return OutlierExposedClassifier(**{"base_epochs": 4, "epochs": 4, "width": 8, **options})


@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_checks_pass():
    results = check_estimator(quick(base_epochs=8, epochs=2, batch_size=64), on_fail=None, on_skip=None)
    failed = {r["check_name"]: repr(r["exception"]) for r in results if r["status"] == "failed"}
    assert not failed
    assert sum(r["status"] == "passed" for r in results) > 40


def test_known_rows_are_classified_and_unknown_ones_score_below():
    X, y, outliers = clouds()
    model = quick(base_epochs=10, epochs=30, lr=0.1, width=16).fit(X, y, outliers=outliers)
    X_new, y_new, unseen = clouds(1)
    far = unseen[np.linalg.norm(unseen[:, None] - X_new[None], axis=2).min(1) > 1.5]
    assert (model.predict(X_new) == y_new).mean() > 0.98 and model.validation_accuracy_ > 0.95
    plain = quick(base_epochs=10, epochs=30, lr=0.1, width=16).fit(X, y)
    got, without = (ood_metrics(m.score_samples(X_new), m.score_samples(far)).auroc for m in (model, plain))
    assert got > 0.95 and got > without + 0.1
    assert model.is_known(X_new).mean() > 0.85  # the threshold keeps 95 % of 24 rows set aside
    assert model.is_known(far).mean() < 0.3
    np.testing.assert_array_equal(model.is_known(far), model.score_samples(far) >= model.threshold_)


@pytest.mark.parametrize("objective", ["mixoe", "oe", "oe-m", "energy", "plain"])
def test_what_was_saved_answers_the_same_to_the_bit(objective, tmp_path):
    X, y, outliers = clouds()
    model = quick(objective=objective).fit(X, y, outliers=outliers)
    model.save(tmp_path / "m")
    back = OutlierExposedClassifier.load(tmp_path / "m")
    np.testing.assert_array_equal(back.predict_proba(outliers), model.predict_proba(outliers))
    assert back.threshold_ == model.threshold_ and back.predict(X).tolist() == model.predict(X).tolist()


def images(seed: int = 0, n: int = 90, side: int = 12):
    """Bars along rows or along columns, as bytes; outliers are noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    X = rng.integers(0, 60, (n, 1, side, side), dtype=np.uint8)
    for i, across in enumerate(y):
        at = rng.integers(2, side - 2)
        if across:
            X[i, 0, at] = 255
        else:
            X[i, 0, :, at] = 255
    return X, y, rng.integers(0, 256, (40, 1, side, side), dtype=np.uint8)


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "both"])
def test_images_on_disk_give_what_images_in_memory_give(mix, tmp_path):
    X, y, outliers = images()
    np.save(tmp_path / "x.npy", X)
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    made = [quick(mix=mix, width=4, shift=0.1, epochs=2).fit(rows, y, outliers=outliers) for rows in (X, on_disk)]
    np.testing.assert_array_equal(made[0].predict_proba(X), made[1].predict_proba(X))
    numbers = quick(mix=mix, width=4, shift=0.1, epochs=2).fit(X / np.float32(255), y, outliers / np.float32(255))
    np.testing.assert_allclose(numbers.predict_proba(X / np.float32(255)), made[0].predict_proba(X), atol=1e-5)


def test_one_row_is_answered_as_in_a_batch():
    X, y, outliers = images()
    model = quick(width=4, epochs=2).fit(X, y, outliers)
    alone = np.concatenate([model.predict_proba(X[i : i + 1]) for i in range(5)])
    # Sums over another batch size are ordered otherwise; float32 keeps about seven digits.
    np.testing.assert_allclose(alone, model.predict_proba(X)[:5], atol=1e-6)


@pytest.mark.parametrize("stop", [3, 12])
def test_an_interrupted_fit_goes_on_to_the_same_model(stop, tmp_path, monkeypatch):
    X, y, outliers = clouds(n=64)
    monkeypatch.setattr("mixtura.robust.outlier_classifier.CHECKPOINT_EVERY", 2)
    whole = quick().fit(X, y, outliers)
    import mixtura.robust.exposure_training as training

    calls, original = [], training._Plan.loss_at

    def stops(self, step):
        calls.append(step)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(training._Plan, "loss_at", stops)
    with pytest.raises(KeyboardInterrupt):
        quick().fit(X, y, outliers, state=tmp_path / "s")
    resumed = quick().fit(X, y, outliers, state=tmp_path / "s")
    assert len(calls) < 2 * 16
    np.testing.assert_array_equal(resumed.predict_proba(X), whole.predict_proba(X))


def test_a_module_of_ones_own_is_fine_tuned_as_a_copy():
    X, y, outliers = clouds()
    torch.manual_seed(0)
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    model = OutlierExposedClassifier(module, epochs=3, lr=0.1).fit(X, y, outliers)
    assert torch.equal(module.weight, before) and len(model.losses_) == 3 * 7
    assert (model.predict(X) == y).mean() > 0.9
    assert clone(model).module is not None


def test_outliers_that_are_known_rows_are_counted():
    X, y, outliers = clouds()
    with pytest.warns(SharedRowsWarning, match="2 of 302 outliers equal rows of X"):
        quick(epochs=1, base_epochs=0).fit(X, y, np.concatenate([outliers, X[:2]]))


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({}, lambda X, y, z: (X, np.zeros(len(X)), z), "y must hold at least two classes, got 1 class"),
        ({}, lambda X, y, z: (X, y, z[:0]), "outliers must hold at least one row, got none"),
        ({}, lambda X, y, z: (X, y, z[:, :1]), r"outliers must have rows of shape \(2,\), as X, got \(1,\)"),
        ({}, lambda X, y, z: (X, y, z * np.nan), "outliers must be finite, got NaN or infinity"),
        ({}, lambda X, y, z: (X, y, z.astype(np.uint8)), "outliers and X must both be bytes or both be numbers"),
        ({"objective": "mix"}, lambda X, y, z: (X, y, z), "objective must be one of"),
        ({"mix": "cutmix"}, lambda X, y, z: (X, y, z), "cutmix needs images"),
        ({"alpha": 0.0}, lambda X, y, z: (X, y, z), "alpha must be > 0, got 0.0"),
        ({"beta": -1.0}, lambda X, y, z: (X, y, z), "beta must be >= 0 and finite, got -1.0"),
        ({"confidence": "sure"}, lambda X, y, z: (X, y, z), "confidence must be one of"),
        ({"level": 0.0}, lambda X, y, z: (X, y, z), r"level must be in \(0, 1\], got 0.0"),
        ({"validation": 1.0}, lambda X, y, z: (X, y, z), r"validation must be in \(0, 1\), got 1.0"),
        ({"width": 6}, lambda X, y, z: (X, y, z), "width must be a multiple of 4, at least 4, got 6"),
        ({"lr": -1.0}, lambda X, y, z: (X, y, z), "lr must be > 0, got -1.0"),
        ({"epochs": -1}, lambda X, y, z: (X, y, z), "epochs must be >= 0, got -1"),
    ],
)
def test_what_can_not_be_fitted_is_named(options, data, message):
    with pytest.raises(ValueError, match=message):
        quick(**options).fit(*data(*clouds()))


def test_images_of_another_shape_than_in_fit_are_named():
    X, y, outliers = images()
    model = quick(width=4, epochs=1).fit(X, y, outliers)
    with pytest.raises(ValueError, match=r"images of shape \(1, 12, 12\), as in fit, got \(1, 12, 13\)"):
        model.predict(np.zeros((2, 1, 12, 13), np.uint8))
    with pytest.raises(ValueError, match="X and y must have the same number of rows, got 90 and 3"):
        quick().fit(X, y[:3], outliers)
