"""Gradients where the loss is about to rise most: training for minima that are flat.

A step takes the gradient not at the weights but at a point close by that the loss likes least, and goes down from the weights
with it. How far "close by" is goes weight by weight with the weight's size, so that scaling a layer up and the next one down
changes nothing.

Source: ASAM (Kwon et al. 2021, 2102.11600), algorithm 1, with p = 2 and element-wise normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["raised"]

ETA = 0.01  # added to the size of a weight, so that one at zero can move; the paper's


@contextmanager
@torch.no_grad()
def raised(
    weights: Mapping[str, nn.Parameter], gradients: Sequence[Tensor | None], rho: float, *, eta: float = ETA
) -> Iterator[None]:
    """Hold weights, within the block, at the point to which the loss rises most; afterwards they are what they were, to the bit.

    The point is w + rho * T^2 g / ||T g||, where g is the gradient and T is |w| + eta for weights of two and more dimensions and
    1 for vectors (biases, norms); the norm is over all of them.

    Args:
        weights: by name; moved in place.
        gradients: one for each; ``None`` where the loss does not depend on it.
        rho: radius, without unit; 0.05 moves no weight by more than a twentieth of T.
        eta: what is added to the size.
    Source:
        ASAM (2102.11600), algorithm 1. That biases have T = 1 is from the authors' code; it goes by names, and so treats the
        scales of norms as weights, where this goes by the number of dimensions.
    Example:
        >>> w = nn.Parameter(torch.tensor([[3.0, 0.0]]))
        >>> with raised({"w": w}, [torch.tensor([[1.0, 0.0]])], 0.1, eta=0.0):
        ...     print(w.tolist())
        [[3.299999952316284, 0.0]]
    """
    moved = [(p, g) for p, g in zip(weights.values(), gradients, strict=True) if g is not None]
    sizes = [p.abs() + eta if p.dim() >= 2 else torch.ones_like(p) for p, _ in moved]
    norms = [torch.linalg.vector_norm(t * g) for t, (_, g) in zip(sizes, moved, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    before = [p.clone() for p, _ in moved]
    # Where the gradient is zero there is no direction in which the loss rises.
    if float(norm) > 0:
        for t, (p, g) in zip(sizes, moved, strict=True):
            p.add_(t.square().mul_(g), alpha=rho / float(norm))
    try:
        yield
    finally:
        for old, (p, _) in zip(before, moved, strict=True):
            p.copy_(old)
