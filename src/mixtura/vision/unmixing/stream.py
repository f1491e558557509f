"""Spectra from a stream of blocks of pixels: what is kept of the blocks that are gone, and the step that a new one makes.

Given their shares, all that spectra and channel weights need of pixels are A'Y, A'A and the squared norm of each channel, and
those add over blocks.

Shapes: L channels, M endmembers.
Source: online factorisation: Mairal, Bach, Ponce and Sapiro 2010 (JMLR 11), algorithm 1; its step for the dictionary is here the
multiplicative one of :mod:`.objective`. Blocks count alike: to forget old ones (its sec. 3.4.1), whose shares are of older
spectra, changed the angles of spectra by less than 0.001 on two scenes in eight blocks, and the shares were further off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.vision.unmixing.objective import Sums, Terms, channel_weights

__all__ = ["Stream"]

STEPS = 10  # of the spectra a block


@dataclass(frozen=True)
class Stream:
    """Sums over the blocks so far; float64, of pixels scaled to about 1.

    Attributes:
        ay: A'Y, shape (M, L).
        aa: A'A, shape (M, M).
        power: squared norm of each channel, shape (L,).
        pixels: how many there were.
        unit: c of the objective for one pixel; that of n pixels is sqrt(n) times as large.
        n_blocks: blocks so far.
    """

    ay: Tensor
    aa: Tensor
    power: Tensor
    pixels: int
    unit: float
    n_blocks: int

    @staticmethod
    def of(sums: Sums, power: Tensor, pixels: int, c: float) -> Stream:
        """The stream after its first block, or after a fit."""
        return Stream(sums.ay, sums.aa, power, pixels, c / pixels**0.5, 1)

    def joined(self, sums: Sums, power: Tensor, pixels: int) -> Stream:
        """The stream after one more block."""
        old = [part.to(power.device) for part in (self.ay, self.aa, self.power)]
        ay, aa, whole = (part + new for part, new in zip(old, (sums.ay, sums.aa, power), strict=True))
        return Stream(ay, aa, whole, self.pixels + pixels, self.unit, self.n_blocks + 1)

    def better(self, spectra: Tensor, of: Terms) -> tuple[Tensor, Tensor]:
        """Spectra (M, L) of lower objective for the shares so far, and the channels' weights (L,) for them."""
        sums = Sums(self.ay, self.aa, 0.0, 0.0)
        # A channel that was blank till now has spectra of 0, which a multiplicative step would keep: start even.
        new_L = (spectra == 0).all(0) & (self.power > 0)
        spectra = torch.where(new_L, self.ay.sum(0) / self.aa.sum(), spectra)
        for _ in range(STEPS):
            spectra = sums.better_spectra(spectra)
        return spectra, channel_weights(sums.residuals(spectra, self.power), self.unit * self.pixels**0.5, of)
