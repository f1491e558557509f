"""``upcycle --method own-units``: a mixture of a dense model's own hidden units, and what it costs on held-out text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtura.cli.checks import check_device, check_writable
from mixtura.cli.work import Say, domains_of, enough, usage_of
from mixtura.core.measure import Meter
from mixtura.lm import cost, loading

__all__ = ["upcycle_units"]

MEASURED = 8  # held-out blocks a domain


def upcycle_units(
    sources: Sequence[str],
    out: Path,
    text: Sequence[Path] | None,
    options: Mapping[str, Any],
    *,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    """Make a mixture of one checkpoint into ``out`` and say its held-out perplexity before and after."""
    from mixtura.lm import upcycle as run
    from mixtura.lm.evaluate import perplexity
    from mixtura.lm.tokens import blocks

    check_device(device)
    check_writable(out, sources)
    if len(sources) != 1:
        raise ValueError(f"own-units takes one model, got {len(sources)}: {', '.join(sources)}; use branch-attend-mix")
    samples, length = options["samples"], options["length"]
    if samples < 1:
        raise ValueError(f"--samples must be at least 1, got {samples}")
    config = loading.load_config(sources[0])
    size = _size(config, options)
    domains = domains_of(text)
    # What every feed-forward part reads is held in float32.
    extra = 2 * size.total + 4 * samples * length * config.hidden_size * config.num_hidden_layers
    say(
        f"upcycle {sources[0]} by own-units with {samples * length:,} tokens of {', '.join(domains)}: "
        f"{cost.estimate(size, forward_tokens=3 * samples * length, extra_memory=extra)}"
    )
    if dry_run:
        return
    model, tokenizer = loading.load(sources[0], dtype="quick", device=device)
    each = -(-samples // len(domains))
    batches = torch.cat([blocks(tokenizer, part.train, length, limit=each) for part in domains.values()])
    held_out = {
        name: blocks(tokenizer, part.held_out, length, limit=MEASURED)
        for name, part in domains.items()
        if enough(tokenizer, part, length)
    }
    before = {name: perplexity(model, rows, batch_size=4) for name, rows in held_out.items()}
    asked = {name: value for name, value in options.items() if name not in ("samples", "length")}
    with Meter() as meter:
        mixture = run(model, method="own-units", batches=batches.to(device), **asked)
    size = cost.model_size(mixture)
    figures: dict[str, Any] = {
        "parameters": size.total,
        "active a token": size.active,
        "seconds": round(meter.seconds, 1),
    }
    for name, rows in held_out.items():
        after = perplexity(mixture, rows, batch_size=4)
        figures[f"held-out perplexity, {name}"] = f"{before[name]:.2f} -> {after:.2f}"
        say(f"{name}: held-out perplexity {before[name]:.2f} -> {after:.2f}, before any training")
    stored = getattr(config, "dtype", None)
    mixture = mixture.to(stored) if isinstance(stored, torch.dtype) else mixture
    card = {
        "title": out.name,
        "base": list(sources),
        "recipe": f"Upcycled with mixtura by `own-units` ({', '.join(f'{k}={v}' for k, v in options.items())}): the hidden units "
        "of each feed-forward part are cut into experts. It answers less well than its base until it is trained.",
        "data": f"activations on {len(batches)} x {length} tokens of {', '.join(domains)}",
        "command": command,
        "figures": figures,
        "usage": usage_of(mixture, out),
    }
    loading.save(mixture, tokenizer, out, card=card)
    say(
        f"{out}: {type(mixture).__name__}, {size.total / 1e6:.1f} M parameters, {size.active / 1e6:.1f} M active a token; "
        f"train it: mixtura train {out}"
    )


def _size(config: Any, options: Mapping[str, Any]) -> cost.Size:
    """Parameters of the mixture, all and active; wrong numbers of blocks are refused here, before anything is read."""
    from mixtura.lm.families import FAMILIES
    from mixtura.lm.model import MixturaConfig
    from mixtura.lm.upcycle.own_units import half_active, mixture_config

    if config.model_type not in FAMILIES:  # refused when it is read
        return cost.model_size(loading.empty_model(config))
    split, shared = options["segments"], options["shared"]
    active = options.get("top_k", half_active(split, shared))
    dense = MixturaConfig(**FAMILIES[config.model_type].fields(config))
    return cost.model_size(loading.empty_model(mixture_config(dense, split=split, active=active, shared=shared)))
