"""Weights that sum to one: projection, temperature, entropy and the Dirichlet distribution.

All functions work on the last dimension, of length C, and broadcast over the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dirichlet_log_density", "entropy", "project", "sample_dirichlet", "temper"]


def project(x: Tensor) -> Tensor:
    """The point of the probability simplex nearest to x in Euclidean distance.

    Args:
        x: shape (..., C), floating point.
    Returns:
        Same shape: entries >= 0, sum 1. Differentiable: the gradient is that of the exact projection.
    Source:
        Held, Wolfe and Crowder 1974; sorted form as in 1309.1541, fig. 1.
    Example:
        >>> project(torch.tensor([0.5, 1.5, -3.0]))
        tensor([0., 1., 0.])
    """
    if x.shape[-1] == 0:
        raise ValueError("x must have at least one entry in its last dimension, got 0")
    sorted_C = x.detach().sort(-1, descending=True).values
    rank_C = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    support = (sorted_C * rank_C > sorted_C.cumsum(-1) - 1).sum(-1, keepdim=True)
    threshold = sorted_C.gather(-1, support - 1)  # smallest entry that stays positive; ties stay together
    inside = x >= threshold
    # The shift is taken over the support by autograd, so that the gradient is the projection's own.
    shift = (x.masked_fill(~inside, 0.0).sum(-1, keepdim=True) - 1) / inside.sum(-1, keepdim=True)
    return (x - shift).masked_fill(~inside, 0.0).clamp(min=0)


def temper(weights: Tensor, temperature: float) -> Tensor:
    """Weights raised to 1 / temperature and summed to one again: flatter above 1, sharper below.

    Args:
        weights: shape (..., C), >= 0, not all zero. Zeros stay zero.
        temperature: > 0; 1 changes nothing but the scale.
    Example:
        >>> temper(torch.tensor([0.2, 0.8]), 0.5)
        tensor([0.0588, 0.9412])
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return (weights.log() / temperature).softmax(-1)


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy in nats, shape (...): 0 at a corner, log C in the middle. 0 log 0 is 0."""
    surprise: Tensor = torch.special.entr(weights)
    return surprise.sum(-1)


def sample_dirichlet(concentration: Tensor, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """n draws from Dirichlet(concentration).

    Args:
        concentration: shape (C,), > 0.
        n: number of draws, >= 0.
        generator: source of chance.
    Returns:
        Shape (n, C), rows sum to 1. Not differentiable.
    Raises:
        ValueError: a concentration that is not above 0, or a negative n.
    """
    _check_concentration(concentration)
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n}")
    alpha = concentration.detach().double().expand(n, -1)
    # Gamma(a) = Gamma(a + 1) U^(1/a), in logs: for a << 1 a direct draw underflows to 0 in every entry.
    boosted = torch._standard_gamma(alpha + 1, generator=generator)
    uniform = torch.rand(alpha.shape, generator=generator, dtype=alpha.dtype, device=alpha.device)
    uniform = uniform.clamp(min=torch.finfo(alpha.dtype).tiny)
    return (boosted.log() + uniform.log() / alpha).softmax(-1).to(concentration.dtype)


def dirichlet_log_density(weights: Tensor, concentration: Tensor) -> Tensor:
    """Log density of Dirichlet(concentration) at weights, with respect to the first C - 1 coordinates.

    Args:
        weights: shape (..., C), inside the simplex.
        concentration: shape (..., C), > 0, broadcast against weights.
    Returns:
        Shape (...), nats. Differentiable in both.
    """
    _check_concentration(concentration)
    normaliser = concentration.lgamma().sum(-1) - concentration.sum(-1).lgamma()
    kernel: Tensor = torch.special.xlogy(concentration - 1, weights)
    return kernel.sum(-1) - normaliser


def _check_concentration(concentration: Tensor) -> None:
    if not concentration.is_floating_point():
        raise TypeError(f"concentration must be floating point, got {concentration.dtype}")
    if not bool((concentration > 0).all()):
        raise ValueError(f"concentration must be > 0, got a smallest entry of {float(concentration.min())}")
