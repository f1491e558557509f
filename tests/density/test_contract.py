"""What every estimator of the room keeps: scikit-learn's checks, cloning, and a way to disk and back."""

import inspect

import numpy as np
import pytest
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
