"""How well a language model predicts held-out text."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["perplexity", "token_losses", "token_losses_and_choices"]


@torch.inference_mode()
def perplexity(model: Any, blocks: Tensor, *, batch_size: int = 16) -> float:
    """Exponential of the mean negative log-likelihood a token, without unit, >= 1; lower is better.

    Args:
        model: a causal language model: ``model(input_ids).logits`` has shape (B, L, V).
        blocks: token ids, shape (N, L), L >= 2; the first token of each block is not predicted.
        batch_size: blocks evaluated at a time.
    """
    losses = token_losses(model, blocks, batch_size=batch_size)
    return math.exp(losses.double().mean().item())


@torch.inference_mode()
def token_losses(model: Any, blocks: Tensor, *, batch_size: int = 16) -> Tensor:
    """Negative log-likelihood of each predicted token in nats, float32, shape (N, L - 1).

    The model is put into evaluation mode and back.
    """
    return torch.cat([_losses(logits, ids) for logits, ids in _read(model, blocks, batch_size)])


@torch.inference_mode()
def token_losses_and_choices(model: Any, blocks: Tensor, *, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """As :func:`token_losses`, and the likeliest token at each of these positions, int64, shape (N, L - 1)."""
    found = [(_losses(logits, ids), logits.argmax(-1).cpu()) for logits, ids in _read(model, blocks, batch_size)]
    losses, choices = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(choices)


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return loss.view(len(ids), -1).cpu()


def _read(model: Any, blocks: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of all but the last position, float32, and the ids, batch by batch."""
    if blocks.dim() != 2 or blocks.shape[1] < 2:
        raise ValueError(f"blocks must have shape (N, L) with L >= 2, got {tuple(blocks.shape)}")
    mode = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        for first in range(0, len(blocks), batch_size):
            ids = blocks[first : first + batch_size].to(device)
            # use_cache=False: no key or value is read again, so none needs to be kept.
            yield model(input_ids=ids, use_cache=False).logits[:, :-1].float(), ids
    finally:
        model.train(mode)
