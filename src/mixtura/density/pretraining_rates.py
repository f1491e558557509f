"""How the excess risk falls with labels and with unlabelled rows, on the theory's own data, beside its rivals.

A replicate has one truth and one set of unlabelled rows for all numbers of labels; smaller m are its first rows.

Source: 2303.01566, sec. 4 and 5; the rivals are ridge and logistic regression on x, tuned by cross-validation, and the
two-phase estimator without unlabelled rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mixtura.density.factor_model import FactorModel
from mixtura.density.latent_pretraining import PretrainedClassifier, PretrainedRegressor
from mixtura.density.mixture import GaussianMixture
from mixtura.density.pretraining_theory import FactorTruth, MixtureTruth
from mixtura.density.rates import RateResult, measured_rates
from mixtura.density.small_heads import Linear, fit_least_squares, fit_logistic, fit_ridge, fit_table

__all__ = ["advantage_experiment", "two_phase"]

TEST = 10_000  # draws of x that errors of a classifier are averaged over, each by its probability
Case = Literal["factor", "mixture"]


def advantage_experiment(
    case: Case,
    sizes_n: Sequence[int],
    sizes_m: Sequence[int],
    replicates: int,
    seed: int = 0,
    *,
    rivals: bool = True,
    violated: bool = False,
    loading: float = 0.5,
    folder: Path | None = None,
    distributed: bool | Literal["auto"] = False,
) -> RateResult:
    """Excess risks over the number of labels, or over that of unlabelled rows.

    Args:
        case: "factor" (100 features, 5 factors, squared error) or "mixture" (100 features, 10 components, 4 classes, share
            of errors).
        sizes_n: numbers of labels. With one number only, the sizes of the result are those of m.
        sizes_m: numbers of unlabelled rows; with several n, each m gives a metric.
        replicates: at least 3.
        seed: replicate r has the same truth whatever the sizes.
        rivals: whether the rivals are measured too (over n only).
        violated: factors only: y comes from the noise of x, which no latent of x knows.
        loading: factors only: standard deviation of the loadings.
        folder, distributed: as in :func:`mixtura.density.rates.rate_experiment`.
    Returns:
        Metrics ``two-phase, m=...`` (over m: ``two-phase``), and of the rivals ``m=n`` (the same estimator without unlabelled
        rows), ``oracle`` (the true latent), ``supervised`` (ridge, logistic regression).
    Raises:
        ValueError: an unknown case, one n and one m, and what ``rate_experiment`` raises.
    """
    if case not in ("factor", "mixture"):
        raise ValueError(f"case must be 'factor' or 'mixture', got {case!r}")
    if violated and case != "factor":
        raise ValueError("violated=True is for case='factor'")
    if len(sizes_n) < 2 and len(sizes_m) < 2:
        raise ValueError(f"sizes_n or sizes_m must hold at least 2 sizes, got {list(sizes_n)} and {list(sizes_m)}")
    over_n = len(sizes_n) > 1
    most = max(sizes_m)
    job: Any = _Factors(seed, most, violated, loading) if case == "factor" else _Mixtures(seed, most)
    names = [f"two-phase, m={m}" for m in sizes_m] if over_n else ["two-phase"]
    if over_n and rivals:
        names += ["m=n", "oracle", "supervised"]

    def measure(size: int, which: Sequence[int], generators: Sequence[torch.Generator]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in names}
        for r, generator in zip(which, generators, strict=True):
            rng = np.random.default_rng(generator.initial_seed())
            n = size if over_n else sizes_n[0]
            X, y = job.truth(r).sample(n, rng)
            for m, name in zip(sizes_m if over_n else [size], names, strict=False):
                found[name].append(job.risk(r, job.latent(r, m), X, y))
            if over_n and rivals:
                for name, value in job.rivals(r, X, y).items():
                    found[name].append(value)
        return found

    return measured_rates(
        measure,
        names,
        sizes_n if over_n else sizes_m,
        replicates,
        seed,
        folder=folder,
        distributed=distributed,
    )


def two_phase(truth: FactorTruth | MixtureTruth, latent: Any) -> PretrainedRegressor | PretrainedClassifier:
    """The estimator of algorithm 1 on the theory's data: least squares without intercept, or the table."""
    if isinstance(truth, FactorTruth):
        return PretrainedRegressor(latent, fit_intercept=False, pretrain_on="unlabeled")
    return PretrainedClassifier(latent, pretrain_on="unlabeled")


class _Replicates:
    """Truths and latents of the replicates, each made once: rows are drawn again, fits are kept."""

    def __init__(self, seed: int, most: int) -> None:
        self.seed, self.most = seed, most
        self._truths: dict[int, Any] = {}
        self._latents: dict[tuple[int, int], Any] = {}

    def truth(self, r: int) -> Any:
        """Of replicate r."""
        if r not in self._truths:
            self._truths[r] = self.drawn(np.random.default_rng([self.seed, r, 0]))
        return self._truths[r]

    def latent(self, r: int, m: int) -> Any:
        """Fitted on the first m unlabelled rows of replicate r."""
        if (r, m) not in self._latents:
            rows = self.truth(r).sample(self.most, np.random.default_rng([self.seed, r, 1]))[0]
            self._latents[r, m] = self.fitted(rows[:m], r)
        return self._latents[r, m]

    def drawn(self, rng: np.random.Generator) -> Any:
        """A truth."""
        raise NotImplementedError

    def fitted(self, X: np.ndarray, r: int) -> Any:
        """A latent of the truth's kind and size."""
        raise NotImplementedError


class _Factors(_Replicates):
    def __init__(self, seed: int, most: int, violated: bool, loading: float) -> None:
        super().__init__(seed, most)
        self.violated, self.loading = violated, loading

    def drawn(self, rng: np.random.Generator) -> FactorTruth:
        return FactorTruth.draw(rng, violated=self.violated, loading=self.loading)

    def fitted(self, X: np.ndarray, r: int) -> FactorModel:
        return FactorModel(5, center=False).fit(X)

    def risk(self, r: int, latent: FactorModel, X: np.ndarray, y: np.ndarray) -> float:
        head = fit_least_squares(latent.transform(X), y, intercept=False)
        return self._of(r, Linear(latent.transform(np.eye(X.shape[1])) @ head.coef, 0.0))

    def rivals(self, r: int, X: np.ndarray, y: np.ndarray) -> dict[str, float]:
        truth = self.truth(r)
        oracle = FactorModel(5, center=False).fit(X)
        oracle.loadings_ = truth.loadings
        return {
            "m=n": self.risk(r, FactorModel(5, center=False).fit(X), X, y),
            "oracle": self.risk(r, oracle, X, y),
            "supervised": self._of(r, fit_ridge(X, y, intercept=False)),
        }

    def _of(self, r: int, line: Linear) -> float:
        return float(self.truth(r).excess_risk(line.coef, line.intercept))


class _Mixtures(_Replicates):
    def drawn(self, rng: np.random.Generator) -> MixtureTruth:
        return MixtureTruth.draw(rng)

    def fitted(self, X: np.ndarray, r: int) -> GaussianMixture:
        model = GaussianMixture(10, covariance="spherical", variance=1.0, n_init=5, tol=1e-4, random_state=r)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # where EM was cut off, the likelihood is still that of the best of five starts
            return model.fit(X)

    def risk(self, r: int, latent: GaussianMixture, X: np.ndarray, y: np.ndarray) -> float:
        head = fit_table(latent.predict_proba(X), y, 4, smoothing=0.1)
        return self._of(r, lambda rows: head.predict_proba(latent.predict_proba(rows)))

    def rivals(self, r: int, X: np.ndarray, y: np.ndarray) -> dict[str, float]:
        truth = self.truth(r)
        table = fit_table(truth.responsibilities(X), y, 4, smoothing=0.1)
        classes, coded = np.unique(y, return_inverse=True)
        logits = fit_logistic(X, coded, len(classes), seed=r)

        def supervised(rows: np.ndarray) -> np.ndarray:
            wide_NC = np.zeros((len(rows), 4))
            wide_NC[:, classes] = logits.predict_proba(rows)
            return wide_NC

        return {
            "m=n": self.risk(r, self.fitted(X, r), X, y),
            "oracle": self._of(r, lambda rows: table.predict_proba(truth.responsibilities(rows))),
            "supervised": self._of(r, supervised),
        }

    def _of(self, r: int, probabilities: Callable[[np.ndarray], np.ndarray]) -> float:
        truth = self.truth(r)
        rng = np.random.default_rng([self.seed, r, 2])
        return float(truth.excess_risk(lambda rows: probabilities(rows).argmax(1), TEST, rng))
