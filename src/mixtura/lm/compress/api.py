"""One door to the ways of making a language model small."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mixtura.lm.tokens import blocks

__all__ = ["METHODS", "calibration_blocks", "compress"]

METHODS = ("mc-moe", "mixllm", "sparse-attention")
DEFAULT_BITS: dict[str, float] = {"mc-moe": 2.5, "mixllm": 4.4}


def compress(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    method: str = "mc-moe",
    bits: float | Literal["default"] | None = "default",
    prune: float | None = None,
    scope: Literal["block", "model"] = "model",
    samples: int | None = None,
    length: int = 256,
    seed: int = 0,
    inplace: bool = False,
    **options: Any,
) -> Any:
    """Compress a language model.

    Args:
        model: for ``"mc-moe"`` any mixture of experts that :func:`mixtura.lm.find_moe` sees inside; for ``"mixllm"`` any causal
            language model in float.
        tokenizer: its tokenizer.
        texts: calibration documents, or domain -> documents.
        method: ``"mc-moe"``: 1 to 3 bits an expert by an integer program, 4 bits for attention and shared experts.
            ``"mixllm"``: 4 bits a weight, and 8 for the output channels that matter most to the loss of the whole model.
            ``"sparse-attention"``: a span of its own for every key/value head, so that the cache keeps a share of its size.
        bits: average bits of a quantized weight (an expert's for ``"mc-moe"``), group scales not counted; 2.5 and 4.4 by
            default. ``None`` leaves the weights as they are.
        prune: share of the tokens protected while second experts that hardly count are skipped at run time; ``None``
            skips nothing.
        scope: one integer program (``"mixllm"``: one list of channels) for the whole ``"model"``, or one for each ``"block"``
            (each matrix). The first lost less wherever it was measured; for ``"mc-moe"`` the second is the paper's.
        samples, length: calibration blocks (32), drawn evenly from the domains, and tokens a block; for ``"sparse-attention"``
            texts of each length (8).
        seed: which blocks.
        inplace: change the model itself; it is then not copied.
        options: passed on to :func:`mixtura.lm.compress.mixed_experts.convert`; for ``"mixllm"`` fields of
            :class:`mixtura.lm.compress.mixed_channels.MixedChannelConfig`, for ``"sparse-attention"`` ``density``, ``lengths``
            and ``block`` of :func:`mixtura.lm.attention.api.give_spans`.
    Returns:
        The compressed model; it saves and loads like any other after ``import mixtura``.
    Raises:
        ValueError: an unknown method, a dense model for ``"mc-moe"``, a budget that no allocation meets (the reachable range is
            named), a model quantized already, text that does not fill one block.
    """
    if method == "sparse-attention":
        from mixtura.lm.attention.api import give_spans

        if prune is not None or bits != "default":
            raise ValueError(
                "sparse-attention cuts what heads look at: it takes density and lengths, no bits and no prune"
            )
        count = 8 if samples is None else samples
        return give_spans(model, tokenizer, texts, samples=count, seed=seed, inplace=inplace, **options)
    samples = 32 if samples is None else samples
    if method == "mixllm":
        if prune is not None or bits is None:
            raise ValueError("mixllm quantizes weights: it takes bits and no prune, which goes with 'mc-moe'")
        wanted = DEFAULT_BITS[method] if bits == "default" else bits
        return _mixed_channels(model, tokenizer, texts, wanted, scope, samples, length, seed, inplace, options)
    if getattr(model.config, "router", "linear") == "sparsity":
        raise ValueError(
            f"mc-moe packs the experts, whose weights the router of {type(model).__name__} reads; use mixllm"
        )
    if bits == "default":
        bits = DEFAULT_BITS["mc-moe"]
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


def _mixed_channels(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    bits: float,
    scope: str,
    samples: int,
    length: int,
    seed: int,
    inplace: bool,
    options: Mapping[str, Any],
) -> Any:
    from mixtura.lm.compress.mixed_channels import MixedChannelConfig, convert, high_share_for

    # Settings first: a budget out of reach is refused before any text is read.
    default = MixedChannelConfig()
    widths = options.get("low_bits", default.low_bits), options.get("high_bits", default.high_bits)
    share = high_share_for(bits, *widths)
    scopes: dict[str, Any] = {"model": "global", "block": "layer"}
    if scope not in scopes:
        raise ValueError(f"scope must be one of {list(scopes)}, got {scope!r}")
    config = MixedChannelConfig(**{"high_share": share, "scope": scopes[scope], **options})
    return convert(model, calibration_blocks(tokenizer, texts, samples, length, seed=seed), config, inplace=inplace)
