"""Estimators on disk: what was saved comes back to the bit, and nothing foreign is built."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from mixtura.core.keeping import Keeping
from mixtura.core.training import TrainConfig


class Kept(Keeping):
    """An estimator with one parameter."""

    def __init__(self, value: Any = None):
        self.value = value

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"value": self.value}


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 0.1, -math.inf, "text", (1, 2.5), [1, [2, None]], {"a": 1, 2: (3,)}, TrainConfig(steps=3, lr=0.5)],
    ids=repr,
)
def test_a_plain_value_comes_back(value, tmp_path):
    kept = Kept(value)
    kept.found_ = value
    kept.save(tmp_path / "e")
    back = Kept.load(tmp_path / "e")
    assert back.value == value and back.found_ == value and type(back.value) is type(value)


def test_arrays_and_tensors_come_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    kept = Kept({"x": rng.normal(size=(3, 4)).T, "empty": np.zeros((0, 2)), "names": np.array(["a", "bc"])})
    kept.tensor_ = torch.randn(2, 3, dtype=torch.float64)
    kept.objects_ = np.array(["a", None, 1], dtype=object)
    kept.save(tmp_path / "e")
    back = Kept.load(tmp_path / "e")
    for name, array in kept.value.items():
        np.testing.assert_array_equal(back.value[name], array)
        assert back.value[name].dtype == array.dtype
    assert torch.equal(back.tensor_, kept.tensor_)
    assert back.objects_.tolist() == ["a", None, 1]


def test_an_estimator_of_this_package_within_another_comes_back(tmp_path):
    from mixtura.density import GaussianMixture

    X = np.random.default_rng(0).normal(size=(30, 2))
    kept = Kept(GaussianMixture(2, random_state=0).fit(X))
    kept.found_ = {"inner": kept.value}
    kept.save(tmp_path / "e")
    back = Kept.load(tmp_path / "e")
    for found in (back.value, back.found_["inner"]):
        np.testing.assert_array_equal(found.score_samples(X), kept.value.score_samples(X))
    meta = tmp_path / "e" / "estimator.json"
    meta.write_text(meta.read_text().replace("mixtura.density.mixture.GaussianMixture", "collections.OrderedDict"))
    with pytest.raises(ValueError, match="no record of mixtura"):
        Kept.load(tmp_path / "e")


def test_nan_comes_back_as_nan(tmp_path):
    Kept(math.nan).save(tmp_path / "e")
    assert math.isnan(Kept.load(tmp_path / "e").value)


def test_what_cannot_be_saved_is_named_and_leaves_the_old_one(tmp_path):
    Kept(1).save(tmp_path / "e")
    with pytest.raises(TypeError, match="parameter value is a function"):
        Kept(lambda: 0).save(tmp_path / "e")
    assert Kept.load(tmp_path / "e").value == 1


def test_a_record_of_another_package_is_neither_written_nor_built(tmp_path):
    @dataclass
    class Foreign:
        a: int = 1

    with pytest.raises(TypeError, match="is a Foreign"):
        Kept(Foreign()).save(tmp_path / "e")
    Kept(TrainConfig(steps=1)).save(tmp_path / "e")
    meta = tmp_path / "e" / "estimator.json"
    meta.write_text(meta.read_text().replace("mixtura.core.training.TrainConfig", "subprocess.Popen"))
    with pytest.raises(ValueError, match="no record of mixtura"):
        Kept.load(tmp_path / "e")


def test_another_class_and_an_empty_directory_are_named(tmp_path):
    Kept(1).save(tmp_path / "e")
    meta = tmp_path / "e" / "estimator.json"
    payload = json.loads(meta.read_text()) | {"class": "elsewhere.Other"}
    meta.write_text(json.dumps(payload))
    with pytest.raises(ValueError, match=r"of class elsewhere\.Other"):
        Kept.load(tmp_path / "e")
    with pytest.raises(ValueError, match="no saved estimator"):
        Kept.load(tmp_path)


def test_models_names_for_saving_are_the_same_directory(tmp_path):
    Kept(3).save_pretrained(tmp_path / "e")
    assert Kept.load(tmp_path / "e").value == Kept.from_pretrained(tmp_path / "e").value == 3


def test_saving_replaces_a_saved_estimator_and_nothing_else(tmp_path):
    Kept(1).save(tmp_path / "e")
    Kept(2).save(tmp_path / "e")
    (tmp_path / "empty").mkdir()
    Kept(2).save(tmp_path / "empty")
    assert Kept.load(tmp_path / "e").value == Kept.load(tmp_path / "empty").value == 2
    (tmp_path / "e" / "notes.txt").write_text("of a person")
    (tmp_path / "file").write_text("of a person")
    with pytest.raises(ValueError, match=r"e is a directory with other files in it \(notes.txt\)"):
        Kept(3).save(tmp_path / "e")
    with pytest.raises(ValueError, match="file exists and is not a directory"):
        Kept(3).save(tmp_path / "file")
    assert (tmp_path / "e" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "of a person"
    assert Kept.load(tmp_path / "e").value == 2
