"""Discovering classes and learning features in turn: the classes found so far are prototypes that features move towards.

Better features give the right number of classes, and the right number gives prototypes that pull no class apart.

Shapes: N things, B of a batch, E width of an embedding, K classes found.
Source: 2305.06144, sec. 3.1 and 3.3 (losses), with prototypes' concentrations after 2005.04966, eq. 12. Discovery runs on
embeddings of the things as they are, without augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.core.contrast import concentrations, info_nce, prototype_contrast, supervised_contrast
from mixtura.core.training import TrainConfig, fit
from mixtura.density.category_discovery import CategoryDiscovery
from mixtura.density.inputs import device_of
from mixtura.density.labels import UNLABELLED, as_labels

__all__ = ["DiscoveryLoop", "Turn"]

EMBED_ROWS = 1024  # things embedded at once


@dataclass(frozen=True)
class Turn:
    """What one discovery within the training found.

    Attributes:
        epoch: before which it ran.
        n_classes: K.
        temper: of the discovery.
    """

    epoch: int
    n_classes: int
    temper: float


@dataclass(frozen=True)
class _Prototypes:
    directions: Tensor  # (K, E), unit rows
    assigned: Tensor  # (N,)
    concentration: Tensor  # (K,)


class DiscoveryLoop:
    """Train an encoder and discover classes in turn.

    Args:
        encoder: things (B, ...) to embeddings (B, E); they are scaled to length one here. It is trained in place.
        augment: (batch, generator) to a random view of each thing, same shape.
        discovery: how classes are found; it is fitted again and again.
        sup_weight: share of the supervised contrast, in [0, 1]; InfoNCE has the rest.
        prototype_weight: of the contrast with prototypes, >= 0; 0 trains without them.
        warmup: epochs before the first prototypes.
        every: epochs between discoveries.
        temperature: of all contrasts, > 0.
        epochs: in all.
        batch_size: things a step, >= 2.
        learning_rate: peak, of AdamW; falls by a cosine to a thousandth.
        held_out: share of the labelled things that no loss sees with their label, in [0, 1): what the discovery's temper is
            learned from, since labelled things that were trained on lie closer together than any others.
        device: "cpu", "cuda" or "auto".
        seed: of everything that chance enters.

    Attributes:
        encoder: trained.
        discovery: fitted on the final embeddings.
        held_out_: which things were held out, shape (N,), boolean.
        turns_: of the discoveries on the way.
        losses_: one a step.
    """

    def __init__(
        self,
        encoder: nn.Module,
        augment: Callable[[Tensor, torch.Generator], Tensor],
        discovery: CategoryDiscovery,
        *,
        sup_weight: float = 0.35,
        prototype_weight: float = 1.0,
        warmup: int = 20,
        every: int = 5,
        temperature: float = 0.1,
        epochs: int = 50,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        held_out: float = 0.2,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        for name, value, low, high in (
            ("sup_weight", sup_weight, 0, 1),
            ("prototype_weight", prototype_weight, 0, math.inf),
            ("warmup", warmup, 0, math.inf),
            ("every", every, 1, math.inf),
            ("epochs", epochs, 0, math.inf),
            ("batch_size", batch_size, 2, math.inf),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be at least 0 and below 1, got {held_out}")
        self.encoder = encoder
        self.augment = augment
        self.discovery = discovery
        self.sup_weight = sup_weight
        self.prototype_weight = prototype_weight
        self.warmup = warmup
        self.every = every
        self.temperature = temperature
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.held_out = held_out
        self.device = device
        self.seed = seed

    def fit(self, things: Tensor, labels: Any) -> Self:
        """Train and discover.

        Args:
            things: shape (N, ...), floating point.
            labels: class of each thing, -1 where unlabelled, shape (N,).
        Raises:
            ValueError: another number of labels than of things, fewer things than two, or what
                :meth:`CategoryDiscovery.fit` refuses.
        """
        y_N = as_labels(labels, "labels")
        if len(y_N) != len(things) or len(things) < 2:
            raise ValueError(f"labels and things must be as many, at least 2, got {len(y_N)} and {len(things)}")
        device = device_of(self.device)
        self.encoder.to(device)
        things, rows = things.to(device), min(self.batch_size, len(things))
        self.held_out_ = hold_out(y_N, self.held_out, self.seed)
        if not (y_N != UNLABELLED).any():
            raise ValueError("labels has no labelled thing (all are -1)")
        told_N = torch.from_numpy(np.where(self.held_out_, UNLABELLED, y_N)).to(device)
        per_epoch = len(things) // rows
        self.turns_: list[Turn] = []
        found: _Prototypes | None = None

        def loss_at(step: int) -> Tensor:
            nonlocal found
            epoch, part = divmod(step, per_epoch)
            due = self.prototype_weight > 0 and epoch >= self.warmup and (epoch - self.warmup) % self.every == 0
            if due and part == 0:
                found = self._prototypes(things, y_N, epoch)
            # One permutation an epoch, drawn from its number, so that a batch follows from the step alone.
            order = np.random.default_rng([self.seed, epoch]).permutation(len(things))
            batch = torch.from_numpy(order[part * rows : (part + 1) * rows]).to(device)
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + step)
            one, two = (F.normalize(self.encoder(self.augment(things[batch], generator)), dim=-1) for _ in range(2))
            known = told_N[batch] >= 0
            loss = (1 - self.sup_weight) * info_nce(one, two, self.temperature)
            if int(known.sum()) >= 2:
                told = told_N[batch][known]
                loss = loss + self.sup_weight * supervised_contrast(one[known], two[known], told, self.temperature)
            if found is not None:
                for view in (one, two):
                    pulled = prototype_contrast(view, found.directions, found.assigned[batch], found.concentration)
                    loss = loss + self.prototype_weight / 2 * pulled
            return loss

        config = TrainConfig(
            steps=self.epochs * per_epoch,
            lr=self.learning_rate,
            warmup=0.02,
            final=1e-3,
            weight_decay=1e-4,
            betas=(0.9, 0.999),
            seed=self.seed,
        )
        self.encoder.train()
        self.losses_ = fit(self.encoder, loss_at, config, label="discovery loop").losses
        self.discovery.fit(self.embed(things), y_N, held_out=self._to_learn_from(y_N))
        return self

    def embed(self, things: Tensor) -> np.ndarray:
        """Embeddings of length one, shape (N, E), float64, in evaluation mode."""
        was_training = self.encoder.training
        self.encoder.eval()
        device = next(self.encoder.parameters()).device
        with torch.no_grad():
            parts = [
                F.normalize(self.encoder(things[start : start + EMBED_ROWS].to(device)), dim=-1).cpu()
                for start in range(0, len(things), EMBED_ROWS)
            ]
        self.encoder.train(was_training)
        return torch.cat(parts).double().numpy()

    def predict(self, things: Tensor) -> np.ndarray:
        """Class of each thing, shape (N,)."""
        return self.discovery.predict(self.embed(things))

    def _to_learn_from(self, y_N: np.ndarray) -> np.ndarray | None:
        """The held-out things, where every class has two of them; else None, and all labelled ones serve."""
        least = min(int(self.held_out_[y_N == label].sum()) for label in np.unique(y_N[y_N != UNLABELLED]))
        return self.held_out_ if least >= 2 else None

    def _prototypes(self, things: Tensor, y_N: np.ndarray, epoch: int) -> _Prototypes:
        z_NE = self.embed(things)
        self.discovery.fit(z_NE, y_N, held_out=self._to_learn_from(y_N))
        self.turns_.append(Turn(epoch, self.discovery.n_classes_, self.discovery.temper_))
        # Held-out things go where they would without their label, as unlabelled ones do; else the loss would see it.
        label_N = np.where(self.held_out_, self.discovery.predict(z_NE), self.discovery.labels_)
        assigned = torch.from_numpy(np.searchsorted(self.discovery.classes_, label_N)).to(things.device)
        z = torch.from_numpy(z_NE).float().to(things.device)
        k = self.discovery.n_classes_
        sums_KE = z.new_zeros(k, z.shape[1]).index_add(0, assigned, z)
        counts_K = torch.bincount(assigned, minlength=k).clamp(min=1)
        means_KE = sums_KE / counts_K[:, None]
        distance_N = (z - means_KE[assigned]).norm(dim=1)
        phi_K = concentrations(distance_N, assigned, k, temperature=self.temperature)
        return _Prototypes(F.normalize(means_KE, dim=-1), assigned, phi_K)


def hold_out(y: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which labelled rows are held out, shape (N,), boolean: the share of every class, but two of it stay in.

    Args:
        y: class of each row, -1 where unlabelled, shape (N,).
        share: in [0, 1).
        seed: of the choice.
    """
    rng, held_N = np.random.default_rng([seed, len(y)]), np.zeros(len(y), dtype=bool)
    for label in np.unique(y[y != UNLABELLED]):
        mine = np.flatnonzero(y == label)
        n = min(round(share * len(mine)), max(len(mine) - 2, 0))
        held_N[rng.choice(mine, n, replace=False)] = True
    return held_N
