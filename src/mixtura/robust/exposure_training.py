"""Fine-tuning with outliers: batches of known inputs and of outliers, drawn from the step alone, through the common loop.

Every known row is seen once an epoch; outliers are cycled for as long as the epochs last. Arrays may lie on disk: only the
rows of a batch are read.

Shapes: N known rows, M outliers, B batch.
Source: Zhang et al. 2021 (2106.03917), sec. 4 and its code: SGD with Nesterov momentum, a cosine
from the first rate to 1e-6, step by step.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixtura.core.training import History, TrainConfig, fit
from mixtura.robust.outlier_exposure import Exposure, HardOutlierExposure, Plain

__all__ = ["Augment", "ExposureConfig", "Rows", "expose", "logits_of", "shared_rows", "shifted"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
LEAST_RATE = 1e-6  # where the cosine ends
READ_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class ExposureConfig:
    """How long and how fast to fine-tune; the defaults are the paper's, for a pretrained network.

    Attributes:
        epochs: passes over the known rows.
        lr: first learning rate; it falls to 1e-6.
        batch_size: known rows a step.
        momentum, weight_decay: of SGD.
        clip: largest norm of the gradient; 0 clips nothing, as in the paper.
        seed: of the order of rows, the pairs and the shares.
    """

    epochs: int = 10
    lr: float = 1e-3
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 1e-5
    clip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must be >= 0, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")


class Rows:
    """Rows of an array as float32 tensors, read when they are asked for; bytes become shares of 255.

    Args:
        array: shape (N, ...): an array, an array on disk, or a tensor.
        only: numbers of the rows that count, all where None.
        shift, scale: subtracted from and divided into every row, shape (...); nothing where None.
        device: where the rows go.
    """

    def __init__(
        self,
        array: Any,
        *,
        only: NDArray[np.int64] | None = None,
        shift: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self.array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        self.only = only
        self.device = device
        self._shift = None if shift is None else torch.as_tensor(shift, dtype=torch.float32, device=device)
        self._scale = None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return len(self.array if self.only is None else self.only)

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        found = np.ascontiguousarray(self.array[rows if self.only is None else self.only[rows]])
        x = torch.from_numpy(found).to(self.device, torch.float32)
        if found.dtype == np.uint8:
            x = x / 255
        if self._shift is not None:
            x = x - self._shift
        return x if self._scale is None else x / self._scale


def expose(
    model: nn.Module,
    objective: Exposure,
    inputs: Rows,
    y: NDArray[np.int64],
    outliers: Rows | None,
    config: ExposureConfig,
    *,
    augment: Augment | None = None,
    out: Path | None = None,
    checkpoint_every: int = 0,
    label: str = "fine-tuning",
) -> History:
    """Train ``model`` in place with an objective.

    Args:
        model: (B, ...) -> logits (B, K).
        objective: one of :mod:`mixtura.robust.outlier_exposure`.
        inputs, y: known rows and their classes, integers in [0, K), shape (N,).
        outliers: cycled as often as it takes; None only for :class:`Plain`.
        config: length and rate.
        augment: (B, ...) and a generator -> (B, ...), done to known rows and outliers alike.
        out, checkpoint_every: see :func:`mixtura.core.training.fit`; an interrupted run goes on from there.
        label: name on the progress bar.
    Raises:
        ValueError: no known row, no outlier, or labels of another number.
    """
    if not len(inputs) or len(y) != len(inputs):
        raise ValueError(
            f"inputs and y must hold the same number of rows, at least one, got {len(inputs)} and {len(y)}"
        )
    if outliers is None and not isinstance(objective, Plain):
        raise ValueError(f"{type(objective).__name__} needs outliers, got none; give some, or use Plain")
    if outliers is not None and not len(outliers):
        raise ValueError("outliers must hold at least one row, got none")
    plan = _Plan(model, objective, inputs, y, outliers, config, augment)
    train = TrainConfig(
        steps=config.epochs * plan.per_epoch,
        lr=config.lr,
        warmup=0.0,
        final=min(1.0, LEAST_RATE / config.lr),
        weight_decay=config.weight_decay,
        betas=(config.momentum, 0.0),
        clip=config.clip,
        checkpoint_every=checkpoint_every,
        seed=config.seed,
        optimizer="sgd",
    )
    describe = {"objective": repr(objective), "rows": len(inputs), "outliers": 0 if outliers is None else len(outliers)}
    return fit(model, plan.loss_at, train, out=out, label=label, describe=describe)


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Rows, rows: NDArray[np.int64] | None = None) -> Tensor:
    """Logits of rows, shape (n, K), on the CPU, in evaluation mode and a few hundred rows at a time."""
    wanted = np.arange(len(inputs)) if rows is None else rows
    mode = model.training
    model.eval()
    try:
        parts = [model(inputs(wanted[i : i + READ_AT_ONCE])).cpu() for i in range(0, len(wanted), READ_AT_ONCE)]
    finally:
        model.train(mode)
    return torch.cat(parts)


def shifted(most: float = 0.125) -> Augment:
    """Moves every image by up to ``most`` of its sides, edges repeated."""

    def move(x: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = x.shape
        pads = [int(most * side) for side in (height, width)]
        padded = nn.functional.pad(x, (pads[1], pads[1], pads[0], pads[0]), mode="replicate")
        at = [
            torch.randint(2 * pad + 1, (n, 1), generator=generator).to(x.device) + torch.arange(side, device=x.device)
            for pad, side in zip(pads, (height, width), strict=True)
        ]
        each = torch.arange(n, device=x.device)[:, None, None]
        return padded[each, :, at[0][:, :, None], at[1][:, None, :]].permute(0, 3, 1, 2)

    return move


def shared_rows(inputs: Any, outliers: Any) -> int:
    """How many outliers equal a known row, value for value; the arrays are read row by row."""

    def digest(row: Any) -> bytes:
        return hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest()

    known = {digest(row) for row in inputs}
    return sum(digest(row) in known for row in outliers)


@dataclass
class _Plan:
    """Which rows and outliers a step sees."""

    model: nn.Module
    objective: Exposure
    inputs: Rows
    y: NDArray[np.int64]
    outliers: Rows | None
    config: ExposureConfig
    augment: Augment | None

    def __post_init__(self) -> None:
        self.per_epoch = math.ceil(len(self.inputs) / self.config.batch_size)
        self._chosen: tuple[int, NDArray[np.int64]] | None = None
        self._order = functools.lru_cache(maxsize=4)(self._draw_order)

    def loss_at(self, step: int) -> Tensor:
        epoch, part = divmod(step, self.per_epoch)
        # Batches of equal size, give or take one: a last batch of one row would break batch normalisation.
        order = self._order(0, epoch, len(self.inputs))
        rows = np.array_split(order, self.per_epoch)[part]
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        x = self._augmented(self.inputs(rows), generator)
        y = torch.from_numpy(self.y[rows]).to(x.device)
        if self.outliers is None:
            return self.objective(self.model, x, y, x, generator=generator)
        z = self.outliers(self._outlier_rows(step, epoch, len(rows)))
        return self.objective(self.model, x, y, self._augmented(z, generator), generator=generator)

    def _outlier_rows(self, step: int, epoch: int, n_rows: int) -> NDArray[np.int64]:
        assert self.outliers is not None
        stride = self.objective.outliers_per_input * self.config.batch_size
        wanted = np.arange(step * stride, step * stride + self.objective.outliers_per_input * n_rows)
        if isinstance(self.objective, HardOutlierExposure):
            chosen = self._hardest(self.objective, epoch, stride)
            return chosen[self._places(wanted, len(chosen))]
        return self._places(wanted, len(self.outliers))

    def _places(self, wanted: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """Entries of an endless list: one shuffle of n after another."""
        rounds, places = np.divmod(wanted, n)
        return np.array([self._order(1, int(r), n)[p] for r, p in zip(rounds, places, strict=True)])

    def _hardest(self, objective: HardOutlierExposure, epoch: int, stride: int) -> NDArray[np.int64]:
        if self._chosen is None or self._chosen[0] != epoch:
            assert self.outliers is not None
            outliers = self.outliers
            generator = torch.Generator().manual_seed(self.config.seed * 7919 + epoch)
            found = objective.choose(
                lambda rows: logits_of(self.model, outliers, rows.numpy()),
                len(outliers),
                stride * self.per_epoch,
                generator=generator,
            )
            self._chosen = (epoch, found.numpy())
        return self._chosen[1]

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x if self.augment is None else self.augment(x, generator)

    def _draw_order(self, kind: int, number: int, n: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.config.seed, kind, number]).permutation(n)
