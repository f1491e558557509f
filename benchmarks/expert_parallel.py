"""Bytes and time of a training step of experts in four processes, beside the closed formulas and one process.

Every layout trains the same decoder on the same rows, and is first shown to have the loss and the gradient norm of one process.
Counted where the collectives are called, a process and step:

- rows that travel to experts and back, forward and backward, against :func:`mixtura.lm.parallel.exchange_cost`;
- gradients: of experts over their copies, of the rest over all processes (here without FSDP, so that all of them are seen),
  against the sizes of the parameters.

Formulas take rows as evenly spread. Where tensor ranks send only their own experts' rows, the spread of a real gate shows.

    python benchmarks/expert_parallel.py            # all, writes docs/benchmarks/expert_parallel.json
    python benchmarks/expert_parallel.py --quick    # fewer tokens and rounds, no record
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _side_by_side import write_record

from mixtura.core.shared_batch import SharedBatch
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.parallel import clip_gradients, exchange_cost, make_mesh, parallelize_experts, reduce_gradients
from mixtura.lm.parallel.gradients import expert_rules

WORLD = 4
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
LAYOUTS: dict[str, tuple[dict[str, int], str]] = {
    "data=4": ({"expert": 1}, "direct"),
    "expert=2,data=2": ({"expert": 2}, "direct"),
    "expert=4": ({"expert": 4}, "direct"),
    "expert=4, hierarchical": ({"expert": 4, "node": 2}, "hierarchical"),
    "expert=2,slices=2": ({"expert": 2, "slices": 2}, "direct"),
    "expert=2,tensor=2, direct": ({"expert": 2, "tensor": 2}, "direct"),
    "expert=2,tensor=2, coordinated": ({"expert": 2, "tensor": 2}, "coordinated"),
}


def build() -> MixturaForCausalLM:
    torch.manual_seed(0)
    config = MixturaConfig(**SHAPE)
    config._experts_implementation = "mixtura"
    return MixturaForCausalLM(config).train()


def batch(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


@contextmanager
def counted(mesh_sizes: dict[str, int]) -> Iterator[Counter[str]]:
    """Bytes handed to the collectives of this process: of rows, and of gradients of so many and of all processes."""
    seen: Counter[str] = Counter()
    swap, reduce = dist.all_to_all_single, dist.all_reduce

    def counting_swap(output: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["rows"] += input.numel() * input.element_size() if input.is_floating_point() else 0
        return swap(output, input, *args, **kwargs)

    def counting_reduce(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if tensor.is_floating_point() and tensor.numel() > 1:  # the others are counts, losses and norms
            whole = dist.get_world_size(group) == WORLD and mesh_sizes["copies"] != WORLD
            seen["gradients of the rest" if whole else "gradients of experts"] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, group=group, **kwargs)

    dist.all_to_all_single, dist.all_reduce = counting_swap, counting_reduce  # type: ignore[assignment]
    try:
        yield seen
    finally:
        dist.all_to_all_single, dist.all_reduce = swap, reduce


def step(model: MixturaForCausalLM, ids: torch.Tensor, finish: Callable[[], torch.Tensor]) -> tuple[float, float]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False, shared_batch=SharedBatch()).loss
    loss.backward()
    return float(loss.detach()), float(finish())


def measure(rank: int, folder: str, rows: int, length: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {}
    for name, (degrees, plan) in LAYOUTS.items():
        mesh = make_mesh(WORLD, **degrees)
        model = parallelize_experts(build(), mesh, plan=plan)  # type: ignore[arg-type]
        places = WORLD // mesh.tensor
        ids = batch(rows, length).tensor_split(places)[rank // mesh.tensor]

        def finish(model: Any = model, mesh: Any = mesh) -> torch.Tensor:
            reduce_gradients(model, mesh)
            return clip_gradients(model, mesh, 0.0)

        with counted({"copies": mesh.expert_data}) as seen:
            loss, norm = step(model, ids, finish)
        total = torch.tensor(loss)
        dist.all_reduce(total)
        seconds = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            step(model, ids, finish)
            seconds.append(time.perf_counter() - start)
        width, k, layers = SHAPE["hidden_size"], SHAPE["num_experts_per_tok"], SHAPE["num_hidden_layers"]
        ways = [
            exchange_cost(ids.numel(), k, width, torch.float32, mesh, plan, direction=way)  # type: ignore[arg-type]
            for way in ("there", "back")
        ]
        own = sum(p.numel() for p in expert_rules(model))
        rest = sum(p.numel() for p in model.parameters()) - own
        found[name] = {
            "loss": float(total) / WORLD,
            "norm": norm,
            "seconds": median(seconds),
            "counted": dict(seen),
            "formula": {
                # Backward, the gradient of a way takes the other.
                "rows": 2 * layers * sum(way.bytes_sent for way in ways) if mesh.owners > 1 else 0,
                "gradients of experts": 4 * own if mesh.expert_data > 1 else 0,
                "gradients of the rest": 4 * rest,
            },
        }
        if mesh.expert_data == WORLD:  # both kinds go to all processes, in one call each
            for part in ("counted", "formula"):
                found[name][part] = _joined(found[name][part])
        if mesh.slices > 1:  # the formula leaves slices out: all of an expert's rows go to each of its processes
            found[name]["formula"]["rows"] *= 1 + mesh.slices
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _joined(parts: dict[str, float]) -> dict[str, float]:
    gradients = sum(size for name, size in parts.items() if name.startswith("gradients"))
    return {"rows": parts.get("rows", 0), "gradients": gradients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds, no record")
    options = parser.parse_args()
    rows, length, rounds = (8, 16, 1) if options.quick else (16, 128, 7)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, rows, length, rounds), nprocs=WORLD)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
    model, ids = build(), batch(rows, length)
    norm_of = lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))  # noqa: E731
    loss, norm = step(model, ids, norm_of)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step(model, ids, norm_of)
        seconds.append(time.perf_counter() - start)
    alone = median(seconds)
    table = []
    for name in LAYOUTS:
        parts = [rank[name] for rank in ranks]
        for part in parts:
            torch.testing.assert_close(part["loss"], loss, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(part["norm"], norm, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        row: dict[str, Any] = {"layout": name, "step over one process": max(p["seconds"] for p in parts) / alone}
        for kind, formula in parts[0]["formula"].items():
            sizes = [part["counted"].get(kind, 0) for part in parts]
            row[f"{kind}, bytes"] = sum(sizes) / WORLD
            if formula:
                row[f"{kind}, counted over formula"] = [
                    min(sizes) / formula,
                    sum(sizes) / WORLD / formula,
                    max(sizes) / formula,
                ]
        table.append(row)
        print("  ".join(f"{key}: {_short(value)}" for key, value in row.items()))
    if not options.quick:
        figures = {"processes": WORLD, "shape": SHAPE, "tokens": rows * length, "one process, seconds": alone}
        print(write_record("expert_parallel", {**figures, "rows": table}))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[1]:.4f} ({value[0]:.4f} to {value[2]:.4f})"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
