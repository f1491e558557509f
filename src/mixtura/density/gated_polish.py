"""After EM: the likelihood of a gated regression climbed over all parameters, and the regions of a top-k gate moved.

The gradient does not see that a border could move: a pair that changes sides makes the likelihood jump. With one active
expert it sees nothing else of the gate either. There the best place along each gate parameter is found exactly, by sorting
the pairs by where they change sides; with more, by steps that shrink.

Shapes: R fits, E experts, D features, N pairs, P parameters.
Source: 2309.13850, sec. 2, for the gate; the searches are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.density.ascent import Ascent
from mixtura.density.gated_em import Given
from mixtura.density.gated_law import GateRule, evaluate

__all__ = ["best_shift", "move_regions", "polish"]

ROUNDS = 20  # of moving regions and climbing again
PASSES = 10  # over the gate's parameters
RISE = 1e-13  # nats a pair that count as one


def polish(given: Given, theta: Tensor, *, max_iter: int = 600, tol: float = 1e-7) -> Ascent:
    """The likelihood climbed over all free parameters; for a top-k gate, regions moved and climbed again.

    Args:
        given: see there.
        theta: starts, shape (R, P).
        max_iter: steps of a climb.
        tol: largest entry of the gradient at the end.
    """
    end = given.climb(given.likelihood, theta, given.free, max_iter, tol)
    if given.rule.kind != "top-k" or (given.layout.n_features == 1 and not given.rule.top_k_bias):
        return end  # in one feature, regions change only where two slopes swap order
    for _ in range(ROUNDS if given.rule.top_k == 1 else 3):
        moved = move_regions(given, end.theta)
        again = given.climb(given.likelihood, moved, given.free, max_iter, tol)
        gain = (again.value - end.value).max()
        end = again
        if gain < 1e-10:
            break
    return end


def move_regions(given: Given, theta: Tensor) -> Tensor:
    """Gate parameters of a top-k gate, moved one by one to where the likelihood is higher; it never falls."""
    return _move_borders(given, theta) if given.rule.top_k == 1 else _move_by_steps(given, theta)


def _move_borders(given: Given, theta: Tensor) -> Tensor:
    """With one active expert: each parameter of the choice in turn at its best, the lines as they are."""
    rule, layout, pairs, likelihood = given.rule, given.layout, given.pairs, given.likelihood
    lower, upper = (edge.to(theta.device) for edge in given.box.edges(layout))
    lines = evaluate(GateRule("softmax"), layout, theta, pairs)
    log_f_REN = lines.joint - lines.log_gate
    where = layout.split(torch.arange(layout.n_parameters)[None])
    weight = 1 / pairs.n if pairs.weight is None else pairs.weight
    value = likelihood.value(theta)
    for _ in range(PASSES):
        before = value
        for i in range(layout.n_experts - 1):  # the last is the reference
            columns = [*where.slope[0, i].tolist(), *([int(where.bias[0, i])] if rule.top_k_bias else [])]
            for d, p in enumerate(columns):
                parts = layout.split(theta)
                score_REN = parts.slope @ pairs.x[:, :-1] + (parts.bias[..., None] if rule.top_k_bias else 0.0)
                others_REN = score_REN.clone()
                others_REN[:, i] = -torch.inf
                rival_RN, rival = others_REN.max(1)
                gain_RN = (log_f_REN[:, i] - log_f_REN.gather(1, rival[:, None])[:, 0]) * weight
                along_RN = pairs.x[:, d if d < layout.n_features else -1].expand_as(gain_RN)
                tried = theta.clone()
                tried[:, p] += best_shift(rival_RN - score_REN[:, i], along_RN, gain_RN)
                tried = tried.clamp(lower, upper)
                found = likelihood.value(tried)
                better = found > value + RISE
                theta, value = torch.where(better[:, None], tried, theta), torch.where(better, found, value)
        if not bool((value > before + RISE).any()):
            break
    return theta


def best_shift(behind: Tensor, along: Tensor, gain: Tensor) -> Tensor:
    """The shift t at which the sum of ``gain`` over the pairs with t * along > behind is largest.

    Args:
        behind: by how much an expert's score is below its best rival's, shape (R, N).
        along: how the score grows with t, any sign, shape (R, N).
        gain: what a pair adds when it has this expert and not the rival, shape (R, N).
    Returns:
        Shape (R,): the middle between the two pairs that change sides around the best place, or 1 beyond all of them.
    Example:
        >>> behind, one = torch.tensor([[0.0, 1.0, 2.0]]), torch.ones(1, 3)
        >>> best_shift(behind, one, torch.tensor([[5.0, 1.0, -9.0]]))
        tensor([1.5000])
    """
    still = along == 0
    at_RN = torch.where(still, 0.0, behind) / torch.where(still, 1.0, along)
    # A pair whose score falls with t leaves where the others come in.
    change_RN = torch.where(still, 0.0, gain * along.sign())
    order = at_RN.argsort(dim=1)
    at_RN = at_RN.gather(1, order)
    total_RN = change_RN.gather(1, order).cumsum(1)
    best = torch.cat([torch.zeros_like(total_RN[:, :1]), total_RN], 1).argmax(1)
    edges = torch.cat([at_RN[:, :1] - 2, at_RN, at_RN[:, -1:] + 2], 1)
    pair = torch.stack([best, best + 1], 1)
    return edges.gather(1, pair).mean(1)


def _move_by_steps(given: Given, theta: Tensor, *, largest: float = 1e-1, smallest: float = 1e-5) -> Tensor:
    """Steps along each gate parameter, up and down, from ``largest`` to ``smallest`` of its size."""
    likelihood = given.likelihood
    best_value = likelihood.value(theta)
    lower, upper = (edge.to(theta.device) for edge in given.box.edges(given.layout))
    coordinates = (given.free & given.layout.mask("slope", "bias")).nonzero()[:, 0].tolist()
    step, best = largest, theta.clone()
    while step >= smallest:
        rose = False
        for p in coordinates:
            for sign in (1.0, -1.0):
                tried = best.clone()
                tried[:, p] += sign * step * best[:, p].abs().clamp(min=1.0)
                tried = tried.clamp(lower, upper)
                value = likelihood.value(tried)
                better = value > best_value + RISE
                best = torch.where(better[:, None], tried, best)
                best_value = torch.where(better, value, best_value)
                rose = rose or bool(better.any())
        if not rose:
            step /= 4
    return best
