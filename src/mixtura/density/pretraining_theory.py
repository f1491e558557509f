"""The theory's own data, where the excess risk of any predictor is known, and what its bounds look like.

Shapes: N samples, F features, R factors, K components, C classes.
Source: 2303.01566, sec. 4 (factor models and linear regression), sec. 5 (Gaussian mixtures and classification); theorem 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["FactorTruth", "MixtureTruth", "bound", "excess_risk"]

CASES = ("factor", "mixture", "contrastive")
TEST = 100_000  # draws that the risk of a classifier is averaged over
BLOCK = 10_000


@dataclass(frozen=True)
class FactorTruth:
    """x = B z + u and y = beta'z + gamma'u + noise e, all of z, u, e standard normal.

    Attributes:
        loadings: B, shape (F, R).
        coef: beta, shape (R,).
        noise: standard deviation of y given z and u.
        outside: gamma, shape (F,). The theory has none; with B'gamma = 0 the latent says nothing about y.
    """

    loadings: np.ndarray
    coef: np.ndarray
    noise: float
    outside: np.ndarray

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        n_features: int = 100,
        n_factors: int = 5,
        *,
        loading: float = 0.5,
        noise: float = 0.5,
        violated: bool = False,
    ) -> FactorTruth:
        """Loadings of standard deviation ``loading``, standard normal coefficients.

        Args:
            rng: source of chance.
            n_features: F.
            n_factors: R.
            loading: standard deviation of every entry of B.
            noise: standard deviation of y.
            violated: whether y comes from the noise space alone: beta = 0 and gamma of length 2 orthogonal to B.
        """
        loadings_FR = loading * rng.normal(size=(n_features, n_factors))
        coef_R, outside_F = rng.normal(size=n_factors), np.zeros(n_features)
        if violated:
            drawn_F = rng.normal(size=n_features)
            drawn_F -= loadings_FR @ np.linalg.lstsq(loadings_FR, drawn_F, rcond=None)[0]
            coef_R, outside_F = np.zeros(n_factors), 2 * drawn_F / np.linalg.norm(drawn_F)
        return cls(loadings_FR, coef_R, noise, outside_F)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """X (n, F) and y (n,)."""
        f, r = self.loadings.shape
        z_NR, u_NF = rng.normal(size=(n, r)), rng.normal(size=(n, f))
        return z_NR @ self.loadings.T + u_NF, z_NR @ self.coef + u_NF @ self.outside + self.noise * rng.normal(size=n)

    @cached_property
    def covariance(self) -> np.ndarray:
        """Of x, shape (F, F)."""
        return self.loadings @ self.loadings.T + np.eye(len(self.loadings))

    @cached_property
    def best(self) -> np.ndarray:
        """The Bayes predictor's weights, (BB' + I)^-1 (B beta + gamma), shape (F,)."""
        return np.linalg.solve(self.covariance, self.loadings @ self.coef + self.outside)

    def excess_risk(self, weights: np.ndarray, intercept: float = 0.0) -> float:
        """E (y - weights'x - intercept)^2 less that of the Bayes predictor: a quadratic form, exactly."""
        away_F = np.asarray(weights) - self.best
        return float(away_F @ self.covariance @ away_F + intercept**2)


@dataclass(frozen=True)
class MixtureTruth:
    """x from one of K unit balls of equal weight, y from the ball's own distribution over classes.

    Attributes:
        means: shape (K, F).
        table: p(class | component), shape (K, C).
    """

    means: np.ndarray
    table: np.ndarray

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        n_features: int = 100,
        n_components: int = 10,
        n_classes: int = 4,
        *,
        norm: float = 4.2,
        flipped: float = 0.1,
    ) -> MixtureTruth:
        """Centres of length ``norm`` in random directions; component k has class k mod C, replaced by another with
        probability ``flipped``."""
        means_KF = rng.normal(size=(n_components, n_features))
        means_KF *= norm / np.linalg.norm(means_KF, axis=1, keepdims=True)
        own_KC = np.eye(n_classes)[np.arange(n_components) % n_classes]
        return cls(means_KF, own_KC * (1 - flipped) + (1 - own_KC) * flipped / (n_classes - 1))

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """X (n, F) and classes (n,)."""
        component_N = rng.integers(len(self.means), size=n)
        class_N = (rng.random(n)[:, None] > self.table.cumsum(1)[component_N]).sum(1)
        X_NF = self.means[component_N] + rng.normal(size=(n, self.means.shape[1]))
        return X_NF, np.minimum(class_N, self.table.shape[1] - 1)

    def responsibilities(self, X: np.ndarray) -> np.ndarray:
        """p(component | x), shape (N, K)."""
        logits_NK = X @ self.means.T - np.square(self.means).sum(1) / 2
        weights_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
        return weights_NK / weights_NK.sum(1, keepdims=True)

    def class_probabilities(self, X: np.ndarray) -> np.ndarray:
        """p(class | x), shape (N, C)."""
        return self.responsibilities(X) @ self.table

    def excess_risk(self, predict: Any, n: int = TEST, seed: int | np.random.Generator = 0) -> float:
        """Probability of an error of ``predict`` (X -> classes) less that of the Bayes rule.

        Over n draws of x; given x, errors are not drawn but counted by their probability.
        """
        rng, total = np.random.default_rng(seed), 0.0
        for start in range(0, n, BLOCK):
            X_BF, _ = self.sample(min(BLOCK, n - start), rng)
            p_BC = self.class_probabilities(X_BF)
            chosen_B = np.asarray(predict(X_BF)).astype(int)
            total += float((p_BC.max(1) - p_BC[np.arange(len(X_BF)), chosen_B]).sum())
        return total / n


def excess_risk(model: Any, truth: FactorTruth | MixtureTruth) -> float:
    """How much worse than the Bayes predictor a fitted model is: squared error, or probability of an error.

    Args:
        model: with ``predict``. For factors it must be linear in x (`PretrainedRegressor` on a `FactorModel`, any linear
            regression), since then the risk is a quadratic form; for mixtures it predicts the classes 0 ... C - 1.
        truth: what the data come from.
    Raises:
        ValueError: for factors, a model that is not linear.
    Source:
        E (y - w'x)^2 - Bayes = (w - w*)' (BB' + I) (w - w*) with w* = (BB' + I)^-1 B beta.
    """
    if isinstance(truth, MixtureTruth):
        return truth.excess_risk(model.predict)
    f = len(truth.loadings)
    probe_F = np.linspace(-3.0, 2.0, f)
    answers = np.asarray(model.predict(np.vstack([np.zeros(f), np.eye(f), probe_F])), dtype=np.float64).ravel()
    intercept, weights_F = answers[0], answers[1 : f + 1] - answers[0]
    there = intercept + weights_F @ probe_F
    if abs(there - answers[-1]) > 1e-6 * (1 + np.abs(weights_F * probe_F).sum() + abs(intercept)):
        raise ValueError(
            "model is not linear in x, so its risk is no quadratic form; draw from truth.sample and average its errors"
        )
    return truth.excess_risk(weights_F, float(intercept))


def bound(case: str, m: int, n: int, d: int, r_or_K: int, kappa: float = 1.0, L: float = 1.0) -> dict[str, Any]:
    """Shapes of the theory's upper bounds with every constant 1, without logarithms; no figure of it is a risk.

    Args:
        case: "factor", "mixture" or "contrastive".
        m: unlabelled samples.
        n: labelled samples.
        d: features.
        r_or_K: factors, components or features of the encoder.
        kappa: of the informative condition.
        L: bound of the loss.
    Returns:
        ``pretraining`` (kappa L sqrt(d r / m)), ``head`` (L sqrt(r / n)), their sum ``two_phase``, ``supervised``
        (L sqrt(d / n); for mixtures L sqrt(d K / n)), and a ``note`` that says what these are.
    Raises:
        ValueError: an unknown case, or a size below 1.
    Source:
        Theorem 3.3 with the covering numbers of sec. 4-6. An upper bound of order 1/sqrt(n) does not say that the risk falls
        as slowly: with the squared loss and a true model it falls as 1/n.
    Example:
        >>> bound("factor", 10_000, 100, 100, 4)["head"]
        0.2
    """
    if case not in CASES:
        raise ValueError(f"case must be one of {list(CASES)}, got {case!r}")
    if min(m, n, d, r_or_K) < 1:
        raise ValueError(f"m, n, d and r_or_K must be at least 1, got {m}, {n}, {d} and {r_or_K}")
    pretraining, head = kappa * L * math.sqrt(d * r_or_K / m), L * math.sqrt(r_or_K / n)
    whole = d * r_or_K if case == "mixture" else d
    return {
        "pretraining": pretraining,
        "head": head,
        "two_phase": pretraining + head,
        "supervised": L * math.sqrt(whole / n),
        "note": "shapes of upper bounds with constants 1 and no logarithms, not risks",
    }
