"""Selection within capacity: at random and first come, against a mask over all tokens and experts with a top-k down it.

16,384 tokens go to 64 experts, one each, at capacity factor 1, in one process and alternating rounds. What is compared with
holds the (T, E) mask, multiplies it by uniform numbers and takes the largest C of every column, as DeepSpeed's released gate
does. Both keep exactly min(C, routed) tokens of every expert.

    python benchmarks/token_selection.py            # writes docs/benchmarks/token_selection.json
    python benchmarks/token_selection.py --busy     # on a machine with other work: processor time
    python benchmarks/token_selection.py --quick    # few rounds, no record
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from _side_by_side import alternate, median, ratio, write_record
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mixtura.core.capacity import capacity, capacity_select

TOKENS, EXPERTS = 16_384, 64
BARS = {"random over prefix, at most": 1.5, "mask over random, at least": 5.0}


def by_mask(indices: Tensor, n_experts: int, limit: int) -> Tensor:
    """The same rule with a tensor of all tokens and experts."""
    mask_TE = torch.nn.functional.one_hot(indices[:, 0], n_experts).float()
    top_CE = (mask_TE * torch.rand_like(mask_TE)).topk(limit, dim=0).indices
    kept_TE = mask_TE * torch.zeros_like(mask_TE).scatter_(0, top_CE, 1.0)
    return kept_TE.sum(1, keepdim=True) > 0


def check(indices: Tensor, limit: int) -> None:
    """All three keep as many tokens of every expert as came, up to its limit."""
    came = torch.bincount(indices.flatten(), minlength=EXPERTS)
    for kept in (
        capacity_select(indices, EXPERTS, limit),
        capacity_select(indices, EXPERTS, limit, policy="prefix"),
        by_mask(indices, EXPERTS, limit),
    ):
        assert torch.bincount(indices[kept], minlength=EXPERTS).tolist() == came.clamp(max=limit).tolist()


def largest_block(run: Any) -> int:
    """Bytes of the largest tensor that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return max(event.self_cpu_memory_usage for event in seen.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="processor time")
    parser.add_argument("--quick", action="store_true", help="few rounds, no record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if options.busy else time.perf_counter
    torch.manual_seed(0)
    indices = (0.7 * torch.randn(TOKENS, EXPERTS)).argmax(-1, keepdim=True)
    limit = capacity(TOKENS, EXPERTS, 1.0)
    check(indices, limit)
    rivals = {
        "random": lambda: capacity_select(indices, EXPERTS, limit),
        "prefix": lambda: capacity_select(indices, EXPERTS, limit, policy="prefix"),
        "mask": lambda: by_mask(indices, EXPERTS, limit),
    }
    times = alternate(rivals, rounds=5 if options.quick else 51, clock=clock)
    rows = {
        "random over prefix": ratio(times, "random", "prefix"),
        "mask over random": ratio(times, "mask", "random"),
        "milliseconds": {name: 1e3 * seconds for name, seconds in median(times).items()},
        "largest block, bytes": {name: largest_block(rivals[name]) for name in rivals},
    }
    for name, value in rows.items():
        print(f"{name}: {value}")
    if not options.quick:
        clock_name = "processor time" if options.busy else "wall clock"
        shape = {"tokens": TOKENS, "experts": EXPERTS, "places": limit}
        print(write_record("token_selection", {"bars": BARS, "clock": clock_name, "shape": shape, **rows}))


if __name__ == "__main__":
    main()
