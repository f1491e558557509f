"""What ``mixtura prune`` does: count visits, keep the most visited experts, measure before and after, write."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtura.cli.checks import check_device, check_writable
from mixtura.cli.multitask_work import is_multitask, measured, mixture_of, texts_of, usage
from mixtura.cli.work import domains_of, usage_of
from mixtura.lm import cost, loading
from mixtura.lm.anatomy import find_moe

__all__ = ["number_of", "run"]

MEASURED = 8  # held-out blocks a domain
ROWS = 16  # a batch of the encoder-decoder

Say = Callable[[str], None]
Measure = Callable[[Any], dict[str, float]]


def number_of(experts: str, n_experts: int) -> int:
    """How many of E experts stay: a share with a point in it, rounded up, or a number.

    Raises:
        ValueError: neither, or outside what there is.
    Example:
        >>> number_of("0.5", 5), number_of("4", 5)
        (3, 4)
    """
    try:
        # Rounded first, so that a tenth of ten is one.
        number = math.ceil(round(float(experts) * n_experts, 6)) if "." in experts else int(experts)
    except ValueError:
        raise ValueError(f"--experts must be a share such as 0.5 or a number such as 4, got {experts!r}") from None
    if not 1 <= number <= n_experts:
        raise ValueError(
            f"--experts {experts} means {number} of {n_experts} experts; give a share up to 1.0 or 1 to {n_experts}"
        )
    return number


def run(
    source: str,
    out: Path,
    text: Sequence[Path] | None,
    *,
    experts: str,
    languages: Sequence[str],
    policy: str,
    samples: int,
    length: int,
    seed: int,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    """Prune a checkpoint into ``out``."""
    from mixtura.lm.prune_experts import expert_usage, prune

    check_device(device)
    check_writable(out, [source])
    if samples < 1:
        raise ValueError(f"--samples must be at least 1, got {samples}")
    both = is_multitask(source)
    if languages and not both:
        raise ValueError("--language goes with the encoder-decoder; for a decoder give --text of that language")
    empty = loading.empty_model(loading.load_config(source))
    blocks = find_moe(empty)
    if not blocks:
        raise ValueError(f"{source} has no mixture layers, so it has no experts to take out")
    keep = {block.name: number_of(experts, block.n_experts) for block in blocks}
    for block in blocks:
        if keep[block.name] < block.k:
            raise ValueError(
                f"--experts {experts} leaves {keep[block.name]} of {block.n_experts} experts in {block.name}, and a token visits "
                f"{block.k}; give at least {block.k}"
            )
    size = cost.model_size(empty)
    tokens = samples * length * (ROWS if both else max(1, len(text or [0])))
    said = ", ".join(sorted({f"{keep[block.name]} of {block.n_experts}" for block in blocks}))
    say(f"prune {source} to {said} experts a layer: {cost.estimate(size, forward_tokens=tokens)}")
    if dry_run:
        return
    model, tokenizer = loading.load(source, dtype="quick", device=device)
    if both:
        batches, measure, what = _pairs(tokenizer, text, languages, samples, length, seed)
    else:
        batches, measure, what = _documents(tokenizer, text, samples, length)
    before = measure(model)
    counts = expert_usage(model, batches) if policy == "usage" else None
    draws = torch.Generator().manual_seed(seed)
    model = prune(model, counts, keep, policy=policy, inplace=True, generator=draws)  # type: ignore[arg-type]
    after = measure(model)
    unit = "nats a token" if both else "perplexity"
    figures: dict[str, Any] = {}
    for name, value in after.items():
        figures[f"held-out {unit}, {name}"] = f"{before[name]:.2f} -> {value:.2f}"
        say(f"{name}: held-out {unit} {before[name]:.2f} -> {value:.2f}")
    small = cost.model_size(model)
    how = f"most visited on {what}" if policy == "usage" else "drawn at random"
    card = {
        "title": out.name,
        "base": [source],
        "recipe": f"Experts taken out with mixtura: {said} a layer stay, {how}.",
        "data": what,
        "command": command,
        "figures": figures | {"parameters": small.total, "parameters before": size.total},
        "usage": usage(out, languages[0] if languages else "de") if both else usage_of(model, out),
        "source": "2109.10465",
    }
    # Back to the checkpoint's type, which `quick` may have left.
    stored = getattr(empty.config, "dtype", None)
    loading.save(model.to(stored) if isinstance(stored, torch.dtype) else model, tokenizer, out, card=card)
    say(f"{out}: {small.total / 1e6:,.1f} M parameters, of {size.total / 1e6:,.1f} M before")


def _documents(
    tokenizer: Any, text: Sequence[Path] | None, samples: int, length: int
) -> tuple[list[Any], Measure, str]:
    """Blocks to count on, and perplexity by domain on held-out ones."""
    from mixtura.lm.evaluate import perplexity
    from mixtura.lm.tokens import blocks

    domains = domains_of(text)
    batches: list[Any] = []
    held = {}
    for name, part in domains.items():
        batches += list(blocks(tokenizer, part.train, length, limit=samples).split(4))
        held[name] = blocks(tokenizer, part.held_out, min(length, 64), limit=MEASURED)

    def measure(model: Any) -> dict[str, float]:
        return {name: perplexity(model, rows, batch_size=4) for name, rows in held.items()}

    return batches, measure, ", ".join(domains)


def _pairs(
    tokenizer: Any, text: Sequence[Path] | None, languages: Sequence[str], samples: int, length: int, seed: int
) -> tuple[list[Mapping[str, Any]], Measure, str]:
    """Batches of both tasks to count on, and nats a token by pair of languages on held-out pairs."""
    train, held, mono = texts_of(text)
    known = sorted({target for _, target in train})
    if unknown := sorted(set(languages) - set(known)):
        raise ValueError(f"--language must be among the targets {known}, got {unknown}")
    shape = {"batch_size": ROWS, "length": length, "seed": seed}
    mixture, watched = mixture_of(tokenizer, train, mono, **shape), mixture_of(tokenizer, held, {}, **shape)
    if languages:
        mixture, watched = mixture.only(languages), watched.only(languages)
    batches: list[Mapping[str, Any]] = [mixture.batch_at(step) for step in range(samples)]
    return batches, lambda model: measured(model, watched), ", ".join(languages or known)
