"""Text to blocks of tokens, and blocks to batches that depend on the step alone.

Shapes: N blocks, L positions, B rows of a batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_at", "blocks", "byte_pair_tokenizer", "mixed_batch_at"]

END = "<|end|>"


def byte_pair_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> Any:
    """Train a byte-level byte-pair tokenizer; every text can be encoded, none needs an unknown token.

    Args:
        texts: documents to learn the merges from.
        vocab_size: number of tokens, the 256 bytes and the end token included; at least 257.
    Returns:
        A ``PreTrainedTokenizerFast`` whose end and padding token is ``<|end|>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and an end token), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def blocks(tokenizer: Any, texts: Sequence[str], length: int, *, limit: int | None = None) -> Tensor:
    """Join documents with the end token and cut them into blocks of equal length.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: documents.
        length: tokens a block, >= 2 (one is predicted from another).
        limit: largest number of blocks; reading stops there.
    Returns:
        Token ids, int64, shape (N, length); what does not fill the last block is dropped.
    Raises:
        ValueError: the texts do not fill one block, or a length or limit below what makes sense.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, since each token is predicted from those before it, got {length}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit, the number of blocks or samples, must be at least 1, got {limit}")
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if end is not None:
            ids.append(end)
        if limit is not None and len(ids) >= limit * length:
            break
    n = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if n == 0:
        raise ValueError(f"the texts give {len(ids)} tokens, which do not fill one block of {length}; give more text")
    return torch.tensor(ids[: n * length], dtype=torch.long).view(n, length)


def batch_at(blocks: Tensor, step: int, batch_size: int, *, seed: int) -> Tensor:
    """Batch of a step: every block once an epoch, each epoch in an order of its own.

    The same step and seed give the same batch, whatever was drawn before, so a resumed run goes on where it stopped.

    Args:
        blocks: shape (N, L).
        step: number of the step, >= 0.
        batch_size: rows, B; may exceed N.
        seed: order of the blocks.
    Returns:
        Shape (B, L).
    """
    n = len(blocks)
    if batch_size < 1 or n < 1:
        raise ValueError(f"batch_size and the number of blocks must be at least 1, got {batch_size} and {n}")
    wanted = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: _order(n, epoch, seed) for epoch in {i // n for i in wanted}}
    return blocks[torch.tensor([int(orders[i // n][i % n]) for i in wanted])]


def mixed_batch_at(
    sources: Mapping[str, Tensor], shares: Mapping[str, float], step: int, batch_size: int, *, seed: int
) -> Tensor:
    """Batch of a step that mixes several sources in given shares.

    Each row's source is drawn from the step; within a source the blocks are taken in random order with replacement.

    Args:
        sources: name -> blocks of shape (N, L), the same L.
        shares: name -> weight, >= 0, not all zero; need not sum to 1.
        step, batch_size, seed: as in :func:`batch_at`.
    Returns:
        Shape (B, L).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if unknown := sorted(set(shares) - set(sources)):
        raise ValueError(f"shares name {unknown}, sources hold {sorted(sources)}")
    names = [name for name, share in shares.items() if share > 0]
    if not names:
        raise ValueError("shares must give at least one source a positive weight")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    weights = torch.tensor([float(shares[name]) for name in names])
    picks = torch.multinomial(weights, batch_size, replacement=True, generator=generator).tolist()
    rows = [sources[names[i]][torch.randint(len(sources[names[i]]), (), generator=generator)] for i in picks]
    return torch.stack(rows)


def _order(n: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
