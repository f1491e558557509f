"""One door to the ways of making a mixture of experts small."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mixtura.lm.tokens import blocks

__all__ = ["METHODS", "calibration_blocks", "compress"]

METHODS = ("mc-moe",)


def compress(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    method: str = "mc-moe",
    bits: float | None = 2.5,
    prune: float | None = None,
    scope: Literal["block", "model"] = "model",
    samples: int = 32,
    length: int = 256,
    seed: int = 0,
    inplace: bool = False,
    **options: Any,
) -> Any:
    """Compress a mixture of experts.

    Args:
        model: any mixture of experts that :func:`mixtura.lm.find_moe` sees inside.
        tokenizer: its tokenizer.
        texts: calibration documents, or domain -> documents.
        method: ``"mc-moe"``: 1 to 3 bits an expert by an integer program, 4 bits for attention and shared experts.
        bits: average bits of an expert's weight, group scales not counted; ``None`` leaves the weights as they are.
        prune: share of the tokens protected while second experts that hardly count are skipped at run time; ``None``
            skips nothing.
        scope: one integer program for the whole ``"model"``, or one for each ``"block"`` as in the paper. Measured on the
            claim's models the first lost about half as much at 2 bits and below.
        samples, length: calibration blocks, drawn evenly from the domains, and tokens a block.
        seed: which blocks.
        inplace: change the model itself; it is then not copied.
        options: passed on to :func:`mixtura.lm.compress.mixed_experts.convert`.
    Returns:
        The compressed model; it saves and loads like any other after ``import mixtura``.
    Raises:
        ValueError: an unknown method, a dense model, a budget that no allocation meets (the reachable range is named).
    """
    from mixtura.lm.compress.dynamic_pruning import prune_dynamically
    from mixtura.lm.compress.mixed_experts import convert

    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    if bits is None and prune is None:
        raise ValueError("bits and prune are both None, so there is nothing to do; give one of them")
    rows = calibration_blocks(tokenizer, texts, samples, length, seed=seed)
    if bits is not None:
        model = convert(model, rows, average_bits=bits, scope=scope, inplace=inplace, **options)
        inplace = True
    if prune is not None:
        model = prune_dynamically(model, rows, protect=prune, inplace=inplace)
    return model


def calibration_blocks(
    tokenizer: Any, texts: Sequence[str] | Mapping[str, Sequence[str]], samples: int, length: int, *, seed: int = 0
) -> Tensor:
    """Blocks of tokens drawn evenly from the domains, shape (samples, length), fewer where the text ends."""
    domains = texts if isinstance(texts, Mapping) else {"text": texts}
    each = -(-samples // len(domains))
    rows = []
    for part in domains.values():
        # Four times as many to draw from, so that a seed chooses and a long text is not read to its end.
        pool = blocks(tokenizer, part, length, limit=4 * each)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        rows.append(pool[order[:each]])
    return torch.cat(rows)[:samples]
