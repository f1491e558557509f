"""Does pretraining pay here? Cross-validated risks of four ways to use the same labels, and which to take.

Source: 2303.01566; that its informative condition cannot be checked from x alone is why labels decide here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.utils.multiclass import type_of_target

from mixtura.density.factor_model import FactorModel
from mixtura.density.latent_models import fit_latent, is_mixture, latent_features
from mixtura.density.latent_pretraining import PretrainedClassifier, PretrainedRegressor
from mixtura.density.small_heads import fit_logistic, fit_ridge

__all__ = ["WAYS", "Fitted", "Report", "fitted_ways", "pretraining_report", "separation"]

WAYS = {
    "pretrained": "head on the latent of all unlabelled rows",
    "without": "head on the latent of the labelled rows alone",
    "supervised": "ridge or logistic regression on x",
    "both": "ridge or logistic regression on x and the latent of all unlabelled rows",
}
INNER = 3  # parts within a part, to tune logistic regression
WORTH = 0.05  # of a risk: ridge on x and on x with a latent of x often differ by less than a thousandth, in every row


@dataclass(frozen=True)
class Report:
    """Held-out risks and a recommendation.

    Attributes:
        risk: way -> mean squared error, or share of errors, over the labelled rows, each predicted without it.
        standard_error: way -> of that mean.
        recommended: a key of `WAYS`.
        reason: in a sentence.
        separation: how well the latent's parts are told apart: of factors the variance of the weakest beyond the noise, in
            units of the noise; of components the smallest distance of two centres in units of their spread; NaN for others.
        m, n: unlabelled and labelled rows.
    """

    risk: dict[str, float]
    standard_error: dict[str, float]
    recommended: str
    reason: str
    separation: float
    m: int
    n: int

    def __str__(self) -> str:
        lines = [f"{self.n} labelled and {self.m} unlabelled rows"]
        for way, text in WAYS.items():
            mark = "->" if way == self.recommended else "  "
            lines.append(f"{mark} {way:<11} {self.risk[way]:9.4g} ± {self.standard_error[way]:.2g}  {text}")
        return "\n".join([*lines, self.reason])


def pretraining_report(
    X_unlabeled: Any, X: Any, y: Any, *, latent: Any, n_latent: int | str = "auto", cv: int = 5, seed: int = 0
) -> Report:
    """Cross-validate four ways to use the labels, and recommend one.

    Args:
        X_unlabeled: shape (m, F).
        X: labelled rows, shape (n, F).
        y: targets, or classes, shape (n,).
        latent, n_latent: as in :class:`PretrainedRegressor`; the latent is fitted once on X_unlabeled, and in each part again on
            the labelled rows that are not held out.
        cv: parts, stratified for classes.
        seed: source of chance.
    Returns:
        The risks, and the recommendation: of "pretrained" and "supervised" the better one; another way only where it is better
        than that by a twentieth and by two standard errors of the difference, since it costs more.
    Raises:
        ValueError: fewer labelled rows than parts, and what the estimators raise.
    """
    X_nF, y_n = np.asarray(X, dtype=np.float64), np.asarray(y)
    continuous = y_n.dtype.kind == "f" and type_of_target(y_n).startswith("continuous")
    if cv < 2 or len(X_nF) < 2 * cv:
        raise ValueError(f"cv={cv} parts need at least 2 parts and 2 labelled rows a part, got {len(X_nF)} rows")
    once = fit_latent(latent, n_latent, X_unlabeled, seed)
    latent = latent.template if isinstance(latent, Fitted) else latent
    losses = {way: np.full(len(y_n), np.nan) for way in WAYS}
    with warnings.catch_warnings():
        # Ways without unlabelled rows warn of just that, and small parts of what they lack.
        warnings.simplefilter("ignore")
        parts = (KFold if continuous else StratifiedKFold)(cv, shuffle=True, random_state=seed)
        for train, held in parts.split(X_nF, None if continuous else y_n):
            for way, predict in fitted_ways(once, latent, n_latent, X_nF[train], y_n[train], continuous, seed).items():
                found = predict(X_nF[held])
                losses[way][held] = (found - y_n[held]) ** 2 if continuous else found != y_n[held]
    risk = {way: float(loss_n.mean()) for way, loss_n in losses.items()}
    error = {way: float(loss_n.std(ddof=1) / np.sqrt(len(loss_n))) for way, loss_n in losses.items()}
    chosen = min(("pretrained", "supervised"), key=lambda way: risk[way])
    for other in ("both", "without"):
        gain_n = losses[chosen] - losses[other]
        if gain_n.mean() > max(2 * gain_n.std(ddof=1) / np.sqrt(len(gain_n)), WORTH * risk[chosen]):
            chosen = other
    return Report(risk, error, chosen, _reason(chosen, risk), separation(once), len(X_unlabeled), len(y_n))


def separation(model: Any) -> float:
    """How well a latent's parts are told apart, as in `Report`."""
    if isinstance(model, FactorModel):
        return model.gap_
    if not hasattr(model, "gaussians_") or model.gaussians_.n_components < 2:
        return float("nan")
    centres_CF = model.gaussians_.means.numpy()
    variance_CF = model.gaussians_.full_covariances().diagonal(dim1=-2, dim2=-1).numpy()
    apart_CCF = centres_CF[:, None] - centres_CF[None]
    squared_CC = (apart_CCF**2 / ((variance_CF[:, None] + variance_CF[None]) / 2)).sum(-1)
    return float(np.sqrt(squared_CC[~np.eye(len(centres_CF), dtype=bool)].min()))


Predict = Callable[[np.ndarray], np.ndarray]


def fitted_ways(
    once: Any, latent: Any, n_latent: int | str, X: np.ndarray, y: np.ndarray, continuous: bool, seed: int
) -> dict[str, Predict]:
    """The four ways fitted to labelled rows, each as its ``predict``; ``once`` is the latent fitted on the unlabelled ones."""
    if continuous:
        alone: Any = PretrainedRegressor(latent, n_latent=n_latent, seed=seed)
    else:
        head = "table" if is_mixture(once) else "logistic"
        alone = PretrainedClassifier(latent, head=head, n_latent=n_latent, seed=seed)
    # The same estimator over a latent that is already fitted.
    pretrained = type(alone)(Fitted(once), **{"head": alone.head, "seed": seed})
    mean_F, scale_F = X.mean(0), X.std(0)
    scale_F = np.where(scale_F > 0, scale_F, 1.0)

    def columns(rows: np.ndarray) -> np.ndarray:
        return (rows - mean_F) / scale_F

    def wide(rows: np.ndarray) -> np.ndarray:
        return np.hstack([columns(rows), latent_features(once, rows)])

    return {
        "pretrained": pretrained.fit(X, y).predict,
        "without": _without(alone, X, y),
        "supervised": _on(columns, X, y, continuous, seed),
        "both": _on(wide, X, y, continuous, seed),
    }


def _without(alone: Any, X: np.ndarray, y: np.ndarray) -> Predict:
    """The estimator on the labelled rows alone; where they are too few for its latent, the mean or the commonest class."""
    try:
        return alone.fit(X, y).predict
    except ValueError:
        values, counts = np.unique(y, return_counts=True)
        common = values[counts.argmax()] if isinstance(alone, PretrainedClassifier) else y.mean()
        return lambda rows: np.full(len(rows), common)


def _on(columns: Predict, X: np.ndarray, y: np.ndarray, continuous: bool, seed: int) -> Predict:
    """Tuned ridge or logistic regression on columns made of x."""
    if continuous:
        line = fit_ridge(columns(X), y, intercept=True)
        return lambda rows: line.predict(columns(rows))
    classes, coded = np.unique(y, return_inverse=True)
    logits = fit_logistic(columns(X), coded, len(classes), folds=INNER, seed=seed)
    return lambda rows: classes[logits.predict_proba(columns(rows)).argmax(1)]


class Fitted:
    """A latent that is fitted already: cloning and fitting give it back, so that several reports share one fit.

    Args:
        model: the fitted latent.
        template: what `pretraining_report` fits to labelled rows alone; by default the model itself, fitted anew.
    """

    def __init__(self, model: Any, template: Any = None) -> None:
        self.model = model
        self.template = model if template is None else template

    def __sklearn_clone__(self) -> Fitted:
        return self

    def fit(self, X: Any) -> Any:
        """The model as it is."""
        return self.model


def _reason(chosen: str, risk: dict[str, float]) -> str:
    said = {
        "pretrained": "The latent of the unlabelled rows beats regression on x.",
        "without": "The labelled rows alone give a latent as good: the gain is one of fewer dimensions, not of unlabelled rows.",
        "supervised": "Regression on x is as good or better: what y depends on is not what x varies most in.",
        "both": "The latent adds to x, and does not replace it.",
    }[chosen]
    other = "supervised" if chosen != "supervised" else "pretrained"
    return f"{said} Held-out risk {risk[chosen]:.4g} against {risk[other]:.4g} ({other})."
