"""How many rows each expert got, iteration by iteration: recorded from a model, or drawn with a known unevenness.

Drawn loads follow one law: the logarithm of an expert's popularity is normal with standard deviation ``skew`` over the experts
of a layer, and from one iteration to the next it keeps sqrt(1 - drift^2) of itself and draws the rest anew, so its spread stays.

Shapes: T iterations, L layers, E experts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtura.core.checkpoint import atomic_file
from mixtura.core.gates import Routing
from mixtura.lm.anatomy import recorded_routing

__all__ = ["LoadTrace", "record_loads", "rows_of", "synthesize_loads"]


@dataclass(frozen=True)
class LoadTrace:
    """Rows of each expert.

    Attributes:
        counts: int64 (T, L, E), over all devices; every layer of an iteration has the same total.
    Raises:
        ValueError: negative counts, totals that differ between layers, or not three dimensions.
    """

    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        counts = self.counts
        if counts.ndim != 3 or not counts.size:
            raise ValueError(f"counts must have shape (T, L, E), none of them 0, got {counts.shape}")
        if (counts < 0).any():
            t, layer, e = np.argwhere(counts < 0)[0]
            raise ValueError(
                f"counts must be >= 0, got {counts[t, layer, e]} at iteration {t}, layer {layer}, expert {e}"
            )
        totals = counts.sum(-1)
        if (totals != totals[:, :1]).any():
            t, layer = np.argwhere(totals != totals[:, :1])[0]
            raise ValueError(
                f"rows must sum to the same tokens in every layer; iteration {t} has {totals[t, 0]} in layer 0 and "
                f"{totals[t, layer]} in layer {layer}"
            )

    @property
    def imbalance(self) -> float:
        """Rows of the busiest expert over the mean, averaged over iterations and layers; 1 is perfect balance."""
        return float((self.counts.max(-1) / np.maximum(self.counts.mean(-1), 1e-12)).mean())

    def fit(self) -> tuple[float, float, float]:
        """(skew, drift, lag-1 correlation) of the law in this module's head that explains the trace best.

        What counting adds to the spread, about 1 / count for each logarithm, is taken off.
        """
        counts = self.counts + 0.5  # an expert without a row has a logarithm too
        logs = np.log(counts)
        logs -= logs.mean(-1, keepdims=True)
        noise = float((1 / counts).mean())
        variance = max(float(logs.var(-1).mean()) - noise, 1e-12)
        if len(logs) < 2:
            return variance**0.5, 0.0, 1.0
        along = float((logs[1:] * logs[:-1]).mean())
        correlation = min(max(along / variance, 0.0), 1.0)
        return variance**0.5, (1 - correlation**2) ** 0.5, correlation

    def tiled(self, layers: int, rows: int) -> "LoadTrace":
        """The same shares for a deeper model and more rows: layers repeat in turn, each shifted in time so that none is a copy.

        Args:
            layers: L of the result.
            rows: rows of an iteration and layer.
        """
        iterations, own, _ = self.counts.shape
        shifted = [
            np.roll(self.counts[:, i % own], (i // own) * iterations // -(-layers // own), 0) for i in range(layers)
        ]
        return LoadTrace(_rounded(np.stack(shifted, 1).astype(np.float64), rows))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        with atomic_file(path) as beside:
            save_file({"counts": torch.from_numpy(np.ascontiguousarray(self.counts))}, beside)

    @staticmethod
    def load(path: str | Path) -> "LoadTrace":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: no safetensors file, or one without ``counts``.
        """
        try:
            with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
                if "counts" not in file.keys():  # noqa: SIM118 (no mapping)
                    raise ValueError(f"{path} is no trace of loads: it has no tensor named counts")
                return LoadTrace(file.get_tensor("counts").numpy())
        except SafetensorError as error:
            raise ValueError(f"{path} is no trace of loads, which is a safetensors file ({error})") from error


def _rounded(weights: NDArray[np.float64], rows: int) -> NDArray[np.int64]:
    """Whole numbers in proportion to the last axis, exactly ``rows`` in sum: the largest remainders get one more."""
    quota = rows * weights / weights.sum(-1, keepdims=True)
    floor = np.floor(quota)
    left = rows - floor.sum(-1, keepdims=True)
    rank = np.argsort(np.argsort(floor - quota, axis=-1, kind="stable"), axis=-1, kind="stable")
    return (floor + (rank < left)).astype(np.int64)


def synthesize_loads(
    iterations: int, layers: int, experts: int, rows: int, *, skew: float, drift: float = 0.03, seed: int = 0
) -> LoadTrace:
    """A trace drawn from the law in this module's head.

    Args:
        iterations, layers, experts: T, L, E.
        rows: rows of an iteration and layer, tokens times experts a token visits.
        skew: standard deviation of the log popularity; 0 is even but for chance. 0.5, 1 and 1.5 make the busiest of 64
            experts 2.9, 6.6 and 12.5 times the mean.
        drift: share of the popularity drawn anew an iteration, in [0, 1].
        seed: of the draws.
    Raises:
        ValueError: the argument is named.
    """
    for name, least, value in (
        ("iterations", 1, iterations), ("layers", 1, layers), ("experts", 1, experts), ("rows", 0, rows), ("skew", 0, skew)
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if not 0 <= drift <= 1:
        raise ValueError(f"drift must be between 0 and 1, got {drift}")
    rng = np.random.default_rng(seed)
    keep, out = (1 - drift**2) ** 0.5, np.empty((iterations, layers, experts), dtype=np.int64)
    state = rng.standard_normal((layers, experts))
    for t in range(iterations):
        share = np.exp(skew * state)
        out[t] = rng.multinomial(rows, share / share.sum(-1, keepdims=True))
        state = keep * state + drift * rng.standard_normal((layers, experts))
    return LoadTrace(out)


def rows_of(seen: Mapping[str, Routing]) -> Tensor:
    """Rows of each expert in one forward pass, int64 (L, E), of what :func:`mixtura.lm.anatomy.recorded_routing` noted.

    Raises:
        ValueError: layers with different numbers of experts.
    """
    sizes = sorted({routing.n_experts for routing in seen.values()})
    if len(sizes) != 1:
        raise ValueError(f"loads are recorded of layers with one number of experts, got {sizes}")
    n_experts = sizes[0]
    counts = [torch.bincount(r.indices.flatten(), minlength=n_experts + 1)[:n_experts] for r in seen.values()]
    return torch.stack(counts).cpu()


@torch.inference_mode()
def record_loads(model: Any, batches: Iterable[Tensor]) -> LoadTrace:
    """Loads of a model on batches of token ids (B, N), one iteration a batch.

    Raises:
        ValueError: no batch, or a model without experts.
    """
    with recorded_routing(model) as seen:
        passes = []
        for batch in batches:
            model(input_ids=batch, use_cache=False)
            passes.append(rows_of(seen))
    if not passes:
        raise ValueError("batches is empty; give at least one batch of token ids")
    return LoadTrace(torch.stack(passes).numpy())
