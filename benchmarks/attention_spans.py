"""Attention spans: a step of decoding and one layer's prompt against full attention, and the bytes of the cache.

    python benchmarks/attention_spans.py            # writes docs/benchmarks/attention_spans.json
    python benchmarks/attention_spans.py --busy     # on a machine with other work: one thread, processor time

Caches are filled with random keys and values, which takes no time to compute and as long to read as real ones.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _side_by_side import alternate, median, ratio, write_record
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from mixtura.data.models import smollm2
from mixtura.lm.attention import SpanCache, SpanPlan, convert
from mixtura.lm.attention.span_mask import HeadGroup, head_groups, prompt_attention
from mixtura.lm.generation import cache_bytes
from mixtura.lm.loading import load

Clock = Callable[[], float]
CASES = ((4096, 8), (8192, 1), (16384, 1))  # tokens, rows
DENSITIES = (0.5, 0.25)
BLOCK, STEPS = 64, 4
BARS = {(4096, 8, 0.5): 1.3}  # tokens a second over those of full attention


def plan_of(shape: tuple[int, int], length: int, density: float) -> SpanPlan:
    """Two spans a layer, dealt to its heads by chance, that keep a share of the cache on average."""
    rng = np.random.default_rng(0)
    spans = np.empty(shape)
    for layer in spans:
        short = rng.uniform(0.2, 0.8) * density
        n_short = rng.integers(1, shape[1])
        long = min(1.0, (density * shape[1] - short * n_short) / (shape[1] - n_short))
        layer[:] = rng.permutation([short] * n_short + [long] * (shape[1] - n_short))
    return SpanPlan(np.zeros(shape).tolist(), spans.tolist(), BLOCK)


def filled(cache: Any, rows: int, tokens: int, config: Any) -> Any:
    """A cache of transformers that holds random keys and values."""
    for layer in range(config.num_hidden_layers):
        shape = (rows, config.num_key_value_heads, tokens, config.head_dim)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def filled_spans(model: Any, rows: int, tokens: int, total: int) -> SpanCache:
    """The same of a model with spans."""
    cache, config = SpanCache(model, total), model.config
    for layer in cache.layers:
        empty = torch.empty(rows, config.num_key_value_heads, 0, config.head_dim)
        layer.lazy_initialization(empty, empty)
        layer.kept = [(torch.randn_like(keys), torch.randn_like(values)) for keys, values in layer.kept]
        layer.columns = layer.seen = tokens
    return cache


def step(model: Any, cache: Any, rows: int) -> None:
    """A few tokens of decoding."""
    with torch.inference_mode():
        for _ in range(STEPS):
            model(input_ids=torch.ones(rows, 1, dtype=torch.long), past_key_values=cache, use_cache=True)


def decode_rows(clock: Clock) -> list[dict[str, Any]]:
    """Decoding beside both caches of transformers."""
    model, _ = load(smollm2(), dtype=torch.float32)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    rows = []
    for tokens, batch in CASES:
        total = tokens + 64
        dense = filled(DynamicCache(config=model.config), batch, tokens, model.config)
        static = filled(StaticCache(config=model.config, max_cache_len=total), batch, tokens, model.config)
        full = cache_bytes(dense)
        calls = {"dynamic": partial(step, model, dense, batch), "static": partial(step, model, static, batch)}
        plans = {density: plan_of(shape, total, density) for density in DENSITIES}
        caches = {}
        for density, plan in plans.items():
            small = convert(model, plan)
            caches[density] = filled_spans(small, batch, tokens, total)
            calls[f"spans {density}"] = partial(step, small, caches[density], batch)
        times = alternate(calls, rounds=5, warmup=1, clock=clock)
        for density, cache in caches.items():
            name = f"spans {density}"
            pace = {rival: ratio(times, rival, name) for rival in ("dynamic", "static")}
            bar = BARS.get((tokens, batch, density))
            rows.append(
                {
                    "what": f"decode, {tokens} tokens, {batch} row{'s' if batch > 1 else ''}",
                    "kept": f"{plans[density].density(total):.2f}",
                    "cache MB": f"{cache.nbytes / 1e6:.0f} of {full / 1e6:.0f}",
                    "ms a step": round(1e3 * median(times)[name] / STEPS, 1),
                    "speed over DynamicCache": str(pace["dynamic"]),
                    "speed over StaticCache": str(pace["static"]),
                    "bar": "" if bar is None else f"{bar} ({'met' if pace['dynamic'].median >= bar else 'missed'})",
                }
            )
        del dense, static, caches, calls
    return rows


def prompt(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, groups: list[HeadGroup]) -> list[Tensor]:
    """Attention over a prompt, all groups."""
    return list(prompt_attention(q, k, v, positions, groups, BLOCK, scale=q.shape[-1] ** -0.5))


def prompt_rows(clock: Clock) -> list[dict[str, Any]]:
    """One layer over a prompt, beside scaled_dot_product_attention with its causal flag."""
    rows = []
    for tokens in (4096, 8192):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, tokens, 64) for heads in (9, 3, 3))
        keys, values = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        calls: dict[str, Callable[[], object]] = {
            "full": partial(F.scaled_dot_product_attention, q, keys, values, is_causal=True)
        }
        for density in DENSITIES:
            windows = plan_of((1, 3), tokens, density).blocks(tokens)[0].tolist()
            groups, positions = head_groups(windows), torch.arange(tokens)
            calls[f"spans {density}"] = partial(prompt, q, k, v, positions, groups)
        with torch.inference_mode():
            times = alternate(calls, rounds=5, warmup=1, clock=clock)
        for density in DENSITIES:
            name = f"spans {density}"
            rows.append(
                {
                    "what": f"attention of one layer over a prompt of {tokens}",
                    "kept": f"{density:.2f}",
                    "ms a step": round(1e3 * median(times)[name], 1),
                    "speed over scaled_dot_product_attention": str(ratio(times, "full", name)),
                }
            )
    return rows


def main() -> None:
    """Measure and write the record."""
    busy = "--busy" in sys.argv
    torch.set_num_threads(1 if busy else 2)
    clock = time.process_time if busy else time.perf_counter
    rows = decode_rows(clock) + prompt_rows(clock)
    for row in rows:
        print(row)
    header = list(dict.fromkeys(name for row in rows for name in row))
    what = (
        "SmolLM2-135M in float32 with two spans a layer that keep half and a quarter of the cache, a step of decoding after "
        "prompts of different lengths, beside the same model with the two caches of transformers; then the attention of one "
        "layer of its shape (9 query heads on 3 key/value heads of width 64). Above 1, spans are faster."
    )
    notes = (
        "At one row reading the weights takes most of a step, so that the cache can win little. DynamicCache copies all it holds "
        "at every step, StaticCache reads all it has room for. What is lost by cutting is in the claim of sparse-attention-mix, "
        "where a uniform window with the same sink (the mask of StreamingLLM) is the baseline; kvpress, whose cuts keep the full "
        "cache until the prompt is read, is not compared here."
    )
    payload = {
        "title": "Attention spans",
        "what": what,
        "rows": [{name: row.get(name, "") for name in header} for row in rows],
        "notes": notes,
        "clock": clock.__name__,
    }
    write_record("attention_spans", payload)


if __name__ == "__main__":
    main()
