"""The objective of robust sparse unmixing, and the sums over pixels that its updates need.

    J = c sum_l || y^l - m^l A ||  +  lam sum_p sum_k a_pk^(1 - h_p)  +  delta^2 / 2 sum_p (1 - sum_k a_pk)^2

A channel pays the norm of its residual and not its square, so that a spoiled one cannot outvote the others. The exponent is a
pixel's own: 1 where it is a mixture of everything (h = 0), near 0 where it is pure. Both norms are smooth at 0: below
``LEAST_RESIDUAL`` c and ``LEAST_SHARE`` they go on as a parabola and as a line, and the updates are those of that function.

One pass over the pixels is enough for an iteration: it updates A and sums A'Y and A'A, from which follow the new spectra, all
residual norms and J. Nothing of the size of the cube is ever made.

Shapes: P pixels (B in a block), L channels, M endmembers; Y (P, L), A (P, M), E (M, L) spectra.
Source: Effective spectral unmixing via robust representation and learning-based sparsity (1409.0685); c, the soft sum to one, the
floors and the order of the updates are ours. The updates minimise majorants: ||r|| <= ||r||^2 / 2||r_t|| + ||r_t|| / 2 (l2,1),
the tangent of a^p (lp), and Lee and Seung's auxiliary function (NIPS 2000, sec. 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtura.core.processes import Processes

__all__ = ["FLOOR", "MOST_PURE", "SPARSENESS", "Sums", "Terms", "gini", "hoyer", "penalty", "terms"]

FLOOR = 1e-9  # abundances never reach 0, where a multiplicative update would keep them
LEAST_SHARE = 1e-6  # a^(-h) is taken there for smaller a
LEAST_RESIDUAL = 1e-3  # of c: a channel's weight is at most 1000
MOST_PURE = 0.9  # of h: an exponent of at least 0.1
BLOCK = 4096  # pixels at once


@dataclass(frozen=True)
class Terms:
    """Strengths of the terms; all for pixels scaled to about 1.

    Attributes:
        lam: of the sparsity, >= 0.
        delta: of the sum to one, >= 0.
        robust: l2,1 over channels; half the squared error otherwise.
    """

    lam: float
    delta: float
    robust: bool


@dataclass(frozen=True)
class Sums:
    """What a pass leaves behind, float64. Those of two sets of pixels add.

    Attributes:
        ay: A'Y, shape (M, L).
        aa: A'A, shape (M, M).
        sparsity: sum over pixels and endmembers of a^(1 - h).
        unity: sum over pixels of (1 - sum a)^2.
    """

    ay: Tensor
    aa: Tensor
    sparsity: float
    unity: float

    def over(self, processes: Processes) -> Sums:
        """The sums over the pixels of all processes."""
        if processes.size == 1:
            return self
        ends = torch.tensor([self.sparsity, self.unity], dtype=torch.float64, device=self.ay.device)
        total = processes.sum(torch.cat([self.ay.reshape(-1), self.aa.reshape(-1), ends]))
        ay, aa, ends = total.split([self.ay.numel(), self.aa.numel(), 2])
        return Sums(ay.reshape(self.ay.shape), aa.reshape(self.aa.shape), float(ends[0]), float(ends[1]))

    def residuals(self, spectra: Tensor, power: Tensor) -> Tensor:
        """Norm of each channel's residual, shape (L,); ``power`` is the squared norm of each channel of Y."""
        fitted = torch.einsum("ml,mk,kl->l", spectra, self.aa, spectra)
        return (power - 2 * (spectra * self.ay).sum(0) + fitted).clamp(min=0).sqrt()

    def objective(self, spectra: Tensor, power: Tensor, c: float, of: Terms) -> float:
        """J, with the norms smooth at 0."""
        r_L = self.residuals(spectra, power)
        if of.robust:
            least = LEAST_RESIDUAL * c
            data = c * torch.where(r_L < least, r_L.square() / (2 * least) + least / 2, r_L).sum()
        else:
            data = r_L.square().sum() / 2
        return float(data) + of.lam * self.sparsity + 0.5 * of.delta**2 * self.unity

    def better_spectra(self, spectra: Tensor) -> Tensor:
        """The update of the spectra; the channels' weights cancel in it."""
        # A channel of zeros has 0 / 0: it stays 0.
        return spectra * self.ay / (self.aa @ spectra).clamp(min=1e-300)


def channel_weights(residuals: Tensor, c: float, of: Terms) -> Tensor:
    """Weight of each channel's squared residual in the majorant, shape (L,): about 1 for a good one."""
    if not of.robust:
        return torch.ones_like(residuals)
    return c / residuals.clamp(min=max(LEAST_RESIDUAL * c, 1e-300))


def terms(y: Tensor, a: Tensor, h: Tensor, spectra: Tensor, weights: Tensor, of: Terms) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the abundances' update, each (B, M), >= 0; their difference is -dJ/dA.

    Args:
        y: pixels (B, L).
        a: abundances (B, M), > 0.
        h: guidance (B,), in [0, 0.9].
        spectra: (M, L). weights: of the channels, (L,), at these abundances.
    """
    weighted_ML = spectra * weights
    gram_MM = (weighted_ML @ spectra.T).to(a.dtype)
    over = y @ weighted_ML.T.to(y.dtype) + of.delta**2
    return over, _under(a, h, gram_MM, of)


def _under(a: Tensor, h: Tensor, gram_MM: Tensor, of: Terms) -> Tensor:
    under = a @ gram_MM
    if of.delta:
        under = under + of.delta**2 * a.sum(1, keepdim=True)
    if of.lam:
        # exp of log: half the time of pow here.
        under = under + of.lam * (1 - h)[:, None] * (-h[:, None] * a.clamp(min=LEAST_SHARE).log()).exp()
    return under


def penalty(a: Tensor, h: Tensor) -> Tensor:
    """Sum of a^(1 - h) over endmembers, shape (B,), with its tangent below ``LEAST_SHARE``."""
    p = (1 - h)[:, None]
    inside = a.clamp(min=LEAST_SHARE)
    value = (p * inside.log()).exp()
    return (value + p * value / inside * (a - inside)).sum(1)


def hoyer(a: Tensor) -> Tensor:
    """Sparseness of each row, shape (B,): 0 where all entries are equal, 1 where one is all (Hoyer 2004, sec. 3.1)."""
    root = a.shape[1] ** 0.5
    return (root - a.abs().sum(1) / a.norm(dim=1).clamp(min=1e-30)) / (root - 1)


def gini(a: Tensor) -> Tensor:
    """Gini index of each row, scaled so that one entry that is all gives 1, shape (B,) (Hurley and Rickard 2009)."""
    m = a.shape[1]
    ranked = a.abs().sort(1).values
    rank = torch.arange(1, m + 1, dtype=a.dtype, device=a.device)
    share = (ranked * (m - rank + 0.5)).sum(1) / ranked.sum(1).clamp(min=1e-30)
    return (1 - 2 * share / m) * m / (m - 1)


SPARSENESS = {"hoyer": hoyer, "gini": gini}


class Pixels:
    """Pixels in blocks, as tensors of one dtype and device, divided by ``scale``: an array on disk stays there.

    Args:
        X: shape (P, L), anything that slices to arrays.
        scale: what the values are divided by.
    """

    def __init__(self, X: Any, *, scale: float = 1.0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        self.scale, self.dtype, self.device = scale, dtype, device
        self.shape = X.shape
        # On another device the pixels are moved once; on this one a block is a view.
        self._x = np.asarray(X) if device == "cpu" else torch.as_tensor(np.asarray(X)).to(device, dtype)

    def __iter__(self) -> Any:
        for start in range(0, self.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            block = self._x[rows]
            if isinstance(block, np.ndarray):
                # torch wants to be able to write; a map opened for reading is copied, a block at a time.
                block = torch.from_numpy(np.require(block, requirements=["C", "W"]))
            yield rows, block.to(self.dtype)

    def power(self) -> Tensor:
        """Squared norm of each channel after scaling, shape (L,), float64."""
        total = torch.zeros(self.shape[1], dtype=torch.float64, device=self.device)
        for _, y in self:
            total += y.double().square().sum(0)
        return total / self.scale**2


def sweep(
    pixels: Pixels, a: Tensor, h: Tensor, spectra: Tensor, weights: Tensor | None, of: Terms, *, steps: int = 1
) -> Sums:
    """One pass over the pixels: update ``a`` in place, ``steps`` times with ``weights`` (not at all where None), and sum."""
    m, n = spectra.shape
    ay = torch.zeros(m, n, dtype=torch.float64, device=a.device)
    aa = torch.zeros(m, m, dtype=torch.float64, device=a.device)
    sparsity = torch.zeros((), dtype=torch.float64, device=a.device)
    unity = torch.zeros_like(sparsity)
    if weights is not None:
        # The scale sits in the spectra, so that no scaled copy of the pixels is made.
        weighted_LM = (spectra * weights / pixels.scale).T.to(a.dtype)
        gram_MM = ((spectra * weights) @ spectra.T).to(a.dtype)
    for rows, y in pixels:
        block, guide = a[rows], h[rows]
        if weights is not None:
            over = y @ weighted_LM + of.delta**2
            for _ in range(steps):
                block = (block * over / _under(block, guide, gram_MM, of).clamp(min=1e-30)).clamp(min=FLOOR)
            a[rows] = block
        ay += (block.T @ y).double()
        aa += (block.T @ block).double()
        if of.lam:
            sparsity += penalty(block, guide).double().sum()
        unity += (1 - block.sum(1)).double().square().sum()
    return Sums(ay / pixels.scale, aa, float(sparsity), float(unity))
