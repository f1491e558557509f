"""Small predictors on a latent: least squares, ridge, logistic, and a table of classes by component.

Each fit gives a record that predicts and can be saved.

Shapes: N samples, R columns of the latent, K components, C classes.
Source: 2303.01566, alg. 1 (empirical risk over the head alone); with the squared loss the Bayes predictor under the model is
linear in the posterior mean, and with classes behind components it is the posterior times a table.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import numpy as np

__all__ = ["ALPHAS", "ClassTable", "Linear", "Logits", "fit_least_squares", "fit_logistic", "fit_ridge", "fit_table"]

log = logging.getLogger(__name__)

ALPHAS = np.logspace(-2, 4, 25)  # of ridge; chosen by generalised cross-validation
PENALTIES = np.logspace(-4, 1, 6)  # C of logistic regression
ROUGH = {"tol": 1e-3, "max_iter": 100}  # fits that are only scored: their ranks settle long before their last digits
JITTER = 1e-8  # of least squares, a share of the columns' mean square


@dataclass(frozen=True)
class Linear:
    """A line in the latent: ``coef`` of shape (R,) and ``intercept``; ``alpha`` is the penalty it was fitted with."""

    coef: np.ndarray
    intercept: float
    alpha: float = 0.0

    def predict(self, latent: np.ndarray) -> np.ndarray:
        """Shape (N,)."""
        return latent @ self.coef + self.intercept


@dataclass(frozen=True)
class ClassTable:
    """Classes by component: ``table`` of shape (K, C), rows sum to 1."""

    table: np.ndarray

    def predict_proba(self, latent: np.ndarray) -> np.ndarray:
        """Probabilities of classes, shape (N, C), from those of components."""
        found = latent @ self.table
        return found / found.sum(1, keepdims=True)


@dataclass(frozen=True)
class Logits:
    """Softmax of lines: ``coef`` of shape (C, R), ``intercept`` of shape (C,), ``penalty`` the inverse strength C."""

    coef: np.ndarray
    intercept: np.ndarray
    penalty: float

    def predict_proba(self, latent: np.ndarray) -> np.ndarray:
        """Probabilities of classes, shape (N, C)."""
        scores_NC = latent @ self.coef.T + self.intercept
        weights_NC = np.exp(scores_NC - scores_NC.max(1, keepdims=True))
        return weights_NC / weights_NC.sum(1, keepdims=True)


def fit_least_squares(latent: np.ndarray, y: np.ndarray, *, intercept: bool) -> Linear:
    """Least squares; a share of 1e-8 of the columns' mean square keeps columns without variance out."""
    z_NR, mean_R, middle = _centred(latent, y, intercept)
    gram_RR = z_NR.T @ z_NR
    jitter = JITTER * max(float(np.trace(gram_RR)) / len(gram_RR), np.finfo(float).tiny / JITTER)
    coef_R = np.linalg.solve(gram_RR + jitter * np.eye(len(gram_RR)), z_NR.T @ (y - middle))
    return Linear(coef_R, float(middle - mean_R @ coef_R))


def fit_ridge(latent: np.ndarray, y: np.ndarray, *, intercept: bool) -> Linear:
    """Ridge whose penalty is chosen among 25 by generalised cross-validation.

    The score of a penalty is the mean squared residual over (1 - degrees of freedom / N)^2 (Golub, Heath and Wahba 1979).
    """
    z_NR, mean_R, middle = _centred(latent, y, intercept)
    n = len(y)
    left_NP, singular_P, right_PR = np.linalg.svd(z_NR, full_matrices=False)
    along_P = left_NP.T @ (y - middle)
    outside = float(np.square(y - middle).sum() - np.square(along_P).sum())
    squares_P = np.square(singular_P)
    kept_AP = squares_P / (squares_P + ALPHAS[:, None])
    residual_A = np.maximum(outside, 0.0) + np.square((1 - kept_AP) * along_P).sum(1)
    free_A = 1 - (kept_AP.sum(1) + intercept) / n
    scores_A = np.where(free_A > 1e-6, residual_A / np.maximum(free_A, 1e-6) ** 2, np.inf)
    alpha = float(ALPHAS[int(scores_A.argmin())])
    coef_R = right_PR.T @ (singular_P / (squares_P + alpha) * along_P)
    return Linear(coef_R, float(middle - mean_R @ coef_R), alpha)


def fit_logistic(latent: np.ndarray, classes: np.ndarray, n_classes: int, *, folds: int = 5, seed: int = 0) -> Logits:
    """Multinomial logistic regression, its penalty among six by stratified cross-validation.

    Args:
        latent: shape (N, R).
        classes: shape (N,), in [0, n_classes), each there at least once.
        n_classes: C.
        folds: parts, fewer where no class has as many rows.
        seed: of the parts.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score

    with warnings.catch_warnings():
        # Of classes rarer than parts, parts without a class, and fits cut off: each lowers a score, and no more.
        warnings.simplefilter("ignore")
        commonest = int(np.bincount(classes, minlength=n_classes).max())
        kind = StratifiedKFold if commonest >= 2 else KFold
        parts = kind(max(2, min(folds, commonest)), shuffle=True, random_state=seed)
        scores = [
            np.nanmean(cross_val_score(LogisticRegression(C=c, **ROUGH), latent, classes, cv=parts)) for c in PENALTIES
        ]
        # Among equals the strongest penalty; where no part could be fitted, 1.
        best = float(PENALTIES[int(np.nanargmax(scores))]) if np.isfinite(scores).any() else 1.0
        found = LogisticRegression(C=best, max_iter=200).fit(latent, classes)
    coef, intercept = found.coef_, found.intercept_
    if len(coef) == 1:  # two classes: one line, whose logit is that of the second
        coef, intercept = np.vstack([np.zeros_like(coef), coef]), np.concatenate([[0.0], intercept])
    return Logits(coef, intercept, best)


def fit_table(latent: np.ndarray, classes: np.ndarray, n_classes: int, *, smoothing: float) -> ClassTable:
    """Share of each class in each component: (sum of responsibilities + smoothing) / (... + smoothing * C).

    Args:
        latent: responsibilities, shape (N, K), >= 0.
        classes: shape (N,), in [0, n_classes).
        n_classes: C.
        smoothing: counts added to every class, > 0.
    """
    counts_KC = latent.T @ np.eye(n_classes)[classes] + smoothing
    return ClassTable(counts_KC / counts_KC.sum(1, keepdims=True))


def _centred(latent: np.ndarray, y: np.ndarray, intercept: bool) -> tuple[np.ndarray, np.ndarray, float]:
    if not intercept:
        return latent, np.zeros(latent.shape[1]), 0.0
    mean_R = latent.mean(0)
    return latent - mean_R, mean_R, float(y.mean())
