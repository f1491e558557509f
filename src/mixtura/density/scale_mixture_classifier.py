"""Classification by wide-network processes that share an uncertain scale: sparse variational, in mini-batches.

Shapes: N samples, B a batch of them, M inducing inputs, C classes, S draws.

Each class has a latent function f_c with covariance s K, one s for all. At the inducing inputs q(u_c | s) = N(m_c, s diag(S_c)),
and q(s) is inverse gamma. With A = K_xZ K_ZZ^-1 and the rest B = k_xx - A K_Zx,

    f_c(x) = A m_c + sqrt(s) N(0, A S_c A' + B),

so the scale moves the spread and never the centre. A fixed scale gives the sparse variational Gaussian process.
Source: Scale Mixtures of Neural Network Gaussian Processes (2107.01408), sec. 3.3 and its appendix on inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor, nn

from mixtura.core.keeping import Keeping
from mixtura.core.training import TrainConfig, fit
from mixtura.density.inputs import device_of
from mixtura.density.process_inputs import checked_inputs, kernel_from
from mixtura.density.scale_evidence import factor
from mixtura.density.scale_priors import FixedScale, InverseGamma, Prior, ScalePrior, named_prior
from mixtura.density.wide_network_kernel import WideNetworkKernel

__all__ = ["ScaleMixtureClassifier", "divergence"]

NUGGET = 1e-6  # over the mean variance: inducing inputs may repeat
PREDICT_DRAWS = 1000
ROWS = 256  # samples predicted at once


@dataclass(frozen=True)
class _Seen:
    """What inputs are to the inducing inputs.

    Attributes:
        white: L^-1 K_Zx with K_ZZ = L L', transposed, shape (N, M): A m = white (L^-1 m).
        squares: A * A, shape (N, M).
        rest: B, shape (N,).
    """

    white: Tensor
    squares: Tensor
    rest: Tensor

    def __getitem__(self, rows: Any) -> _Seen:
        return _Seen(self.white[rows], self.squares[rows], self.rest[rows])


class _Posterior(nn.Module):
    """q(u | s) and q(s). Centres are kept as L^-1 m, which is the same family and a far rounder loss."""

    precision_diagonal: Tensor
    log_det: Tensor

    def __init__(self, prior: Prior, lower: Tensor, n_classes: int) -> None:
        super().__init__()
        self.prior = prior
        precision_MM = torch.cholesky_inverse(lower)
        self.register_buffer("precision_diagonal", precision_MM.diagonal().clone())
        self.register_buffer("log_det", 2 * lower.diagonal().log().sum())
        self.centre = nn.Parameter(lower.new_zeros(len(lower), n_classes))
        # The diagonal that is nearest to the prior.
        self.log_spread = nn.Parameter(-self.precision_diagonal.log()[:, None].repeat(1, n_classes))
        if isinstance(prior, FixedScale):
            value = 1.0 if prior.value == "evidence" else float(prior.value)
            log_scale = torch.tensor(math.log(value), dtype=lower.dtype)
            self.log_scale = nn.Parameter(log_scale, requires_grad=prior.value == "evidence")
        else:
            start = prior if isinstance(prior, InverseGamma) else InverseGamma()
            self.log_a = nn.Parameter(torch.tensor(math.log(start.a), dtype=lower.dtype))
            # Not log b: a and b' grow together with the labels, and only their ratio says how large the scale is.
            self.log_ratio = nn.Parameter(torch.tensor(math.log(start.b / start.a), dtype=lower.dtype))

    def draw_log_scale(self, n: int) -> Tensor:
        """n draws of log s, differentiable in a' and b' (implicit reparametrisation of the gamma distribution)."""
        if isinstance(self.prior, FixedScale):
            return self.log_scale.expand(n)
        gamma = torch.distributions.Gamma(self.log_a.exp(), torch.ones_like(self.log_a))
        return self.log_a + self.log_ratio - gamma.rsample((n,)).clamp(min=torch.finfo(self.log_a.dtype).tiny).log()

    def moments(self, seen: _Seen) -> tuple[Tensor, Tensor]:
        """Mean and variance of f over s, shapes (B, C)."""
        return seen.white @ self.centre, seen.squares @ self.log_spread.exp() + seen.rest[:, None]

    def divergence(self, n_draws: int) -> Tensor:
        """KL(q || p) over inducing values and scale."""
        if isinstance(self.prior, FixedScale):
            mean_precision, of_scale = (-self.log_scale).exp(), torch.zeros_like(self.log_scale)
        elif isinstance(self.prior, InverseGamma):
            mean_precision = (-self.log_ratio).exp()
            of_scale = _scale_divergence(self.log_a.exp(), (self.log_a + self.log_ratio).exp(), self.prior)
        else:
            mean_precision = (-self.log_ratio).exp()
            of_scale = self._drawn_scale_divergence(n_draws)
        return of_scale + divergence(
            self.centre,
            self.log_spread,
            self.precision_diagonal,
            self.log_det,
            mean_precision,
        )

    def _drawn_scale_divergence(self, n_draws: int) -> Tensor:
        assert isinstance(self.prior, ScalePrior)
        u, a, log_b = self.draw_log_scale(n_draws), self.log_a.exp(), self.log_a + self.log_ratio
        log_q = a * log_b - a.lgamma() - (a + 1) * u - (log_b - u).exp()
        return (log_q - self.prior.log_density(u)).mean()


class ScaleMixtureClassifier(Keeping, ClassifierMixin, BaseEstimator):
    """A classifier whose confidence is scaled by what the labels support (SVTP; with a fixed scale it is SVGP).

    The kernel is taken as it is: its variances are not learned, and features should be standardised first.

    Args:
        kernel: as in ``ScaleMixtureRegressor``.
        depth: hidden layers of a kernel given by name.
        scale_prior: ``"inverse-gamma"`` (a = b = 2), ``"burr"``, ``"fixed"`` (one scale, learned with the rest), or a prior;
            ``FixedScale(1.0)`` is the plain sparse variational process.
        n_inducing: inducing inputs, drawn evenly from the classes; at most the number of samples are used.
        batch_size: samples a step.
        epochs: passes over the data.
        n_draws: draws of the scale and the functions a step.
        learning_rate: of Adam at its top.
        device: where torch computes.
        seed: of inducing inputs, batches and draws.
    Attributes:
        classes_: shape (C,).
        scale_posterior_: q(s), or the fixed scale.
        losses_: negative bound a sample, nats, one a step.
        n_features_in_: number of features.
    Example:
        >>> X = np.array([[-2.0], [-1.0], [1.0], [2.0]])
        >>> ScaleMixtureClassifier(epochs=200).fit(X, ["low", "low", "high", "high"]).predict([[-3.0], [3.0]]).tolist()
        ['low', 'high']
    """

    def __init__(
        self,
        kernel: str | WideNetworkKernel | Callable[..., np.ndarray] = "relu",
        depth: int = 2,
        scale_prior: str | Prior = "inverse-gamma",
        n_inducing: int = 200,
        batch_size: int = 100,
        epochs: int = 100,
        n_draws: int = 100,
        learning_rate: float = 1e-2,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.kernel = kernel
        self.depth = depth
        self.scale_prior = scale_prior
        self.n_inducing = n_inducing
        self.batch_size = batch_size
        self.epochs = epochs
        self.n_draws = n_draws
        self.learning_rate = learning_rate
        self.device = device
        self.seed = seed

    def fit(self, X: Any, y: Any) -> Self:
        """Maximise the evidence lower bound.

        Args:
            X: shape (N, F), or (N, rows, columns, channels) for networks on images.
            y: labels, shape (N,), at least two different ones.
        Raises:
            ValueError: one class only, NaN or infinity, shapes that disagree, or an argument out of range.
        """
        for name in ("n_inducing", "batch_size", "epochs", "n_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        prior = named_prior(self.scale_prior)
        self.kernel_ = kernel_from(self.kernel, self.depth, self._device)
        X = checked_inputs(self, X, reset=True)
        if y is None:
            raise ValueError("this classifier requires y to be passed, but the target y is None")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if len(y) != len(X):
            raise ValueError(f"X and y must have as many rows, got {len(X)} and {len(y)}")
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, got one class: {self.classes_[0]!r}")
        rng = np.random.default_rng(self.seed)
        self.inducing_ = X[balanced(codes, min(self.n_inducing, len(X)), rng)]
        gram_MM = self._covariance(self.inducing_)
        lower_MM = factor(gram_MM, NUGGET * float(gram_MM.diagonal().mean()))[0]
        self.cholesky_ = lower_MM.cpu().numpy()
        seen, labels_N = self._seen(X), torch.from_numpy(codes).to(self._device)
        model = _Posterior(prior, lower_MM, len(self.classes_))
        per_epoch = math.ceil(len(X) / self.batch_size)

        def loss_at(step: int) -> Tensor:
            epoch, part = divmod(step, per_epoch)
            # One permutation an epoch, drawn from its number, so that the batch follows from the step alone.
            order = np.random.default_rng([self.seed, epoch]).permutation(len(X))
            rows = torch.from_numpy(order[part * self.batch_size : (part + 1) * self.batch_size])
            log_scale_S = model.draw_log_scale(self.n_draws)
            mean_BC, variance_BC = model.moments(seen[rows])
            white_SBC = torch.randn(self.n_draws, *mean_BC.shape, dtype=mean_BC.dtype).to(self._device)
            logits_SBC = mean_BC + (0.5 * log_scale_S).exp()[:, None, None] * variance_BC.sqrt() * white_SBC
            fit_B = logits_SBC.log_softmax(-1).gather(-1, labels_N[rows].expand(self.n_draws, -1)[..., None])
            return model.divergence(self.n_draws) / len(X) - fit_B.mean()

        config = TrainConfig(
            steps=self.epochs * per_epoch,
            lr=self.learning_rate,
            warmup=0.0,
            weight_decay=0.0,
            betas=(0.9, 0.999),
            clip=0.0,  # a sharp prior has large gradients of its own, and a global clip would stall all others
            seed=self.seed,
        )
        self.losses_ = fit(model, loss_at, config, label="classifier").losses
        with torch.no_grad():
            self.centre_ = model.centre.cpu().numpy()
            self.spread_ = model.log_spread.exp().cpu().numpy()
            self.scale_posterior_: FixedScale | InverseGamma = (
                FixedScale(float(model.log_scale.exp()))
                if isinstance(prior, FixedScale)
                else InverseGamma(float(model.log_a.exp()), float((model.log_a + model.log_ratio).exp()))
            )
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each sample, shape (N,)."""
        probabilities_NC = self.predict_proba(X)
        return self.classes_[probabilities_NC.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities averaged over 1000 draws of scale and functions, shape (N, C).

        Every sample sees the same draws, so a row alone gives what it gives in a batch.
        """
        return np.exp(self.log_proba(X))

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Same as ``log_proba``, under scikit-learn's name."""
        return self.log_proba(X)

    def log_proba(self, X: Any) -> np.ndarray:
        """Logarithm of the class probabilities, shape (N, C), without underflow."""
        check_is_fitted(self)
        X = checked_inputs(self, X, reset=False)
        generator = torch.Generator().manual_seed(self.seed)
        posterior = self.scale_posterior_
        if isinstance(posterior, InverseGamma):
            log_scale_S = posterior.draw(PREDICT_DRAWS, generator)
        else:
            log_scale_S = torch.full((PREDICT_DRAWS,), math.log(float(posterior.value)), dtype=torch.float64)
        white_SC = torch.randn(PREDICT_DRAWS, len(self.classes_), generator=generator, dtype=torch.float64)
        step_SC = ((0.5 * log_scale_S).exp()[:, None] * white_SC).to(self._device)
        centre_MC, spread_MC = (torch.from_numpy(v).to(self._device) for v in (self.centre_, self.spread_))
        found = []
        for i in range(0, len(X), ROWS):
            seen = self._seen(X[i : i + ROWS])
            mean_BC = seen.white @ centre_MC
            width_BC = (seen.squares @ spread_MC + seen.rest[:, None]).sqrt()
            logits_SBC = mean_BC + width_BC * step_SC[:, None]
            found.append((logits_SBC.log_softmax(-1).logsumexp(0) - math.log(PREDICT_DRAWS)).cpu().numpy())
        return np.concatenate(found)

    @property
    def _device(self) -> str:
        return device_of(self.device)

    def _covariance(self, X: np.ndarray, Y: np.ndarray | None = None) -> Tensor:
        found = self.kernel_(X) if Y is None else self.kernel_(X, Y)
        return torch.from_numpy(np.array(found, dtype=np.float64)).to(self._device)

    def _seen(self, X: np.ndarray) -> _Seen:
        lower_MM = torch.from_numpy(self.cholesky_).to(self._device)
        white_MN = torch.linalg.solve_triangular(lower_MM, self._covariance(self.inducing_, X), upper=False)
        weights_MN = torch.linalg.solve_triangular(lower_MM.T, white_MN, upper=True)
        own_N = torch.from_numpy(np.asarray(self.kernel_.diag(X), dtype=np.float64)).to(self._device)
        rest_N = (own_N - white_MN.square().sum(0)).clamp(min=0)
        return _Seen(white_MN.T.contiguous(), weights_MN.T.square(), rest_N)


def divergence(
    centre: Tensor, log_spread: Tensor, precision_diagonal: Tensor, log_det: Tensor, mean_precision: Tensor
) -> Tensor:
    """KL of N(m_c, s diag(S_c)) from N(0, s K), summed over classes and averaged over q(s).

    Args:
        centre: L^-1 m, shape (M, C), where K = L L'.
        log_spread: log S, shape (M, C).
        precision_diagonal: diagonal of K^-1, shape (M,).
        log_det: log|K|.
        mean_precision: E[1/s] under q(s), which is a'/b' for an inverse gamma.
    """
    n_inducing, n_classes = centre.shape
    spread = log_spread.exp()
    return 0.5 * (
        n_classes * (log_det - n_inducing)
        - log_spread.sum()
        + (precision_diagonal[:, None] * spread).sum()
        + mean_precision * centre.square().sum()
    )


def _scale_divergence(a: Tensor, b: Tensor, prior: InverseGamma) -> Tensor:
    """KL of IG(a, b) from the prior."""
    return (
        (a - prior.a) * a.digamma()
        - a.lgamma()
        + math.lgamma(prior.a)
        + prior.a * (b.log() - math.log(prior.b))
        + a * (prior.b - b) / b
    )


def balanced(codes: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n row numbers, as even over the classes as these allow, shape (n,)."""
    queues = [list(rng.permutation(np.flatnonzero(codes == c))) for c in range(codes.max() + 1)]
    chosen: list[int] = []
    while len(chosen) < n:
        for queue in queues:
            if queue and len(chosen) < n:
                chosen.append(int(queue.pop()))
    return np.array(chosen)
