"""Small real tables by name."""

import builtins

import numpy as np
import pytest

from mixtura.data.samples import SAMPLES, sample
from mixtura.data.texts import MissingData

SHAPES = {
    "diabetes": (442, 10),
    "wine": (178, 13),
    "breast_cancer": (569, 30),
    "iris": (150, 4),
    "digits": (1797, 64),
    "boston": (506, 13),
    "autompg": (392, 7),
}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_sample_has_its_published_size_and_no_gaps(name: str):
    found = sample(name)
    assert found.X.shape == SHAPES[name] and found.y.shape == SHAPES[name][:1]
    assert len(set(found.columns)) == found.X.shape[1]
    assert np.isfinite(found.X).all() and np.isfinite(found.y).all()


def test_one_column_is_predicted_from_the_others():
    found = sample("wine")
    X, y = found.predicting("alcohol")
    assert X.shape == (178, 12) and y[0] == 14.23
    assert found.predicting("alcohol", ("ash",))[0][0].tolist() == [2.43]
    with pytest.raises(ValueError, match="wine has no column 'proof'"):
        found.predicting("proof")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="name must be one of"):
        sample("cifar")


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch):
    inner = builtins.__import__

    def without(name: str, *rest, **options):
        if name.startswith("mlxtend"):
            raise ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")
        return inner(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingData, match="pip install mlxtend"):
        sample("boston")
