"""Sparse layers of equal cost: what their simulation costs, and what compressed rows gain where zeros can be skipped.

1. A training step of the wide perceptron (s = 0.75, MaskOptimizer with RigL) against the same wide network without masks: the
   limit of a simulation, which computes all products. Bar: 1.15 of its time.
2. One step on which masks move, of the same network: what RigL adds every hundredth step or so.
3. A product with a 2048 x 2048 weight of density 0.1, batch 1: torch.sparse's compressed rows against the dense product. Bar: at
   least 2 times as fast. First both are shown to compute the same.

4. The same training step and one whose masks move against the peer, sparsimony (PyPI, RigL on torch's parametrizations): first
   one move of both is shown to give the same mask. The rows are left out where it is not installed.

    python benchmarks/sparse_layers.py            # writes docs/benchmarks/sparse_layers.json
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _side_by_side import Ratio, alternate, ratio, write_record
from torch import nn
from torch.nn.utils import prune

from mixtura.claims.sparse_ift import perceptron
from mixtura.core.isoflop import IsoFlop, widen
from mixtura.core.sparse_layers import SparseLinear, draw_mask, masked_parameters
from mixtura.core.sparse_training import MaskConfig, MaskOptimizer, moved_mask

STEPS = 20  # a timed round
WIDTHS = (16, 128, 512)


def stepper(model: nn.Module, stepping: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Some training steps on one batch."""

    def run() -> None:
        for _ in range(STEPS):
            stepping.zero_grad()
            F.cross_entropy(model(x), y).backward()
            stepping.step()

    return run


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The recipe of the claim."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def training(width: int, rounds: int) -> list[dict[str, Any]]:
    """Steps of the sparse network over those of the dense wide one, and of one with torch's own masks."""
    torch.manual_seed(0)
    x, y = torch.randn(128, 196), torch.randint(10, (128,))
    sparse = widen(
        lambda w: perceptron(w, inputs=196), IsoFlop("wide", 0.75), width=width, example_input=torch.zeros(1, 196)
    )
    dense, pruned = perceptron(2 * width, inputs=196), perceptron(2 * width, inputs=196)
    for twin in (dense, pruned):
        twin.load_state_dict({k: v for k, v in sparse.state_dict().items() if "mask" not in k})
    for name, found in masked_parameters(sparse).items():
        prune.custom_from_mask(pruned.get_submodule(name.removesuffix(".weight")), "weight", found.mask)
    for twin in (dense, pruned):
        torch.testing.assert_close(twin(x), sparse(x))  # all three compute the same
    # Moves come after the timed rounds; a step with a move is timed by itself.
    far, near = (
        MaskOptimizer(sparse, optimizer(sparse), MaskConfig(every=every), total_steps=10**7) for every in (10**6, 1)
    )
    rivals = {
        "sparse": stepper(sparse, far, x, y),
        "moving": stepper(sparse, near, x, y),
        "dense": stepper(dense, optimizer(dense), x, y),
        "torch's masks": stepper(pruned, optimizer(pruned), x, y),
    }
    times = alternate(rivals, rounds=rounds, clock=time.process_time)
    case = f"perceptron 196-{2 * width}-{2 * width}-{2 * width}-10, batch 128"
    return [
        row(
            f"{case}: a step, masks simulated", "the same network without masks", ratio(times, "sparse", "dense"), 1.15
        ),
        row(
            f"{case}: a step, masks simulated",
            "torch.nn.utils.prune, static",
            ratio(times, "sparse", "torch's masks"),
            1.0,
        ),
        row(
            f"{case}: a step on which masks move",
            "the same network without masks",
            ratio(times, "moving", "dense"),
            None,
        ),
    ]


def peer(width: int, rounds: int) -> list[dict[str, Any]]:
    """Steps against sparsimony's, masks at rest and masks that move at every step."""
    from sparsimony.pruners.unstructured import UnstructuredGradientGrower, UnstructuredMagnitudePruner

    generator = torch.Generator().manual_seed(0)
    weight, slope = torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator)
    mask = draw_mask((64, 64), 1024, generator=generator)
    weight *= mask
    kept = UnstructuredMagnitudePruner.calculate_mask(0.3, mask.float(), weight)
    theirs = UnstructuredGradientGrower.calculate_mask(0.75, kept, slope)
    assert torch.equal(theirs.bool(), moved_mask(weight, mask, slope.abs(), 0.3)[0])

    x, y = torch.randn(128, 196), torch.randint(10, (128,))
    found = []
    for what, every in (("a step, masks at rest", 10**6), ("a step on which masks move", 1)):
        rivals = {"ours": _ours(width, every, x, y), "theirs": _theirs(width, every, x, y)}
        times = alternate(rivals, rounds=rounds, clock=time.process_time)
        case = f"perceptron 196-{2 * width}-{2 * width}-{2 * width}-10, batch 128: {what}"
        found.append(row(case, "sparsimony 0.1.0, RigL", ratio(times, "ours", "theirs"), 1.0))
    return found


def _ours(width: int, every: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    model = widen(
        lambda w: perceptron(w, inputs=196),
        IsoFlop("wide", 0.75, match="layer"),
        width=width,
        example_input=torch.zeros(1, 196),
    )
    stepping = MaskOptimizer(model, optimizer(model), MaskConfig(every=every), total_steps=10**7)
    return stepper(model, stepping, x, y)


def _theirs(width: int, every: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    from sparsimony.distributions.base import UniformDistribution
    from sparsimony.dst.rigl import RigL
    from sparsimony.schedulers.base import CosineDecayScheduler

    model = perceptron(2 * width, inputs=196)
    inner = optimizer(model)
    masks = RigL(
        CosineDecayScheduler(0.3, 75 * 10**5, every), UniformDistribution(), inner, sparsity=0.75, init_method=None
    )
    masks.prepare(model, [{"tensor_fqn": f"{i}.weight"} for i in (0, 3, 6)])

    class Both:
        def zero_grad(self) -> None:
            inner.zero_grad()

        def step(self) -> None:
            inner.step()
            masks.step()

    return stepper(model, Both(), x, y)


def inference(density: float, rounds: int) -> dict[str, Any]:
    """One row through a square weight: compressed rows over the dense product."""
    layer = SparseLinear(2048, 2048, bias=False)
    layer.set_mask(draw_mask((2048, 2048), round(density * 2048**2), generator=torch.Generator().manual_seed(0)))
    weight, compressed = layer.weight.detach().clone(), layer.to_sparse_csr()
    x = torch.randn(1, 2048)
    torch.testing.assert_close(compressed @ x[0], F.linear(x, weight)[0], rtol=1e-4, atol=1e-4)

    def many(product: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(STEPS):
                product()

        return run

    with torch.inference_mode():
        rivals = {"rows": many(lambda: compressed @ x[0]), "dense": many(lambda: F.linear(x, weight))}
        times = alternate(rivals, rounds=rounds, clock=time.process_time)
    return row(
        f"2048 x 2048, density {density:g}, batch 1: compressed rows",
        "the dense product",
        ratio(times, "rows", "dense"),
        0.5 if density == 0.1 else None,
    )


def row(case: str, rival: str, found: Ratio, bar: float | None) -> dict[str, Any]:
    """A row of the table."""
    print(f"{case}: {found} of {rival}")
    reached = None if bar is None else bool(found.median <= bar)
    return {
        "case": case,
        "rival": rival,
        "ratio": str(found),
        "bar": "reported" if bar is None else f"at most {bar}",
        "reached": reached,
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; fewer than 9 write no record")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [found for width in WIDTHS for found in training(width, rounds)]
    if importlib.util.find_spec("sparsimony") is not None:
        rows += [found for width in WIDTHS for found in peer(width, rounds)]
    rows += [inference(density, rounds) for density in (0.1, 0.25)]
    if rounds >= 9:
        payload = {
            "title": "Sparse layers of equal cost",
            "what": (
                "Float32, one thread, processor time. The masked network, the dense one and torch's own pruning are shown to "
                "compute the same before anything is timed; so are compressed rows and the dense product."
            ),
            "rows": rows,
            "notes": (
                "A simulation computes every product of the wide network and then some: its time is no measure of the method, "
                "whose cost is in counted multiply-adds. The smaller the layers, the more the calls themselves weigh."
            ),
        }
        write_record("sparse_layers", payload)


if __name__ == "__main__":
    main()
