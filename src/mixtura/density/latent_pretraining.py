"""Two phases: a model of x by maximum likelihood on unlabelled rows, then a small head on its posterior from few labels.

Shapes: N rows of X of which n are labelled, m rows that the latent is fitted on, R columns of the latent, C classes.
Source: 2303.01566, alg. 1 (MLE + ERM); its factor models, Gaussian mixtures and contrastive pairs.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from mixtura.core.keeping import Keeping
from mixtura.data.tables import non_finite
from mixtura.density.inputs import as_matrix
from mixtura.density.latent_models import Together, fit_latent, is_mixture, latent_features, several
from mixtura.density.small_heads import fit_least_squares, fit_logistic, fit_ridge, fit_table

__all__ = ["PretrainedClassifier", "PretrainedRegressor", "labelled_rows"]

PRETRAIN_ON = ("all", "unlabeled")


class _TwoPhase(Keeping, BaseEstimator):
    """What both estimators share: the rows, and the first phase."""

    latent: Any
    head: Any
    n_latent: int | str
    pretrain_on: str
    seed: int

    def _checked(self, X: Any, *, reset: bool) -> np.ndarray:
        return as_matrix(self, X, reset=reset)

    def _pretrain(self, X_NF: np.ndarray, known_N: np.ndarray, X_unlabeled: Any) -> None:
        """The first phase: sets ``latent_``, ``m_`` and ``n_``."""
        if self.pretrain_on not in PRETRAIN_ON:
            raise ValueError(f"pretrain_on must be one of {list(PRETRAIN_ON)}, got {self.pretrain_on!r}")
        self.n_ = int(known_N.sum())
        parts: list[Any] = []
        if X_unlabeled is not None:
            parts.append(self._unlabelled(X_unlabeled))
        paired = _paired(self.latent)
        if paired and not parts:
            raise ValueError("views='pairs' needs X_unlabeled, pairs of shape (m, 2, features)")
        if not paired and not known_N.all():
            parts.append(X_NF[~known_N])
        if not parts:
            warnings.warn(
                f"no unlabelled rows: the latent is fitted on the {self.n_} labelled ones alone (m = n), which is a reduction "
                "of dimension and not pretraining; give X_unlabeled, or rows without a target",
                UserWarning,
                stacklevel=4,
            )
        if not parts or (self.pretrain_on == "all" and not paired):
            parts.append(X_NF[known_N])
        if any(several(part) for part in parts):
            rows: Any = Together(*parts)
            self.m_ = sum(map(len, rows))
        else:
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
            self.m_ = len(rows)
        self.latent_ = fit_latent(self.latent, self.n_latent, rows, self.seed)

    def _unlabelled(self, X: Any) -> Any:
        """Unlabelled rows as an array of as many columns as X, or a path or batches as they are."""
        if several(X):
            first = next(iter(Together(X)), None)
            shape: tuple[int, ...] = (0, self.n_features_in_) if first is None else np.shape(first)
        else:
            shape = np.shape(X)
        wanted = 3 if _paired(self.latent) else 2
        if len(shape) != wanted or (wanted == 3 and shape[1] != 2):
            form = "(m, 2, features), pairs of rows" if wanted == 3 else "(m, features)"
            raise ValueError(f"X_unlabeled must have shape {form}, got {shape}")
        if shape[-1] != self.n_features_in_:
            raise ValueError(
                f"X_unlabeled has {shape[-1]} features and X has {self.n_features_in_}; they must have the same columns"
            )
        if several(X):
            return X
        if wanted == 2:
            return as_matrix(self, X, reset=False, name="X_unlabeled")
        x = np.asarray(X, dtype=np.float64)
        if problem := non_finite(x.reshape(len(x), -1)):
            raise ValueError(f"X_unlabeled contains {problem}")
        return x

    def _features(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "head_")
        return latent_features(self.latent_, self._checked(X, reset=False))


class PretrainedRegressor(RegressorMixin, _TwoPhase):
    """Regression on a latent that unlabelled rows teach.

    Parameters
    ----------
    latent : {"factor", "mixture", "contrastive"} or estimator, default="factor"
        The model of x; an estimator (:class:`FactorModel`, :class:`GaussianMixture`, :class:`ContrastiveModel`, or any with
        ``fit(X)`` and ``transform`` or ``predict_proba``) is cloned. See :func:`mixtura.density.latent_models.fit_latent`.
    head : {"ols", "ridge"} or estimator, default="ols"
        What is fitted on the posterior: least squares, ridge with its penalty by generalised cross-validation, or any
        regressor. Where there are no more labels than columns, "ols" becomes "ridge" and says so.
    n_latent : int or "auto", default="auto"
        Size of a latent given by name.
    fit_intercept : bool, default=True
        Whether the line has an intercept; the theory's has none.
    pretrain_on : {"all", "unlabeled"}, default="all"
        Whether the latent also sees the rows with a target, or, as in algorithm 1, the others alone.
    seed : int, default=0

    Attributes
    ----------
    latent_, head_ : the fitted parts.
    m_, n_ : int
        Rows that the latent was fitted on, and labels.

    Examples
    --------
    >>> from mixtura.density import FactorModel
    >>> rng = np.random.default_rng(0)
    >>> B, z = rng.normal(size=(30, 2)), rng.normal(size=(2000, 2))
    >>> X, y = z @ B.T + rng.normal(size=(2000, 30)), z @ [1.0, -1.0]
    >>> model = PretrainedRegressor(FactorModel(2)).fit(X[:20], y[:20], X[20:1000])
    >>> model.m_, model.n_, bool(model.score(X[1000:], y[1000:]) > 0.9)
    (1000, 20, True)
    """

    def __init__(
        self,
        latent: Any = "factor",
        *,
        head: Any = "ols",
        n_latent: int | str = "auto",
        fit_intercept: bool = True,
        pretrain_on: str = "all",
        seed: int = 0,
    ) -> None:
        self.latent = latent
        self.head = head
        self.n_latent = n_latent
        self.fit_intercept = fit_intercept
        self.pretrain_on = pretrain_on
        self.seed = seed

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # a target may depend on what the latent leaves out
        return tags

    def fit(self, X: Any, y: Any, X_unlabeled: Any = None) -> Self:
        """Fit the latent, then the head.

        Parameters
        ----------
        X : array-like of shape (N, F)
        y : array-like of shape (N,)
            NaN where a row has no target.
        X_unlabeled : array-like of shape (m, F), memory map, iterable of batches or path; pairs (m, 2, F) for views="pairs"
            More rows without a target.

        Raises
        ------
        ValueError
            Columns that differ, values that are not finite, fewer than 2 targets, all targets alike, an unknown name.

        Warns
        -----
        UserWarning
            No row without a target, or no more targets than columns of the latent.
        """
        if isinstance(self.head, str) and self.head not in ("ols", "ridge"):
            raise ValueError(f"head must be 'ols', 'ridge' or an estimator, got {self.head!r}")
        if y is None:
            raise ValueError("this regressor requires y to be passed, but the target y is None")
        X_NF = self._checked(X, reset=True)
        y_N = np.asarray(column_or_1d(y, warn=True), dtype=np.float64)
        if np.isinf(y_N).any():
            raise ValueError(f"y contains infinity, the first in row {int(np.isinf(y_N).argmax())}")
        known_N = labelled_rows(X_NF, y_N, ~np.isnan(y_N))
        if y_N[known_N].min() == y_N[known_N].max():
            raise ValueError(
                f"y is constant ({y_N[known_N][0]:g} in all {known_N.sum()} rows): there is nothing to learn"
            )
        self._pretrain(X_NF, known_N, X_unlabeled)
        z_nR, y_n = latent_features(self.latent_, X_NF[known_N]), y_N[known_N]
        if not isinstance(self.head, str):
            self.head_ = clone(self.head).fit(z_nR, y_n)
            return self
        fit = {"ols": fit_least_squares, "ridge": fit_ridge}[self.head]
        if self.head == "ols" and len(y_n) <= z_nR.shape[1] + self.fit_intercept:
            warnings.warn(
                f"{len(y_n)} targets do not determine least squares on {z_nR.shape[1]} columns of the latent; ridge took its "
                "place. Give more targets, a smaller n_latent, or head='ridge'",
                UserWarning,
                stacklevel=2,
            )
            fit = fit_ridge
        self.head_ = fit(z_nR, y_n, intercept=self.fit_intercept)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Targets, shape (N,)."""
        return np.asarray(self.head_.predict(self._features(X)) if hasattr(self, "head_") else self._features(X))


class PretrainedClassifier(ClassifierMixin, _TwoPhase):
    """Classification on a latent that unlabelled rows teach.

    Parameters
    ----------
    latent : {"mixture", "factor", "contrastive"} or estimator, default="mixture"
        As in :class:`PretrainedRegressor`.
    head : {"table", "logistic"} or estimator, default="table"
        "table": p(class | component), by maximum likelihood on the responsibilities, for latents with ``predict_proba``.
        "logistic": multinomial logistic regression on the posterior, its penalty by cross-validation.
    n_latent : int or "auto", default="auto"
        Size of a latent given by name.
    smoothing : float, default=0.1
        Counts added to every class of a component, > 0.
    pretrain_on : {"all", "unlabeled"}, default="all"
        Whether the latent also sees the labelled rows.
    seed : int, default=0

    Attributes
    ----------
    classes_ : ndarray of shape (C,)
    latent_, head_, m_, n_ : as in :class:`PretrainedRegressor`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> group = rng.integers(3, size=600)
    >>> X = rng.normal(size=(600, 2)) + 6 * np.array([[0, 0], [0, 1], [1, 0]])[group]
    >>> y = np.where(group == 0, "far", "near")
    >>> model = PretrainedClassifier(n_latent=3).fit(X[:9], y[:9], X[9:300])
    >>> bool(model.score(X[300:], y[300:]) > 0.95)
    True
    """

    def __init__(
        self,
        latent: Any = "mixture",
        *,
        head: Any = "table",
        n_latent: int | str = "auto",
        smoothing: float = 0.1,
        pretrain_on: str = "all",
        seed: int = 0,
    ) -> None:
        self.latent = latent
        self.head = head
        self.n_latent = n_latent
        self.smoothing = smoothing
        self.pretrain_on = pretrain_on
        self.seed = seed

    def fit(self, X: Any, y: Any, X_unlabeled: Any = None) -> Self:
        """Fit the latent, then the head.

        Parameters
        ----------
        X : array-like of shape (N, F)
        y : array-like of shape (N,)
            Classes; -1, NaN, None or "" where a row has none.
        X_unlabeled : as in :meth:`PretrainedRegressor.fit`

        Raises
        ------
        ValueError
            As there; one class only; head="table" on a latent without ``predict_proba``.

        Warns
        -----
        UserWarning
            No row without a class.
        """
        if isinstance(self.head, str) and self.head not in ("table", "logistic"):
            raise ValueError(f"head must be 'table', 'logistic' or an estimator, got {self.head!r}")
        if not self.smoothing > 0:
            raise ValueError(f"smoothing must be > 0, got {self.smoothing}")
        if y is None:
            raise ValueError("this classifier requires y to be passed, but the target y is None")
        X_NF = self._checked(X, reset=True)
        y_N = column_or_1d(y, warn=True)
        known_N = labelled_rows(X_NF, y_N, _has_class(y_N))
        check_classification_targets(y_N[known_N])
        self.classes_, class_n = np.unique(y_N[known_N], return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least 2 classes, got 1 class: {self.classes_[0]!r}")
        self._pretrain(X_NF, known_N, X_unlabeled)
        if self.head == "table" and not is_mixture(self.latent_):
            raise ValueError(f"head='table' needs a latent with predict_proba, {type(self.latent_).__name__} has none")
        z_nR = latent_features(self.latent_, X_NF[known_N])
        if not isinstance(self.head, str):
            self.head_ = clone(self.head).fit(z_nR, class_n)
        elif self.head == "table":
            self.head_ = fit_table(z_nR, class_n, len(self.classes_), smoothing=self.smoothing)
        else:
            self.head_ = fit_logistic(z_nR, class_n, len(self.classes_), seed=self.seed)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each class, shape (N, C), rows sum to 1."""
        features = self._features(X)
        return np.asarray(self.head_.predict_proba(features))

    def predict(self, X: Any) -> np.ndarray:
        """Most probable class, shape (N,)."""
        chosen = self.predict_proba(X).argmax(1)
        return self.classes_[chosen]


def labelled_rows(X: np.ndarray, y: np.ndarray, known: np.ndarray) -> np.ndarray:
    """``known`` again, checked: as many as rows of X, and at least two.

    Raises:
        ValueError: otherwise.
    """
    if len(y) != len(X):
        raise ValueError(f"X and y must have as many rows, got {len(X)} and {len(y)}")
    if known.sum() < 2:
        raise ValueError(f"at least 2 rows must be labelled, got n_samples = {int(known.sum())}")
    return known


def _has_class(y: np.ndarray) -> np.ndarray:
    """Which rows are labelled."""
    if y.dtype.kind == "f":
        return ~np.isnan(y) & (y != -1)
    if y.dtype.kind in "biu":
        return y != -1
    import pandas as pd

    return np.array([not (gone or v == "" or v == -1) for v, gone in zip(y.tolist(), pd.isna(y), strict=True)])


def _paired(latent: Any) -> bool:
    return getattr(latent, "views", None) == "pairs"
