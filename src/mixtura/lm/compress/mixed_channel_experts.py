"""Feed-forward experts whose output channels have one of two widths; called like all experts of transformers.

Shapes: T tokens, D width, H hidden, E experts, K experts a token visits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear
from mixtura.lm.compress.packed_experts import PackedExperts

__all__ = ["MixedChannelExperts", "MixedMatrices"]


class MixedMatrices(nn.ModuleList):
    """One matrix of every expert, with the methods of :class:`~mixtura.lm.compress.packed.PackedMatrices`."""

    def product(self, j: int, x: Tensor) -> Tensor:
        """x (M, I) times matrix j transposed: (M, O), in the type of x."""
        y: Tensor = self[j](x)
        return y

    def dequantize(self, j: int) -> Tensor:
        """Matrix j, float32, (O, I)."""
        return self._layer(j).weight()

    @property
    def bits(self) -> list[float]:
        """Bits a weight of every matrix, everything stored for it counted."""
        return [self._layer(j).bits for j in range(len(self))]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(self._layer(j).nbytes for j in range(len(self)))

    def _layer(self, j: int) -> MixedChannelLinear:
        layer = self[j]
        assert isinstance(layer, MixedChannelLinear)
        return layer


class MixedChannelExperts(PackedExperts):
    """Gated experts of mixed channels: (T, D), indices (T, K), weights (T, K) -> (T, D)."""

    up: Any  # MixedMatrices instead of the packed ones of the base
    down: Any

    def __init__(self, n_experts: int, activation: Callable[[Tensor], Tensor]):
        nn.Module.__init__(self)
        self.num_experts, self.act_fn = n_experts, activation
        self.up, self.down = MixedMatrices(), MixedMatrices()

    @property
    def bits(self) -> Tensor:
        """Bits a weight of each expert, everything stored for it counted, to one decimal, float32, (E,)."""
        pairs = zip(self.up, self.down, strict=True)
        sizes = [[(m.nbytes, m.in_features * m.out_features) for m in pair] for pair in pairs]
        return torch.tensor([round(8 * sum(b for b, _ in pair) / sum(n for _, n in pair), 1) for pair in sizes])
