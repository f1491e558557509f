"""Rivals of the equation solver in one dimension: physics-informed networks, finite differences, Chebyshev collocation.

All take a :class:`LineProblem` and give the solution as a function. The networks carry value, slope and bend through the
layers by hand (Taylor mode), which costs three forward passes instead of two nested backward ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

__all__ = ["LineProblem", "NetworkBudget", "chebyshev", "finite_differences", "train_network"]

Solution = Callable[[np.ndarray], np.ndarray]
Jet = tuple[Tensor, Tensor, Tensor]  # value, first and second derivative


@dataclass(frozen=True)
class LineProblem:
    """u'' = source, or u'' + u (u^2 - 1) = source, on [low, high], u given at both ends.

    Attributes:
        low, high, points: of the uniform grid.
        source: right-hand side at given points. ends: u at low and high.
        reaction: whether u (u^2 - 1) stands on the left as well.
    """

    low: float
    high: float
    points: int
    source: Solution
    ends: tuple[float, float]
    reaction: bool = False


@dataclass(frozen=True)
class NetworkBudget:
    """Size and length of a network's training."""

    width: int = 100
    layers: int = 5
    features: int = 100  # random Fourier features, where there are any
    adam: int = 2000
    lbfgs: int = 300
    lr: float = 1e-3


class LineNetwork(nn.Module):
    """A tanh network of one coordinate, behind random Fourier features if ``sigma`` is given."""

    def __init__(self, problem: LineProblem, budget: NetworkBudget, sigma: float | None, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.middle, self.reach = 0.5 * (problem.low + problem.high), 0.5 * (problem.high - problem.low)
        self.frequencies: Tensor | None = None
        inputs = 1
        if sigma is not None:
            normal = torch.randn(budget.features, generator=draw, dtype=torch.float64)
            self.frequencies = 2 * math.pi * sigma * normal
            inputs = 2 * budget.features
        sizes = [inputs, *[budget.width] * budget.layers, 1]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for a, b in pairwise(sizes):
            spread = math.sqrt(2 / (a + b))
            self.weights.append(spread * torch.randn(b, a, generator=draw, dtype=torch.float64))
            self.biases.append(torch.zeros(b, dtype=torch.float64))

    def forward(self, x: Tensor) -> Jet:
        """Value, slope and bend at x of shape (n,)."""
        jet = self._inputs(x)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            n = len(x)
            stacked = torch.cat(jet) @ weight.mT
            z, dz, ddz = stacked[:n] + bias, stacked[n : 2 * n], stacked[2 * n :]
            if i < last:
                t = z.tanh()
                fall = 1 - t.square()
                jet = (t, fall * dz, fall * (ddz - 2 * t * dz.square()))
            else:
                jet = (z, dz, ddz)
        value, slope, bend = (part[:, 0] for part in jet)
        return value, slope, bend

    def _inputs(self, x: Tensor) -> Jet:
        if self.frequencies is None:
            scaled = ((x - self.middle) / self.reach)[:, None]
            return scaled, torch.full_like(scaled, 1 / self.reach), torch.zeros_like(scaled)
        w = self.frequencies.to(x.dtype)
        cosine, sine = (w * x[:, None]).cos(), (w * x[:, None]).sin()
        return (
            torch.cat([cosine, sine], 1),
            torch.cat([-w * sine, w * cosine], 1),
            torch.cat([-w.square() * cosine, -w.square() * sine], 1),
        )


def train_network(
    problem: LineProblem, budget: NetworkBudget, *, weight: float = 1.0, sigma: float | None = None, seed: int = 0
) -> Solution:
    """A physics-informed network: Adam with a cosine to zero in float32, then L-BFGS in float64, on all points at once.

    Args:
        weight: of the boundary against the residual, which is measured in units of the source's root mean square.
        sigma: of the frequencies of random Fourier features, in cycles per unit of length; None feeds the coordinate.
    """
    network = LineNetwork(problem, budget, sigma, seed)
    x = torch.linspace(problem.low, problem.high, problem.points, dtype=torch.float64)
    source = torch.tensor(problem.source(x.numpy()), dtype=torch.float64)
    unit = source.square().mean().sqrt()
    ends = torch.tensor(problem.ends, dtype=torch.float64)

    def loss(dtype: torch.dtype) -> Tensor:
        value, _, bend = network(x.to(dtype))
        residual = bend - source.to(dtype)
        if problem.reaction:
            residual = residual + value * (value.square() - 1)
        gap = value[[0, -1]] - ends.to(dtype)
        return (residual / unit.to(dtype)).square().mean() + weight * gap.square().mean()

    network.float()
    parameters = list(network.parameters())
    adam = torch.optim.Adam(parameters, lr=budget.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, budget.adam))
    for _ in range(budget.adam):
        adam.zero_grad()
        loss(torch.float32).backward()
        adam.step()
        schedule.step()
    network.double()
    lbfgs = torch.optim.LBFGS(
        network.parameters(),
        max_iter=budget.lbfgs,
        max_eval=budget.lbfgs * 5 // 4,
        tolerance_grad=1e-14,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = loss(torch.float64)
        value.backward()
        return value

    if budget.lbfgs:
        lbfgs.step(closure)

    def solution(at: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.as_tensor(at))[0].numpy()

    return solution


def finite_differences(problem: LineProblem) -> Solution:
    """Second order on the same points; between them the solution is their cubic spline.

    Straight lines would cut the crests off, which hides that the scheme makes a badly resolved wave too high.
    """
    n = problem.points
    x = np.linspace(problem.low, problem.high, n)
    h = x[1] - x[0]
    bend = (np.eye(n, k=1) - 2 * np.eye(n) + np.eye(n, k=-1)) / h**2
    u = _newton(problem, x, bend)
    return CubicSpline(x, u)


def chebyshev(problem: LineProblem) -> Solution:
    """Collocation with as many points at Chebyshev's places; the polynomial through them is the solution."""
    n = problem.points - 1
    k = np.arange(n + 1)
    nodes = np.cos(np.pi * k / n)
    c = np.where((k == 0) | (k == n), 2.0, 1.0) * (-1.0) ** k
    gaps = nodes[:, None] - nodes[None, :] + np.eye(n + 1)
    slope = np.outer(c, 1 / c) / gaps
    slope -= np.diag(slope.sum(1))
    half = 0.5 * (problem.high - problem.low)
    # From high to low, as the nodes are.
    x = problem.low + half * (1 + nodes)
    u = _newton(problem, x, slope @ slope / half**2)
    weights = (-1.0) ** k * np.where((k == 0) | (k == n), 0.5, 1.0)

    def solution(at: np.ndarray) -> np.ndarray:
        distance = at[:, None] - x[None, :]
        hit = distance == 0
        shares = weights / np.where(hit, 1.0, distance)
        found = (shares @ u) / shares.sum(1)
        return np.where(hit.any(1), u[hit.argmax(1)], found)

    return solution


def _newton(problem: LineProblem, x: np.ndarray, bend: np.ndarray) -> np.ndarray:
    """u with bend u + reaction(u) = source inside and the given ends; one step where the problem is linear."""
    low, high = int(x.argmin()), int(x.argmax())
    source = problem.source(x)
    u = np.zeros(len(x))
    for _ in range(50 if problem.reaction else 1):
        jacobian = bend + np.diag(3 * u**2 - 1) if problem.reaction else bend.copy()
        residual = bend @ u + (u**3 - u if problem.reaction else 0) - source
        for place, end in ((low, problem.ends[0]), (high, problem.ends[1])):
            jacobian[place] = 0
            jacobian[place, place] = 1
            residual[place] = u[place] - end
        step = np.linalg.solve(jacobian, residual)
        u = u - step
        if np.abs(step).max() < 1e-12:
            break
    return u
