"""Experts on a GPU in bfloat16: the backend ``triton`` against transformers' ``grouped_mm`` and against the card's limit.

At OLMoE's and Mixtral's shapes, forward, and forward and backward, in one process and in alternating rounds:

- ``grouped_mm``: transformers' own; ``grouped``: mixtura's other backend; ``triton``;
- ``limit``: plain matrix products of the same arithmetic, all rows with one weight. The bar is 0.8 of its speed;
- ``products alone``: triton's two products of the forward pass without activation, sorting and the sum over a token's experts.

Before timing, every result is compared with grouped_mm's.

    python benchmarks/experts_gpu.py              # all, writes docs/benchmarks/experts_gpu.json
    python benchmarks/experts_gpu.py --quick      # fewer rounds, no record
    TRITON_INTERPRET=1 python benchmarks/experts_gpu.py --rehearse    # without a GPU: tiny, no times, shows that it runs
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _side_by_side import alternate, median, ratio, versions, write_record
from experts_forward import check_same, routings, step_of
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mixtura.core.dispatch import dispatch
from mixtura.lm.experts_forward import expert_stack

SHAPES = {
    "OLMoE, 64 experts, top 8, 2048 x 1024": {"n_experts": 64, "k": 8, "width": 2048, "hidden": 1024},
    "Mixtral, 8 experts, top 2, 4096 x 14336": {"n_experts": 8, "k": 2, "width": 4096, "hidden": 14336},
}
REHEARSED = {"4 experts, top 2, 32 x 16": {"n_experts": 4, "k": 2, "width": 32, "hidden": 16}}
TOKENS = (512, 8192)
CALLS = 10  # in one timed span, so that waiting for the GPU once weighs little
BAR = 0.8
OURS = {"triton": "mixtura-triton", "grouped": "mixtura"}
TRITON, RIVAL = OURS["triton"], "grouped_mm"


def triton_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return dispatch(hidden_states, expert_stack(self), top_k_index, top_k_weights, backend="triton")


ALL_EXPERTS_FUNCTIONS.register(TRITON, triton_forward)


def build(shape: dict[str, int], device: torch.device) -> MixtralExperts:
    config = SimpleNamespace(
        num_local_experts=shape["n_experts"],
        hidden_size=shape["width"],
        intermediate_size=shape["hidden"],
        hidden_act="silu",
        _experts_implementation="eager",
    )
    with device:
        experts = MixtralExperts(config).to(torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(0.0, p.shape[-1] ** -0.5)
    return experts


def limit(experts: MixtralExperts, n_rows: int, backward: bool) -> Callable[[], object]:
    """Rows of all experts times the first expert's weights; backward has two more products for each."""
    pairs = []
    for weight in (experts.gate_up_proj[0].detach(), experts.down_proj[0].detach()):
        x, grad = (torch.randn(n_rows, n, device=weight.device).to(weight.dtype) for n in weight.T.shape)
        pairs.append((x, weight, grad))
    if not backward:
        return lambda: [F.linear(x, weight) for x, weight, _ in pairs]
    return lambda: [(F.linear(x, w), torch.mm(grad, w), torch.mm(grad.T, x)) for x, w, grad in pairs]


def products_alone(experts: MixtralExperts, indices: Tensor) -> Callable[[], object]:
    from mixtura.core import gpu_dispatch

    x, h = (
        torch.randn(indices.numel(), weight.shape[-1], device=weight.device).to(weight.dtype)
        for weight in (experts.gate_up_proj, experts.down_proj)
    )
    groups = gpu_dispatch.sort_pairs(indices, experts.num_experts)

    @torch.no_grad()
    def run() -> None:
        gpu_dispatch.expert_product(x, experts.gate_up_proj, None, *groups, False)
        gpu_dispatch.expert_product(h, experts.down_proj, None, *groups, False)

    return run


def measure(shape: dict[str, int], n_tokens: int, backward: bool, device: torch.device, rounds: int) -> dict[str, Any]:
    experts = build(shape, device).requires_grad_(backward)
    inputs = [tuple(t.to(device) for t in case) for case in routings(shape, n_tokens, torch.bfloat16, 4)]
    step = step_of(experts, backward)
    names = [RIVAL, *OURS.values()]
    check_same(experts, step, inputs[0], names, backward)
    if device.type != "cuda":
        products_alone(experts, inputs[0][1])()
        limit(experts, n_tokens * shape["k"], backward)()
        return {}

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                call()
            torch.cuda.synchronize()

        return run

    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        cycle = itertools.cycle(inputs)
        calls[name] = repeated(lambda name=name, cycle=cycle: step(name, next(cycle)))
    calls["limit"] = repeated(limit(experts, n_tokens * shape["k"], backward))
    if not backward:
        calls["products alone"] = repeated(products_alone(experts, inputs[0][1]))
    times = alternate(calls, rounds=rounds, clock=time.perf_counter)
    found: dict[str, Any] = {
        f"{name}, of the limit": str(ratio(times, "limit", key))
        for name, key in {"triton": TRITON, "grouped_mm": RIVAL, "grouped": OURS["grouped"]}.items()
    }
    found["bar, at least"] = BAR
    found["reached"] = ratio(times, "limit", TRITON).median >= BAR
    found["triton's time over grouped_mm's"] = str(ratio(times, TRITON, RIVAL))
    if not backward:
        found["triton's products alone, of the limit"] = str(ratio(times, "limit", "products alone"))
    products = 6 * n_tokens * shape["k"] * shape["width"] * shape["hidden"] * (3 if backward else 1)
    found["limit, TFLOP/s"] = round(products / (median(times)["limit"] / CALLS) / 1e12, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, no record")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in Triton's interpreter, no times")
    options = parser.parse_args()
    if options.rehearse:
        for (name, shape), backward in itertools.product(REHEARSED.items(), (False, True)):
            measure(shape, 8, backward, torch.device("cpu"), 1)
            print(f"{name}, {'forward and backward' if backward else 'forward'}: the same as grouped_mm")
        return
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    rows = []
    for (name, shape), n_tokens, backward in itertools.product(SHAPES.items(), TOKENS, (False, True)):
        case = f"{name}, {n_tokens} tokens, {'forward and backward' if backward else 'forward'}"
        row = {"case": case} | measure(shape, n_tokens, backward, torch.device("cuda"), 3 if options.quick else 7)
        print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    if not options.quick:
        record = {
            "title": "Experts on a GPU",
            "what": (
                f"The backend triton in bfloat16 on {torch.cuda.get_device_name()}, against transformers' grouped_mm and "
                "plain matrix products of the same arithmetic (the limit). Speed over the limit's, and time over "
                "grouped_mm's; wall clock."
            ),
            "rows": rows,
            "peer": versions("transformers", "triton"),
        }
        print(write_record("experts_gpu", record))


if __name__ == "__main__":
    main()
