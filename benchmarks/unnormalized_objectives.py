"""What an objective for unnormalised models costs beside the energy itself.

A step of each objective (noise drawn, its density taken, forward and backward over B data and as many noise points) against the
bare forward and backward of the energy over the same number of points. Bars: compositional 1.05 of bare, "storm" 1.5. Noise
contrast and self-normalised batches stand beside them. First the gradients of "ema" and "batch" are shown to agree on a first
step, where both must.

    python benchmarks/unnormalized_objectives.py      # writes docs/benchmarks/unnormalized_objectives.json
"""

import itertools
import time
from typing import Any

import torch
from _side_by_side import alternate, ratio, write_record
from torch import nn

from mixtura.density.noise_laws import GaussianNoise
from mixtura.density.unnormalized import CompositionalLikelihood, NoiseContrastive

B = 256
BAR, BAR_STORM = 1.05, 1.5
NOTES = (
    "An objective is about thirty small operations on vectors of B numbers, and the draws and the density of the noise law. The "
    "former do not grow with the energy and disappear beside a large one. The latter grow with the features alone: beside three "
    "layers of width 1024 on 784 features, draws in double precision take about 4 % of a step and densities 1 %, in every "
    "objective, noise contrast too, so that the bar of 1.05 is just missed. Storm adds a forward pass over the noise and a copy "
    "of the weights."
)


class Energy(nn.Module):
    """A network from flattened points to one number each."""

    def __init__(self, features: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [features, *[width] * depth]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Log p0, shape (N,)."""
        return self.net(x).squeeze(-1)


def case(features: int, width: int, depth: int, rounds: int) -> dict[str, Any]:
    """Time of a step of every objective over that of the bare energy."""
    torch.manual_seed(0)
    data = torch.randn(4096, features)
    energy, law = Energy(features, width, depth), GaussianNoise.fit(data)
    objectives: dict[str, nn.Module] = {
        **{inner: CompositionalLikelihood(law, inner=inner) for inner in ("ema", "batch", "learned", "storm")},  # type: ignore[arg-type]
        "noise contrast": NoiseContrastive(law),
    }
    both = torch.randn(2 * B, features)
    generator = torch.Generator().manual_seed(0)

    def bare() -> None:
        energy.zero_grad()
        energy(both).sum().backward()

    def step(objective: nn.Module) -> None:
        energy.zero_grad()
        objective(energy, data[:B], generator=generator).backward()

    first = {}
    for name in ("ema", "batch"):
        energy.zero_grad()
        objectives[name](energy, data[:B], noise_batch=both[:B]).backward()
        first[name] = [p.grad.clone() for p in energy.parameters() if p.grad is not None]
    torch.testing.assert_close(first["ema"], first["batch"])
    rivals = {"bare": bare, **{name: lambda o=o: step(o) for name, o in objectives.items()}}
    times = alternate(rivals, rounds=rounds, warmup=3, clock=time.process_time)
    row: dict[str, Any] = {"energy": f"{depth} layers of {width}, {features} features"}
    for name in objectives:
        found = ratio(times, name, "bare")
        row[name] = str(found)
        row[f"_{name}"] = found.median
    print(row)
    return row


def main() -> None:
    """Measure and write the record."""
    torch.set_num_threads(1)
    rows = [case(*shape, rounds=41) for shape in ((2, 128, 3), (32, 512, 3), (784, 1024, 3))]
    judged = {"ema": max(row["_ema"] for row in rows), "storm": max(row["_storm"] for row in rows)}
    largest = {"ema": rows[-1]["_ema"], "storm": rows[-1]["_storm"]}
    for name, bar in (("ema", BAR), ("storm", BAR_STORM)):
        print(f"{name}: worst {judged[name]:.2f}, largest energy {largest[name]:.2f}, bar {bar}")
    payload = {
        "title": "Objectives for unnormalised models",
        "what": (
            f"A step over {B} data and {B} noise points, over the bare forward and backward of the energy on as many. Median of "
            f"41 rounds with the lowest and the highest. Bars: ema {BAR}, storm {BAR_STORM}."
        ),
        "rows": [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows],
        "notes": NOTES,
        "bars": {"ema": BAR, "storm": BAR_STORM},
        "medians": [{key[1:]: value for key, value in row.items() if key.startswith("_")} for row in rows],
    }
    write_record("unnormalized_objectives", payload)


if __name__ == "__main__":
    main()
