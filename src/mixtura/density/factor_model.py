"""Linear factors under Gaussian noise by maximum likelihood: the posterior of the factors, densities, draws.

x = mean + B z + u with z ~ N(0, I) and u ~ N(0, noise). Fits need the second moments alone, which add over batches and
processes, so memory is one block and F squared.

Shapes: N samples, F features, R factors, B samples of a block.
Source: Tipping and Bishop 1999, Probabilistic principal component analysis, eq. 7-8 (one noise variance; with the variance
known to be 1 the same with 1 in its place); Barber, Bayesian Reasoning and Machine Learning, alg. 21.1 (a variance a feature);
Horn 1965 (number of factors).
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from mixtura.core.gaussian import LOG_2PI
from mixtura.core.keeping import Keeping
from mixtura.core.processes import ALONE, Processes, join
from mixtura.core.sufficient import Statistics
from mixtura.density.inputs import as_source, device_of
from mixtura.density.sources import Checked, Source

__all__ = ["FactorModel", "Factors", "Posterior", "closed_form", "diagonal_form", "parallel_analysis"]

log = logging.getLogger(__name__)

NOISES = ("unit", "isotropic", "diagonal")
BLOCK = 1024  # samples: with a few hundred features a block stays in the cache
LEAST_SHARE = 1e-9  # of a feature's variance that is noise at least, where noise is fitted
RANDOM_TABLES, QUANTILE = 20, 0.95  # of parallel analysis


@dataclass(frozen=True)
class Factors:
    """What a fit finds.

    Attributes:
        loadings: B, shape (F, R).
        noise: variance of each feature that the factors do not explain, shape (F,).
        log_likelihood: mean a sample, in nats.
        n_iter: steps taken; 1 in closed form.
        change: of the log likelihood in the last step.
    """

    loadings: np.ndarray
    noise: np.ndarray
    log_likelihood: float
    n_iter: int = 1
    change: float = 0.0


@dataclass(frozen=True)
class Posterior:
    """Gaussian law of the factors given samples: means of shape (N, R), and one covariance (R, R) for all."""

    mean: np.ndarray
    covariance: np.ndarray


def closed_form(covariance: np.ndarray, n_factors: int, *, unit: bool) -> Factors:
    """The factors that maximise the likelihood where all features have one noise variance.

    Args:
        covariance: of the samples, shape (F, F).
        n_factors: R, below F.
        unit: whether the noise variance is known to be 1; else it is the mean of the F - R smallest eigenvalues.
    """
    values_F, vectors_FF = np.linalg.eigh(covariance)
    f = len(values_F)
    least = LEAST_SHARE * max(float(values_F[-1]), np.finfo(float).tiny)
    noise = 1.0 if unit else max(float(values_F[: f - n_factors].mean()), least)
    top_R = np.maximum(values_F[f - n_factors :][::-1] - noise, 0.0)
    loadings_FR = vectors_FF[:, f - n_factors :][:, ::-1] * np.sqrt(top_R)
    # Along a factor the model's variance is the sample's, unless that is below the noise.
    explained_R = values_F[f - n_factors :][::-1] / (top_R + noise)
    quadratic = explained_R.sum() + values_F[: f - n_factors].sum() / noise
    log_det = np.log(top_R + noise).sum() + (f - n_factors) * math.log(noise)
    return Factors(loadings_FR, np.full(f, noise), float(-(f * LOG_2PI + log_det + quadratic) / 2))


def diagonal_form(covariance: np.ndarray, n_factors: int, *, tol: float, max_iter: int) -> Factors:
    """The factors that maximise the likelihood where each feature has a noise variance of its own.

    Given the noise, loadings are in closed form (of the samples in units of the noise); given the loadings, one step of EM
    moves the noise. The likelihood never falls.

    Args:
        covariance: shape (F, F).
        n_factors: R, below F.
        tol: change of the mean log likelihood a sample at which it ends, in nats.
        max_iter: most steps.
    """
    variance_F = covariance.diagonal()
    floor_F = LEAST_SHARE * np.maximum(variance_F, np.finfo(float).tiny / LEAST_SHARE)
    # A start between none and all of the variance: from all of it, the first loadings are those of the correlations.
    noise_F, last, change = np.maximum(variance_F, floor_F), -math.inf, math.inf
    loadings_FR, step = np.zeros((len(variance_F), n_factors)), 0
    while True:
        root_F = np.sqrt(noise_F)
        found = closed_form(covariance / np.outer(root_F, root_F), n_factors, unit=True)
        value = found.log_likelihood - np.log(root_F).sum()
        loadings_FR, change, last = found.loadings * root_F[:, None], value - last, value
        if step == max_iter or change < tol:
            return Factors(loadings_FR, noise_F, value, step, change)
        noise_F = np.maximum(variance_F - np.square(loadings_FR).sum(1), floor_F)
        step += 1


def parallel_analysis(covariance: np.ndarray, n_samples: int, *, unit: bool, random_state: Any = None) -> int:
    """How many factors stand out of noise.

    With known noise, the eigenvalues above 95 % of the largest of noise alone; else, of correlations, the leading ones above
    95 % of those of noise of the same rank (Horn), which overlooks a factor that hardly any feature has much of.

    Args:
        covariance: shape (F, F).
        n_samples: it is of.
        unit: whether the noise variance is known to be 1; else correlations are compared, so that units do not matter.
        random_state: source of chance.
    Returns:
        Between 1 and F - 1: the caller wants factors.
    """
    rng = check_random_state(random_state)
    f = len(covariance)
    if not unit:
        root_F = np.sqrt(np.maximum(covariance.diagonal(), np.finfo(float).tiny))
        covariance = covariance / np.outer(root_F, root_F)
    values_F = np.linalg.eigvalsh(covariance)[::-1]
    drawn = np.array([np.linalg.eigvalsh(_noise_covariance(n_samples, f, rng))[::-1] for _ in range(RANDOM_TABLES)])
    edge_F = np.quantile(drawn[:, :1] if unit else drawn, QUANTILE, axis=0)
    above_F = values_F > edge_F
    return int(np.clip(f if above_F.all() else above_F.argmin(), 1, f - 1))


def _noise_covariance(n: int, f: int, rng: np.random.RandomState) -> np.ndarray:
    """Covariance of n samples of standard normal noise, by Bartlett's factor where that is smaller than the samples."""
    if n <= f:
        x_NF = rng.normal(size=(n, f))
        return x_NF.T @ x_NF / n
    lower_FF = np.tril(rng.normal(size=(f, f)), -1)
    lower_FF[np.diag_indices(f)] = np.sqrt(rng.chisquare(n - np.arange(f)))
    return lower_FF @ lower_FF.T / n


class FactorModel(Keeping, ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    """Linear factors under Gaussian noise; ``transform`` gives the posterior mean of the factors.

    Parameters
    ----------
    n_factors : int or "auto", default=1
        Number of factors R, below the number of features. "auto" takes as many as stand out of noise (parallel analysis).
    noise : {"unit", "isotropic", "diagonal"}, default="unit"
        Of each feature: variance 1 (the theory's model), one variance for all, or one each. With "diagonal", and only
        then, units of the features do not matter.
    center : bool, default=True
        Whether the mean is fitted; False where it is known to be zero.
    tol : float, default=1e-9
        Change of the mean log likelihood a sample at which a "diagonal" fit ends, in nats.
    max_iter : int, default=2000
        Most steps of a "diagonal" fit, each an eigendecomposition of F x F.
    device : str, default="cpu"
        Where second moments are summed: "cpu", "cuda", "auto".
    distributed : bool or "auto", default="auto"
        Whether processes fit together, each with its own shard.
    seed : int, default=0
        Of ``sample`` and of "auto".

    Attributes
    ----------
    mean_ : ndarray of shape (F,)
    loadings_ : ndarray of shape (F, R)
        B, up to a rotation of the factors, which no prediction depends on.
    noise_variance_ : ndarray of shape (F,)
    n_factors_ : int
    gap_ : float
        By how much the variance along the weakest factor exceeds the noise, in units of the noise. Near zero, factors are
        not told from noise.
    log_likelihood_ : float
        Mean a sample, in nats.
    n_samples_ : int
        Samples seen.
    n_iter_ : int
        Steps of a "diagonal" fit; 1 in closed form.
    statistics_ : Statistics
        Second moments around ``origin_``; ``partial_fit`` adds to them.

    Notes
    -----
    N F^2 multiplications for the moments and about 9 F^3 for the eigenvalues; memory F^2 and one block of rows.

    Examples
    --------
    >>> X = np.random.default_rng(0).normal(size=(500, 1)) @ [[3.0, 0.0, -3.0]]
    >>> X += np.random.default_rng(1).normal(size=(500, 3))
    >>> model = FactorModel(1).fit(X)
    >>> np.abs(model.loadings_[:, 0]).round(0).tolist()
    [3.0, 0.0, 3.0]
    """

    def __init__(
        self,
        n_factors: int | str = 1,
        *,
        noise: str = "unit",
        center: bool = True,
        tol: float = 1e-9,
        max_iter: int = 2000,
        device: str = "cpu",
        distributed: bool | str = "auto",
        seed: int = 0,
    ) -> None:
        self.n_factors = n_factors
        self.noise = noise
        self.center = center
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.distributed = distributed
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit mean, loadings and noise.

        Parameters
        ----------
        X : array-like of shape (N, F), memory map; iterable of such batches; path of a Parquet file or folder
            In several processes, this process's shard.
        y : ignored

        Raises
        ------
        ValueError
            Values that are not finite (counted, first position named), as many factors as features, fewer than 2 samples,
            a parameter out of its range.
        """
        for name in ("statistics_", "origin_"):
            if hasattr(self, name):
                delattr(self, name)
        return self._add(X, join(self.distributed))  # type: ignore[arg-type]

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Add more samples; the result is that of ``fit`` on all of them together."""
        return self._add(X, ALONE)

    def posterior(self, X: Any) -> Posterior:
        """The law of the factors given each sample: E[z | x] = (I + B' N^-1 B)^-1 B' N^-1 (x - mean)."""
        return Posterior(np.asarray(self.transform(X)), self._posterior_covariance())

    def transform(self, X: Any) -> np.ndarray:
        """Posterior mean of the factors, shape (N, R)."""
        check_is_fitted(self, "loadings_")
        map_RF = self._posterior_covariance() @ (self.loadings_ / self.noise_variance_[:, None]).T
        return np.concatenate([(x_BF - self.mean_) @ map_RF.T for x_BF in self._blocks(X)])

    def score_samples(self, X: Any) -> np.ndarray:
        """Log density at each sample, shape (N,), in nats."""
        check_is_fitted(self, "loadings_")
        scaled_FR = self.loadings_ / self.noise_variance_[:, None]
        inner_RR = np.eye(self.n_factors_) + self.loadings_.T @ scaled_FR
        log_det = np.linalg.slogdet(inner_RR)[1] + np.log(self.noise_variance_).sum()
        lower_RR = np.linalg.cholesky(inner_RR)
        found = []
        for x_BF in self._blocks(X):
            away_BF = x_BF - self.mean_
            along_RB = np.linalg.solve(lower_RR, scaled_FR.T @ away_BF.T)
            found.append((away_BF**2 / self.noise_variance_).sum(1) - (along_RB**2).sum(0))
        return -(np.concatenate(found) + log_det + len(self.mean_) * LOG_2PI) / 2

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log density a sample, in nats."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draws, shape (n_samples, F), and the factors behind them, shape (n_samples, R)."""
        check_is_fitted(self, "loadings_")
        if not isinstance(n_samples, (int, np.integer)) or n_samples < 1:
            raise ValueError(f"n_samples must be a whole number >= 1, got {n_samples!r}")
        rng = check_random_state(self.seed)
        z_NR = rng.normal(size=(int(n_samples), self.n_factors_))
        noise_NF = rng.normal(size=(int(n_samples), len(self.mean_))) * np.sqrt(self.noise_variance_)
        return self.mean_ + z_NR @ self.loadings_.T + noise_NF, z_NR

    @property
    def _n_features_out(self) -> int:
        return self.n_factors_

    def _posterior_covariance(self) -> np.ndarray:
        check_is_fitted(self, "loadings_")
        scaled_FR = self.loadings_ / self.noise_variance_[:, None]
        return np.linalg.inv(np.eye(self.n_factors_) + self.loadings_.T @ scaled_FR)

    def _blocks(self, X: Any) -> Any:
        source = Checked(as_source(self, X, reset=False), missing=False)
        return (block.numpy().astype(np.float64, copy=False) for block in source.blocks(BLOCK))

    def _check_parameters(self) -> None:
        r = self.n_factors
        if r != "auto" and (not isinstance(r, (int, np.integer)) or isinstance(r, bool) or r < 1):
            raise ValueError(f"n_factors must be 'auto' or a whole number >= 1, got {r!r}")
        if self.noise not in NOISES:
            raise ValueError(f"noise must be one of {list(NOISES)}, got {self.noise!r}")
        if not self.tol >= 0 or not isinstance(self.max_iter, (int, np.integer)) or self.max_iter < 1:
            raise ValueError(
                f"tol must be >= 0 and max_iter a whole number >= 1, got {self.tol!r} and {self.max_iter!r}"
            )

    def _add(self, X: Any, processes: Processes) -> Self:
        self._check_parameters()
        fresh = not hasattr(self, "statistics_")
        with processes.together():
            source = as_source(self, X, reset=fresh, min_samples=2 if fresh and processes.size == 1 else 0)
        found, origin = self._moments(Checked(source, missing=False), processes)
        if not fresh:
            before: tuple[Statistics, np.ndarray] = (self.statistics_, self.origin_)
            shift = torch.from_numpy(origin - before[1])
            found, origin = before[0] + found.mapped(torch.ones_like(shift), shift, "tied"), before[1]
        n, f = round(float(found.weight)), len(origin)
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got n_samples = {n}")
        if self.n_factors != "auto" and self.n_factors >= f:  # type: ignore[operator]
            raise ValueError(f"n_factors must be below the n_features = {f} of X, got {self.n_factors}")
        if f < 2:
            raise ValueError(f"factors need at least 2 features to be shared by, got n_features = {f}")
        self.statistics_: Statistics = found
        self.origin_: np.ndarray = origin
        self.n_samples_ = n
        apart_F = (found.first[0] / n).numpy() if self.center else -origin
        self.mean_ = origin + apart_F if self.center else np.zeros(f)
        first_F = (found.first[0] / n).numpy()
        # Second moment around the mean, or around zero.
        cross_FF = np.outer(first_F, apart_F)
        return self._solve(found.second.numpy() / n - cross_FF - cross_FF.T + np.outer(apart_F, apart_F))

    def _moments(self, source: Source, processes: Processes) -> tuple[Statistics, np.ndarray]:
        """Second moments of the samples of all processes, around the start of the first of them."""
        device = device_of(self.device)
        first = next(iter(source.blocks(BLOCK)), None)
        own = torch.empty(0, dtype=torch.float64) if first is None else first.double().mean(0)
        starts = [part for part in processes.gather(own) if len(part)]
        if not starts or any(len(part) != len(starts[0]) for part in starts):
            raise ValueError(f"X must have samples of one number of features, got {[len(part) for part in starts]}")
        origin_F = starts[0]
        f, n = len(origin_F), 0
        sum_F, second_FF = np.zeros(f), np.zeros((f, f))
        on_device = torch.zeros(f, f, dtype=torch.float64, device=device) if device != "cpu" else None
        with processes.together():
            for block in source.blocks(BLOCK):
                z_BF = block.double() - origin_F
                n, sum_F = n + len(z_BF), sum_F + z_BF.sum(0).numpy()
                if on_device is None:
                    # NumPy sees that both sides are one matrix, and forms half of the product.
                    second_FF += z_BF.numpy().T @ z_BF.numpy()
                else:
                    moved_BF = z_BF.to(device)
                    on_device.addmm_(moved_BF.mT, moved_BF)
        second = torch.from_numpy(second_FF) if on_device is None else on_device.cpu()
        weight = torch.tensor([float(n)], dtype=torch.float64)
        local = Statistics(weight, torch.from_numpy(sum_F)[None], second, torch.zeros((), dtype=torch.float64))
        return local.from_vector(processes.sum(local.as_vector())), origin_F.numpy()

    def _solve(self, covariance_FF: np.ndarray) -> Self:
        unit = self.noise == "unit"
        if self.n_factors == "auto":
            r = parallel_analysis(covariance_FF, self.n_samples_, unit=unit, random_state=self.seed)
        else:
            r = int(self.n_factors)
        if self.noise == "diagonal":
            found = diagonal_form(covariance_FF, r, tol=self.tol, max_iter=self.max_iter)
            if found.change >= self.tol and found.n_iter == self.max_iter:
                warnings.warn(
                    f"the factors did not converge in max_iter={self.max_iter} steps: the last one changed the mean log "
                    f"likelihood by {found.change:.2g} a sample (tol={self.tol:g}). Raise max_iter or tol, or use fewer factors",
                    ConvergenceWarning,
                    stacklevel=4,
                )
        else:
            found = closed_form(covariance_FF, r, unit=unit)
        self.loadings_, self.noise_variance_, self.n_factors_ = found.loadings, found.noise, r
        self.log_likelihood_, self.n_iter_ = found.log_likelihood, found.n_iter
        strength_RR = found.loadings.T @ (found.loadings / found.noise[:, None])
        self.gap_ = float(np.linalg.eigvalsh(strength_RR)[0])
        if self.gap_ <= 0 or not np.square(found.loadings).sum(0).min() > 0:
            log.info("a factor has no variance above the noise: fewer than %d factors would do as well", r)
        return self
