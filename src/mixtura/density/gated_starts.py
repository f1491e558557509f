"""Where a gated regression starts: groups of pairs, each with a line of its own, and a gate that tells them apart.

Starts take turns between two kinds: k-means on inputs and target together finds groups that lie apart; lines through a few
neighbours each find groups that cross.

Shapes: M pairs of a subsample, D features, E experts, P parameters.
Source: Arthur and Vassilvitskii 2007 (`starts.kmeans_plus_plus`); Späth 1979, clusterwise regression, for the lines.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mixtura.density.gated_em import Given, experts_step, gate_step
from mixtura.density.gated_law import Pairs
from mixtura.density.starts import kmeans_plus_plus, lloyd

__all__ = ["start", "subset"]

SURE = 0.9  # responsibility of a pair's own group: EM hardly leaves a start without doubt
LINE_ROUNDS = 8
START_STEPS = 20  # of the gate towards the groups


def subset(given: Given, n: int, seed: int) -> Given:
    """The same fit on at most n of its pairs, drawn evenly."""
    if given.pairs.n <= n:
        return given
    rows = np.random.RandomState(seed % 2**32).choice(given.pairs.n, n, replace=False)
    chosen = torch.from_numpy(np.sort(rows)).to(given.pairs.y.device)
    weight = None if given.pairs.weight is None else given.pairs.weight[:, chosen]
    return replace(given, pairs=Pairs(given.pairs.x[..., chosen], given.pairs.y[:, chosen], weight))


def start(given: Given, seed: int, turn: int, temperature: float) -> Tensor:
    """Parameters to start from, shape (P,), in standard units.

    Args:
        given: pairs that all fits share, a few thousand, inputs and targets of mean 0 and variance 1 or so.
        seed: of everything drawn.
        turn: which start; even ones group by k-means, odd ones by lines.
        temperature: where it starts.
    """
    rng = np.random.RandomState((seed * 1000 + turn) % 2**32)
    layout, e, m = given.layout, given.layout.n_experts, given.pairs.n
    x_MD, y_M = given.pairs.x[0, :-1].mT.cpu().numpy(), given.pairs.y[0].cpu().numpy()
    group_M = _by_lines(x_MD, y_M, e, rng) if turn % 2 and e > 1 else _by_means(x_MD, y_M, e, rng)
    r_1EM = torch.full((1, e, m), (1 - SURE) / max(e - 1, 1), dtype=torch.float64)
    r_1EM[0, torch.from_numpy(group_M), torch.arange(m)] = SURE if e > 1 else 1.0
    r_1EM = r_1EM.to(given.pairs.y.device)
    parts = layout.split(torch.zeros(1, layout.n_parameters, dtype=torch.float64))
    # Slopes of 0 are a saddle of an odd activation's gate, so none starts there.
    slope = torch.from_numpy(rng.normal(scale=0.1, size=parts.slope.shape))
    slope[:, -1] = 0.0
    log_tau = torch.full_like(parts.log_temperature, math.log(temperature))
    theta = layout.join(parts._replace(slope=slope, log_temperature=log_tau)).to(given.pairs.y.device)
    theta = experts_step(given, theta, r_1EM)
    return gate_step(given, theta, r_1EM, None, max_iter=START_STEPS, learn_temperature=False)[0]


def _by_means(x_MD: np.ndarray, y_M: np.ndarray, n_groups: int, rng: np.random.RandomState) -> np.ndarray:
    both = np.column_stack([x_MD, y_M * max(1.0, x_MD.shape[1] ** 0.5)])  # the target weighs as much as all inputs
    n_groups = min(n_groups, len(both))
    return lloyd(both, kmeans_plus_plus(both, n_groups, random_state=rng))[1]


def _by_lines(x_MD: np.ndarray, y_M: np.ndarray, n_groups: int, rng: np.random.RandomState) -> np.ndarray:
    """Groups by the nearest of several lines, each through the neighbours of a random pair, then fitted to its group."""
    m, d = x_MD.shape
    ones = np.column_stack([x_MD, np.ones(m)])
    near = min(m, max(d + 2, m // (4 * n_groups)))
    lines = np.empty((n_groups, d + 1))
    both = np.column_stack([x_MD, y_M])
    for g in range(n_groups):
        centre = both[rng.randint(m)]
        nearest = np.argsort(((both - centre) ** 2).sum(1), kind="stable")[:near]
        lines[g] = np.linalg.lstsq(ones[nearest], y_M[nearest], rcond=None)[0]
    group_M = np.zeros(m, dtype=np.int64)
    for _ in range(LINE_ROUNDS):
        group_M = np.abs(y_M[:, None] - ones @ lines.T).argmin(1)
        for g in range(n_groups):
            mine = group_M == g
            if mine.sum() > d + 1:
                lines[g] = np.linalg.lstsq(ones[mine], y_M[mine], rcond=None)[0]
    return group_M
