"""Regression by an infinitely wide network whose read-out variance is uncertain: a scale mixture of Gaussian processes.

Shapes: N training inputs, M test inputs, F features (or images, see ``WideNetworkKernel``), C outputs.

- One scale s, shared by all outputs and by the noise: targets have covariance s (K + noise I).
- Its posterior follows from the targets, so error bars widen or narrow with them; with an inverse-gamma prior the
  prediction is a Student-t whose degrees of freedom grow by one a target.
- One Cholesky factor serves every prior, so all this costs what the plain process costs.
- One shared scale does not down-weight single outliers. It calibrates the error bars as a whole.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mixtura.core.keeping import Keeping
from mixtura.density.inputs import device_of
from mixtura.density.process_inputs import checked_inputs, checked_targets, kernel_from
from mixtura.density.scale_evidence import evidence, factor, maximise
from mixtura.density.scale_predictive import ScaleMixture, StudentT
from mixtura.density.scale_priors import (
    INTEGRATIONS,
    FixedScale,
    Integration,
    InverseGamma,
    Posterior,
    Prior,
    condition,
    log_marginal,
    named_prior,
)
from mixtura.density.wide_network_kernel import WideNetworkKernel

__all__ = ["ScaleMixtureGP", "ScaleMixtureRegressor"]

ROWS = 2048  # test inputs predicted at once


class ScaleMixtureRegressor(Keeping, RegressorMixin, BaseEstimator):
    """A regressor that infers from its targets how wide its error bars must be.

    Standardise the features first (``make_pipeline(StandardScaler(), ScaleMixtureRegressor())``): the kernel compares
    features by their size.

    Args:
        kernel: ``"relu"`` or ``"erf"``, a dense network; a :class:`WideNetworkKernel`; or any callable of one or two arrays
            that returns their covariances, scikit-learn's kernels among them.
        depth: hidden layers of a kernel given by name; without effect on others.
        scale_prior: ``"inverse-gamma"`` (a = b = 2), ``"burr"``, ``"fixed"`` (the plain process at the scale of largest
            evidence), or an ``InverseGamma``, ``BurrXII``, ``FixedScale`` or another prior with ``log_density`` and ``draw``.
        noise: variance of the noise over that of a read-out of variance 1, >= 0; where the search starts if ``optimize``.
        optimize: learn noise and, for dense networks, weight and bias variance by largest evidence. A bias variance of
            exactly 0 stays 0. On images and for other callables only the noise is learned.
        integration: over the scale: ``"closed"``, ``"quadrature"``, ``"importance"`` (the paper's) or ``"auto"``.
        n_restarts: random starts of the search beyond the first, >= 0.
        normalize_y: centre the targets and divide them by their standard deviation, output by output.
        device: where torch computes.
        seed: of restarts and importance sampling.
    Attributes:
        log_evidence_: log density of the (normalised) targets, nats.
        quadratic_: y' K_y^-1 y of those targets, all that the scale is inferred from.
        scale_posterior_: of s: ``InverseGamma`` in closed form, else weighted nodes.
        kernel_, noise_: as learned or given.
        df_: degrees of freedom of the predictions: 2a + N C; infinite for a fixed scale, NaN for other priors.
        n_features_in_: F.
    Source:
        Scale Mixtures of Neural Network Gaussian Processes (2107.01408), sec. 3.
    Example:
        >>> X = np.linspace(-1, 1, 20)[:, None]
        >>> model = ScaleMixtureRegressor().fit(X, 3 * X[:, 0] ** 2)
        >>> low, high = model.predict_distribution(X).interval(0.95)
        >>> bool(np.all((low < 3 * X[:, 0] ** 2) & (3 * X[:, 0] ** 2 < high)))
        True
    """

    def __init__(
        self,
        kernel: str | WideNetworkKernel | Callable[..., np.ndarray] = "relu",
        depth: int = 2,
        scale_prior: str | Prior = "inverse-gamma",
        noise: float = 1e-2,
        optimize: bool = True,
        integration: Integration = "auto",
        n_restarts: int = 2,
        normalize_y: bool = True,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.kernel = kernel
        self.depth = depth
        self.scale_prior = scale_prior
        self.noise = noise
        self.optimize = optimize
        self.integration = integration
        self.n_restarts = n_restarts
        self.normalize_y = normalize_y
        self.device = device
        self.seed = seed

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Learn kernel and noise where asked, factor the Gram matrix once, and infer the scale.

        Args:
            X: shape (N, F), or (N, rows, columns, channels) for networks on images; N >= 2.
            y: shape (N,) or (N, C).
        Raises:
            ValueError: NaN or infinity (counted, first row named), N < 2, shapes that disagree, an argument out of range, or
                a Gram matrix that is not positive definite.
        """
        prior, kernel = self._checked()
        X = checked_inputs(self, X, reset=True)
        targets = checked_targets(X, y)
        self.one_output_ = targets.ndim == 1
        columns_NC = targets.reshape(len(targets), -1)
        self.y_mean_, self.y_std_ = self._normaliser(columns_NC)
        Y_NC = torch.from_numpy((columns_NC - self.y_mean_) / self.y_std_).to(self._device)
        noise = float(self.noise)
        if self.optimize:
            kernel, noise = self._learned(kernel, X, Y_NC, prior)
        self.kernel_, self.noise_ = kernel, noise
        found = evidence(self._covariance(X), noise, Y_NC, prior, self.integration, seed=self.seed)
        self.X_fit_ = X
        self.cholesky_ = found.cholesky.cpu().numpy()
        self.coefficients_ = found.coefficients.cpu().numpy()
        self.quadratic_ = found.quadratic
        self._hold(prior, found.posterior, found.log_evidence)
        return self

    def with_prior(self, scale_prior: str | Prior) -> Self:
        """This fit under another prior of the scale: same kernel, noise and factor, so it takes no more than an integral.

        Arrays are shared with the original, not copied.
        """
        check_is_fitted(self)
        prior = named_prior(scale_prior)
        made = copy.copy(self)
        made.scale_prior = scale_prior
        n_values = self.coefficients_.size
        posterior, log_density = condition(prior, self.quadratic_, n_values, self.integration, seed=self.seed)
        log_det = 2 * float(np.log(np.diagonal(self.cholesky_)).sum())
        made._hold(prior, posterior, log_density - self.coefficients_.shape[1] * log_det / 2)
        return made

    def predict(self, X: Any, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Centre of the prediction, shape (M,) or (M, C); with ``return_std`` also the standard deviation of the function.

        Raises:
            ValueError: ``return_std`` where the variance is infinite (two degrees of freedom or fewer).
        """
        if return_std:
            found = self.predict_distribution(X, observed=False)
            return found.location, found.std
        check_is_fitted(self)
        X = checked_inputs(self, X, reset=False)
        parts = [self._cross(X[i : i + ROWS]).T.cpu().numpy() @ self.coefficients_ for i in range(0, len(X), ROWS)]
        return self._in_units(np.concatenate(parts))

    def predict_distribution(self, X: Any, observed: bool = True) -> StudentT | ScaleMixture:
        """What is predicted at each of M inputs: a Student-t under an inverse-gamma prior, else a mixture of Gaussians.

        Args:
            X: shape (M, F) or (M, rows, columns, channels).
            observed: of targets, noise included; else of the function.
        """
        location_MC, variance_M = self._moments(X)
        variance_M = variance_M + self.noise_ if observed else variance_M
        return self._predictive(location_MC, variance_M, self.scale_posterior_)

    def score_samples(self, X: Any, y: Any) -> np.ndarray:
        """Log predictive density of each row of targets, nats, shape (M,); the outputs of a row share their scale.

        Args:
            X: shape (M, F).
            y: shape (M,) or (M, C), in the units of the training targets.
        """
        location_MC, variance_M = self._moments(X)
        residual_MC = self._residuals(y, location_MC)
        variance_M = variance_M + self.noise_
        n_outputs = residual_MC.shape[1]
        quadratic_M = torch.from_numpy((residual_MC**2).sum(1) / variance_M)
        log_density_M = log_marginal(self.scale_posterior_, quadratic_M, n_outputs).numpy()
        return log_density_M - n_outputs / 2 * np.log(variance_M) - np.log(self.y_std_).sum()

    def log_prob(self, X: Any, y: Any) -> float:
        """Log predictive density of all rows of targets together, nats: they share one scale, so it is no sum over rows.

        Args:
            X: shape (M, F).
            y: shape (M,) or (M, C), in the units of the training targets.
        """
        location_MC, covariance_MM = self._joint(X)
        residual_MC = torch.from_numpy(self._residuals(y, location_MC)).to(self._device)
        found = evidence(covariance_MM, self.noise_, residual_MC, self.scale_posterior_)
        return found.log_evidence - len(residual_MC) * float(np.log(self.y_std_).sum())

    def sample(
        self, X: Any, n_samples: int = 1, posterior: bool = True, seed: int | None = None, observed: bool = False
    ) -> np.ndarray:
        """Draws of the function at M inputs together, each with a scale of its own.

        Args:
            X: shape (M, F).
            n_samples: number of draws, >= 1.
            posterior: given the targets; else from the prior, in the targets' units.
            seed: of the draws; None takes the estimator's.
            observed: add the noise.
        Returns:
            Shape (n_samples, M) or (n_samples, M, C).
        """
        if n_samples < 1:
            raise ValueError(f"n_samples must be >= 1, got {n_samples}")
        check_is_fitted(self)
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        scale: Posterior = self.scale_posterior_
        if posterior:
            location_MC, covariance_MM = self._joint(X)
        else:
            covariance_MM = self._covariance(checked_inputs(self, X, reset=False))
            location_MC = np.zeros((len(covariance_MM), self.coefficients_.shape[1]))
            scale = self._prior_scale()
        lower_MM = factor(covariance_MM, self.noise_ if observed else 0.0)[0].cpu()
        log_scale_S = scale.draw(n_samples, generator)
        white = torch.randn(n_samples, *location_MC.shape, generator=generator, dtype=torch.float64)
        draws = location_MC + ((0.5 * log_scale_S).exp()[:, None, None] * (lower_MM @ white)).numpy()
        return self._in_units(draws)

    def ensemble_limit(self, X: Any, layers: Literal["last", "all"] = "last") -> StudentT | ScaleMixture:
        """What an ensemble of wide networks predicts, each drawn from the prior and trained by gradient descent to the end.

        Training does not move the scale, so its law stays the prior (2a degrees of freedom, not 2a + N). Squared loss has no
        noise: the networks go through the targets.

        Args:
            X: shape (M, F).
            layers: which are trained: ``"last"``, the read-out alone, or ``"all"``, where the tangent kernel takes over.
        Raises:
            ValueError: ``layers="all"`` with a kernel that has no tangent kernel, or an unknown word.
        Source:
            2107.01408, theorems on trained networks; Lee et al. 2019 (1902.06720), eq. 16 for all layers.
        """
        if layers not in ("last", "all"):
            raise ValueError(f"layers must be 'last' or 'all', got {layers!r}")
        check_is_fitted(self)
        X = checked_inputs(self, X, reset=False)
        Y_NC = torch.from_numpy(self._fitted_targets()).to(self._device)
        K_NN, K_NM, K_M = self._covariance(self.X_fit_), self._cross(X), self._variances(X)
        if layers == "last":
            lower = factor(K_NN, 0.0)[0]
            location_MC = K_NM.T @ torch.cholesky_solve(Y_NC, lower)
            variance_M = K_M - torch.linalg.solve_triangular(lower, K_NM, upper=False).square().sum(0)
        else:
            if not isinstance(self.kernel_, WideNetworkKernel):
                raise ValueError("layers='all' needs a WideNetworkKernel: only a network has a tangent kernel")
            x, fitted = self.kernel_.inputs(X), self.kernel_.inputs(self.X_fit_)
            lower = factor(self.kernel_.tangents(fitted).double(), 0.0)[0]
            weights_NM = torch.cholesky_solve(self.kernel_.tangents(fitted, x).double(), lower)
            location_MC = weights_NM.T @ Y_NC
            variance_M = K_M + (weights_NM * (K_NN @ weights_NM)).sum(0) - 2 * (weights_NM * K_NM).sum(0)
        variance_M = variance_M.clamp(min=torch.finfo(torch.float64).eps * float(K_M.max()))
        return self._predictive(location_MC.cpu().numpy(), variance_M.cpu().numpy(), self._prior_scale())

    @property
    def _device(self) -> str:
        return device_of(self.device)

    def _checked(self) -> tuple[Prior, Any]:
        """Prior and kernel to start from; everything that the constructor was given is looked at here."""
        if not isinstance(self.noise, (int, float, np.number)) or not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a number >= 0 and finite, got {self.noise!r}")
        if self.optimize and self.noise == 0:
            raise ValueError(
                "noise=0 cannot be optimized on a logarithmic scale; start it above 0 or give optimize=False"
            )
        if not isinstance(self.n_restarts, (int, np.integer)) or self.n_restarts < 0:
            raise ValueError(f"n_restarts must be a whole number >= 0, got {self.n_restarts!r}")
        if self.integration not in INTEGRATIONS:
            raise ValueError(f"integration must be one of {list(INTEGRATIONS)}, got {self.integration!r}")
        return named_prior(self.scale_prior), kernel_from(self.kernel, self.depth, self._device)

    def _hold(self, prior: Prior, posterior: Posterior, log_evidence: float) -> None:
        self.scale_posterior_, self.log_evidence_ = posterior, log_evidence
        if isinstance(prior, FixedScale):
            self.df_ = math.inf
        else:
            self.df_ = 2 * posterior.a if isinstance(posterior, InverseGamma) else math.nan

    def _learned(self, kernel: Any, X: np.ndarray, Y_NC: Tensor, prior: Prior) -> tuple[Any, float]:
        start: dict[str, float] = {}
        if isinstance(kernel, WideNetworkKernel) and not kernel.on_images:
            start = {"weight_variance": kernel.weight_variance, "bias_variance": kernel.bias_variance}
            if not kernel.bias_variance:
                del start["bias_variance"]
            x = kernel.inputs(X)

            def gram_at(**variances: Tensor) -> Tensor:
                return kernel.gram(x, **variances).double()
        else:
            gram = self._covariance(X, kernel=kernel)

            def gram_at(**variances: Tensor) -> Tensor:
                return gram

        found = maximise(
            gram_at,
            {**start, "noise": float(self.noise)},
            Y_NC,
            prior,
            self.integration,
            n_restarts=self.n_restarts,
            seed=self.seed,
        )
        noise = found.pop("noise")
        return (replace(kernel, **found) if found else kernel), noise

    def _normaliser(self, columns_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n_outputs = columns_NC.shape[1]
        spread = columns_NC.std(0)
        constant = np.flatnonzero(spread <= 1e-13 * np.abs(columns_NC).max(0, initial=0.0))
        if len(constant):
            which = "y" if n_outputs == 1 else f"output {constant[0]} of y"
            warnings.warn(
                f"{which} is constant, so nothing is there to learn; it is predicted everywhere with error bars of the prior's "
                "making",
                UserWarning,
                stacklevel=3,
            )
        if not self.normalize_y:
            return np.zeros(n_outputs), np.ones(n_outputs)
        spread = spread.copy()
        spread[constant] = 1.0
        return columns_NC.mean(0), spread

    def _covariance(self, X: np.ndarray, Y: np.ndarray | None = None, *, kernel: Any = None) -> Tensor:
        kernel = self.kernel_ if kernel is None else kernel
        if isinstance(kernel, WideNetworkKernel):
            return kernel.gram(kernel.inputs(X), None if Y is None else kernel.inputs(Y)).double()
        found = np.asarray(kernel(X) if Y is None else kernel(X, Y), dtype=np.float64)
        wanted = (len(X), len(X if Y is None else Y))
        if found.shape != wanted:
            raise ValueError(f"kernel must return covariances of shape {wanted}, got {found.shape}")
        return torch.from_numpy(np.ascontiguousarray(found)).to(self._device)

    def _cross(self, X: np.ndarray) -> Tensor:
        return self._covariance(self.X_fit_, X)

    def _variances(self, X: np.ndarray) -> Tensor:
        if isinstance(self.kernel_, WideNetworkKernel):
            return self.kernel_.variances(self.kernel_.inputs(X)).double()
        if hasattr(self.kernel_, "diag"):
            return torch.from_numpy(np.asarray(self.kernel_.diag(X), dtype=np.float64)).to(self._device)
        one_by_one = [float(np.asarray(self.kernel_(row)).item()) for row in np.split(X, len(X))]
        return torch.tensor(one_by_one, dtype=torch.float64, device=self._device)

    def _moments(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Location (M, C) and variance (M,) of the function at s = 1, normalised units."""
        check_is_fitted(self)
        X = checked_inputs(self, X, reset=False)
        lower_NN = torch.from_numpy(self.cholesky_).to(self._device)
        coefficients_NC = torch.from_numpy(self.coefficients_).to(self._device)
        locations, variances = [], []
        for i in range(0, len(X), ROWS):
            part = X[i : i + ROWS]
            K_NB, K_B = self._cross(part), self._variances(part)
            explained_B = torch.linalg.solve_triangular(lower_NN, K_NB, upper=False).square_().sum(0)
            locations.append((K_NB.T @ coefficients_NC).cpu().numpy())
            # At a training input without noise nothing is left, and rounding may say less than nothing.
            variances.append(torch.maximum(K_B - explained_B, torch.finfo(torch.float64).eps * K_B).cpu().numpy())
        return np.concatenate(locations), np.concatenate(variances)

    def _joint(self, X: Any) -> tuple[np.ndarray, Tensor]:
        """Location (M, C) and covariance (M, M) of the function at s = 1, normalised units."""
        check_is_fitted(self)
        X = checked_inputs(self, X, reset=False)
        lower_NN = torch.from_numpy(self.cholesky_).to(self._device)
        K_NM = self._cross(X)
        white_NM = torch.linalg.solve_triangular(lower_NN, K_NM, upper=False)
        return K_NM.T.cpu().numpy() @ self.coefficients_, self._covariance(X) - white_NM.T @ white_NM

    def _residuals(self, y: Any, location_MC: np.ndarray) -> np.ndarray:
        columns_MC = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
        if columns_MC.shape != location_MC.shape:
            raise ValueError(f"y must hold {location_MC.shape[0]} rows of {location_MC.shape[1]}, got {np.shape(y)}")
        return (columns_MC - self.y_mean_) / self.y_std_ - location_MC

    def _predictive(self, location_MC: np.ndarray, variance_M: np.ndarray, scale: Posterior) -> StudentT | ScaleMixture:
        location = self._in_units(location_MC)
        unit = np.sqrt(variance_M)[:, None] * self.y_std_
        unit = unit[:, 0] if self.one_output_ else unit
        if isinstance(scale, InverseGamma):
            return StudentT(location, unit * math.sqrt(scale.b / scale.a), 2 * scale.a)
        return ScaleMixture(location, unit, scale.log_scale.numpy(), scale.log_weight.numpy())

    def _prior_scale(self) -> Posterior:
        prior = named_prior(self.scale_prior)
        # A fixed scale of largest evidence is known only from the targets, and is what its posterior holds.
        return self.scale_posterior_ if isinstance(prior, FixedScale) else condition(prior, 0.0, 0)[0]

    def _fitted_targets(self) -> np.ndarray:
        return self.cholesky_ @ (self.cholesky_.T @ self.coefficients_)

    def _in_units(self, values: np.ndarray) -> np.ndarray:
        values = values * self.y_std_ + self.y_mean_
        return values[..., 0] if self.one_output_ else values


# The room's name for it, beside GaussianMixture; the class is the same.
ScaleMixtureGP = ScaleMixtureRegressor
