"""Climbing R likelihoods at once: limited-memory BFGS on the information metric, each fit with steps of its own.

A fit has few parameters and many samples, so the information matrix (mean outer product of the samples' gradients) costs
hardly more than a gradient. It is the metric from which BFGS starts: near a maximum of a true model it is the curvature
itself, and flat directions stay flat. A fit leaves the batch when it is done.

Shapes: R fits, P parameters.
Sources: Nocedal and Wright, Numerical Optimization, alg. 7.4 (two loops) and 3.1 (backtracking); Berndt, Hall, Hall and
Hausman 1974 (the metric).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

__all__ = ["Ascent", "Objective", "ascend"]

MEMORY = 10  # steps that BFGS remembers
REFRESH = 15  # steps after which the metric is taken anew
DAMPING = 1e-7  # of the metric with unit diagonal
HALVINGS = 25
LARGEST_METRIC = 400  # parameters; beyond, the metric is a multiple of one
METRIC_SAMPLES = 1 << 14  # a metric need not be exact: the values of the function are


class Objective(Protocol):
    """What can be climbed."""

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Values (R,) and gradients (R, P)."""

    def value(self, theta: Tensor) -> Tensor:
        """Values (R,)."""

    def information(self, theta: Tensor) -> Tensor:
        """A positive semidefinite metric, (R, P, P)."""

    def take(self, rows: Tensor) -> Self:
        """The objectives of some fits."""

    def thinned(self, n: int) -> Self:
        """The objectives on at most ``n`` samples a fit."""


@dataclass(frozen=True)
class Ascent:
    """Where R fits ended.

    Attributes:
        theta: shape (R, P).
        value: shape (R,), never below the start's.
        gradient: largest entry of the gradient that the box allows to follow, shape (R,).
        steps: shape (R,).
    """

    theta: Tensor
    value: Tensor
    gradient: Tensor
    steps: Tensor


def ascend(
    objective: Objective,
    theta: Tensor,
    *,
    free: Tensor,
    lower: Tensor,
    upper: Tensor,
    max_iter: int = 600,
    tol: float = 1e-7,
) -> Ascent:
    """Climb from theta until the gradient is below ``tol`` or no step leads up.

    Args:
        objective: R functions.
        theta: starts, shape (R, P), inside the box.
        free: which parameters may move, boolean (P,).
        lower, upper: the box, shape (P,).
        max_iter: steps at most.
        tol: largest entry of the gradient at the end.
    """
    free, lower, upper = (edge.to(theta.device) for edge in (free, lower, upper))
    value, gradient = objective.at(theta)
    state = _State(theta, value, gradient * free)
    end = Ascent(
        theta.clone(), value.clone(), torch.full_like(value, torch.inf), torch.zeros_like(value, dtype=torch.long)
    )
    alive = torch.arange(len(theta), device=theta.device)
    for step in range(max_iter + 1):
        allowed = _allowed(state, lower, upper)
        size = allowed.abs().amax(1)
        end.theta[alive], end.value[alive], end.gradient[alive], end.steps[alive] = state.theta, state.value, size, step
        keep = (size > tol) & (state.stalled < 3)
        if step == max_iter or not bool(keep.any()):
            break
        if not bool(keep.all()):
            alive, objective, state, allowed = (
                alive[keep],
                objective.take(keep.nonzero()[:, 0]),
                state.take(keep),
                allowed[keep],
            )
        if step % REFRESH == 0:
            state.forget()
            state.metric = _metric(objective, state.theta, free)
        direction = state.direction(allowed) * free
        slope = (direction * allowed).sum(1)
        lost = ~(slope > 0)
        direction[lost] = allowed[lost]
        _step(objective, state, direction, allowed, free, lower, upper)
    return end


class _State:
    """The fits that still climb."""

    def __init__(self, theta: Tensor, value: Tensor, gradient: Tensor) -> None:
        self.theta, self.value, self.gradient = theta, value, gradient
        self.stalled = torch.zeros_like(value, dtype=torch.long)
        self.metric: Tensor | None = None
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # steps, changes of minus the gradient, 1 / product or 0

    def take(self, keep: Tensor) -> _State:
        taken = _State(self.theta[keep], self.value[keep], self.gradient[keep])
        taken.stalled = self.stalled[keep]
        taken.metric = None if self.metric is None else self.metric[keep]
        taken.pairs = [(s[keep], y[keep], rho[keep]) for s, y, rho in self.pairs]
        return taken

    def forget(self) -> None:
        self.pairs = []

    def remember(self, moved: Tensor, bent: Tensor) -> None:
        product = (moved * bent).sum(1)
        good = product > 1e-10 * moved.norm(dim=1) * bent.norm(dim=1)
        rho = torch.where(good, 1 / torch.where(good, product, 1.0), 0.0)
        self.pairs = [*self.pairs[-MEMORY + 1 :], (moved, bent, rho)]

    def apply_metric(self, vector: Tensor) -> Tensor:
        if self.metric is None:
            return vector
        return torch.cholesky_solve(vector[..., None], self.metric)[..., 0]

    def direction(self, gradient: Tensor) -> Tensor:
        q, along = gradient.clone(), []
        for s, y, rho in reversed(self.pairs):
            a = rho * (s * q).sum(1)
            q -= a[:, None] * y
            along.append(a)
        q = self.apply_metric(q)
        for (s, y, rho), a in zip(self.pairs, reversed(along), strict=True):
            b = rho * (y * q).sum(1)
            q += (a - b)[:, None] * s
        return q


def _metric(objective: Objective, theta: Tensor, free: Tensor) -> Tensor | None:
    """Cholesky factor of the damped information over the free parameters, 1 elsewhere."""
    if int(free.sum()) > LARGEST_METRIC:
        return None
    both = free[:, None] & free
    found = objective.thinned(METRIC_SAMPLES).information(theta) * both
    scale = found.diagonal(dim1=-2, dim2=-1)
    # A parameter that nothing depends on (an idle expert's) keeps a metric of its own.
    scale = torch.where(scale > 1e-12, scale, 1.0).sqrt()
    unit = found / scale[:, :, None] / scale[:, None]
    eye = torch.eye(len(free), dtype=theta.dtype, device=theta.device)
    for damping in (DAMPING, 1e-4, 1e-1, 10.0):
        lower, info = torch.linalg.cholesky_ex(unit + damping * eye + torch.diag((~free).to(theta.dtype)))
        if not bool(info.any()):
            return lower * scale[:, :, None]
    return None


def _allowed(state: _State, lower: Tensor, upper: Tensor) -> Tensor:
    """The gradient without what points out of the box."""
    out = ((state.theta <= lower) & (state.gradient < 0)) | ((state.theta >= upper) & (state.gradient > 0))
    return state.gradient.masked_fill(out, 0.0)


def _step(
    objective: Objective,
    state: _State,
    direction: Tensor,
    allowed: Tensor,
    free: Tensor,
    lower: Tensor,
    upper: Tensor,
) -> None:
    """Move every fit up along its direction, halving until the rise is worth the step; who cannot rise is stalled."""
    theta, value, gradient = state.theta.clone(), state.value.clone(), state.gradient.clone()
    length = theta.new_ones(len(theta))
    waiting = torch.arange(len(theta), device=theta.device)
    for _ in range(HALVINGS):
        tried = (state.theta[waiting] + length[waiting, None] * direction[waiting]).clamp(lower, upper)
        part = objective if len(waiting) == len(theta) else objective.take(waiting)
        found, slope = part.at(tried)
        rise = (allowed[waiting] * (tried - state.theta[waiting])).sum(1)
        # Not strictly: near the end a rise is smaller than what a sum of N terms can resolve.
        slack = 1e-15 * state.value[waiting].abs()
        good = found.isfinite() & (found >= state.value[waiting] + 1e-4 * rise.clamp(min=0) - slack)
        done = waiting[good]
        theta[done], value[done], gradient[done] = tried[good], found[good], slope[good] * free
        waiting = waiting[~good]
        if not len(waiting):
            break
        # The parabola through value, slope and what was found, kept between a tenth and a half.
        drop = (state.value[waiting] + rise[~good] - found[~good]).clamp(min=1e-300)
        factor = torch.nan_to_num(rise[~good] / (2 * drop), nan=0.1, posinf=0.5, neginf=0.1).clamp(0.1, 0.5)
        length[waiting] *= factor
    small = value - state.value <= 2e-16 * state.value.abs()
    state.stalled = torch.where(small, state.stalled + 1, 0)
    # Two in one: a fit that found no step tries the bare metric next, and is given up after that.
    state.stalled[waiting] += 1
    state.remember(theta - state.theta, state.gradient - gradient)
    state.theta, state.value, state.gradient = theta, value, gradient
    if len(waiting):
        keep = torch.ones_like(length, dtype=torch.bool)
        keep[waiting] = False
        state.pairs = [(s, y, rho * keep) for s, y, rho in state.pairs]
