"""Train a separator on clips that are mixed with one another, each queried by what accompanies it.

Shapes: C clips, N samples, D width of an embedding, B mixtures of a batch, n sources of a mixture.
Source: CLIPSep (2212.07065), sec. 3; mix-and-separate of Zhao et al. 2018 (1804.03160), sec. 3.2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.audio.embed import JointEmbedding, TextTower
from mixtura.audio.separate.noise_invariant import NoiseInvariantLoss, query_loss
from mixtura.audio.separate.query import QuerySeparator
from mixtura.core.spectrum import MaskKind, loudness_weight, mask_targets
from mixtura.core.training import History, TrainConfig, fit

__all__ = ["Mixing", "fit_from_text", "fit_from_video", "fit_separator", "mixture_loss"]

Objective = Literal["noise-invariant", "query"]


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How a batch is made and judged.

    Attributes:
        batch: mixtures a step.
        sources: clips a mixture, at least 2.
        gain: each clip is scaled by a factor drawn evenly in decibels from -gain to gain.
        mask: kind of target.
        warmup: share of the steps in which the noise heads rest (``pit_warmup_steps`` of the released code).
        seed: of the clips drawn.
    """

    batch: int = 16
    sources: int = 2
    gain: float = 0.0
    mask: MaskKind = "binary"
    warmup: float = 1 / 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.sources < 2:
            raise ValueError(f"batch must be at least 1 and sources at least 2, got {self.batch} and {self.sources}")
        if not 0 <= self.warmup <= 1 or self.gain < 0:
            raise ValueError(f"warmup must lie in [0, 1] and gain be >= 0, got {self.warmup} and {self.gain}")


def mixture_loss(
    model: QuerySeparator,
    sources: Tensor,
    query: Tensor,
    objective: NoiseInvariantLoss | None,
    mask: MaskKind = "binary",
) -> Tensor:
    """Loss of a batch of mixtures.

    Args:
        model: the separator.
        sources: shape (B, n, N); the mixture is their sum.
        query: embeddings, shape (B, n, D).
        objective: with noise heads, or None for the plain loss of the queries.
        mask: kind of target.
    """
    waves = torch.cat([sources, sources.sum(1, keepdim=True)], 1)
    magnitude = model.magnitude_bands(model.spectrum(waves))
    parts, mixture = magnitude[:, :-1], magnitude[:, -1]
    targets, weight = mask_targets(parts, mixture, mask), loudness_weight(mixture)
    if objective is None:
        return query_loss(model.logits(mixture, query), targets, weight)
    asked, noise = model.logits(mixture, query, noise=True)
    return objective(asked, noise, targets, weight)


def fit_separator(
    model: QuerySeparator,
    waves: Tensor,
    embeddings: Tensor,
    config: TrainConfig,
    *,
    mixing: Mixing | None = None,
    objective: NoiseInvariantLoss | None = None,
    groups: Tensor | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    out: Path | None = None,
    label: str = "separate",
    stop: int | None = None,
    describe: Mapping[str, Any] | None = None,
) -> History:
    """Train on clips, each with the embedding that queries it.

    Args:
        model: trained in place.
        waves: shape (C, N), at the model's sample rate, of any floating type; rows are taken as they are drawn, so they may lie
            in a file on disk (:func:`mixtura.audio.separate.pieces.unpack`).
        embeddings: shape (C, D), of any floating type and in a file if need be, or (C, frames, D), of which the mean is taken.
        config: length and rate; the plan of the paper has no weight decay.
        mixing: batches.
        objective: with noise heads; None trains queries alone.
        groups: clips of one group are never mixed with each other, shape (C,). Needs to know what a clip holds: with
            unlabelled clips leave it out.
        augment: changes a batch of sources (B, n, N).
        out: directory of the state of an unfinished run.
        label: on the progress bar.
        stop: leave after so many steps, the state kept in ``out`` (:func:`mixtura.core.training.fit`).
        describe: further facts that must agree between an unfinished run and what goes on from it.
    Raises:
        ValueError: shapes that do not match, clips that are silent or not finite, a number of sources other than that of the
            model's noise heads, or fewer groups than sources.
    """
    mixing = mixing or Mixing()
    _check(model, waves, embeddings, mixing, objective, groups)
    query_CD = F.normalize(embeddings.mean(1), dim=-1) if embeddings.dim() == 3 else embeddings
    warm = int(mixing.warmup * config.steps) if objective is not None else 0
    members = None if groups is None else _members(groups)

    def loss_at(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(mixing.seed * 1_000_003 + step)
        rows_Bn = _drawn(len(waves), mixing, members, rng)
        sources = waves[rows_Bn].float()
        if mixing.gain:
            level = (2 * torch.rand(rows_Bn.shape, generator=rng) - 1) * mixing.gain
            sources = sources * 10 ** (level / 20)[..., None]
        if augment is not None:
            sources = augment(sources, rng)
        used = objective if step >= warm else None
        device = model.shift.device
        return mixture_loss(model, sources.to(device), query_CD[rows_Bn].float().to(device), used, mixing.mask)

    facts = {"clips": len(waves), "seed": mixing.seed, **(describe or {})}
    return fit(model, loss_at, config, out=out, label=label, describe=facts, stop=stop)


def fit_from_video(
    model: QuerySeparator,
    waves: Tensor,
    frames: Tensor,
    tower: JointEmbedding,
    config: TrainConfig,
    *,
    gamma: float = 0.25,
    weight: float = 0.1,
    mixing: Mixing | None = None,
    objective: Objective = "noise-invariant",
    out: Path | None = None,
    stop: int | None = None,
) -> History:
    """Train on clips with pictures, without a word: each clip's pictures are its query (the paper's setting).

    Args:
        model: trained in place.
        waves: shape (C, N).
        frames: pictures of each clip, shape (C, frames, height, width) or (C, frames, 3, height, width).
        tower: frozen; asked once before training.
        gamma, weight: hinge of the noise heads.
        config, mixing, out, stop: as for :func:`fit_separator`.
        objective: ``"noise-invariant"``, or ``"query"`` for the loss without noise heads.
    """
    if objective not in ("noise-invariant", "query"):
        raise ValueError(f"objective must be 'noise-invariant' or 'query', got {objective!r}")
    with torch.inference_mode():
        flat = torch.cat([tower.embed_image(part) for part in frames.flatten(0, 1).split(512)])
    embeddings = flat.clone().reshape(*frames.shape[:2], -1)
    loss = NoiseInvariantLoss(gamma, weight) if objective == "noise-invariant" else None
    return fit_separator(model, waves, embeddings, config, mixing=mixing, objective=loss, out=out, stop=stop)


def fit_from_text(
    model: QuerySeparator,
    waves: Tensor,
    texts: Sequence[str],
    tower: TextTower,
    config: TrainConfig,
    *,
    mixing: Mixing | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    out: Path | None = None,
) -> History:
    """Train on clips with texts that say what they hold; clips of one text are never mixed with each other.

    Args:
        model: trained in place.
        waves: shape (C, N).
        texts: one a clip.
        tower: frozen.
        config, mixing, augment, out: as for :func:`fit_separator`.
    """
    names = sorted(set(texts))
    place = {name: i for i, name in enumerate(names)}
    groups = torch.tensor([place[text] for text in texts])
    with torch.inference_mode():
        embedded = tower.embed_text(names).clone()
    return fit_separator(
        model, waves, embedded[groups], config, mixing=mixing, groups=groups, augment=augment, out=out, label="separate"
    )


def _members(groups: Tensor) -> Sequence[Tensor]:
    """Clips of each group, groups and clips in ascending order; one sort, for there may be as many groups as videos."""
    order = groups.argsort(stable=True)
    return order.split(groups.unique(return_counts=True)[1].tolist())


def _drawn(clips: int, mixing: Mixing, members: Sequence[Tensor] | None, rng: torch.Generator) -> Tensor:
    """Clips of each mixture, shape (B, n): different ones, and of different groups where their members are known."""
    if members is None:
        rows = [torch.randperm(clips, generator=rng)[: mixing.sources] for _ in range(mixing.batch)]
        return torch.stack(rows)
    rows = []
    for _ in range(mixing.batch):
        chosen = torch.randperm(len(members), generator=rng)[: mixing.sources]
        rows.append(torch.stack([members[g][torch.randint(len(members[g]), (), generator=rng)] for g in chosen]))
    return torch.stack(rows)


def _check(
    model: QuerySeparator,
    waves: Tensor,
    embeddings: Tensor,
    mixing: Mixing,
    objective: NoiseInvariantLoss | None,
    groups: Tensor | None,
) -> None:
    if waves.dim() != 2 or embeddings.dim() not in (2, 3) or len(waves) != len(embeddings):
        raise ValueError(
            "waves must have shape (clips, samples) and embeddings (clips, width) or (clips, frames, width), got "
            f"{tuple(waves.shape)} and {tuple(embeddings.shape)}"
        )
    if embeddings.shape[-1] != model.embed_dim:
        raise ValueError(f"embeddings have width {embeddings.shape[-1]}, this separator takes {model.embed_dim}")
    silent = 0
    for part in waves.split(256):  # they may be larger than memory
        if not bool(part.isfinite().all()):
            raise ValueError("waves must be finite; they hold NaN or infinity")
        silent += int((part.abs().amax(1) == 0).sum())
    if silent:
        raise ValueError(f"{silent} of {len(waves)} clips are silent; leave them out")
    if objective is not None and mixing.sources != len(model.noise):
        raise ValueError(
            f"mixing has {mixing.sources} sources, and the separator {len(model.noise)} noise heads; they must agree"
        )
    kinds = len(waves) if groups is None else len(groups.unique())
    if kinds < mixing.sources:
        raise ValueError(f"a mixture of {mixing.sources} sources needs as many kinds of clips, got {kinds}")
