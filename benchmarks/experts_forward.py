"""Experts forward on CPU: mixtura against transformers' own, and against the machine.

For every shape, number of tokens, dtype and pass, in one process and in alternating rounds:

- transformers' ``eager``, ``batched_mm`` and ``grouped_mm`` (rivals), and ``mixtura``;
- ``dense``: one dense matrix product of the same arithmetic (F.linear, same dtype; backward adds two more);
- ``read``: the weights of the chosen experts read once, at the bandwidth that a sum over memory reaches here.

Two more say where a ratio is lost: ``products alone`` runs mixtura's matrix products without gathering, activation and
combining (1024 tokens, forward), and ``call alone`` the whole call on experts so small that only its overhead is left.

Before timing, every result is compared with grouped_mm's. Each round draws from a cycle of routings, so that a
decode step does not find the last step's weights in the cache, as it would not in a model of many layers.

    python benchmarks/experts_forward.py            # all, writes docs/benchmarks/experts_forward.json
    python benchmarks/experts_forward.py --busy     # on a machine with other work: one thread, processor time
    python benchmarks/experts_forward.py --quick    # fewer rounds, no record
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _side_by_side import alternate, median, ratio, write_record
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import mixtura.lm.experts_forward  # noqa: F401  registers "mixtura"
from mixtura.core import native, products

Clock = Callable[[], float]

SHAPES = {
    "64 experts, top 8, 1024 x 512": {"n_experts": 64, "k": 8, "width": 1024, "hidden": 512},
    "8 experts, top 2, 1024 x 2048": {"n_experts": 8, "k": 2, "width": 1024, "hidden": 2048},
}
TOKENS = (1, 32, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RIVALS = ("eager", "batched_mm", "grouped_mm")
BARS = {"of the best rival's time, at most": 1.0, "of dense, at least": 0.85, "of reading the weights, at least": 0.7}
# batched_mm copies the weights of every token-expert pair: 1024 tokens would need 50 GB for the first shape.
BATCHED_MM_TOKENS = 32
HOPELESS = 8  # a rival that takes this many times the fastest rival's time is timed once and left out of the rounds


@functools.lru_cache(maxsize=1)
def build(shape: str, dtype: torch.dtype) -> MixtralExperts:
    return build_experts(SHAPES[shape], dtype)


def build_experts(shape: dict[str, int], dtype: torch.dtype) -> MixtralExperts:
    config = SimpleNamespace(
        num_local_experts=shape["n_experts"],
        hidden_size=shape["width"],
        intermediate_size=shape["hidden"],
        hidden_act="silu",
        _experts_implementation="eager",
    )
    experts = MixtralExperts(config).to(dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    return experts


def routings(shape: dict[str, int], n_tokens: int, dtype: torch.dtype, n: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """n inputs with random choices; single tokens that follow each other visit different experts."""
    g = torch.Generator().manual_seed(1)
    e, k = shape["n_experts"], shape["k"]
    inputs = []
    names = torch.randperm(e, generator=g)
    for i in range(n):
        x = torch.randn(n_tokens, shape["width"], generator=g).to(dtype)
        logits = torch.randn(n_tokens, e, generator=g)
        if n_tokens == 1:
            logits[0, names[(torch.arange(k) + i * k) % e]] += 100.0
        weights, indices = logits.softmax(-1).topk(k)
        inputs.append((x, indices, (weights / weights.sum(-1, keepdim=True)).to(dtype)))
    return inputs


def bandwidth(rounds: int, clock: Clock) -> float:
    """Bytes a second that all threads read from memory, larger than any cache."""
    buffer = torch.ones(128 << 20)
    seconds = alternate({"sum": buffer.sum}, rounds=rounds, clock=clock)["sum"]
    return buffer.numel() * 4 / min(seconds)


def step_of(experts: Any, backward: bool) -> Callable[[str, tuple[Tensor, ...]], Tensor]:
    """A pass over a case by the implementation of a name; with ``backward`` its gradients too."""

    def step(name: str, case: tuple[Tensor, ...]) -> Tensor:
        experts.config._experts_implementation = name
        x, indices, weights = case
        if not backward:
            with torch.no_grad():
                return experts(x, indices, weights)
        for p in experts.parameters():
            p.grad = None
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        y = experts(x, indices, weights)
        y.backward(x.detach())
        return y

    return step


def measure(name: str, n_tokens: int, dtype: torch.dtype, backward: bool, rounds: int, clock: Clock) -> dict[str, Any]:
    experts, shape = build(name, dtype).requires_grad_(backward), SHAPES[name]
    inputs = routings(shape, n_tokens, dtype, 8)
    names = [n for n in RIVALS if n != "batched_mm" or n_tokens <= BATCHED_MM_TOKENS] + ["mixtura"]

    step = step_of(experts, backward)
    once = check_same(experts, step, inputs[0], names, backward)
    fastest = min(once[n] for n in names if n != "mixtura")
    hopeless = {n: s for n, s in once.items() if s > HOPELESS * fastest}
    names = [n for n in names if n not in hopeless]
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        cycle = itertools.cycle(inputs)
        calls[name] = lambda name=name, cycle=cycle: step(name, next(cycle))
    if n_tokens >= 1024:
        calls["dense"] = dense_product(shape, n_tokens, dtype, backward)
        if not backward:
            calls["products alone"] = products_alone(experts, inputs[0])
    elif not backward:
        calls["call alone"] = call_alone(shape, n_tokens, dtype)
    times = alternate(calls, rounds=rounds, clock=clock)
    seconds = median(times)
    best = min((n for n in names if n != "mixtura"), key=seconds.__getitem__)
    found: dict[str, Any] = {
        "seconds": seconds,
        "seconds of those timed once": hopeless,
        "best rival": best,
        "of the best rival's time": ratio(times, "mixtura", best),
    }
    if n_tokens >= 1024:
        found["of dense"] = ratio(times, "dense", "mixtura")
        found["best rival, of dense"] = ratio(times, "dense", best)
        if not backward:
            found["products alone, of dense"] = ratio(times, "dense", "products alone")
    elif not backward:
        speed = bandwidth(rounds, clock)
        visited = [len(indices.unique()) for _, indices, _ in inputs]
        one = 3 * shape["width"] * shape["hidden"] * dtype.itemsize
        limit = sum(visited) / len(visited) * one / speed
        found["read"] = {"bytes_per_second": speed, "experts": sum(visited) / len(visited), "seconds": limit}
        found["of reading the weights"] = limit / seconds["mixtura"]
        found["best rival, of reading the weights"] = limit / seconds[best]
    return found


def dense_product(shape: dict[str, int], n_tokens: int, dtype: torch.dtype, backward: bool) -> Callable[[], object]:
    """x (T K, D) times (3 H, D): the multiplications of all visited experts in one product."""
    x = torch.randn(n_tokens * shape["k"], shape["width"]).to(dtype)
    weight = torch.randn(3 * shape["hidden"], shape["width"]).to(dtype)
    if not backward:
        return lambda: F.linear(x, weight)
    grad = torch.randn(len(x), len(weight)).to(dtype)
    return lambda: (F.linear(x, weight), torch.mm(grad, weight), torch.mm(grad.T, x))


def products_alone(experts: MixtralExperts, case: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """The two products of every expert, on rows that are gathered and activated already."""
    x, indices, _ = case
    counts = torch.bincount(indices.flatten(), minlength=experts.num_experts).tolist()
    rows = [(e, x.repeat(-(-n // len(x)), 1)[:n].clone()) for e, n in enumerate(counts) if n]
    hidden = [torch.randn(len(r), experts.intermediate_dim).to(x.dtype) for _, r in rows]
    out = [torch.empty_like(r) for _, r in rows]

    @torch.no_grad()
    def run() -> None:
        for (e, x_MD), h_MH, y_MD in zip(rows, hidden, out, strict=True):
            span = [(e, 0, len(x_MD))]
            products.grouped_linear(x_MD, experts.gate_up_proj, None, span)
            products.grouped_linear(h_MH, experts.down_proj, None, span, out=y_MD)

    return run


def call_alone(shape: dict[str, int], n_tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    small = {**shape, "width": 64, "hidden": 32}
    experts = build_experts(small, dtype)
    experts.config._experts_implementation = "mixtura"
    case = routings(small, n_tokens, dtype, 1)[0]

    @torch.no_grad()
    def run() -> Tensor:
        return experts(*case)

    return run


def check_same(experts: MixtralExperts, step: Any, case: Any, names: list[str], backward: bool) -> dict[str, float]:
    """Seconds of one call each, after comparing every result with grouped_mm's."""
    tolerance = 3e-2 if case[0].dtype == torch.bfloat16 else 1e-4
    wanted: list[Tensor] = []
    seconds = {}
    for name in sorted(names, key="grouped_mm".__ne__):
        start = time.perf_counter()
        y = step(name, case)
        seconds[name] = time.perf_counter() - start
        if seconds[name] < 2:  # the first call pays for fresh memory and caches; only a slow rival is judged by it
            start = time.perf_counter()
            step(name, case)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
        found = [y.detach()] + [p.grad for p in experts.parameters() if backward]  # of the last call: both are alike
        wanted = wanted or found
        for want, got in zip(wanted, found, strict=True):
            error = float((got - want).abs().max() / want.abs().max())
            if error > tolerance:
                raise AssertionError(f"{name} differs from grouped_mm by {error:.1e} of the largest entry")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, no record")
    parser.add_argument("--only", default="", help="measure the rows whose name contains this")
    parser.add_argument("--busy", action="store_true", help="one thread and processor time, for a machine in use")
    args = parser.parse_args()
    clock: Clock = time.process_time if args.busy else time.perf_counter
    if args.busy:
        torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for shape, dtype, n_tokens, backward in itertools.product(SHAPES, DTYPES, TOKENS, (False, True)):
        name = f"{shape}, {n_tokens} tokens, {dtype}, {'forward and backward' if backward else 'forward'}"
        if args.only not in name:
            continue
        rows[name] = found = measure(shape, n_tokens, DTYPES[dtype], backward, 3 if args.quick else 7, clock)
        times = ", ".join(f"{n} {1e3 * s:.1f}" for n, s in found["seconds"].items())
        marks = "; ".join(f"{found[key]:.2f} {key}" if isinstance(found[key], float) else f"{found[key]} {key}"
                          for key in found if key.startswith("of "))  # fmt: skip
        print(f"{name}\n    ms: {times}\n    {marks}", flush=True)
    if not args.quick and not args.only:
        payload = {
            "clock": "processor time" if args.busy else "wall clock",
            "bars": BARS,
            "kernel": native.why_not(torch.zeros(1, 32), torch.zeros(1, 4, 32)) or "built",
            "rows": rows,
        }
        print(write_record("experts_forward", payload))


if __name__ == "__main__":
    main()
