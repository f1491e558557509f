"""Two phases: heads against their definitions, limits where the Bayes rule is known, what must not matter, bad input."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import multivariate_normal
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.neighbors import KNeighborsClassifier

from mixtura.density import (
    FactorModel,
    GaussianMixture,
    PretrainedClassifier,
    PretrainedRegressor,
    excess_risk,
    pretraining_report,
)
from mixtura.density.pretraining_theory import FactorTruth, MixtureTruth, bound
from mixtura.density.small_heads import ALPHAS, Linear, fit_least_squares, fit_logistic, fit_ridge, fit_table

quiet = pytest.mark.filterwarnings("ignore:no unlabelled rows")


def rows(n=60, m=400, f=8, seed=0):
    rng = np.random.default_rng(seed)
    truth = FactorTruth.draw(rng, f, 2, loading=1.5)
    return truth, *truth.sample(n, rng), truth.sample(m, rng)[0]


# Oracles.


@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_is_scikit_learns_by_generalised_cross_validation(intercept):
    rng = np.random.default_rng(0)
    for n, f in ((30, 8), (10, 20)):
        X, noise = rng.normal(size=(n, f)) + 1, rng.normal(size=n)
        y = X @ rng.normal(size=f) + 3 * noise
        ours = fit_ridge(X, y, intercept=intercept)
        if n > f and not intercept:
            # Generalised: the peer's default is leave-one-out, so the score is compared where it is spelt out.
            scores = []
            for alpha in ALPHAS:
                hat = X @ np.linalg.solve(X.T @ X + alpha * np.eye(f), X.T)
                scores.append(np.square(y - hat @ y).mean() / (1 - np.trace(hat) / n) ** 2)
            assert ours.alpha == ALPHAS[int(np.argmin(scores))]
        peer = RidgeCV([ours.alpha], fit_intercept=intercept).fit(X, y)
        np.testing.assert_allclose(ours.coef, peer.coef_, rtol=1e-8, atol=1e-10)
        assert ours.intercept == pytest.approx(float(peer.intercept_), abs=1e-9)


def test_least_squares_is_scikit_learns_and_leaves_a_column_without_variance_out():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 3)), rng.normal(size=40)
    peer = LinearRegression().fit(X, y)
    ours = fit_least_squares(X, y, intercept=True)
    np.testing.assert_allclose(ours.coef, peer.coef_, rtol=1e-6)
    flat = fit_least_squares(np.column_stack([X, np.zeros(40)]), y, intercept=True)
    np.testing.assert_allclose(flat.coef, [*peer.coef_, 0.0], rtol=1e-6, atol=1e-12)


def test_the_table_is_the_weighted_count_of_classes():
    r = np.array([[0.9, 0.1], [0.2, 0.8], [1.0, 0.0]])
    found = fit_table(r, np.array([0, 1, 1]), 3, smoothing=0.1).table
    want = np.array([[1.0, 1.3, 0.1], [0.2, 0.9, 0.1]])  # responsibilities of each class and a tenth
    np.testing.assert_allclose(found, want / want.sum(1, keepdims=True))


def test_probabilities_of_two_and_three_classes_are_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    for classes in (2, 3):
        y = (X[:, 0] + rng.normal(size=60) > 0).astype(int) + (classes == 3) * (X[:, 1] > 0)
        ours = fit_logistic(X, y, classes)
        peer = LogisticRegression(C=ours.penalty, max_iter=200).fit(X, y)
        np.testing.assert_allclose(ours.predict_proba(X), peer.predict_proba(X), rtol=1e-8)


@pytest.mark.parametrize("violated", [False, True])
def test_the_exact_excess_risk_is_that_of_draws(violated):
    rng = np.random.default_rng(0)
    truth = FactorTruth.draw(rng, 10, 2, violated=violated)
    w = truth.best + 0.3 * rng.normal(size=10)
    model = type("Line", (), {"predict": lambda self, X: X @ w + 0.2})()
    X, y = truth.sample(200_000, rng)
    loss = (y - X @ w - 0.2) ** 2 - (y - X @ truth.best) ** 2
    assert abs(loss.mean() - excess_risk(model, truth)) < 3 * loss.std() / np.sqrt(len(y))
    with pytest.raises(ValueError, match="model is not linear in x"):
        excess_risk(type("Bent", (), {"predict": lambda self, X: (X**3).sum(1)})(), truth)


def test_the_bayes_rule_of_a_mixture_is_bayes_theorem_and_has_no_excess():
    truth = MixtureTruth.draw(np.random.default_rng(0), 5, 4, 3, norm=1.5)
    X, y = truth.sample(50_000, np.random.default_rng(1))
    joint = np.array([multivariate_normal(m, np.eye(5)).pdf(X[:20]) for m in truth.means]).T @ truth.table
    np.testing.assert_allclose(truth.class_probabilities(X[:20]), joint / joint.sum(1, keepdims=True), rtol=1e-8)
    bayes = type("Bayes", (), {"predict": lambda self, X: truth.class_probabilities(X).argmax(1)})()
    assert excess_risk(bayes, truth) == 0.0
    # A constant rule: its errors less the Bayes rule's, from draws, within five standard errors.
    drawn = (y != 0).astype(float) - (y != bayes.predict(X))
    constant = type("Constant", (), {"predict": lambda self, X: np.zeros(len(X))})()
    assert abs(excess_risk(constant, truth) - drawn.mean()) < 5 * drawn.std() / np.sqrt(len(y))


# Limits.


def test_with_true_centres_the_table_reaches_the_bayes_rule():
    rng = np.random.default_rng(0)
    truth = MixtureTruth.draw(rng, n_features=20)
    X, y = truth.sample(10_000, rng)
    head = fit_table(truth.responsibilities(X), y, 4, smoothing=0.1)
    assert truth.excess_risk(lambda rows: head.predict_proba(truth.responsibilities(rows)).argmax(1), 20_000) < 1e-3


def test_few_labels_and_many_unlabelled_rows_beat_ridge_on_the_theorys_data():
    rng = np.random.default_rng(0)
    truth = FactorTruth.draw(rng)
    X, y = truth.sample(40, rng)
    unlabelled = truth.sample(2000, rng)[0]
    model = PretrainedRegressor(FactorModel(5), fit_intercept=False).fit(X, y, unlabelled)
    ridge = type("Ridge", (), {"predict": fit_ridge(X, y, intercept=False).predict})()
    assert excess_risk(model, truth) < 0.5 * excess_risk(ridge, truth) and (model.m_, model.n_) == (2040, 40)


# What must not matter.


@pytest.mark.parametrize("head", ["ols", "ridge"])
def test_a_rotation_of_the_loadings_changes_no_prediction(head):
    _, X, y, unlabelled = rows()

    class Turned(FactorModel):
        def fit(self, X, y=None):
            super().fit(X)
            turn = np.linalg.qr(np.random.default_rng(1).normal(size=(2, 2)))[0]
            self.loadings_ = self.loadings_ @ turn
            return self

    plain, turned = (PretrainedRegressor(kind(2), head=head).fit(X, y, unlabelled) for kind in (FactorModel, Turned))
    assert not np.allclose(plain.latent_.loadings_, turned.latent_.loadings_)
    np.testing.assert_allclose(turned.predict(X), plain.predict(X), atol=1e-10)


def test_the_names_of_components_change_no_prediction():
    rng = np.random.default_rng(0)
    truth = MixtureTruth.draw(rng, 6, 5, 3)
    X, y = truth.sample(80, rng)
    order = np.array([3, 0, 4, 1, 2])

    def fitted(means):
        latent = GaussianMixture(5, covariance="spherical", variance=1.0, means_init=means, max_iter=5, tol=0.0)
        return PretrainedClassifier(latent).fit(X, y, truth.sample(300, np.random.default_rng(2))[0])

    one, other = fitted(truth.means), fitted(truth.means[order])
    np.testing.assert_allclose(one.predict_proba(X), other.predict_proba(X), atol=1e-10)


def test_rows_without_a_target_count_as_unlabelled_ones():
    _, X, y, unlabelled = rows()
    together = np.vstack([unlabelled, X])
    targets = np.concatenate([np.full(len(unlabelled), np.nan), y])
    mixed, apart = (
        PretrainedRegressor(FactorModel(2)).fit(*given) for given in ((together, targets), (X, y, unlabelled))
    )
    np.testing.assert_allclose(mixed.predict(X), apart.predict(X), rtol=1e-8)
    assert (mixed.m_, mixed.n_) == (apart.m_, apart.n_) == (460, 60)
    for absent, classes in ((-1, np.array([0, 1])), ("", np.array(["a", "b"])), (None, np.array(["a", "b"]))):
        known = classes[(y > 0).astype(int)].tolist()
        labels = np.array([absent] * len(unlabelled) + known, dtype=object if absent is None else None)
        model = PretrainedClassifier("factor", head="logistic", n_latent=2).fit(together, labels)
        assert (model.m_, model.n_) == (460, 60) and model.classes_.tolist() == classes.tolist()


def test_unlabelled_rows_may_come_from_a_file_or_in_batches(tmp_path):
    _, X, y, unlabelled = rows()
    pd.DataFrame(unlabelled, columns=list("abcdefgh")).to_parquet(tmp_path / "more.parquet")
    want = PretrainedRegressor(FactorModel(2)).fit(X, y, unlabelled).predict(X)
    for given in (tmp_path / "more.parquet", np.array_split(unlabelled, 3)):
        model = PretrainedRegressor(FactorModel(2)).fit(X, y, given)
        np.testing.assert_allclose(model.predict(X), want, rtol=1e-8)
        assert model.m_ == 460


def test_only_unlabelled_rows_teach_the_latent_where_asked():
    _, X, y, unlabelled = rows()
    model = PretrainedRegressor(FactorModel(2), pretrain_on="unlabeled").fit(X, y, unlabelled)
    assert model.m_ == 400
    np.testing.assert_allclose(model.latent_.mean_, unlabelled.mean(0), rtol=1e-10)


# Contract.


def test_fewer_targets_than_columns_warn_and_take_ridge():
    _, X, y, unlabelled = rows(n=4)
    with pytest.warns(UserWarning, match="4 targets do not determine least squares on 5 columns"):
        model = PretrainedRegressor(FactorModel(5)).fit(X, y, unlabelled)
    assert model.head_.alpha > 0


def test_no_unlabelled_rows_warn_that_m_is_n():
    _, X, y, _ = rows()
    with pytest.warns(UserWarning, match=r"fitted on the 60 labelled ones alone \(m = n\)"):
        assert PretrainedRegressor(FactorModel(2)).fit(X, y).m_ == 60


@quiet
def test_heads_and_latents_of_ones_own_are_taken_and_saved_ones_answer_the_same(tmp_path):
    _, X, y, unlabelled = rows()
    model = PretrainedClassifier(FactorModel(2), head=KNeighborsClassifier(3)).fit(X, y > 0, unlabelled)
    assert set(model.predict(X)) <= {False, True}
    with pytest.raises(TypeError, match="KNeighborsClassifier, which cannot be saved without pickle"):
        model.save(tmp_path / "no")
    PretrainedRegressor(FactorModel(2)).fit(X, y, unlabelled).save(tmp_path / "yes")
    back = PretrainedRegressor.load(tmp_path / "yes")
    assert isinstance(back.latent_, FactorModel) and isinstance(back.head_, Linear)
    np.testing.assert_array_equal(back.predict(X), PretrainedRegressor(FactorModel(2)).fit(X, y, unlabelled).predict(X))


X_GOOD, Y_GOOD = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12.0)


@quiet
@pytest.mark.parametrize(
    ("options", "fit", "message"),
    [
        (
            {},
            (X_GOOD, Y_GOOD, X_GOOD[:, :2]),
            "X_unlabeled has 2 features and X has 3; they must have the same columns",
        ),
        ({"n_latent": 3}, (X_GOOD, Y_GOOD), "n_factors must be below the n_features = 3 of X, got 3"),
        ({}, (X_GOOD, np.ones(12)), r"y is constant \(1 in all 12 rows\)"),
        ({}, (X_GOOD, np.full(12, np.inf)), "y contains infinity, the first in row 0"),
        ({}, (X_GOOD, np.r_[1.0, [np.nan] * 11]), "at least 2 rows must be labelled, got n_samples = 1"),
        ({}, (np.where(np.eye(12, 3) > 0, np.nan, X_GOOD), Y_GOOD), "X contains 3 missing"),
        ({}, (X_GOOD, Y_GOOD, X_GOOD * np.inf), "X_unlabeled contains 36"),
        ({"latent": "forest"}, (X_GOOD, Y_GOOD), "latent must be one of .* or an estimator, got 'forest'"),
        ({"head": "table"}, (X_GOOD, Y_GOOD), "head must be 'ols', 'ridge' or an estimator, got 'table'"),
        ({"n_latent": 0}, (X_GOOD, Y_GOOD), "n_latent must be 'auto' or a whole number >= 1, got 0"),
        ({"latent": FactorModel(1), "n_latent": 2}, (X_GOOD, Y_GOOD), "n_latent=2 is for latents by name"),
        ({"pretrain_on": "test"}, (X_GOOD, Y_GOOD), "pretrain_on must be one of"),
        ({}, (X_GOOD, Y_GOOD[:5]), "X and y must have as many rows, got 12 and 5"),
    ],
)
def test_bad_input_of_a_regressor_is_named(options, fit, message):
    with pytest.raises(ValueError, match=message):
        PretrainedRegressor(**options).fit(*fit)


@quiet
@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({}, np.zeros(12, int), "y must have at least 2 classes, got 1 class: "),
        (
            {"latent": FactorModel(1)},
            Y_GOOD.astype(int) % 2,
            "head='table' needs a latent with predict_proba, FactorModel",
        ),
        ({"head": "ols"}, Y_GOOD.astype(int) % 2, "head must be 'table', 'logistic' or an estimator"),
        ({"smoothing": 0}, Y_GOOD.astype(int) % 2, "smoothing must be > 0, got 0"),
    ],
)
def test_bad_input_of_a_classifier_is_named(options, y, message):
    with pytest.raises(ValueError, match=message):
        PretrainedClassifier(**options).fit(X_GOOD, y)


def test_bounds_are_shapes_and_say_so():
    found = bound("mixture", 10_000, 400, 100, 4)
    assert found["pretraining"] == pytest.approx(0.2) and found["head"] == pytest.approx(0.1)
    assert found["supervised"] == pytest.approx(1.0) and "not risks" in found["note"]
    with pytest.raises(ValueError, match="case must be one of"):
        bound("circle", 1, 1, 1, 1)


@pytest.mark.parametrize("violated", [False, True])
def test_the_report_recommends_what_the_condition_says(violated):
    rng = np.random.default_rng(3)
    truth = FactorTruth.draw(rng, 40, 3, violated=violated)
    X, y = truth.sample(80, rng)
    report = pretraining_report(truth.sample(2000, rng)[0], X, y, latent=FactorModel(3))
    assert report.recommended == ("supervised" if violated else "pretrained"), str(report)
    assert "80 labelled and 2000 unlabelled rows" in str(report) and report.separation > 1
    with pytest.raises(ValueError, match="2 labelled rows a part, got 8 rows"):
        pretraining_report(X, X[:8], y[:8], latent=FactorModel(3))


def test_the_report_of_classes_knows_how_far_centres_are_apart():
    rng = np.random.default_rng(0)
    truth = MixtureTruth.draw(rng, 20, 4, 2, norm=4.0)
    X, y = truth.sample(60, rng)
    latent = GaussianMixture(4, covariance="spherical", variance=1.0, n_init=3, random_state=0)
    report = pretraining_report(truth.sample(1500, rng)[0], X, y, latent=latent)
    apart = min(np.linalg.norm(truth.means[i] - truth.means[j]) for i in range(4) for j in range(i))
    assert report.separation == pytest.approx(apart, rel=0.1) and report.recommended == "pretrained", str(report)


@quiet
@pytest.mark.parametrize("dtype", [object, "category", "string"])
def test_classes_that_pandas_has_as_missing_count_as_unlabelled(dtype):
    rng = np.random.default_rng(0)
    kind = np.array(["ant", "bee"])[np.arange(40) % 2]
    X = rng.normal(size=(40, 2)) + 6 * (kind == "bee")[:, None]
    told = pd.Series(np.where(np.arange(40) < 10, kind, None), dtype=dtype)
    model = PretrainedClassifier(n_latent=2).fit(X, told)
    assert (model.n_, model.m_) == (10, 40) and (model.predict(X) == kind).all()
