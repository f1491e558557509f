"""The law of a gated regression: a mixture of linear Gaussian experts whose weights follow the input.

    g(y | x) = sum_i p_i(x) Normal(y | a_i'x + b_i, v_i),    v_i a variance

    softmax, temperature:  p(x) = softmax((b1_i'x + b0_i) / tau), tau = 1 or learned
    activation:            p(x) = softmax((s(b1_i'x) + b0_i) / tau)
    top-k:                 the same as softmax over the K experts of largest b1_i'x (or b1_i'x + b0_i), 0 for the others

Many laws at once: R fits, E experts, D features, N pairs, P parameters. Samples come last, so that every operation is a
pass over contiguous memory whatever the number of experts. All parameters of a fit stand in one row ``theta`` of P =
E (2 D + 3) + 1 numbers, which `Layout` takes apart. Gradients are written out; autograd is their oracle in the tests.

Sources: 2401.13875, eq. 1 and 5; 2309.13850, eq. 1 and 2 (the bias enters the weight, not the choice).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mixtura.core.gates import best_experts, log_weights
from mixtura.core.gaussian import LOG_2PI
from mixtura.density.activations import activation_named

__all__ = ["GATES", "GateKind", "GateRule", "Joint", "Layout", "Likelihood", "Pairs", "evaluate", "slow_log_density"]

GateKind = Literal["softmax", "temperature", "activation", "top-k"]
GATES: tuple[str, ...] = get_args(GateKind)
BLOCK = 1 << 16  # numbers of one (R, E, N) block: half a megabyte, which stays in a core's cache


@dataclass(frozen=True)
class GateRule:
    """Which gate.

    Attributes:
        kind: see the table at the top of the module.
        activation: a name in `activations.ACTIVATIONS`; for the activation gate.
        top_k: experts that answer; for the top-k gate.
        top_k_bias: whether the bias takes part in the choice; for the top-k gate.
    """

    kind: GateKind = "softmax"
    activation: str = "tanh"
    top_k: int = 1
    top_k_bias: bool = False

    @property
    def has_temperature(self) -> bool:
        """Whether a temperature may be learned."""
        return self.kind in ("temperature", "activation")

    @property
    def affine(self) -> bool:
        """Whether moving the inputs by a constant only moves the biases."""
        return self.kind in ("softmax", "temperature") or (self.kind == "top-k" and self.top_k_bias)

    @property
    def slopes_shift(self) -> bool:
        """Whether adding one vector to all slopes leaves the gate as it is."""
        return self.kind != "activation"


class Parts(NamedTuple):
    """Views into ``theta``."""

    slope: Tensor  # (R, E, D), b1
    bias: Tensor  # (R, E), b0
    coef: Tensor  # (R, E, D), a
    intercept: Tensor  # (R, E), b
    log_variance: Tensor  # (R, E)
    log_temperature: Tensor  # (R,)


@dataclass(frozen=True)
class Layout:
    """Where the parameters of E experts in D features stand in a row of ``theta``."""

    n_experts: int
    n_features: int

    @property
    def n_parameters(self) -> int:
        """P."""
        return self.n_experts * (2 * self.n_features + 3) + 1

    def split(self, theta: Tensor) -> Parts:
        """Views into theta (R, P)."""
        e, d = self.n_experts, self.n_features
        slope, bias, coef, intercept, log_v, log_tau = theta.split([e * d, e, e * d, e, e, 1], dim=-1)
        return Parts(slope.unflatten(-1, (e, d)), bias, coef.unflatten(-1, (e, d)), intercept, log_v, log_tau[..., 0])

    def join(self, parts: Parts) -> Tensor:
        """Theta (R, P) from its parts."""
        flat = (parts.slope.flatten(-2), parts.bias, parts.coef.flatten(-2), parts.intercept, parts.log_variance)
        return torch.cat([*flat, parts.log_temperature[..., None]], dim=-1)

    def mask(self, *names: str) -> Tensor:
        """Which parameters belong to the named parts, boolean (P,)."""
        parts = self.split(torch.zeros(1, self.n_parameters, dtype=torch.bool))
        return self.join(Parts(*(torch.full_like(p, n in names) for n, p in zip(Parts._fields, parts, strict=True))))[0]

    def free(self, rule: GateRule, *, temperature: bool) -> Tensor:
        """Which parameters are learned, boolean (P,): the last expert's slope and bias are 0, which fixes the gauge."""
        parts = self.split(torch.ones(1, self.n_parameters, dtype=torch.bool))
        parts.slope[:, -1], parts.bias[:, -1] = False, False
        parts.log_temperature[:] = temperature and rule.has_temperature
        return self.join(parts)[0]


@dataclass(frozen=True)
class Pairs:
    """Inputs and targets of R fits, or of one that all share (then R is 1 here).

    Attributes:
        x: shape (R, D + 1, N), the last row 1.
        y: shape (R, N).
        weight: shape (R, N), >= 0, each row sums to 1; None: all 1 / N.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None

    @classmethod
    def of(cls, X: Tensor, y: Tensor, weight: Tensor | None = None) -> Pairs:
        """From X (N, D) or (R, N, D), y (N,) or (R, N) and weights of y's shape."""
        X, y = (X, y) if X.dim() == 3 else (X[None], y[None])
        ones = torch.ones_like(X[..., :1])
        if weight is not None:
            weight = weight.expand_as(y)
            weight = weight / weight.sum(-1, keepdim=True)
        return cls(torch.cat([X, ones], -1).mT.contiguous(), y.contiguous(), weight)

    @property
    def n(self) -> int:
        """Number of pairs of a fit."""
        return self.y.shape[-1]

    def take(self, rows: Tensor) -> Pairs:
        """The pairs of some fits."""
        if len(self.y) == 1:
            return self
        return Pairs(self.x[rows], self.y[rows], None if self.weight is None else self.weight[rows])

    def thinned(self, n: int) -> Pairs:
        """At most ``n`` pairs of each fit, evenly spread."""
        step = -(-self.n // n)
        if step == 1:
            return self
        weight = None if self.weight is None else self.weight[:, ::step]
        if weight is not None:
            # Where every weight that is left is 0, all count alike: a metric must have a size.
            total = weight.sum(-1, keepdim=True)
            weight = torch.where(total > 0, weight / total.clamp(min=1e-300), 1 / weight.shape[1])
        return Pairs(self.x[..., ::step], self.y[:, ::step], weight)

    def blocks(self, width: int) -> Iterator[tuple[Pairs, slice]]:
        """Parts that hold about ``width`` samples of each fit."""
        for start in range(0, self.n, width):
            part = slice(start, min(start + width, self.n))
            weight = None if self.weight is None else self.weight[:, part]
            yield Pairs(self.x[..., part], self.y[:, part], weight), part

    def weights(self) -> Tensor | float:
        """Weights that sum to 1, broadcast over (R, E, N)."""
        return 1 / self.n if self.weight is None else self.weight[:, None]


class Joint(NamedTuple):
    """A law at some pairs."""

    score: Tensor  # (R, E, N), b1'x
    logit: Tensor  # (R, E, N), before the choice, after the temperature
    log_gate: Tensor  # (R, E, N), log p; -inf where an expert is not chosen
    residual: Tensor  # (R, E, N), y - a'x - b
    log_f: Tensor  # (R, E, N), of every expert, chosen or not
    joint: Tensor  # (R, E, N), log p + log f
    log_density: Tensor  # (R, N)


def gate_logits(rule: GateRule, parts: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes times inputs, and logits after activation, bias and temperature: both (R, E, N)."""
    score_REN = parts.slope @ x[:, :-1]
    value_REN = activation_named(rule.activation).value(score_REN) if rule.kind == "activation" else score_REN
    logit_REN = value_REN + parts.bias[..., None]
    if rule.has_temperature:
        logit_REN = logit_REN / parts.log_temperature.exp()[:, None, None]
    return score_REN, logit_REN


def chosen(rule: GateRule, score: Tensor, logit: Tensor) -> Tensor | None:
    """Which experts answer, boolean (R, E, N); None where all do."""
    if rule.kind != "top-k":
        return None
    return best_experts(logit if rule.top_k_bias else score, rule.top_k, dim=1)


def evaluate(rule: GateRule, layout: Layout, theta: Tensor, pairs: Pairs) -> Joint:
    """Everything at once, for one block of pairs."""
    parts = layout.split(theta)
    score_REN, logit_REN = gate_logits(rule, parts, pairs.x)
    log_gate_REN = log_weights(logit_REN, chosen(rule, score_REN, logit_REN), dim=1)
    line_REd = torch.cat([parts.coef, parts.intercept[..., None]], -1)
    residual_REN = pairs.y[:, None] - line_REd @ pairs.x
    log_v_RE1 = parts.log_variance[..., None]
    log_f_REN = -0.5 * (residual_REN.square() * (-log_v_RE1).exp() + (log_v_RE1 + LOG_2PI))
    joint_REN = log_gate_REN + log_f_REN
    return Joint(score_REN, logit_REN, log_gate_REN, residual_REN, log_f_REN, joint_REN, joint_REN.logsumexp(1))


@dataclass(frozen=True)
class Likelihood:
    """Mean log density of R fits as a function of ``theta``, with gradient and information.

    Attributes:
        rule, layout: of the law.
        pairs: the data.
    """

    rule: GateRule
    layout: Layout
    pairs: Pairs

    def take(self, rows: Tensor) -> Likelihood:
        """Of some fits."""
        return Likelihood(self.rule, self.layout, self.pairs.take(rows))

    def thinned(self, n: int) -> Likelihood:
        """Of at most ``n`` pairs a fit."""
        return Likelihood(self.rule, self.layout, self.pairs.thinned(n))

    def width(self, n_fits: int, rows: int) -> int:
        """Samples a block, for ``rows`` numbers a sample and fit."""
        return max(256, BLOCK // (n_fits * rows))

    def value(self, theta: Tensor) -> Tensor:
        """Mean log density, nats, shape (R,)."""
        total = theta.new_zeros(len(theta))
        for part, _ in self.pairs.blocks(self.width(len(theta), self.layout.n_experts)):
            log_density_RN = evaluate(self.rule, self.layout, theta, part).log_density
            weight = 1 / self.pairs.n if part.weight is None else part.weight
            total += (log_density_RN * weight).sum(-1)
        return total

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Mean log density (R,) and its gradient (R, P)."""
        total, gradient = theta.new_zeros(len(theta)), torch.zeros_like(theta)
        for part, _ in self.pairs.blocks(self.width(len(theta), self.layout.n_experts)):
            found = evaluate(self.rule, self.layout, theta, part)
            weight = 1 / self.pairs.n if part.weight is None else part.weight
            total += (found.log_density * weight).sum(-1)
            pieces = self._pieces(theta, part, found)
            scale = self.pairs.n**-1 if part.weight is None else part.weight[:, None]
            x_RNd = part.x.mT
            gate_REN, line_REN = pieces.gate * scale, pieces.line * scale
            line_REd = line_REN @ x_RNd
            gate_REd = (gate_REN if pieces.inner is None else gate_REN * pieces.inner) @ x_RNd
            gradient += self.layout.join(
                Parts(
                    gate_REd[..., :-1],
                    gate_REd[..., -1] if pieces.inner is None else gate_REN.sum(-1),
                    line_REd[..., :-1],
                    line_REd[..., -1],
                    (pieces.spread * scale).sum(-1),
                    (pieces.temperature * (1 / self.pairs.n if part.weight is None else part.weight)).sum(-1),
                )
            )
        return total, gradient

    def information(self, theta: Tensor) -> Tensor:
        """Mean outer product of each pair's gradient, (R, P, P): the Fisher information where the law is the true one.

        Source: Berndt, Hall, Hall and Hausman 1974.
        """
        r, p = theta.shape
        total = theta.new_zeros(r, p, p)
        for part, _ in self.pairs.blocks(self.width(r, p)):
            scores_RPN = self.scores(theta, part)
            weight = 1 / self.pairs.n if part.weight is None else part.weight[:, None]
            total += (scores_RPN * weight) @ scores_RPN.mT
        return total

    def scores(self, theta: Tensor, pairs: Pairs) -> Tensor:
        """Gradient of each pair's log density, (R, P, N)."""
        pieces = self._pieces(theta, pairs, evaluate(self.rule, self.layout, theta, pairs))
        x_R1DN = pairs.x[:, None, :-1]
        inner_REN = pieces.gate if pieces.inner is None else pieces.gate * pieces.inner
        rows = (
            (inner_REN[:, :, None] * x_R1DN).flatten(1, 2),
            pieces.gate,
            (pieces.line[:, :, None] * x_R1DN).flatten(1, 2),
            pieces.line,
            pieces.spread,
            pieces.temperature[:, None],
        )
        return torch.cat(rows, 1)

    def _pieces(self, theta: Tensor, pairs: Pairs, found: Joint) -> _Pieces:
        parts = self.layout.split(theta)
        r_REN = (found.joint - found.log_density[:, None]).exp()
        # An expert that is not chosen has r = p = 0 exactly, so nothing reaches its parameters.
        excess_REN = r_REN - found.log_gate.exp()
        line_REN = r_REN * found.residual * (-parts.log_variance).exp()[..., None]
        spread_REN = 0.5 * (line_REN * found.residual - r_REN)
        inner = activation_named(self.rule.activation).slope(found.score) if self.rule.kind == "activation" else None
        temperature_RN = torch.zeros_like(found.log_density)
        if self.rule.has_temperature:
            temperature_RN = -(excess_REN * found.logit).sum(1)
            excess_REN = excess_REN / parts.log_temperature.exp()[:, None, None]
        return _Pieces(excess_REN, inner, line_REN, spread_REN, temperature_RN)


class _Pieces(NamedTuple):
    """Derivatives of each pair's log density."""

    gate: Tensor  # (R, E, N), by the bias
    inner: Tensor | None  # (R, E, N), s'(b1'x), which the slope's has besides; None: 1
    line: Tensor  # (R, E, N), by the intercept
    spread: Tensor  # (R, E, N), by log v
    temperature: Tensor  # (R, N), by log tau


def slow_log_density(rule: GateRule, layout: Layout, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Log density of pairs X (N, D), y (N,) under one law, theta (P,), term by term: what `evaluate` must agree with."""
    parts = layout.split(theta[None])
    tau = float(parts.log_temperature.exp()) if rule.has_temperature else 1.0
    activate = activation_named(rule.activation).value
    found = []
    for x, target in zip(X, y, strict=True):
        experts = range(layout.n_experts)
        slopes = [float(parts.slope[0, i] @ x) for i in experts]
        bias = [float(b) for b in parts.bias[0]]
        inner = [float(activate(torch.tensor(s, dtype=X.dtype))) if rule.kind == "activation" else s for s in slopes]
        kept = list(experts)
        if rule.kind == "top-k":
            by = [s + b for s, b in zip(slopes, bias, strict=True)] if rule.top_k_bias else slopes
            kept = sorted(experts, key=lambda i: (-by[i], i))[: rule.top_k]
        logits = {i: (inner[i] + bias[i]) / tau for i in kept}
        top = max(logits.values())
        total = sum(math.exp(v - top) for v in logits.values())
        density = 0.0
        for i in kept:
            v = math.exp(float(parts.log_variance[0, i]))
            mean = float(parts.coef[0, i] @ x) + float(parts.intercept[0, i])
            normal = math.exp(-((float(target) - mean) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
            density += math.exp(logits[i] - top) / total * normal
        found.append(math.log(density))
    return torch.tensor(found, dtype=X.dtype)
