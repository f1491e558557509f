"""Top-1 routing by tables against one-hot products over [T, E, C], and against DeepSpeed's own gate.

In one process and in alternating rounds, after both sides were shown to give the same output, gradients and dropped tokens:

- *route and move*: logits to experts, rows to their expert's places and back, experts left out;
- *whole layer*: the same with experts of two matrices, ReLU, twice as many hidden units as the width;
- *memory*: what a route-and-move allocates at most, beyond its inputs;
- *gate*: logits to routing with capacity, against ``deepspeed``'s ``top1gating`` on the same logits, where it is installed.

The one-hot side has the capacity that the tables have, ceil(T / E), and no padding.

    python benchmarks/table_dispatch.py            # all, writes docs/benchmarks/table_dispatch.json
    python benchmarks/table_dispatch.py --busy     # on a machine with other work: one thread, processor time
    python benchmarks/table_dispatch.py --quick    # a small case, fewer rounds, no record

The peer, in a folder of its own, since accelerate imports an installed deepspeed whenever a model is saved:

    DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation --target peers deepspeed hjson py-cpuinfo msgpack einops
    PYTHONPATH=peers python benchmarks/table_dispatch.py
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _side_by_side import Ratio, alternate, median, ratio, versions, write_record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixtura.core import products
from mixtura.core.capacity import capacity
from mixtura.core.dispatch import _Groups, experts_forward
from mixtura.core.gates import Routing, limit_capacity, top_k

CASES = ((2048, 32, 512), (1024, 64, 512))  # tokens, experts, width
LAYER_BARS = {(2048, 32, 512): 2.5, (1024, 64, 512): 1.3}  # one-hot over tables, at least
MOVE_BAR, GATE_BAR, MEMORY_BAR = 10.0, 1.0, 1.0


@dataclass(frozen=True)
class Layer:
    """Inputs of one case: tokens (T, D), logits (T, E), and the experts' matrices (E, H, D), (E, D, H)."""

    x: Tensor
    logits: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def draw(cls, tokens: int, experts: int, width: int) -> Layer:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        return cls(
            normal(tokens, width),
            normal(tokens, experts),
            normal(experts, 2 * width, width, scale=width**-0.5),
            normal(experts, width, 2 * width, scale=(2 * width) ** -0.5),
        )

    @property
    def places(self) -> int:
        return capacity(*self.logits.shape, 1.0)


def routed(layer: Layer) -> Routing:
    """Top-1 with the weight as it is, and the first come."""
    return limit_capacity(top_k(layer.logits, 1, renormalise=False), layer.places, policy="prefix")


def table_move(layer: Layer) -> Tensor:
    routing = routed(layer)
    groups = _Groups.of(routing.indices, routing.n_experts)
    rows = layer.x.new_empty(len(groups.tokens) + 1, layer.x.shape[1])
    torch.index_select(layer.x, 0, groups.tokens, out=rows[:-1])
    rows[-1] = 0  # what a dropped token reads
    return products.gather_sum(rows, groups.places, routing.weights)


def table_layer(layer: Layer) -> Tensor:
    routing = routed(layer)
    return experts_forward(
        layer.x, layer.up, layer.down, routing.indices, routing.weights, activation="relu", backend="grouped"
    )


def masks(layer: Layer) -> tuple[Tensor, Tensor]:
    """Dispatch mask and combine weights, (T, E, C)."""
    n_experts, places = layer.logits.shape[1], layer.places
    probs = layer.logits.softmax(-1)
    chosen = F.one_hot(probs.argmax(-1), n_experts)
    queue = chosen.cumsum(0) - 1
    kept = chosen * (queue < places)
    place = (queue * kept).sum(-1)
    weight = (probs * kept).sum(-1)
    combine = torch.einsum("te,tc->tec", weight[:, None] * kept, F.one_hot(place, places).float())
    return combine.bool().to(layer.x.dtype), combine


def one_hot_move(layer: Layer) -> Tensor:
    mask, combine = masks(layer)
    return torch.einsum("tec,ecd->td", combine, torch.einsum("tec,td->ecd", mask, layer.x))


def one_hot_layer(layer: Layer) -> Tensor:
    mask, combine = masks(layer)
    inside = torch.einsum("tec,td->ecd", mask, layer.x)
    hidden = F.relu(torch.bmm(inside, layer.up.transpose(1, 2)))
    return torch.einsum("tec,ecd->td", combine, torch.bmm(hidden, layer.down.transpose(1, 2)))


def assert_same(layer: Layer) -> None:
    """Output and all gradients of the two layers, and the output of the two moves."""
    torch.testing.assert_close(table_move(layer), one_hot_move(layer), rtol=1e-5, atol=1e-6)
    found = []
    for way in (table_layer, one_hot_layer):
        leaves = [t.clone().requires_grad_() for t in (layer.x, layer.logits, layer.up, layer.down)]
        y = way(Layer(*leaves))
        y.square().sum().backward()
        found.append([y.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Allocated(TorchDispatchMode):
    """Most bytes of new storage that were alive at once; every result of an operation counts until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in inputs | self.known:
                self._count(t)
        return result

    def _count(self, t: Tensor) -> None:
        import weakref

        storage, size = t.untyped_storage(), t.untyped_storage().nbytes()
        key = storage._cdata
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def freed() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)


def allocated(run: Callable[[], object]) -> int:
    with torch.no_grad(), Allocated() as counter:
        run()
    return counter.most


def compare(case: tuple[int, int, int], rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Ratios of one case, of rivals that were first shown to compute the same."""
    layer = Layer.draw(*case)
    assert_same(layer)
    rows: list[dict[str, Any]] = []

    def judged(what: str, rival: str, found: Ratio | float, bar: float | None, seconds: dict[str, float]) -> None:
        spent = {name: f"{1e3 * value:.2f}" for name, value in seconds.items()}
        tokens, experts, width = case
        middle = found.median if isinstance(found, Ratio) else found
        rows.append(
            {
                "case": f"{what}, {tokens} tokens, {experts} experts, width {width}",
                "rival": rival,
                "rival's over ours": str(found) if isinstance(found, Ratio) else f"{found:.2f}",
                "bar, at least": "" if bar is None else bar,
                "reached": "" if bar is None else middle >= bar,
                "ours, ms": spent.get("ours", ""),
                "rival, ms": spent.get("rival", ""),
            }
        )

    def timed(what: str, rival: str, ours: Callable[..., Any], theirs: Callable[..., Any], bar: float | None) -> None:
        times = alternate({"ours": lambda: ours(layer), "rival": lambda: theirs(layer)}, rounds=rounds, clock=clock)
        judged(what, rival, ratio(times, "rival", "ours"), bar, median(times))

    with torch.no_grad():
        timed("route and move", "one-hot", table_move, one_hot_move, MOVE_BAR)
        timed("whole layer", "one-hot", table_layer, one_hot_layer, LAYER_BARS.get(case))
        if deepspeed_gate is not None:
            timed("gate", "deepspeed", routed, deepspeed_gate, GATE_BAR)
    ours, theirs = (allocated(lambda f=way: f(layer)) for way in (table_move, one_hot_move))
    judged("memory", "one-hot", theirs / ours, None, {})
    judged("memory", "the bytes of 3 T K D values", 3 * layer.x.nbytes / ours, MEMORY_BAR, {})
    return rows


def _deepspeed() -> Callable[[Layer], Any] | None:
    """DeepSpeed's top-1 gate without random selection, shown to keep the tokens that ours keeps."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    from deepspeed.moe.sharded_moe import top1gating

    def gate(layer: Layer) -> Any:
        return top1gating(layer.logits, 1.0, 4, drop_tokens=True, use_rts=False)

    layer = Layer.draw(256, 8, 16)
    combine = gate(layer)[1]
    theirs, ours = combine.sum((1, 2)), routed(layer).weights[:, 0]
    # Without random selection its released code keeps those with the largest probability, or the first; either way as many.
    assert int((theirs > 0).sum()) == int((ours > 0).sum())
    return gate


deepspeed_gate = _deepspeed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    parser.add_argument("--quick", action="store_true", help="a small case, fewer rounds, no record")
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    torch.set_num_threads(1)  # the bars are set for one thread
    rows = []
    for case in ((256, 8, 64),) if options.quick else CASES:
        rows += compare(case, 3 if options.quick else 9, clock)
    for row in rows:
        print("  ".join(f"{name}: {value}" for name, value in row.items()))
    if deepspeed_gate is None:
        print("deepspeed is not installed: its gate was not timed")
    if not options.quick:
        record = {
            "title": "Top-1 routing by tables",
            "what": (
                "Routing, moving rows and a whole layer (two matrices, ReLU) by tables, against masks of tokens x experts x "
                "places and products over them, and against DeepSpeed's own gate on the same logits. Time, or memory, of the "
                f"rival over ours; {'processor time' if options.busy else 'wall clock'}, one thread, the first come stay."
            ),
            "rows": rows,
        }
        if deepspeed_gate is not None:
            record["peer"] = versions("deepspeed")
        print(write_record("table_dispatch", record))


if __name__ == "__main__":
    main()
