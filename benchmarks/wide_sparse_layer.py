"""The wide sparse layer: what its gate costs, the layer beside a learned gate and transformers' block, and the probe.

    python benchmarks/wide_sparse_layer.py            # writes docs/benchmarks/wide_sparse_layer.json
    python benchmarks/wide_sparse_layer.py --busy     # one thread and processor time, for a machine with other tenants

Width 512, 8 experts of 1,024 hidden units, 2 a token, 2,048 tokens, float32. The peer is the same experts behind a linear
router in transformers' own expert engines, first shown to compute the same. The probe reads 5,000 positions x 1,536 units x
768 properties.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _side_by_side import alternate, median, ratio, write_record
from torch import Tensor, nn

from mixtura.lm.model import MixturaConfig
from mixtura.lm.model.parts import ExpertsBlock
from mixtura.lm.unit_probes import BoardProbe
from mixtura.lm.wide_sparse import WideSparseMoE

WIDTH, HIDDEN, EXPERTS, ACTIVE = 512, 1024, 8, 2
BARS = {
    "gate of the layer's time": 0.10,
    "sparsity gate over learned gate": 1.25,
    "probe, seconds": 20.0,
}


def block(layer: WideSparseMoE, engine: str) -> nn.Module:
    """The same experts behind the same linear router, run by one of transformers' engines."""
    config = MixturaConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        mlp_gated=False,
        hidden_act="relu",
        num_attention_heads=8,
    )
    config._experts_implementation = engine
    made: Any = ExpertsBlock(config, EXPERTS)
    with torch.no_grad():
        made.gate.weight.copy_(layer.gate.weight)  # type: ignore[arg-type]
        made.experts.up_proj.copy_(layer.experts.up_proj)  # type: ignore[union-attr]
        made.experts.down_proj.copy_(layer.experts.down_proj)  # type: ignore[union-attr]
    return made  # type: ignore[no-any-return]


def layers(rounds: int, tokens: int, clock: Callable[[], float]) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    ours = WideSparseMoE(WIDTH, HIDDEN, EXPERTS, ACTIVE, generator=draw)
    learned = WideSparseMoE(WIDTH, HIDDEN, EXPERTS, ACTIVE, gate="linear", generator=draw)
    learned.experts.load_state_dict(ours.experts.state_dict())
    x = torch.randn(tokens, WIDTH, generator=draw)
    peers = {f"transformers {engine}": block(learned, engine) for engine in ("eager", "grouped_mm")}
    for name, peer in peers.items():
        torch.testing.assert_close(
            peer(x[None])[0], learned(x), rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )

    def trained(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            layer.zero_grad(set_to_none=True)
            layer(x[None]).square().sum().backward()

        return run

    def gate_only() -> None:
        ours.zero_grad(set_to_none=True)
        ours.route(x).weights.square().sum().backward()

    rows: dict[str, Any] = {}
    rivals = {"sparsity": trained(ours), "learned": trained(learned), "gate": gate_only}
    rivals |= {name: trained(peer) for name, peer in peers.items()}
    times = alternate(rivals, rounds=rounds, clock=clock)
    seconds = median(times)
    rows["training: seconds of a step"] = f"{seconds['sparsity']:.3f}"
    rows["training: gate of the layer's time"] = ratio(times, "gate", "sparsity")
    rows["training: sparsity gate over learned gate"] = ratio(times, "sparsity", "learned")
    for name in peers:
        rows[f"training: {name} over ours"] = ratio(times, name, "sparsity")
    for module in (ours, learned):
        module.eval()
    with torch.no_grad():
        forward: dict[str, Callable[[], object]] = {
            "sparsity": lambda: ours(x),
            "learned": lambda: learned(x),
            "gate": lambda: ours.route(x),
        }
        times = alternate(forward, rounds=rounds, clock=clock)
    rows["forward: seconds"] = f"{median(times)['sparsity']:.3f}"
    rows["forward: gate of the layer's time"] = ratio(times, "gate", "sparsity")
    rows["forward: sparsity gate over learned gate"] = ratio(times, "sparsity", "learned")
    return rows


def probe(positions: int, units: int, properties: int, clock: Callable[[], float]) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    boards = torch.rand(2, positions, properties, generator=draw) < 0.05
    z = torch.rand(2, positions, units, generator=draw) * (torch.rand(2, positions, units, generator=draw) < 0.1)

    def both(z: Tensor, boards: Tensor) -> float:
        start = clock()
        fitted = BoardProbe().fit(z[0], boards[0])
        fitted.coverage(z[1], boards[1])
        fitted.reconstruction(z[1], boards[1])
        return clock() - start

    size = f"{positions} x {units} x {properties}"
    return {f"{size}, fitted and measured: probe, seconds": f"{both(z, boards):.1f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes, no record")
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    torch.set_num_threads(1)  # the bars are set for one thread
    rounds, tokens = (2, 512) if options.quick else (7, 2048)
    rows = layers(rounds, tokens, clock)
    rows |= probe(*((500, 256, 128) if options.quick else (5000, 1536, 768)), clock)
    for name, value in rows.items():
        print(f"{name}: {value}")
    if options.quick:
        return
    bars = {name: next((b for part, b in BARS.items() if name.endswith(part)), "reported") for name in rows}
    table = [{"case": name, "found": str(value), "bar": str(bars[name])} for name, value in rows.items()]
    what = (
        f"{EXPERTS} experts of {HIDDEN} hidden units, width {WIDTH}, {tokens} tokens, float32, one thread, "
        f"{'processor time' if options.busy else 'wall clock'}: what the gate without parameters costs, beside a learned one and "
        "transformers' engines behind the same learned router; and the probe of units."
    )
    print(
        write_record("wide_sparse_layer", {"title": "The wide sparse layer", "what": what, "rows": table, "raw": rows})
    )


if __name__ == "__main__":
    main()
