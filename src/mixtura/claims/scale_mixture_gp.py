"""The claim of scale mixtures of wide-network processes: small real tables, the paper's synthetic sets, shifted digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.data.samples import sample
from mixtura.density.scale_mixture_process import ScaleMixtureRegressor
from mixtura.density.scale_priors import BurrXII, FixedScale, InverseGamma, Prior, condition, log_marginal
from mixtura.density.wide_network_kernel import WideNetworkKernel

__all__ = ["CLAIM"]

Pair = tuple[np.ndarray, np.ndarray]

TABLES = ("diabetes", "wine", "breast_cancer", "iris", "boston", "autompg")
SIZES = (8, 15, 30, 100)
NOISES = tuple(10.0 ** (e / 2) for e in range(-6, 3))
MIXTURE, PLAIN = InverseGamma(2.0, 2.0), FixedScale("evidence")

# Grids of the paper's first version.
DEPTHS, WEIGHTS, BIASES = (1, 4, 16), (1.0, 2.0, 4.0), (0.0, 0.09, 1.0)
PAPER_NOISES = tuple(10.0 ** (-6 + e / 2) for e in range(5, 10))
READOUTS = (1.0, 4.0)
SHAPES, BURR_SHAPES = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0), (1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Size:
    """How much of each part a scale runs."""

    splits: int
    tables: int
    depths: tuple[int, ...]
    shapes: tuple[float, ...]
    steps: int


SCALES: dict[Scale, Size] = {
    "smoke": Size(1, 2, (1,), (0.5, 2.0), 30),
    "cpu": Size(20, len(TABLES), DEPTHS, SHAPES, 2000),
    "gpu": Size(20, len(TABLES), DEPTHS, SHAPES, 2000),
}


def table(name: str) -> Pair:
    """Inputs and target of one of the tables."""
    found = sample(name)
    if name == "wine":
        return found.predicting("alcohol")
    if name == "breast_cancer":
        return found.predicting("mean area", found.columns[4:10])
    if name == "iris":
        return found.predicting("petal width (cm)")
    return found.X, found.y


def small_tables(size: Size, seed: int) -> dict[str, Any]:
    """Mean gain in test log density of the mixture over the plain process, by table and number of training rows."""
    kernels = [
        WideNetworkKernel(depth, activation, weight, bias)
        for depth in (1, 2)
        for activation in ("relu", "erf")
        for weight in (1.0, 2.0)
        for bias in (0.1, 1.0)
    ]
    gains: dict[str, list[float]] = {}
    for name in TABLES[: size.tables]:
        X, y = table(name)
        for n in SIZES:
            found = []
            for split in range(size.splits):
                order = np.random.default_rng([seed, split, n]).permutation(len(y))
                train, test = standardised((X[order[:n]], y[order[:n]]), (X[order[n:]], y[order[n:]]))
                scores = [_by_evidence(kernels, prior, train).score_samples(*test).mean() for prior in (MIXTURE, PLAIN)]
                found.append(scores[0] - scores[1])
            gains[f"{name} {n}"] = found
    figures: dict[str, Any] = {
        f"gain_{n}": float(np.mean([np.mean(v) for k, v in gains.items() if k.endswith(f" {n}")])) for n in SIZES
    }
    return figures | {"detail": {"gains": {k: float(np.mean(v)) for k, v in gains.items()}}}


def standardised(train: Pair, *others: Pair) -> list[Pair]:
    """All parts centred and scaled by the training part."""
    means, widths = zip(*((part.mean(0), np.where(part.std(0) > 0, part.std(0), 1.0)) for part in train), strict=True)
    return [tuple((v - m) / w for v, m, w in zip(part, means, widths, strict=True)) for part in (train, *others)]  # type: ignore[misc]


def _by_evidence(kernels: Sequence[WideNetworkKernel], prior: Prior, train: Pair) -> ScaleMixtureRegressor:
    """The kernel and noise of largest evidence under a prior, fitted: one eigendecomposition a kernel serves all noises."""
    X, y = train
    best: tuple[float, WideNetworkKernel, float] | None = None
    for kernel in kernels:
        values, vectors = np.linalg.eigh(kernel(X))
        rotated = (vectors.T @ y) ** 2
        for noise in NOISES:
            spectrum = np.maximum(values, 0.0) + noise
            density = condition(prior, float((rotated / spectrum).sum()), len(y))[1] - np.log(spectrum).sum() / 2
            if best is None or density > best[0]:
                best = (density, kernel, noise)
    assert best is not None
    return _fitted(best[1], prior, best[2], train)


def _fitted(kernel: WideNetworkKernel, prior: Prior, noise: float, train: Pair) -> ScaleMixtureRegressor:
    model = ScaleMixtureRegressor(kernel, scale_prior=prior, noise=noise, optimize=False, normalize_y=False)
    return model.fit(*train)


def synthetic(name: str) -> Pair:
    """The paper's synthetic sets: a smooth process seen through Gaussian (A) or Cauchy (B) noise."""
    n, seed = (100, 829) if name == "A" else (300, 761)
    chance = np.random.RandomState(seed)  # noqa: NPY002 - the paper's own draws
    x = np.linspace(-n / 2, n / 2, n)[:, None]
    f = chance.multivariate_normal(np.zeros(n), np.exp(-0.5 * (x - x.T) ** 2))
    return x, f + (0.2 * chance.standard_normal(n) if name == "A" else 0.8 * chance.standard_t(1, n))


def synthetic_sets(size: Size, seed: int) -> dict[str, Any]:
    """Test NLL on the paper's synthetic sets, everything chosen on the validation part from the paper's grids."""
    kernels = [
        WideNetworkKernel(depth, activation, weight, bias)
        for depth in size.depths
        for activation in ("relu", "erf")
        for weight in WEIGHTS
        for bias in BIASES
    ]
    families: dict[str, list[Prior]] = {
        "nngp": [FixedScale(s) for s in READOUTS],
        "inverse_gamma": [InverseGamma(a, b) for a in size.shapes for b in size.shapes],
        "burr": [BurrXII(c, d) for c in BURR_SHAPES for d in BURR_SHAPES],
    }
    figures: dict[str, Any] = {}
    for name in ("A", "B"):
        x, y = synthetic(name)
        order = np.random.RandomState(seed).permutation(len(y))  # noqa: NPY002
        x, y = x[order], y[order]
        first, second = int(0.8 * len(y)), int(0.9 * len(y))
        train, valid, test = standardised(
            (x[:first], y[:first]), (x[first:second], y[first:second]), (x[second:], y[second:])
        )
        best: dict[str, tuple[float, float]] = {}
        held = np.concatenate([valid[0], test[0]]), np.concatenate([valid[1], test[1]])
        for kernel in kernels:
            for noise in PAPER_NOISES:
                model = _fitted(kernel, FixedScale(1.0), noise, train)
                found = model.predict_distribution(held[0])
                distances = torch.from_numpy(((held[1] - found.location) / found.unit) ** 2)
                for family, priors in families.items():
                    for prior in priors:
                        posterior = condition(prior, model.quadratic_, len(train[1]))[0]
                        nll = np.log(found.unit) - log_marginal(posterior, distances, 1).numpy()
                        figure = (float(nll[: len(valid[1])].mean()), float(nll[len(valid[1]) :].mean()))
                        best[family] = min(best.get(family, figure), figure)
        for family, (_, on_test) in best.items():
            figures[f"{name}_{family}"] = on_test
        figures[f"{name}_nngp_ml2"] = -float(_by_evidence(kernels, PLAIN, train).score_samples(*test).mean())
        figures[f"gain_{name}"] = figures[f"{name}_nngp"] - figures[f"{name}_inverse_gamma"]
    return figures
