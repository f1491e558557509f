"""Latents by name: which model of x stands behind a name, how large it is, and what a head sees of it.

What a head sees is the posterior: the mean of a factor, the probabilities of components, the features of an encoder.

Source: 2303.01566, sec. 4-6 (factor models, Gaussian mixtures, contrastive pairs).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone

from mixtura.density.factor_model import FactorModel
from mixtura.density.mixture import GaussianMixture
from mixtura.density.selection import select_components
from mixtura.density.sources import is_batches, open_source

__all__ = ["LATENTS", "Together", "fit_latent", "is_mixture", "latent_features"]

log = logging.getLogger(__name__)

LATENTS = ("contrastive", "factor", "mixture")
MOST_COMPONENTS, PATIENCE = 30, 3  # of a mixture whose size BIC chooses
RESTARTS = 5


class Together:
    """Samples of several sources in turn, as batches that can be read again; nothing is copied.

    Args:
        parts: arrays of shape (n, F), iterables of such, or paths that `GaussianMixture.fit` reads.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[np.ndarray]:
        for part in self.parts:
            source = open_source(part)
            if source is None:
                yield np.asarray(part)
            else:
                yield from (block.numpy() for block in source.blocks(4096))


def fit_latent(latent: Any, n_latent: int | str, X: Any, seed: int) -> Any:
    """A fitted model of x.

    Args:
        latent: "factor" (a noise variance a feature, so that units do not matter), "mixture" (a variance a feature in each
            component), "contrastive" (a small network and jittered copies), or an estimator, which is cloned and keeps its size.
        n_latent: factors, components or features; "auto" chooses factors by parallel analysis, components by BIC, 32 features.
        X: samples as the model takes them.
        seed: source of chance, of models by name.
    Raises:
        ValueError: an unknown name, a size that an estimator already has, and what the model's ``fit`` raises.
    """
    if n_latent != "auto" and (
        not isinstance(n_latent, (int, np.integer)) or isinstance(n_latent, bool) or n_latent < 1
    ):
        raise ValueError(f"n_latent must be 'auto' or a whole number >= 1, got {n_latent!r}")
    if not isinstance(latent, str):
        if n_latent != "auto":
            raise ValueError(f"n_latent={n_latent} is for latents by name; the estimator {latent!r} has its own size")
        return clone(latent).fit(X)
    if latent not in LATENTS:
        raise ValueError(f"latent must be one of {list(LATENTS)} or an estimator, got {latent!r}")
    if latent == "factor":
        return FactorModel(n_latent, noise="diagonal", seed=seed).fit(X)
    if latent == "contrastive":
        from mixtura.density.contrastive_model import ContrastiveModel

        return ContrastiveModel(dim=32 if n_latent == "auto" else int(n_latent), seed=seed).fit(X)
    options: dict[str, Any] = {"covariance": "diag", "random_state": seed}
    if n_latent != "auto":
        return GaussianMixture(n_latent, n_init=RESTARTS, **options).fit(X)  # type: ignore[arg-type]
    most = MOST_COMPONENTS if not hasattr(X, "shape") else max(1, min(MOST_COMPONENTS, len(X) // 2))
    return select_components(X, range(1, most + 1), "bic", patience=PATIENCE, **options)[0]


def is_mixture(model: Any) -> bool:
    """Whether a model tells the probabilities of components."""
    return hasattr(model, "predict_proba")


def latent_features(model: Any, X: Any) -> np.ndarray:
    """What a head sees of each sample, shape (N, R): probabilities of components, or ``transform``."""
    return np.asarray(model.predict_proba(X) if is_mixture(model) else model.transform(X), dtype=np.float64)


def several(X: Any) -> bool:
    """Whether samples come as a path or as batches rather than as one array."""
    return isinstance(X, (str, Path)) or is_batches(X)
