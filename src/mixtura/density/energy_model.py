"""Densities from energies: a network gives log p0, and its normalising constant is estimated with an error bar.

Batches and noise are functions of the seed
and the step. Training runs in float32 unless the data need more; log weights are summed, and densities scored, in float64.

Time of ``fit``: max_iter · (batch_size + noise_batch_size) evaluations of the energy forward and backward, and
``PARTITION_DRAWS`` forward at the end. Memory: the activations of one batch. Of ``score_samples``: one evaluation a row.

Shapes: N samples, F features (flattened), J noise points.
Source: Jiang et al. 2023 (2306.07485); see ``density.unnormalized``.
"""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from mixtura.core.keeping import Keeping
from mixtura.core.training import TrainConfig, learning_rate
from mixtura.core.training import fit as train
from mixtura.density import noise_laws
from mixtura.density.energies import ENERGIES, Tilted, evaluated, langevin, tilted
from mixtura.density.inputs import as_matrix, device_of
from mixtura.density.unnormalized import CompositionalLikelihood, NoiseContrastive, NoiseCoverageWarning

__all__ = ["METHODS", "NOISES", "EnergyDensity", "ood_score"]

METHODS = ("compositional", "nce", "batch")
NOISES: dict[str, Any] = {
    "gaussian": noise_laws.GaussianNoise,
    "mixture": noise_laws.MixtureNoise,
    "student": noise_laws.StudentNoise,
    "uniform": noise_laws.UniformNoise,
    "kernel": noise_laws.KernelNoise,
}
FLOATS = (np.float64, np.float32)
PARTITION_DRAWS = 100_000
PARTITION_BLOCK = 8192
ESS_FLOOR = 0.02
GAMMA_FINAL = 0.1  # gamma falls with the learning rate, to this share of itself
REFRESH_POINTS = 4000

Energy = Literal["mlp", "conv"] | nn.Module | Callable[[tuple[int, ...]], nn.Module]


class EnergyDensity(Keeping, DensityMixin, BaseEstimator):
    """A density whose logarithm is a network up to a constant, fitted by maximum likelihood.

    Args:
        energy: what gives log p0, that is minus the energy: ``"mlp"`` or ``"conv"`` (images), networks that tilt the noise
            law; an ``nn.Module`` from (n, ...) to (n,), of which a copy is trained; or a callable that builds one from the
            shape of a sample.
        noise: the law q: ``"gaussian"`` (twice as wide as the data), ``"mixture"``, ``"student"``, ``"uniform"``,
            ``"kernel"``, fitted to the data, or a law of your own over flattened samples.
        method: ``"compositional"``; ``"nce"`` and ``"batch"`` (biased) are what it is compared with.
        inner: how the compositional method follows the constant, see :class:`CompositionalLikelihood`.
        max_iter: optimiser steps; Adam, the rate falls to zero as a cosine.
        batch_size: data points a step.
        noise_batch_size: noise points a step.
        lr: first learning rate.
        gamma: weight of the newest step in the running constant, at first; it falls to a tenth with the rate.
        width: of the built-in networks.
        depth: hidden layers of the built-in networks.
        refresh_noise_every: steps after which q becomes a mixture fitted to draws of the current model and to the data; 0
            keeps the first q.
        device: where torch computes.
        seed: of weights, batches and noise.
    Attributes:
        log_partition_: log Z by importance sampling with 1e5 fresh draws from q, nats.
        log_partition_se_: its standard error.
        ess_: effective sample size of those draws over their number. Below .02 the error bar can not be trusted.
        history_: per step, arrays of ``loss``, ``log_partition`` and, for the likelihoods, ``ess``.
        noise_: the fitted law.
        base_: the law that a built-in network tilts: the first q; ``None`` for a module of your own.
        weights_: the network's state, name -> array.
        feature_shape_, n_features_in_: of a sample.
    Does not do:
        Training in several processes: there, use :class:`CompositionalLikelihood` in a loop of your own.
        Densities of discrete data, and data on a lower-dimensional surface (a constant feature is refused): add noise first.
        A model with an ``nn.Module`` or a law of your own can not be saved.
    Example:
        >>> X = np.random.default_rng(0).normal(size=(200, 2))
        >>> model = EnergyDensity(max_iter=50, width=16, depth=1).fit(X)
        >>> model.score_samples(X).shape
        (200,)
    """

    def __init__(
        self,
        energy: Energy = "mlp",
        noise: Any = "gaussian",
        method: str = "compositional",
        max_iter: int = 2000,
        batch_size: int = 256,
        noise_batch_size: int = 256,
        lr: float = 1e-2,
        gamma: float = 0.1,
        width: int = 128,
        depth: int = 3,
        device: str = "cpu",
        seed: int = 0,
        inner: str = "ema",
        refresh_noise_every: int = 0,
    ) -> None:
        self.energy = energy
        self.noise = noise
        self.method = method
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.noise_batch_size = noise_batch_size
        self.lr = lr
        self.gamma = gamma
        self.width = width
        self.depth = depth
        self.device = device
        self.seed = seed
        self.inner = inner
        self.refresh_noise_every = refresh_noise_every

    def fit(self, X: ArrayLike, y: object = None) -> "EnergyDensity":
        """Fit to samples.

        Args:
            X: shape (n, d), or (n, channels, height, width) for images, n >= 2, finite.
            y: ignored.
        Raises:
            ValueError: fewer than 2 samples, a constant feature, a sample outside the support of q (its row is named), an
                unknown method, noise or energy, a count below 1.
            TypeError: a noise law without ``sample`` or ``log_prob``.
            NonFiniteLoss: the energy became NaN, with the step.
        Warns:
            NoiseCoverageWarning: a few noise points carry the whole constant.
        """
        self._check_parameters()
        table = as_matrix(self, X, reset=True, dtype=FLOATS, ensure_min_samples=2, allow_nd=self.energy != "mlp")
        self.feature_shape_ = tuple(int(n) for n in table.shape[1:])
        data = torch.as_tensor(np.ascontiguousarray(table))
        flat_NF = data.flatten(1)
        law = self._fitted_noise(flat_NF)
        noise_laws.check_support(law, flat_NF)
        x = data.to(self._device, _dtype(flat_NF))
        # What a built-in network tilts, and what the model falls off like.
        self.base_ = law if isinstance(self.energy, str) else None
        log_p0 = self._network().to(x)
        if isinstance(log_p0, Tilted):
            log_p0.standardise(data)
        objective = self._objective(_on(law, self._device))
        self.history_ = self._train(log_p0, objective, x)
        self.noise_ = _on(objective.noise, "cpu")
        self.weights_ = {name: value.cpu().numpy() for name, value in log_p0.state_dict().items()}
        self._estimate_partition()
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Log density of each sample, shape (n,), nats: log p0 minus ``log_partition_``."""
        return self._log_p0(self._checked(X)).cpu().numpy() - self.log_partition_

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Mean log density, nats a sample."""
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, *, langevin_steps: int = 0, step: float = 0.3, seed: int | None = None
    ) -> NDArray[np.float64]:
        """Draws: noise points resampled by their weights, then moved by Langevin steps if asked.

        Args:
            n_samples: number of draws, >= 1.
            langevin_steps: Metropolis-adjusted Langevin steps after the resampling, which part draws that fell on one point.
            step: their length in units of the noise law's spread.
            seed: of the draws; the estimator's by default.
        Returns:
            Shape (n_samples, ...).
        Warns:
            NoiseCoverageWarning: the weights rest on fewer points than asked for; the draws repeat.
        """
        check_is_fitted(self)
        for name, value, least in (("n_samples", n_samples, 1), ("langevin_steps", langevin_steps, 0)):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        generator = torch.Generator().manual_seed(self.seed + 1 if seed is None else seed)
        z, log_w_J = self._weighted_noise(max(10_000, 20 * n_samples), generator)
        effective = float(torch.exp(2 * log_w_J.logsumexp(0) - (2 * log_w_J).logsumexp(0)))
        if effective < max(n_samples, ESS_FLOOR * len(z)):
            warnings.warn(
                f"the {n_samples} draws rest on {effective:.0f} effective points among {len(z)} noise points, so they repeat; "
                "move them apart with langevin_steps, or fit with a noise law closer to the data",
                NoiseCoverageWarning,
                stacklevel=2,
            )
        chosen = torch.multinomial(log_w_J.softmax(0), n_samples, replacement=True, generator=generator)
        return langevin(self._trained(), z[chosen], step * z.std(0), langevin_steps, generator).numpy()

    @property
    def _device(self) -> str:
        return device_of(self.device)

    def _check_parameters(self) -> None:
        device_of(self.device)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {self.method!r}")
        if self.inner != "ema" and self.method != "compositional":
            raise ValueError(f"inner={self.inner!r} has no effect with method={self.method!r}; leave it at 'ema'")
        if isinstance(self.energy, str) and self.energy not in ENERGIES:
            raise ValueError(f"energy must be one of {sorted(ENERGIES)}, a module or a callable, got {self.energy!r}")
        if isinstance(self.noise, str) and self.noise not in NOISES:
            raise ValueError(f"noise must be one of {sorted(NOISES)} or a noise law, got {self.noise!r}")
        for name in ("max_iter", "batch_size", "noise_batch_size", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "EnergyDensity fits in one process, but torch.distributed runs several, over which the objective would sum; "
                "train a module with CompositionalLikelihood and DistributedDataParallel instead"
            )
        if self.refresh_noise_every < 0:
            raise ValueError(f"refresh_noise_every must be >= 0, got {self.refresh_noise_every}")

    def _fitted_noise(self, flat_NF: Tensor) -> noise_laws.NoiseLaw:
        if not isinstance(self.noise, str):
            return noise_laws.noise_law(self.noise)
        if self.noise == "mixture":
            return noise_laws.MixtureNoise.fit(flat_NF, min(20, max(1, len(flat_NF) // 10)), seed=self.seed)
        return NOISES[self.noise].fit(flat_NF)

    def _network(self) -> nn.Module:
        """The network as it is before training, or a copy of the module that was given."""
        if isinstance(self.energy, nn.Module):
            return copy.deepcopy(self.energy)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if isinstance(self.energy, str):
                base = _on(self.base_, self._device)
                return tilted(self.energy, base, self.feature_shape_, self.width, self.depth)
            return self.energy(self.feature_shape_)

    def _objective(self, law: noise_laws.NoiseLaw) -> CompositionalLikelihood | NoiseContrastive:
        if self.method == "nce":
            return NoiseContrastive(law, ratio=self.noise_batch_size / self.batch_size)
        inner: Any = "batch" if self.method == "batch" else self.inner
        return CompositionalLikelihood(law, gamma=self.gamma, inner=inner, noise_batch_size=self.noise_batch_size)

    def _train(self, log_p0: nn.Module, objective: Any, x: Tensor) -> dict[str, NDArray[np.float64]]:
        # Adam with a cosine to zero. Decay would pull the weights from the maximum of the likelihood, and clipping would take
        # off the rare large pulls of the noise, which the expectation needs.
        config = TrainConfig(
            steps=self.max_iter,
            lr=self.lr,
            warmup=0.0,
            final=0.0,
            weight_decay=0.0,
            betas=(0.9, 0.999),
            clip=0.0,
            seed=self.seed,
        )
        history: dict[str, list[float]] = {"log_partition": []}
        likelihood = isinstance(objective, CompositionalLikelihood)
        if likelihood:
            history["ess"] = []

        def loss_at(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            if self.refresh_noise_every and step and step % self.refresh_noise_every == 0:
                objective.noise = self._refreshed(log_p0, objective.noise, x, generator)
            if likelihood:
                objective.gamma = self.gamma * max(GAMMA_FINAL, learning_rate(step, config) / self.lr)
            rows = torch.randint(len(x), (self.batch_size,), generator=generator)
            loss = objective(log_p0, x[rows.to(x.device)], generator=generator)
            history["log_partition"].append(objective.log_partition)
            if likelihood:
                history["ess"].append(objective.ess_fraction)
            return loss

        pair = nn.ModuleDict({"log_p0": log_p0, "objective": objective}).to(x.device)
        losses = train(pair, loss_at, config, label="density").losses
        return {name: np.array(values) for name, values in {"loss": losses, **history}.items()}

    def _refreshed(self, log_p0: nn.Module, law: Any, x: Tensor, generator: torch.Generator) -> Any:
        """A mixture fitted to draws of the current model and to the data: where either is, q is."""
        z_JF = law.sample(10 * REFRESH_POINTS, generator)
        log_w_J = evaluated(log_p0, z_JF.to(x).reshape(-1, *self.feature_shape_)) - law.log_prob(z_JF).double()
        drawn = torch.multinomial(log_w_J.softmax(0).cpu(), REFRESH_POINTS, replacement=True, generator=generator)
        rows = torch.randperm(len(x), generator=generator)[:REFRESH_POINTS]
        both = torch.cat([z_JF[drawn.to(z_JF.device)].cpu(), x.flatten(1)[rows.to(x.device)].cpu().double()])
        return _on(noise_laws.MixtureNoise.fit(both, seed=self.seed), x.device)

    def _estimate_partition(self) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 - 1)
        _, log_w_J = self._weighted_noise(PARTITION_DRAWS, generator, points=False)
        n = len(log_w_J)
        self.log_partition_ = float(log_w_J.logsumexp(0)) - math.log(n)
        relative_J = (log_w_J - self.log_partition_).exp()
        # Of a logarithm, by the delta method.
        self.log_partition_se_ = float(relative_J.std()) / math.sqrt(n)
        self.ess_ = float(relative_J.sum() ** 2 / relative_J.square().sum()) / n
        if self.ess_ < ESS_FLOOR:
            warnings.warn(
                f"log_partition_ rests on {self.ess_:.2%} of {n} noise points (floor {ESS_FLOOR:.0%}), so its error bar "
                f"{self.log_partition_se_:.3g} can not be trusted; take a noise law closer to the data or with heavier tails",
                NoiseCoverageWarning,
                stacklevel=3,
            )

    def _weighted_noise(self, n: int, generator: torch.Generator, *, points: bool = True) -> tuple[Tensor, Tensor]:
        """Noise points, shape (n, ...), float64 (none unless ``points``), and their log weights, shape (n,)."""
        kept, log_w = [], []
        for start in range(0, n, PARTITION_BLOCK):
            z_JF = self.noise_.sample(min(PARTITION_BLOCK, n - start), generator).double()
            z = z_JF.reshape(-1, *self.feature_shape_)
            log_w.append(self._log_p0(z) - self.noise_.log_prob(z_JF).double())
            kept += [z] if points else []
        return torch.cat(kept) if kept else torch.empty(0), torch.cat(log_w)

    def _checked(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        table = as_matrix(self, X, reset=False, dtype=FLOATS, allow_nd=self.energy != "mlp")
        if table.shape[1:] != self.feature_shape_:
            raise ValueError(f"X must hold samples of shape {self.feature_shape_} as in fit, got {table.shape[1:]}")
        return torch.as_tensor(np.ascontiguousarray(table), dtype=torch.float64)

    def _trained(self) -> nn.Module:
        log_p0 = self._network().double()
        log_p0.load_state_dict({name: torch.as_tensor(value) for name, value in self.weights_.items()})
        return log_p0.requires_grad_(False)

    def _log_p0(self, x: Tensor) -> Tensor:
        """Log p0, shape (N,), on the CPU: float64, so that a row scores the same alone and among others."""
        return evaluated(self._trained().to(self._device), x.to(self._device)).cpu()


def ood_score(model: EnergyDensity, X: ArrayLike) -> NDArray[np.float64]:
    """How strange each sample is to the model, shape (n,): minus its log density, nats; higher is stranger.

    Far from everything, density tells shape and not meaning: a simpler image can be likelier than those learned from.
    """
    return -model.score_samples(X)


def _dtype(flat_NF: Tensor) -> torch.dtype:
    """Float32, unless it would round the data away beside their mean or leave its range."""
    mean_F, spread_F = flat_NF.double().mean(0).abs(), flat_NF.double().std(0)
    fits = bool((mean_F < 1e3 * spread_F).all()) and float(spread_F.min()) > 1e-15 and float(spread_F.max()) < 1e15
    return torch.float32 if fits else torch.float64


def _on(law: Any, device: torch.device | str) -> Any:
    return law.to(device) if hasattr(law, "to") else law
