"""Inputs made of several concepts, targets that need what each concept knows and what all of them share.

Made up, and built to be hard for a few large experts: an input shows 3 of 24 concepts at once, so that no 2 of 16 experts fit
all sets (*hybridity*), and a part of the target is common to all of them (*redundancy*).

    x = U c + sum of the keys of 3 concepts            c standard normal in 32 dimensions, x in 64
    y = common(c) + sum of the 3 concepts' own maps of c, each of rank 8; all maps are W2 relu(W1 c)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ConceptMixture"]

MAPS = 500_000  # stands where no step does


@dataclass(frozen=True, kw_only=True)
class ConceptMixture:
    """The task; two of the same seed are the same.

    Attributes:
        width, content: dimensions of input and target, and of the content c.
        concepts, shown: concepts in all and in one input.
        common, rank: hidden units of the common map, and of each concept's own.
        seed: of the maps and of every batch.
    """

    width: int = 64
    content: int = 32
    concepts: int = 24
    shown: int = 3
    common: int = 64
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.shown <= self.concepts:
            raise ValueError(f"shown must be between 1 and concepts={self.concepts}, got {self.shown}")
        # A stream of its own: a layer that starts from the same small seed would start with the concepts' keys as rows.
        draw = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 - MAPS)

        def normal(*shape: int, fan_in: int) -> Tensor:
            return torch.randn(*shape, generator=draw) * fan_in**-0.5

        maps = {
            "place": normal(self.width, self.content, fan_in=self.content),
            "keys": normal(self.concepts, self.width, fan_in=1),
            "common_in": normal(self.common, self.content, fan_in=self.content),
            "common_out": normal(self.width, self.common, fan_in=self.common) * 2**0.5,
            "own_in": normal(self.concepts, self.rank, self.content, fan_in=self.content),
            "own_out": normal(self.concepts, self.width, self.rank, fan_in=self.rank) * 2**0.5,
        }
        object.__setattr__(self, "_maps", maps)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (size, width) of a step; the same step gives the same batch. A negative step is never trained on.

        Example:
            >>> x, y = ConceptMixture().batch(0, 5)
            >>> x.shape, y.shape
            (torch.Size([5, 64]), torch.Size([5, 64]))
        """
        draw = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        c_NC = torch.randn(size, self.content, generator=draw)
        chosen_NS = torch.rand(size, self.concepts, generator=draw).argsort(-1)[:, : self.shown]
        return self._input(c_NC, chosen_NS), self._target(c_NC, chosen_NS)

    def _input(self, c_NC: Tensor, chosen_NS: Tensor) -> Tensor:
        maps: dict[str, Tensor] = self._maps  # type: ignore[attr-defined]
        return c_NC @ maps["place"].T + maps["keys"][chosen_NS].sum(1)

    def _target(self, c_NC: Tensor, chosen_NS: Tensor) -> Tensor:
        maps: dict[str, Tensor] = self._maps  # type: ignore[attr-defined]
        common_ND = F.relu(c_NC @ maps["common_in"].T) @ maps["common_out"].T
        # Of every concept, then those shown: a product of all is cheaper than gathering maps.
        hidden_NKR = F.relu(torch.einsum("nc,krc->nkr", c_NC, maps["own_in"]))
        shown_NK = torch.zeros(len(c_NC), self.concepts).scatter(1, chosen_NS, 1.0)
        return common_ND + torch.einsum("nkr,kdr,nk->nd", hidden_NKR, maps["own_out"], shown_NK)
