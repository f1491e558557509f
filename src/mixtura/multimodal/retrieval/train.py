"""Training a retriever: from plain text with a queue of keys, or from questions with known answers.

Shapes: B pairs of a batch, K keys in the queue, D width.
Source: Contriever (2112.09118), sec. 3.2 (queue), sec. 3.4 and appendix B (fine-tuning, mined negatives).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.core.contrast import KeyQueue, follow, gathered, queue_contrast
from mixtura.core.training import History, TrainConfig, fit
from mixtura.multimodal.retrieval.crops import CropDataset, Tokens
from mixtura.multimodal.retrieval.encoder import TextEncoder

__all__ = ["MomentumRetriever", "UnsupervisedConfig", "finetune", "mine_hard_negatives", "train_unsupervised"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UnsupervisedConfig:
    """How the contrast is set up.

    Attributes:
        steps: of the optimizer.
        batch: pairs a step, on each process.
        queue: keys that serve as negatives; rounded up to a multiple of all processes' batch.
        momentum: of the network that makes the keys.
        temperature: of the similarities.
        lr: peak learning rate.
        label_smoothing: share of the target that is spread over all candidates.
        seed: of batches and of dropout.
    """

    steps: int
    batch: int = 256
    queue: int = 8192
    momentum: float = 0.995
    temperature: float = 0.05
    lr: float = 2e-2
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 2 or self.queue < 1:
            raise ValueError(f"steps must be >= 0, batch >= 2 and queue >= 1, got {self}")


class MomentumRetriever(nn.Module):
    """An encoder in training, its slow follower, and the follower's last keys.

    At each step the follower moves first and encodes the keys then. The keys of the step are no negatives of the step; they
    enter the queue afterwards. While the queue is empty, which is the first step, the batch's own keys serve.

    Args:
        encoder: trained in place.
        queue_size: K.
        momentum, temperature, label_smoothing: as in :class:`UnsupervisedConfig`.
    Source:
        Contriever (2112.09118), sec. 3.2; MoCo (1911.05722), algorithm 1. Unlike there the queue grows from empty: random
        vectors teach nothing, and here there are few steps.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        queue_size: int = 8192,
        momentum: float = 0.995,
        temperature: float = 0.05,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
        self.encoder = encoder
        tokenizer, encoder.tokenizer = encoder.tokenizer, None  # type: ignore[assignment]  # not worth a copy
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        encoder.tokenizer = self.key_encoder.tokenizer = tokenizer
        self.queue = KeyQueue(queue_size, encoder.width).to(encoder.device)
        self.momentum, self.temperature, self.label_smoothing = momentum, temperature, label_smoothing

    def forward(self, q: Tokens, k: Tokens) -> Tensor:
        """Loss of a batch of pairs, in nats; moves the follower and the queue."""
        queries = self.encoder.embed(q)
        with torch.no_grad():
            follow(self.key_encoder, self.encoder, self.momentum)
            keys = self.key_encoder.embed(k)
            everyone = gathered(keys)
        if len(self.queue):
            loss = queue_contrast(
                queries, keys, self.queue.held(), self.temperature, label_smoothing=self.label_smoothing
            )
        else:
            first = len(keys) * _rank()
            loss = in_batch(queries, everyone, self.temperature, first=first, label_smoothing=self.label_smoothing)
        self.queue.push(everyone)
        return loss

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the trained weights."""
        slow = {f"key_encoder.{name}": t for name, t in self.key_encoder.state_dict().items()}
        return slow | {f"queue.{name}": t for name, t in self.queue.state_dict().items()}


def in_batch(
    queries: Tensor, keys: Tensor, temperature: float, *, first: int = 0, label_smoothing: float = 0.0
) -> Tensor:
    """How badly query i finds key first + i among all keys, in nats; shapes (B, D) and (first + B or more, D)."""
    logits = queries.float() @ keys.float().mT / temperature
    target = first + torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


def train_unsupervised(
    encoder: TextEncoder,
    data: CropDataset,
    config: UnsupervisedConfig,
    *,
    out: Path | None = None,
    resume: bool = True,
    checkpoint_every: int = 0,
    label: str = "train",
) -> History:
    """Train an encoder, in place, on pairs of crops.

    Args:
        encoder: from nothing, or any start that saw no labels.
        data: gives the pairs of a step.
        config: of the contrast.
        out, resume, checkpoint_every: as in :func:`mixtura.core.training.fit`; a resumed run ends with the weights of an
            unbroken one.
        label: on the progress bar.
    Under ``torch.distributed`` every process calls this with equal encoders and data: batches differ, gradients are averaged and
    the queue is filled with everybody's keys, as in one process with the joined batch. Give ``out`` on the first process alone
    where nothing is resumed.

    Returns:
        Losses, one a step; of this process.
    """
    world, rank = _world(), _rank()
    whole = config.batch * world
    size = -(-config.queue // whole) * whole
    if size != config.queue:
        log.info("queue of %d keys rounded up to %d, a multiple of the batch of %d", config.queue, size, whole)
    learner = MomentumRetriever(
        encoder, size, config.momentum, config.temperature, label_smoothing=config.label_smoothing
    )

    def loss_at(step: int) -> Tensor:
        q, k = data.batch(step * world + rank, config.batch, seed=config.seed)
        return learner(q, k)

    schedule = TrainConfig(
        steps=config.steps,
        lr=config.lr,
        warmup=0.05,
        final=0.0,
        weight_decay=0.0,
        betas=(0.9, 0.98),
        clip=0.0,
        seed=config.seed,
        checkpoint_every=checkpoint_every,
    )
    facts: dict[str, Any] = {
        "documents": len(data),
        "tokens": len(data.ids),
        "way": data.way,
        "batch": config.batch,
        "queue": size,
    }
    facts |= {"momentum": config.momentum, "temperature": config.temperature}
    hooks = [] if world == 1 else [p.register_post_accumulate_grad_hook(_average) for p in encoder.parameters()]
    try:
        return fit(
            learner, loss_at, schedule, out=out, resume=resume, label=label, describe=facts, carried=learner.carried()
        )
    finally:
        for hook in hooks:
            hook.remove()


def finetune(
    encoder: TextEncoder,
    queries: Sequence[str],
    positives: Sequence[str],
    hard_negatives: Sequence[str] | None = None,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    temperature: float = 0.05,
    rho: float = 0.05,
    seed: int = 0,
    out: Path | None = None,
) -> History:
    """Train an encoder, in place, on questions with known answers; this is supervised, and no claim here uses it.

    Negatives of a question are the answers to the batch's other questions and all hard negatives of the batch. Gradients are
    taken where the loss rises most near the weights (ASAM), which takes twice the time.

    Args:
        encoder: best one that :func:`train_unsupervised` made.
        queries, positives: question i and its answer.
        hard_negatives: a wrong answer to question i that looks right, as :func:`mine_hard_negatives` finds.
        steps, batch, lr, temperature, seed: of the training.
        rho: radius of ASAM; 0 takes plain gradients, in half the time.
        out: directory for checkpoints.
    Source:
        Contriever (2112.09118), sec. 3.4, appendix B; ASAM (2102.11600).
    """
    n = len(queries)
    sides = {"positives": positives} | ({} if hard_negatives is None else {"hard_negatives": hard_negatives})
    for name, texts in sides.items():
        if len(texts) != n:
            raise ValueError(f"{name} must have one text a query, got {len(texts)} for {n}")
    if n < 2:
        raise ValueError(f"queries must be at least 2, since one answer is the other's negative, got {n}")
    ids = {name: encoder.tokenizer.ids(texts, encoder.config.max_length) for name, texts in sides.items()}
    asked = encoder.tokenizer.ids(queries, encoder.config.max_length)

    def tokens(texts: Sequence[Sequence[int]], rows: np.ndarray) -> Tensor:
        return encoder.embed(_unmarked(encoder, [texts[i] for i in rows]))

    def loss_at(step: int) -> Tensor:
        rows = np.random.default_rng([seed, step]).permutation(n)[:batch]
        keys = torch.cat([tokens(texts, rows) for texts in ids.values()])
        return in_batch(tokens(asked, rows), keys, temperature)

    schedule = TrainConfig(steps=steps, lr=lr, warmup=0.05, final=0.0, weight_decay=0.0, clip=1.0, seed=seed, rho=rho)
    return fit(encoder, loss_at, schedule, out=out, label="fine-tune", describe={"pairs": n, "batch": batch})


def mine_hard_negatives(
    encoder: TextEncoder,
    queries: Sequence[str],
    relevant: Sequence[set[int]],
    documents: Sequence[str],
    *,
    depth: int = 100,
    seed: int = 0,
) -> list[int]:
    """For each query a document that the encoder ranks among the first ``depth`` and that does not answer it.

    Args:
        relevant: places of the documents that answer each query.
        documents: to choose from; more than any query has answers.
    Returns:
        A place in ``documents`` for each query.
    Source:
        Contriever (2112.09118), appendix B: negatives mined by the model itself.
    """
    from mixtura.multimodal.retrieval.index import DenseIndex

    if len(queries) != len(relevant):
        raise ValueError(f"relevant must have one set a query, got {len(relevant)} for {len(queries)}")
    most = max((len(own) for own in relevant), default=0)
    if len(documents) <= most:
        raise ValueError(f"documents must be more than a query's {most} answers, got {len(documents)}")
    found = DenseIndex(encoder.encode(documents)).search(encoder.encode(queries), min(depth + most, len(documents)))
    rng = np.random.default_rng(seed)
    chosen = []
    for rows, own in zip(found.rows, relevant, strict=True):
        wrong = [int(row) for row in rows if row >= 0 and int(row) not in own][:depth]
        # A query of no known token finds nothing; then any document that does not answer it.
        wrong = wrong or [i for i in range(len(documents)) if i not in own]
        chosen.append(int(rng.choice(wrong)))
    return chosen


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _average(parameter: Tensor) -> None:
    """Make a gradient the mean over the processes."""
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= _world()


def _unmarked(encoder: TextEncoder, texts: Sequence[Sequence[int]]) -> Tokens:
    """Ids whose marks ``embed`` will put back."""
    return Tokens.of([ids[1:-1] if encoder.tokenizer.marks else ids for ids in texts])
