"""The best of several starts of a gated regression, fits with an expert of a few rows set aside.

An expert that explains hardly more rows than a line has coefficients can shrink its variance to nothing, and the likelihood
has no maximum there: the best start would be the worst model. So a start is chosen by likelihood among the sound ones.

Shapes: S starts, P parameters, E experts, D features, N pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixtura.core.gates import TemperatureSchedule
from mixtura.density.gated_em import Given, expectation, fit_em
from mixtura.density.gated_law import GateRule
from mixtura.density.gated_polish import polish
from mixtura.density.gated_starts import start, subset

__all__ = ["Found", "best_fit", "degenerate", "screened"]

HAND_OVER = 1e-5  # nats a pair below which EM leaves the rest to the climb
SCREENED = 4096  # pairs on which starts compete
TOGETHER = 2  # starts that are fitted to all pairs; the next ones only where all of these are degenerate
SCREENING = 30  # iterations of EM in the competition
CLIMB = 600  # steps at most


@dataclass(frozen=True)
class Found:
    """The fit that was kept.

    Attributes:
        theta: shape (P,), on the CPU.
        history: mean log density over its iterations.
        n_iter: iterations of EM and steps of the climb.
        unfinished: what was still changing when the iterations were used up; None where nothing was.
        degenerate: number of fits that were degenerate.
        fits: number of fits to all pairs.
    """

    theta: Tensor
    history: list[float]
    n_iter: int
    unfinished: str | None
    degenerate: int
    fits: int


def degenerate(given: Given, theta: Tensor) -> Tensor:
    """Which fits have an expert with the least variance allowed, or of fewer rows than its line has parameters, (S,)."""
    parts = given.layout.split(theta)
    at_floor = (parts.log_variance <= math.log(given.box.variance[0]) + 1e-9).any(1)
    _, r_SEN, _, _ = expectation(given, theta)
    rows_SE = (r_SEN * given.pairs.weights()).sum(-1) * given.pairs.n
    return at_floor | (rows_SE < given.layout.n_features + 2).any(1)


def screened(given: Given, n_init: int, seed: int, temperature: float, max_iter: int) -> Tensor:
    """Starts (S, P), the most promising first: after a short EM on a few thousand pairs, sound ones by likelihood.

    A top-k gate, whose regions hardly move once experts have settled in them, starts also from where a gate in which all
    experts answer went from the same starts: S is ``n_init``, or twice that.
    """
    small = subset(given, SCREENED, seed)
    starts = torch.stack([start(small, seed, turn, temperature) for turn in range(n_init)])
    steps = min(SCREENING, max_iter)
    if given.rule.kind == "top-k" and given.rule.top_k < given.layout.n_experts:
        soft, _ = fit_em(replace(small, rule=GateRule("softmax")), starts, max_iter=steps, tol=HAND_OVER)
        starts = torch.cat([starts, soft])
    if len(starts) == 1:
        return starts
    starts, _ = fit_em(small, starts, max_iter=steps, tol=HAND_OVER)
    return starts[_ranked(small.likelihood.value(starts), degenerate(small, starts))]


def best_fit(
    given: Given, starts: Tensor, *, max_iter: int, tol: float, climb: bool, schedule: TemperatureSchedule | None = None
) -> Found:
    """EM and climb from the first starts, and from later ones while every fit is degenerate.

    Args:
        given: see there.
        starts: shape (S, P), the most promising first.
        max_iter: iterations of EM.
        tol: nats a pair at which EM ends; with a climb it ends earlier.
        climb: whether the likelihood itself is climbed after EM.
        schedule: of the temperature, one step an iteration of EM.
    """
    kept: list[tuple[bool, float, Found]] = []
    for part in starts.split(TOGETHER):
        theta, values = fit_em(
            given,
            part,
            max_iter=max_iter,
            tol=max(tol, HAND_OVER) if climb else tol,
            temperature_at=None if schedule is None else schedule.at,
            anneal=0 if schedule is None else schedule.steps,
        )
        n_em = len(values) - 1
        if climb:
            end = polish(given, theta, max_iter=CLIMB)
            theta, steps = end.theta, end.steps.tolist()
            values.append(end.value)
            left = [
                f"a slope of {g:.2g} nats a pair" if s >= CLIMB else None
                for g, s in zip(end.gradient, steps, strict=True)
            ]
        else:
            change, steps = values[-1] - values[-2], [0] * len(part)
            left = [f"a change of {c:.2g} nats a pair" if c >= tol else None for c in change]
        bad = degenerate(given, theta)
        for i in range(len(part)):
            history = [float(value[i]) for value in values]
            found = Found(theta[i].cpu(), history, max(1, n_em + steps[i]), left[i], 0, 0)
            kept.append((bool(bad[i]), history[-1], found))
        if not bool(bad.all()):
            break
    best = _ranked(torch.tensor([value for _, value, _ in kept]), torch.tensor([bad for bad, _, _ in kept]))[0]
    found = kept[best][2]
    return Found(found.theta, found.history, found.n_iter, found.unfinished, sum(bad for bad, _, _ in kept), len(kept))


def _ranked(value: Tensor, bad: Tensor) -> list[int]:
    return sorted(range(len(value)), key=lambda i: (bool(bad[i]), -float(value[i])))
