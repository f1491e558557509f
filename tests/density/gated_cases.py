"""Small laws that the tests of gated regressions share."""

import numpy as np
import torch

from mixtura.density.gated_law import GateRule, Layout, Pairs
from mixtura.density.rates import Truth
from mixtura.density.voronoi import MixingMeasure

__all__ = ["RULES", "law", "two_lines"]

RULES = {
    "softmax": GateRule("softmax"),
    "temperature": GateRule("temperature"),
    "tanh": GateRule("activation"),
    "gelu": GateRule("activation", "gelu"),
    "top-k": GateRule("top-k", top_k=2),
    "top-k with bias": GateRule("top-k", top_k=2, top_k_bias=True),
}


def law(n_features=2, n_experts=3, n=60, n_fits=2, seed=0, weighted=True):
    """Parameters (R, P) and pairs, all random."""
    g = torch.Generator().manual_seed(seed)
    layout = Layout(n_experts, n_features)
    theta = torch.randn(n_fits, layout.n_parameters, generator=g, dtype=torch.float64)
    X = torch.randn(n_fits, n, n_features, generator=g, dtype=torch.float64)
    y = torch.randn(n_fits, n, generator=g, dtype=torch.float64)
    weight = torch.rand(n_fits, n, generator=g, dtype=torch.float64) if weighted else None
    return layout, theta, X, y, weight, Pairs.of(X, y, weight)


def two_lines(rule: GateRule, slope: float = 3.0) -> Truth:
    """Two lines with a temperature of 0.6."""
    return Truth(
        MixingMeasure.of([np.exp(0.3 / 0.6), 1], [[slope], [0]], 0.6, [[2], [-1.5]], [1, -1], [0.25, 0.36]), rule
    )
