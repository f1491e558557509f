"""Expectation-maximisation of gated regressions, R fits at once.

Experts are maximised exactly (weighted least squares), the gate by a few steps that never lower its part of the bound. A
top-k gate's bound jumps where a pair changes its experts, so there a gate step counts only if the likelihood with the
regions drawn anew has risen; else it is shortened or dropped.

Shapes: R fits, E experts, D features, N pairs, P parameters.
Sources: Jordan and Jacobs 1994, sec. 3 (EM of mixtures of experts); 2309.13850 and 2401.13875 for the gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixtura.core.gates import log_weights
from mixtura.density.activations import activation_named
from mixtura.density.ascent import Ascent, ascend
from mixtura.density.gated_law import GateRule, Layout, Likelihood, Pairs, Parts, evaluate, gate_logits

__all__ = ["Box", "GateBound", "Given", "expectation", "experts_step", "fit_em", "gate_step"]

RIDGE = 1e-11  # of the mean square of the inputs: keeps a least-squares system of two pairs solvable
IDLE = 1e-9  # share of pairs below which an expert keeps its parameters
GATE_STEPS = 4  # of the gate in one iteration; more would only finish what the next iteration changes
MOVES = 10  # lengths that a gate step of top-k is tried at, each a quarter of the one before


@dataclass(frozen=True)
class Box:
    """Where parameters may be, in the units of the fit.

    Attributes:
        largest: bound of slopes, biases, coefficients and intercepts, absolute.
        variance: lowest and highest.
        temperature: lowest and highest.
    """

    largest: float = 100.0
    variance: tuple[float, float] = (1e-6, 1e2)
    temperature: tuple[float, float] = (1e-2, 1e2)

    def edges(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Lower and upper, (P,)."""
        parts = layout.split(torch.ones(1, layout.n_parameters, dtype=torch.float64))
        edges = []
        for end, sign in ((0, -1.0), (1, 1.0)):
            sides = [torch.full_like(part, sign * self.largest) for part in parts[:4]]
            sides.append(torch.full_like(parts.log_variance, math.log(self.variance[end])))
            sides.append(torch.full_like(parts.log_temperature, math.log(self.temperature[end])))
            edges.append(layout.join(Parts(*sides))[0])
        return edges[0], edges[1]


@dataclass(frozen=True)
class Given:
    """What a fit is given besides its start.

    Attributes:
        rule, layout: of the law.
        pairs: the data.
        free: which parameters are learned, boolean (P,).
        box: where they may be.
    """

    rule: GateRule
    layout: Layout
    pairs: Pairs
    free: Tensor
    box: Box = field(default_factory=Box)

    @property
    def likelihood(self) -> Likelihood:
        """What is climbed in the end."""
        return Likelihood(self.rule, self.layout, self.pairs)

    def climb(
        self, objective: Likelihood | GateBound, theta: Tensor, free: Tensor, max_iter: int, tol: float
    ) -> Ascent:
        """`ascend` in this box."""
        lower, upper = self.box.edges(self.layout)
        return ascend(objective, theta, free=free, lower=lower, upper=upper, max_iter=max_iter, tol=tol)


def expectation(given: Given, theta: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the pairs say of the experts.

    Returns:
        Mean log density (R,); responsibilities (R, E, N), exactly 0 where an expert does not answer; which experts answer
        (None: all); and, for top-k, the responsibilities were all to answer (else None).
    """
    rule, layout, pairs = given.rule, given.layout, given.pairs
    r, e = len(theta), layout.n_experts
    value, r_REN = theta.new_zeros(r), theta.new_empty(r, e, pairs.n)
    mask = torch.empty_like(r_REN, dtype=torch.bool) if rule.kind == "top-k" else None
    open_REN = torch.empty_like(r_REN) if rule.kind == "top-k" else None
    for part, where in pairs.blocks(given.likelihood.width(r, e)):
        found = evaluate(rule, layout, theta, part)
        value += (found.log_density * (1 / pairs.n if part.weight is None else part.weight)).sum(-1)
        r_REN[..., where] = (found.joint - found.log_density[:, None]).exp()
        if mask is not None and open_REN is not None:
            mask[..., where] = ~torch.isneginf(found.log_gate)
            open_REN[..., where] = (found.logit + found.log_f).softmax(1)
    return value, r_REN, mask, open_REN


def experts_step(given: Given, theta: Tensor, responsibilities: Tensor) -> Tensor:
    """The experts' weighted least squares and variances; an expert without pairs keeps what it had.

    Args:
        given: see there.
        theta: shape (R, P).
        responsibilities: shape (R, E, N).
    Returns:
        A new theta.
    """
    mass_RE, second_REdd, cross_REd, square_RE = _moments(given, responsibilities)
    parts = given.layout.split(theta.clone())
    idle_RE = mass_RE < IDLE
    # An expert in use has a mean square of at least 1: the row of ones.
    size_RE = torch.where(idle_RE, 1.0, second_REdd.diagonal(dim1=-2, dim2=-1).mean(-1))
    eye = torch.eye(second_REdd.shape[-1], dtype=theta.dtype, device=theta.device)
    damped_REdd = second_REdd + (RIDGE * size_RE + idle_RE)[..., None, None] * eye
    line_REd = torch.cholesky_solve(cross_REd[..., None], torch.linalg.cholesky(damped_REdd))[..., 0]
    line_REd = line_REd.clamp(-given.box.largest, given.box.largest)
    fitted_RE = (line_REd * (2 * cross_REd - (second_REdd @ line_REd[..., None])[..., 0])).sum(-1)
    low, high = given.box.variance
    variance_RE = ((square_RE - fitted_RE) / mass_RE.clamp(min=IDLE)).clamp(low, high)
    keep = idle_RE[..., None]
    return given.layout.join(
        parts._replace(
            coef=torch.where(keep, parts.coef, line_REd[..., :-1]),
            intercept=torch.where(idle_RE, parts.intercept, line_REd[..., -1]),
            log_variance=torch.where(idle_RE, parts.log_variance, variance_RE.log()),
        )
    )


def _moments(given: Given, responsibilities: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each expert's weight (R, E), inputs squared (R, E, D+1, D+1), inputs times targets, and targets squared."""
    pairs, d = given.pairs, given.layout.n_features + 1
    r, e = responsibilities.shape[:2]
    rows, columns = torch.triu_indices(d, d)
    total = responsibilities.new_zeros(r, e, len(rows) + d + 1)
    for part, where in pairs.blocks(given.likelihood.width(len(pairs.y), len(rows) + d + 1)):
        scale = 1 / pairs.n if part.weight is None else part.weight[:, None]
        total += (responsibilities[..., where] * scale) @ _products(part).mT
    second = total.new_empty(r, e, d, d)
    second[..., rows, columns] = total[..., : len(rows)]
    second[..., columns, rows] = total[..., : len(rows)]
    return second[..., -1, -1].clone(), second, total[..., len(rows) : -1], total[..., -1]


def _products(pairs: Pairs) -> Tensor:
    """All products of two inputs in the order of ``triu_indices``, inputs times target, target squared: (R, M, N)."""
    d = pairs.x.shape[1]
    y_R1N = pairs.y[:, None]
    squares = [pairs.x[:, i:] * pairs.x[:, i : i + 1] for i in range(d)]
    return torch.cat([*squares, pairs.x * y_R1N, y_R1N * y_R1N], 1)


@dataclass(frozen=True)
class GateBound:
    """The gate's part of EM's bound, mean over pairs of sum_i r_i log p_i, as a function of ``theta``.

    Attributes:
        rule, layout, pairs: as in `Likelihood`.
        responsibilities: shape (R, E, N).
        mask: which experts answer, held fixed; None: all.
    """

    rule: GateRule
    layout: Layout
    pairs: Pairs
    responsibilities: Tensor
    mask: Tensor | None = None

    def take(self, rows: Tensor) -> GateBound:
        """Of some fits."""
        mask = None if self.mask is None else self.mask[rows]
        return GateBound(self.rule, self.layout, self.pairs.take(rows), self.responsibilities[rows], mask)

    def thinned(self, n: int) -> GateBound:
        """Of at most ``n`` pairs a fit."""
        step = -(-self.pairs.n // n)
        mask = None if self.mask is None else self.mask[..., ::step]
        return GateBound(self.rule, self.layout, self.pairs.thinned(n), self.responsibilities[..., ::step], mask)

    def value(self, theta: Tensor) -> Tensor:
        """Shape (R,)."""
        return self.at(theta)[0]

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Value (R,) and gradient (R, P), zero outside the gate."""
        total, gradient = theta.new_zeros(len(theta)), torch.zeros_like(theta)
        out = self.layout.split(gradient)
        for part, r_REN, gate in self._blocks(theta):
            scale = part.weights()
            # 0 log 0 is 0: an expert that does not answer has no part in the bound.
            total += (torch.where(r_REN > 0, r_REN * gate.log_gate, 0.0) * scale).sum((1, 2))
            excess_REN = (r_REN - gate.log_gate.exp()) * scale
            out.slope.add_((excess_REN * gate.inner) @ part.x[:, :-1].mT)
            out.bias.add_(excess_REN.sum(-1) * gate.by_bias)
            if self.rule.has_temperature:
                out.log_temperature.sub_((excess_REN * gate.logit).sum((1, 2)))
        return total, gradient

    def information(self, theta: Tensor) -> Tensor:
        """Mean over pairs of the covariance, under the gate, of the logits' derivatives: minus the Hessian where logits are
        linear."""
        r, p = theta.shape
        e, d = self.layout.n_experts, self.layout.n_features
        # G gate parameters in the order of `Layout`: slopes, biases, log temperature. The experts' have no part in it.
        at = self.layout.split(torch.arange(p, device=theta.device)[None])
        gate_G = torch.cat([at.slope.flatten(), at.bias.flatten(), at.log_temperature])
        total = theta.new_zeros(r, len(gate_G), len(gate_G))
        for part, _, gate in self._blocks(theta, rows=e * (d + 2)):
            p_REN, scale = gate.log_gate.exp(), part.weights()
            by_temperature_REN = -gate.logit if self.rule.has_temperature else torch.zeros_like(gate.logit)
            # Derivatives of each logit by its own slope, its bias, and the common log temperature.
            z_REdN = torch.cat(
                [
                    part.x[:, None, :-1] * gate.inner[:, :, None],
                    gate.by_bias[..., None, None].expand(-1, e, 1, part.n),
                    by_temperature_REN[:, :, None],
                ],
                2,
            )
            weighted_REdN = z_REdN * p_REN[:, :, None]
            own_REdd = (weighted_REdN * (scale if isinstance(scale, float) else scale[:, None])) @ z_REdN.mT
            for i in range(e):
                own = torch.cat([torch.arange(i * d, (i + 1) * d), torch.tensor([e * d + i, e * (d + 1)])])
                total[:, own[:, None], own] += own_REdd[:, i]
            mean_RGN = torch.cat(
                [
                    weighted_REdN[:, :, :d].flatten(1, 2),
                    weighted_REdN[:, :, d],
                    weighted_REdN[:, :, d + 1].sum(1, keepdim=True),
                ],
                1,
            )
            total -= (mean_RGN * scale) @ mean_RGN.mT
        found = theta.new_zeros(r, p, p)
        found[:, gate_G[:, None], gate_G] = total
        return found

    def _blocks(self, theta: Tensor, rows: int | None = None) -> Iterator[tuple[Pairs, Tensor, _Gate]]:
        parts = self.layout.split(theta)
        likelihood = Likelihood(self.rule, self.layout, self.pairs)
        by_bias_R1 = (-parts.log_temperature).exp()[:, None]
        if not self.rule.has_temperature:
            by_bias_R1 = torch.ones_like(by_bias_R1)
        for part, where in self.pairs.blocks(likelihood.width(len(theta), rows or self.layout.n_experts)):
            score_REN, logit_REN = gate_logits(self.rule, parts, part.x)
            inner_REN = by_bias_R1[..., None].expand_as(logit_REN)
            if self.rule.kind == "activation":
                inner_REN = inner_REN * activation_named(self.rule.activation).slope(score_REN)
            mask = None if self.mask is None else self.mask[..., where]
            log_gate_REN = log_weights(logit_REN, mask, dim=1)
            yield part, self.responsibilities[..., where], _Gate(logit_REN, log_gate_REN, inner_REN, by_bias_R1)


@dataclass(frozen=True)
class _Gate:
    logit: Tensor  # (R, E, N)
    log_gate: Tensor  # (R, E, N)
    inner: Tensor  # (R, E, N), derivative of the logit by b1'x
    by_bias: Tensor  # (R, 1), derivative by the bias


def gate_step(
    given: Given,
    theta: Tensor,
    responsibilities: Tensor,
    mask: Tensor | None,
    *,
    max_iter: int,
    learn_temperature: bool,
) -> Tensor:
    """Gate parameters that raise the bound, everything else as in ``theta``."""
    names = ("slope", "bias", "log_temperature") if learn_temperature else ("slope", "bias")
    bound = GateBound(given.rule, given.layout, given.pairs, responsibilities, mask)
    return given.climb(bound, theta, given.free & given.layout.mask(*names), max_iter, 1e-9).theta


def fit_em(
    given: Given,
    theta: Tensor,
    *,
    max_iter: int,
    tol: float,
    temperature_at: Callable[[int], float] | None = None,
    anneal: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """EM from starts ``theta`` (R, P) until every fit gains less than ``tol`` a pair.

    Args:
        given: see there.
        theta: starts.
        max_iter: iterations at most.
        tol: nats a pair.
        temperature_at: temperature by iteration, up to iteration ``anneal`` (counted from 0), from where it stays; until there
            the likelihood may fall.
        anneal: see ``temperature_at``.
    Returns:
        Theta (R, P), and the mean log density (R,) before each iteration and at the end.
    """
    # A linear gate's temperature is a matter of units: its slopes take over what it would do.
    learn_temperature = given.rule.kind == "activation"
    values: list[Tensor] = []
    for iteration in range(max_iter):
        if temperature_at is not None and iteration <= anneal:
            parts = given.layout.split(theta.clone())
            theta = given.layout.join(
                parts._replace(
                    log_temperature=torch.full_like(parts.log_temperature, math.log(temperature_at(iteration)))
                )
            )
        value, r_REN, mask, open_REN = expectation(given, theta)
        values.append(value)
        if iteration > max(anneal, 0) and bool((values[-1] - values[-2] < tol).all()):
            return theta, values
        moved = experts_step(given, theta, r_REN)
        if mask is None or open_REN is None:
            theta = gate_step(given, moved, r_REN, None, max_iter=GATE_STEPS, learn_temperature=learn_temperature)
        else:
            inside = gate_step(given, moved, r_REN, mask, max_iter=GATE_STEPS, learn_temperature=False)
            across = gate_step(given, moved, open_REN, None, max_iter=GATE_STEPS, learn_temperature=False)
            theta = _best_move(given, moved, (inside, across))
    values.append(given.likelihood.value(theta))
    return theta, values


def _best_move(given: Given, theta: Tensor, proposals: tuple[Tensor, ...]) -> Tensor:
    """The best, by the likelihood with regions drawn anew, of staying and of each proposal, shortened until it rises."""
    likelihood = given.likelihood
    stay = likelihood.value(theta)
    best, best_value = theta, stay
    for proposal in proposals:
        tried, waiting = proposal, torch.ones_like(stay, dtype=torch.bool)
        for _ in range(MOVES):
            value = likelihood.value(tried)
            better = waiting & (value > best_value)
            best = torch.where(better[:, None], tried, best)
            best_value = torch.where(better, value, best_value)
            waiting &= ~(value > stay)
            if not bool(waiting.any()):
                break
            tried = torch.where(waiting[:, None], theta + (tried - theta) / 4, tried)
    return best
