"""``compress --method sparse-attention``: every head a span of its own, and a picture of how far each looks."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtura.cli.checks import check_device, check_writable
from mixtura.cli.work import Say, domains_of, usage_of
from mixtura.core.measure import Meter
from mixtura.core.page import save_figure
from mixtura.lm import cost, loading

__all__ = ["compress_spans", "parse_lengths"]

PICTURE, PLAN = "spans.svg", "spans.json"
ANSWER = 128  # tokens that the model writes at most for each text


def compress_spans(
    source: str,
    out: Path,
    text: Sequence[Path] | None,
    *,
    span: float,
    lengths: str,
    plan: Path | None,
    options: Mapping[str, Any],
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    """Give a checkpoint spans, write it into ``out`` with its plan and a picture, and say what is kept."""
    from mixtura.lm.attention import SpanPlan, convert
    from mixtura.lm.attention.api import plan_from_texts
    from mixtura.lm.attention.span_picture import spans_figure

    check_device(device)
    check_writable(out, [source])
    wanted = parse_lengths(lengths)
    if not 0 < span <= 1:
        raise ValueError(f"--span must be above 0 and at most 1, got {span:g}")
    config = loading.load_config(source)
    size = cost.model_size(loading.empty_model(config))
    domains = domains_of(text) if plan is None else {}
    # Reading each text, its answer token by token, and one pass forward and back.
    tokens = 0 if plan is not None else sum(4 * length + 3 * ANSWER for length in wanted) * options["samples"]
    # Weights are written as they came: packed ones stay packed.
    stored = (loading.directory_bytes(source) if Path(source).is_dir() else 0) or 2 * size.total
    extra = 4 * size.total if plan is None else 0
    work = cost.estimate(size, bytes_per_parameter=stored / size.total, forward_tokens=tokens, extra_memory=extra)
    what = f"spans that keep {100 * span:.0f} % of the cache" if plan is None else f"the spans of {plan}"
    say(f"give {source} {what}: {work}")
    if dry_run:
        return
    model, tokenizer = loading.load(source, device=device)
    with Meter() as meter:
        if plan is None:
            texts = {name: part.train for name, part in domains.items()}
            made = plan_from_texts(model.float(), tokenizer, texts, density=span, lengths=wanted, **options)
        else:
            made = SpanPlan.from_json(plan)
        small = convert(model, made, inplace=True)
    longest = made.longest or max(wanted)
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not isinstance(dtype, str):
        small = small.to(dtype)
    card = {
        "title": out.name,
        "base": [source],
        "recipe": f"Spans by mixtura: every key/value head keeps its first {made.block} tokens and a window of its own, "
        f"{100 * made.density(longest):.0f} % of the full cache at {longest} tokens. The weights are those of the base.",
        "data": f"planned on the model's own summaries of {', '.join(domains)}" if domains else f"spans of {plan}",
        "command": command,
        "figures": {
            "parameters": size.total,
            f"tokens a head keeps of {longest}, mean": round(float(made.spans(longest).double().mean()), 1),
            "seconds": round(meter.seconds, 1),
        },
        "usage": usage_of(small, out),
        "source": "MoA: Mixture of Sparse Attention (arXiv 2406.14909)",
    }
    loading.save(small, tokenizer, out, card=card)
    made.to_json(out / PLAN)
    save_figure(spans_figure(made, longest), out / PICTURE)
    spans = made.spans(longest)
    say(
        f"of {longest} tokens heads keep {float(spans.double().mean()):.0f} on average, {int(spans.min())} to {int(spans.max())} "
        f"({out / PICTURE} shows them; {out / PLAN} can be given as --plan)"
    )
    say(f"{out} is written; it takes up to {longest} tokens, prompt and answer together")


def parse_lengths(text: str) -> list[int]:
    """Lengths from ``2k,4k,8k`` or ``2048,4096``."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", part)
        if match is None or int(match.group(1)) == 0:
            raise ValueError(f"--lengths must look like 2k,4k,8k or 2048,4096, got {text!r}")
        found.append(int(match.group(1)) * (1024 if match.group(2) else 1))
    return sorted(set(found))
