"""A step of one layer in two real processes, where the gate sends most tokens to one expert: copies against plain parallelism.

Both sides hold the same experts and are first shown to give the same output. Rounds alternate in the same processes; a step is
forward and backward, and ends when the slower process ends. Then the time of planning, and bytes held and moved.

    python benchmarks/sharded_experts.py            # writes docs/benchmarks/sharded_experts.json; needs two idle cores
    python benchmarks/sharded_experts.py --quick    # fewer rounds and tokens, no record
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _side_by_side import Ratio, alternate, ratio, write_record
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.lm.model import MixturaConfig
from mixtura.lm.model.parts import make_experts
from mixtura.lm.parallel import make_mesh
from mixtura.lm.parallel.experts import ParallelExperts
from mixtura.lm.parallel.placement import Topology, assign_tokens, homogeneous, materialize, shard
from mixtura.lm.parallel.sharded_experts import FullyShardedExperts
from mixtura.lm.parallel.sparse_collectives import bytes_moved

TITLE = "Sharded experts"
WHAT = (
    "Forward and backward of one layer in two processes of one thread each, the slower one counts; weights moved are those of "
    "copies, forward. Then the time of planning, one thread."
)
PROCESSES, EXPERTS, WIDTH, HIDDEN, SHARE = 2, 8, 256, 1024, 0.7


def experts() -> Any:
    torch.manual_seed(0)
    config = MixturaConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        num_attention_heads=4,
        num_experts=EXPERTS,
        mlp_gated=False,
        hidden_act="gelu",
    )
    config._experts_implementation = "grouped_mm"
    module = make_experts(config, EXPERTS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.05)
    return module


def batch(rank: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows, and the one expert of each: the first for most of them."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, WIDTH, generator=generator)
    others = torch.randint(1, EXPERTS, (tokens,), generator=generator)
    hot = torch.rand(tokens, generator=generator) < SHARE
    return x, torch.where(hot, 0, others).unsqueeze(1)


def work(rank: int, folder: str, tokens: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    mesh = make_mesh(PROCESSES)
    sides: dict[str, Any] = {
        "expert parallelism": ParallelExperts(experts(), EXPERTS, mesh),
        "copies": FullyShardedExperts(experts(), EXPERTS, mesh, overlap=2, capacity=2),
        "copies, freed": FullyShardedExperts(experts(), EXPERTS, mesh, overlap=2, capacity=2, rematerialize=True),
    }
    x, chosen = batch(rank, tokens // PROCESSES)
    x.requires_grad_()
    weights = torch.ones_like(chosen, dtype=x.dtype)

    def step(side: Any) -> Tensor:
        dist.barrier()
        side.zero_grad(set_to_none=True)
        y = side(x, chosen, weights)
        y.square().sum().backward()
        dist.barrier()
        return y.detach()

    want = step(sides["expert parallelism"])
    for side in sides.values():
        for _ in range(2):  # the second time the load is known, and copies are made
            torch.testing.assert_close(step(side), want, rtol=1e-4, atol=1e-4)
    held = sides["copies"]
    assert (held.placement & ~held.owners).any(), "no copy was made"
    times = alternate({name: lambda side=side: step(side) for name, side in sides.items()}, rounds=rounds)
    if rank == 0:
        flat = {name: torch.tensor(values, dtype=torch.float64) for name, values in times.items()}
        chunk = sum(p[0].numel() * p.element_size() for p in experts().parameters())
        flat["moved"] = bytes_moved(held.owners, held.placement, chunk)[0].double()
        save_file(flat, Path(folder) / "times.safetensors")
    dist.destroy_process_group()


def measured(tokens: int, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder, tokens, rounds), nprocs=PROCESSES, start_method="spawn")
        found = load_file(Path(folder) / "times.safetensors")
    sent = found.pop("moved").sum().item()
    times = {name: values.tolist() for name, values in found.items()}
    case = f"step over expert parallelism, {tokens} tokens, {SHARE:.0%} to one of {EXPERTS} experts"
    return [
        {
            "case": f"{case}, {name}",
            "ratio": ratio(times, name, "expert parallelism"),
            "bar": bar,
            "bytes of weights": sent * n,
        }
        for name, bar, n in (("copies", "0.75", 1), ("copies, freed", "reported", 2))
    ]


def planning(rounds: int) -> list[dict[str, Any]]:
    topology, generator = Topology(4, 8), torch.Generator().manual_seed(0)
    owners, loads = homogeneous(64, 32), torch.randn(12, 64, generator=generator).exp() * 8192
    counts = torch.randint(0, 500, (32, 64), generator=generator)

    def layer() -> None:
        assign_tokens(
            materialize(owners, loads[0].tolist(), overlap=20, capacity=8, topology=topology), counts, topology
        )

    times = alternate({"layer": layer, "owners": lambda: shard(loads, overlap=6, topology=topology)}, rounds=rounds)
    milliseconds = {name: [1e3 * value for value in values] for name, values in times.items()}
    spread = {name: Ratio(statistics.median(v), min(v), max(v)) for name, v in milliseconds.items()}
    return [
        {
            "case": "milliseconds, copies and tokens of a layer, 64 experts on 32 devices",
            "ratio": spread["layer"],
            "bar": "2",
        },
        {
            "case": "milliseconds, owners of 12 layers, 64 experts on 32 devices",
            "ratio": spread["owners"],
            "bar": "100",
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens, no record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens, rounds = (512, 2) if options.quick else (4096, 15)
    began = time.perf_counter()
    rows = measured(tokens, rounds) + planning(3 if options.quick else 20)
    for row in rows:
        print("  ".join(f"{name}: {value}" for name, value in row.items()))
    if not options.quick:
        print(
            write_record("sharded_experts", {"title": TITLE, "what": WHAT, "rows": rows}),
            f"in {time.perf_counter() - began:.0f} s",
        )


if __name__ == "__main__":
    main()
