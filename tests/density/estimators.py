"""The room's estimators in one place: each is run through the contract, and what is skipped names its reason."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixtura.density import (
    AdjustedSDPClustering,
    CategoryDiscovery,
    ContrastiveModel,
    EnergyDensity,
    FactorModel,
    GatedRegression,
    GaussianMixture,
    PretrainedClassifier,
    PretrainedRegressor,
    ScaleMixtureClassifier,
    ScaleMixtureRegressor,
)

__all__ = ["ESTIMATORS", "Case"]


@dataclass(frozen=True)
class Case:
    """An estimator under contract.

    Attributes:
        make: builds it, small and quick.
        expected_failures: name of a scikit-learn check that does not apply -> why.
    """

    make: Callable[[], Any]
    expected_failures: Mapping[str, str] = field(default_factory=dict)


class UnlabelledMixture(GaussianMixture):
    """A mixture that is not told the labels, so that every check applies."""

    def fit(self, X, y=None, sample_weight=None):
        """Fit without labels."""
        return super().fit(X, sample_weight=sample_weight)

    def partial_fit(self, X, y=None, sample_weight=None):
        """Go on without labels."""
        return super().partial_fit(X, sample_weight=sample_weight)


ONE_COMPONENT = "sets n_components=1 and labels several classes, and every class needs a component of its own"
SAME_DRAW = "k-means++ draws other samples when one is repeated instead of weighted; from one start both agree (tested)"
MANY_COLUMNS = {
    "check_sample_weight_equivalence_on_dense_data": "fits 27 rows of 30 columns, fewer than one line has parameters, which is "
    "refused; on more rows weights are repetitions (tested)"
}
TOO_FEW = MANY_COLUMNS | dict.fromkeys(
    ("check_n_features_in_after_fitting", "check_estimators_nan_inf"),
    "fits fewer rows than two experts have parameters, which is refused; one line passes",
)
GATE = {
    "check_regressors_no_decision_function": "predict_proba is the gate, a distribution over experts and not over classes"
}
# A regressor's density is that of targets, so score_samples takes (X, y); these two checks call it with X alone.
NEEDS_Y = dict.fromkeys(
    ("check_methods_sample_order_invariance", "check_methods_subset_invariance"), "score_samples needs y"
)

NUMBERED = {
    "check_classifiers_classes": "labels are whole numbers, since -1 means unlabelled; the command line numbers names",
    "check_clustering": "fits without y, and discovery starts from labelled samples",
}
UNLABELLED = {"check_classifiers_classes": "-1 is one of its two labels, and here it means unlabelled"}

ESTIMATORS: dict[str, Case] = {
    "AdjustedSDPClustering": Case(lambda: AdjustedSDPClustering(2, max_iter=3)),
    "GaussianMixture": Case(
        lambda: GaussianMixture(4, random_state=0),
        {
            "check_dont_overwrite_parameters": ONE_COMPONENT,
            "check_fit2d_1feature": ONE_COMPONENT,
            "check_fit2d_predict1d": ONE_COMPONENT,
            "check_methods_sample_order_invariance": ONE_COMPONENT,
            "check_methods_subset_invariance": ONE_COMPONENT,
        },
    ),
    "CategoryDiscovery": Case(lambda: CategoryDiscovery(rounds=4, anneal=2, n_init=1), NUMBERED),
    "ContrastiveModel": Case(lambda: ContrastiveModel("linear", dim=2, epochs=2)),
    "FactorModel": Case(lambda: FactorModel(1)),
    "FactorModel, a noise a feature": Case(lambda: FactorModel(1, noise="diagonal", max_iter=50)),
    "PretrainedClassifier": Case(lambda: PretrainedClassifier(n_latent=3, head="logistic"), UNLABELLED),
    "PretrainedRegressor": Case(lambda: PretrainedRegressor("mixture", n_latent=2)),
    "EnergyDensity": Case(lambda: EnergyDensity(max_iter=5, width=8, depth=1, batch_size=16, noise_batch_size=16)),
    "GatedRegression": Case(lambda: GatedRegression(2, n_init=1, max_iter=20), TOO_FEW | GATE | NEEDS_Y),
    "GatedRegression of one line": Case(lambda: GatedRegression(1), MANY_COLUMNS | GATE | NEEDS_Y),
    "GaussianMixture without labels": Case(
        lambda: UnlabelledMixture(2, random_state=0), {"check_sample_weight_equivalence_on_dense_data": SAME_DRAW}
    ),
    "ScaleMixtureRegressor": Case(
        lambda: ScaleMixtureRegressor(n_restarts=0),
        NEEDS_Y,
    ),
    "ScaleMixtureClassifier": Case(lambda: ScaleMixtureClassifier(n_inducing=40, epochs=15, n_draws=20)),
}
