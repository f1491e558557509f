"""A training step of fine-grained, shared experts: mixtura against transformers' blocks, and against few large experts.

In one process and in alternating rounds, forward and backward, after both sides were shown to compute the same:

- ``DeepseekV2Moe`` with transformers' ``eager`` and ``grouped_mm`` engines (63 routed experts, 7 a token, 1 shared);
- ``OlmoeSparseMoeBlock`` with the same engines (64 experts, 8 a token, none shared);
- mixtura's own layer of 16 experts, 2 a token, with equal multiply-adds: what the finer cut costs.

    python benchmarks/fine_grained_layer.py            # all, writes docs/benchmarks/fine_grained_layer.json
    python benchmarks/fine_grained_layer.py --busy     # on a machine with other work: one thread, processor time
    python benchmarks/fine_grained_layer.py --quick    # fewer rounds and tokens, no record
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _side_by_side import alternate, ratio, write_record
from torch import Tensor, nn
from transformers import DeepseekV2Config, OlmoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from mixtura.lm.fine_grained import FineGrainedMoE, MatchedShape, matched

WIDTH = 512
STANDARD = (256, 1408)  # hidden units of a standard expert; the small ones have a quarter
TITLE = "Many narrow experts"
WHAT = (
    "A training step of one layer (forward and backward, width 512): transformers' engines over ours, above 1 ours is faster "
    "(bars: eager 1.5, grouped_mm 0.95), and ours over 16 experts of four times the width with equal multiply-adds (bar 1.6)."
)


def ours(shape: MatchedShape) -> FineGrainedMoE:
    return FineGrainedMoE(WIDTH, shape.hidden, shape.routed, shape.active, shape.shared, init_std=0.02)


def deepseek(layer: FineGrainedMoE, shape: MatchedShape, engine: str) -> nn.Module:
    config = DeepseekV2Config(
        hidden_size=WIDTH,
        moe_intermediate_size=shape.hidden,
        n_routed_experts=shape.routed,
        num_experts_per_tok=shape.active,
        n_shared_experts=shape.shared,
        num_attention_heads=8,
    )
    config._experts_implementation = engine
    block: Any = DeepseekV2Moe(config)
    assert layer.shared is not None
    gate, up = layer.shared.up_proj.weight.chunk(2)
    with torch.no_grad():
        block.shared_experts.gate_proj.weight.copy_(gate)
        block.shared_experts.up_proj.weight.copy_(up)
        block.shared_experts.down_proj.weight.copy_(layer.shared.down_proj.weight)
    return copied(block, layer)


def olmoe(layer: FineGrainedMoE, shape: MatchedShape, engine: str) -> nn.Module:
    config = OlmoeConfig(
        hidden_size=WIDTH,
        intermediate_size=shape.hidden,
        num_experts=shape.routed,
        num_experts_per_tok=shape.active,
        norm_topk_prob=False,
    )
    config._experts_implementation = engine
    return copied(OlmoeSparseMoeBlock(config), layer)


def copied(block: Any, layer: FineGrainedMoE) -> nn.Module:
    with torch.no_grad():
        block.gate.weight.copy_(layer.gate.weight)
        block.experts.gate_up_proj.copy_(layer.experts.gate_up_proj)
        block.experts.down_proj.copy_(layer.experts.down_proj)
    return block  # type: ignore[no-any-return]


def outputs(block: nn.Module, x: Tensor) -> Tensor:
    y = block(x)
    return y[0] if isinstance(y, tuple) else y


def step(block: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        block.zero_grad(set_to_none=True)
        outputs(block, x).square().sum().backward()

    return run


def compare(kind: str, standard: int, tokens: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Times of one layer and its rivals, which are first shown to compute the same output and router gradient."""
    shape = matched(standard, 16, 2, split=4, shared=1 if kind == "deepseek" else 0)
    torch.manual_seed(0)
    layer = ours(shape)
    peer = deepseek if kind == "deepseek" else olmoe
    blocks = {"mixtura": layer} | {f"{kind} {engine}": peer(layer, shape, engine) for engine in ("eager", "grouped_mm")}
    x = torch.randn(1, tokens, WIDTH)
    want = outputs(layer, x)
    step(layer, x)()
    for name, block in blocks.items():
        torch.testing.assert_close(outputs(block, x), want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        step(block, x)()
        torch.testing.assert_close(block.gate.weight.grad, layer.gate.weight.grad, rtol=1e-3, atol=1e-4)
    if kind == "deepseek":
        blocks["16 large experts"] = ours(matched(standard, 16, 2, split=1))
    times = alternate({name: step(block, x) for name, block in blocks.items()}, rounds=rounds, clock=clock)
    row: dict[str, Any] = {"block": kind, "expert width": shape.hidden, "tokens": tokens}
    for name in blocks:
        if name == "16 large experts":
            row["ours over 16 large experts"] = ratio(times, "mixtura", name)
        elif name != "mixtura":
            row[f"{name.removeprefix(kind)[1:]} over ours"] = ratio(times, name, "mixtura")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens, no record")
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    torch.set_num_threads(1)  # the bars are set for one thread
    tokens, rounds = (256, 2) if options.quick else (2048, 7)
    rows = []
    for standard in STANDARD[:1] if options.quick else STANDARD:
        for kind in ("deepseek", "olmoe"):
            rows.append(compare(kind, standard, tokens, rounds, clock))
            print("  ".join(f"{name}: {value}" for name, value in rows[-1].items()))
    if not options.quick:
        clock_name = "processor time" if options.busy else "wall clock"
        print(
            write_record(
                "fine_grained_layer", {"title": TITLE, "what": WHAT, "notes": f"Times are {clock_name}.", "rows": rows}
            )
        )


if __name__ == "__main__":
    main()
