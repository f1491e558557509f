"""Attention spans against full attention and kvpress: a step of decoding, one layer's prompt, numbers looked up.

    python benchmarks/attention_spans.py            # writes docs/benchmarks/attention_spans.json
    python benchmarks/attention_spans.py --busy     # on a machine with other work: one thread, processor time
    python benchmarks/attention_spans.py --quick    # one short case of each, no record

For speed, caches are filled with random keys and values, which takes no time to compute and as long to read as real ones.

The peer asks for older versions of transformers and pandas than it needs, hence a folder of its own and no dependencies:

    pip install --no-deps --target peers kvpress==0.5.5 'cachetools<6' datasets dill fire multiprocess six termcolor xxhash
    PYTHONPATH=peers python benchmarks/attention_spans.py
"""

import copy
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from _side_by_side import alternate, median, ratio, versions, write_record
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from mixtura.claims.sparse_attention_mix import SCALES, calibration, examples
from mixtura.data.models import smollm2
from mixtura.data.registers import Lookup
from mixtura.lm.attention import SpanCache, SpanPlan, convert, plan_spans, profile_spans
from mixtura.lm.attention.span_flex import why_not_flex
from mixtura.lm.attention.span_mask import head_groups, prompt_attention
from mixtura.lm.generation import cache_bytes
from mixtura.lm.loading import load

Clock = Callable[[], float]
CASES = ((4096, 8), (8192, 1), (16384, 1))  # tokens, rows
DENSITIES = (0.5, 0.25)
BLOCK, STEPS = 64, 4
BARS = {(4096, 8, 0.5): 1.3}  # tokens a second over those of full attention
PROMPTS = (4096, 8192)
PRESSES = ("StreamingLLMPress", "SnapKVPress", "ExpectedAttentionPress")
RECORDS, QUESTIONS = 10, 6
RECORD = 640  # tokens of a record with all its questions
SMALL_BLOCK = 16  # as in the claim


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


def decode_rows(clock: Clock, cases: Sequence[tuple[int, int]] = CASES) -> list[dict[str, Any]]:
    """Decoding beside both caches of transformers, and beside what a press of kvpress leaves: a DynamicCache as small as ours."""
    model, _ = load(smollm2(), dtype=torch.float32)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    rows = []
    for tokens, batch in cases:
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
            left = filled(DynamicCache(config=model.config), batch, round(plan.density(total) * total), model.config)
            calls[f"pressed {density}"] = partial(step, model, left, batch)
        times = alternate(calls, rounds=5, warmup=1, clock=clock)
        for density, cache in caches.items():
            name = f"spans {density}"
            pace = {rival: ratio(times, rival, name) for rival in ("dynamic", "static", f"pressed {density}")}
            bar = BARS.get((tokens, batch, density))
            rows.append(
                {
                    "what": f"decode, {tokens} tokens, {batch} row{'s' if batch > 1 else ''}",
                    "kept": f"{plans[density].density(total):.2f}",
                    "cache MB": f"{cache.nbytes / 1e6:.0f} of {full / 1e6:.0f}",
                    "ms a step": round(1e3 * median(times)[name] / STEPS, 1),
                    "speed over DynamicCache": str(pace["dynamic"]),
                    "speed over StaticCache": str(pace["static"]),
                    "speed over kvpress's cache": str(pace[f"pressed {density}"]),
                    "bar": "" if bar is None else f"{bar} ({'met' if pace['dynamic'].median >= bar else 'missed'})",
                }
            )
        del dense, static, caches, calls, left
    return rows


def prompt_rows(clock: Clock, prompts: Sequence[int] = PROMPTS) -> list[dict[str, Any]]:
    """One layer over a prompt, by both backends, beside scaled_dot_product_attention with its causal flag."""
    rows = []
    for tokens in prompts:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, tokens, 64) for heads in (9, 3, 3))
        keys, values = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        calls: dict[str, Callable[[], Tensor]] = {
            "full": partial(F.scaled_dot_product_attention, q, keys, values, is_causal=True)
        }
        backends = ["windowed"] if why_not_flex(q) else ["windowed", "flex"]
        for density in DENSITIES:
            windows = plan_of((1, 3), tokens, density).blocks(tokens)[0].tolist()
            given = (q, k, v, torch.arange(tokens), head_groups(windows), BLOCK)
            for backend in backends:
                call = partial(prompt_attention, *given, scale=q.shape[-1] ** -0.5, backend=backend)
                calls[f"{backend} {density}"] = call
        with torch.inference_mode():
            for density in DENSITIES:
                for backend in backends[1:]:
                    torch.testing.assert_close(calls[f"{backend} {density}"](), calls[f"windowed {density}"]())
            times = alternate(calls, rounds=5, warmup=1, clock=clock)
        for density in DENSITIES:
            for backend in backends:
                name = f"{backend} {density}"
                rows.append(
                    {
                        "what": f"attention of one layer over a prompt of {tokens}, {backend}",
                        "kept": f"{density:.2f}",
                        "ms a step": round(1e3 * median(times)[name], 1),
                        "speed over scaled_dot_product_attention": str(ratio(times, "full", name)),
                    }
                )
    return rows


def asked(model: Any, cache: Any, one: Lookup, number: int) -> tuple[float, bool, int]:
    """One question put to a copy of a cache that read the record: loss of a digit, whether the number is found, bytes then."""
    ids, answer = one.questions[number], one.answers[number]
    row = torch.tensor([ids + answer])
    place = torch.arange(len(one.context), len(one.context) + row.shape[1])[None]
    cache = copy.deepcopy(cache)
    logits = model(row, past_key_values=cache, position_ids=place).logits[0, len(ids) - 1 : -1]
    truth = row[0, len(ids) :]
    held = cache.nbytes if isinstance(cache, SpanCache) else cache_bytes(cache)
    return F.cross_entropy(logits, truth).item(), bool((logits.argmax(-1) == truth).all()), held


@torch.inference_mode()
def looked_up(what: str, read: Callable[[Lookup, int], tuple[Any, Any]], found: Sequence[Lookup]) -> dict[str, Any]:
    """All questions to all records. ``read``: record and tokens of its longest question -> model, and cache that read it."""
    results = []
    for one in found:
        rest = max(len(q) + len(a) for q, a in zip(one.questions, one.answers, strict=True))
        model, cache = read(one, rest)
        results += [asked(model, cache, one, number) for number in range(len(one.questions))]
    losses, hits, sizes = zip(*results, strict=True)
    return {
        "what": what,
        "cache MB": f"{np.mean(sizes) / 1e6:.1f}",
        "nats a digit": f"{np.mean(losses):.3f}",
        "numbers found": f"{sum(hits)} of {len(hits)}",
    }


def lookup_rows(scale: str = "cpu") -> list[dict[str, Any]]:
    """Numbers looked up in a record that was read before the questions were known, with caches of equal bytes."""
    model, tokenizer = load(smollm2(), dtype=torch.float32)
    rng, size = np.random.default_rng(0), SCALES[scale]
    influence = profile_spans(model, calibration(model, tokenizer, size, size.length, rng), block=SMALL_BLOCK)
    found = examples(tokenizer, RECORDS if scale == "cpu" else 1, RECORD, QUESTIONS, rng)

    def plainly(one: Lookup, rest: int) -> tuple[Any, Any]:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([one.context]), past_key_values=cache, logits_to_keep=1)
        return model, cache

    def spanned(small: Any, one: Lookup, rest: int) -> tuple[Any, Any]:
        cache = SpanCache(small, len(one.context) + rest)
        small(torch.tensor([one.context]), past_key_values=cache, logits_to_keep=1)
        return small, cache

    def pressed(press: Any, plan: SpanPlan | None, one: Lookup, rest: int) -> tuple[Any, Any]:
        n, cache = len(one.context), DynamicCache(config=model.config)
        if plan is not None:
            # What the question adds stays whole, so the record has what the question leaves of the spans.
            press.compression_ratio = 1 - (float(plan.spans(n + rest).double().mean()) - rest) / n
        with press(model):
            # transformers no longer hands this on, and a press tells by it that a prompt is being read.
            model(torch.tensor([one.context]), past_key_values=cache, logits_to_keep=1, cache_position=torch.arange(n))
        return model, cache

    rows = [looked_up("looking numbers up, everything kept", plainly, found)]
    plans = {density: plan_spans(influence, density, extend=(RECORD,)) for density in DENSITIES}
    for density, plan in plans.items():
        row = looked_up("looking numbers up, spans", partial(spanned, convert(model, plan)), found)
        rows.append(row | {"kept": f"{density:.2f}"})
    if importlib.util.find_spec("kvpress") is None:
        return rows
    import kvpress

    plain = looked_up("", partial(pressed, kvpress.StreamingLLMPress(), None), found[:1])
    assert plain["nats a digit"] == looked_up("", plainly, found[:1])["nats a digit"], (
        "a press that cuts nothing differs"
    )
    for name in PRESSES:
        options = {"n_sink": SMALL_BLOCK} if name == "StreamingLLMPress" else {}
        for density, plan in plans.items():
            press = getattr(kvpress, name)(**options)
            row = looked_up(f"looking numbers up, kvpress's {name}", partial(pressed, press, plan), found)
            rows.append(row | {"kept": f"{density:.2f}"})
    return rows


def main() -> None:
    """Measure and write the record."""
    busy, quick = "--busy" in sys.argv, "--quick" in sys.argv
    torch.set_num_threads(1 if busy else 2)
    clock = time.process_time if busy else time.perf_counter
    if quick:
        rows = decode_rows(clock, [(1024, 1)]) + prompt_rows(clock, [1024]) + lookup_rows("smoke")
    else:
        rows = decode_rows(clock) + prompt_rows(clock) + lookup_rows()
    for row in rows:
        print(row)
    if quick:
        return
    header = list(dict.fromkeys(name for row in rows for name in row))
    what = (
        "SmolLM2-135M in float32 with two spans a layer that keep half and a quarter of the cache, a step of decoding after "
        "prompts of different lengths, beside the same model with the two caches of transformers and with what kvpress leaves; "
        "the attention of one layer of its shape (9 query heads on 3 key/value heads of width 64) by both backends; and "
        "numbers looked up in records of about 500 tokens, with spans planned on answers of the model's own and with three "
        "presses of kvpress, bytes of the cache equal at the end of a question. Above 1, spans are faster."
    )
    notes = (
        "At one row reading the weights takes most of a step, so that the cache can win little. DynamicCache copies all it holds "
        "at every step, StaticCache reads all it has room for. The flex backend is compiled before it is timed. A press reads a "
        "record with full attention and cuts afterwards, so that its peak memory is the full cache's; spans hide from the start, "
        "and the cache never is larger. Every question is put to the same cut cache, which was made without knowing it."
    )
    payload = {
        "title": "Attention spans",
        "what": what,
        "rows": [{name: row.get(name, "") for name in header} for row in rows],
        "notes": notes,
        "clock": clock.__name__,
        "peer": versions("kvpress"),
    }
    write_record("attention_spans", payload)


if __name__ == "__main__":
    main()
