"""What every estimator of the room keeps: scikit-learn's checks, cloning, and a way to disk and back."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from estimators import ESTIMATORS
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

each = pytest.mark.parametrize("name", sorted(ESTIMATORS))


@each
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_checks_pass_where_they_apply(name: str):
    case = ESTIMATORS[name]
    results = check_estimator(
        case.make(), expected_failed_checks=dict(case.expected_failures), on_fail=None, on_skip=None
    )
    failed = {r["check_name"]: repr(r["exception"]) for r in results if r["status"] == "failed"}
    assert not failed
    # A check that passes although it is listed as failing has no business on the list.
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == set(case.expected_failures)


@each
def test_a_clone_has_the_same_parameters_and_no_fit(name: str):
    made = ESTIMATORS[name].make()
    copy = clone(made)
    assert repr(copy) == repr(made)
    assert not [attribute for attribute in vars(copy) if attribute.endswith("_") and not attribute.startswith("_")]


@each
@pytest.mark.filterwarnings("ignore")
def test_what_was_saved_answers_the_same_to_the_bit(name: str, tmp_path):
    made = ESTIMATORS[name].make()
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 2))
    y = (X[:, 0] > 0).astype(int)
    made.fit(X, y)
    made.save(tmp_path / name)
    back = type(made).load(tmp_path / name)
    for verb in ("score_samples", "predict", "predict_proba"):
        if hasattr(made, verb):
            # A regressor's density is that of targets.
            given = (X, y) if "y" in inspect.signature(getattr(made, verb)).parameters else (X,)
            np.testing.assert_array_equal(getattr(back, verb)(*given), getattr(made, verb)(*given), err_msg=verb)


def rows_and_labels() -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(0).normal(size=(40, 2))
    return X, (X[:, 0] > 0).astype(int)


def answer(model, X):
    """What a fitted model says of X."""
    verb = next(verb for verb in ("predict", "score_samples", "transform") if hasattr(model, verb))
    return getattr(model, verb)(X)


@each
@pytest.mark.filterwarnings("ignore")
def test_a_column_that_holds_no_numbers_is_named(name: str):
    X, y = rows_and_labels()
    table = pd.DataFrame(X, columns=["length", "mass"])
    for values, what in (
        (np.where(y > 0, "ant", "bee"), "'(ant|bee)'"),
        (pd.date_range("2020", periods=40), "2020-01-01"),
    ):
        with pytest.raises(ValueError, match=f"column 'kind' is no column of numbers.*{what}"):
            ESTIMATORS[name].make().fit(table.assign(kind=values), y)


@each
@pytest.mark.filterwarnings("ignore")
def test_values_that_are_not_finite_are_counted_and_the_first_is_placed(name: str):
    X, y = rows_and_labels()
    table = pd.DataFrame(X, columns=["length", "mass"])
    table.loc[[3, 5], "mass"] = np.nan
    with pytest.raises(ValueError, match=r"X contains 2 .*NaN.*, the first in row 3, column 'mass'"):
        ESTIMATORS[name].make().fit(table, y)


@each
@pytest.mark.filterwarnings("ignore")
def test_reversed_rows_read_only_rows_and_tensors_are_taken(name: str):
    X, y = rows_and_labels()
    fitted = ESTIMATORS[name].make().fit(X[::-1].copy(), y[::-1])
    want = answer(fitted, X)
    frozen = X.copy()
    frozen.flags.writeable = False
    given = torch.from_numpy(X.copy()).requires_grad_()
    for rows in (X[::-1], frozen[::-1], given.flip(0)):
        np.testing.assert_array_equal(answer(ESTIMATORS[name].make().fit(rows, y[::-1]), X), want)
    for rows in (frozen, given):
        np.testing.assert_array_equal(answer(fitted, rows), want)
    half = given.detach().bfloat16()
    np.testing.assert_allclose(answer(fitted, half), answer(fitted, half.double().numpy()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in sorted(ESTIMATORS) if hasattr(ESTIMATORS[name].make(), "transform")])
@pytest.mark.filterwarnings("ignore")
def test_what_transforms_names_its_columns_and_gives_a_frame_where_asked(name: str):
    X, y = rows_and_labels()
    table = pd.DataFrame(X, columns=["length", "mass"], index=np.arange(40) + 7)
    made = ESTIMATORS[name].make()
    plain = made.fit(table, y).transform(table)
    kind = type(made).__name__.lower()
    assert made.get_feature_names_out().tolist() == [f"{kind}{i}" for i in range(plain.shape[1])]
    framed = made.set_output(transform="pandas").transform(table)
    assert (
        framed.columns.tolist() == made.get_feature_names_out().tolist()
        and framed.index.tolist() == table.index.tolist()
    )
    np.testing.assert_array_equal(framed.to_numpy(), plain)


@each
def test_nothing_is_said_of_memory_that_must_not_be_written(name: str, recwarn):
    X, y = rows_and_labels()
    X.flags.writeable = False
    model = ESTIMATORS[name].make().fit(X, y)
    answer(model, X)
    assert not [str(w.message) for w in recwarn if "writable" in str(w.message) or "__array__" in str(w.message)]
