"""The wavelet block: space is mixed by a Haar transform without parameters, channels by 1 x 1 convolutions.

The transform halves the sides and loses nothing, so the convolutions between it and the one transposed convolution that
comes back to full resolution work on maps a quarter as large. Deeper levels widen what a pixel sees by 2 a level, and come
back from the deepest to the finest, each joining the sub-bands of its own level.

Shapes: B images, C channels (divisible by 4), H height, W width, L levels.
Source: Jeevan et al. 2022 (2205.14375v5), sec. 3 and fig. 2.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.core.wavelets import haar2d, squares, wavelet2d

__all__ = ["MIXERS", "UPSAMPLING", "Mixer", "Upsample", "WaveletMixing"]

Mixer = Literal["dwt", "average", "random", "none"]
Upsample = Literal["deconv", "nearest"]
MIXERS = ("dwt", "average", "random", "none")
UPSAMPLING = ("deconv", "nearest")


class WaveletMixing(nn.Module):
    """x + block(x), (B, C, H, W) -> (B, C, H, W), for any H and W of at least 2^levels.

    Sides that 2^levels does not divide are continued by their last pixels and cropped after (ours; the paper's code needs
    sides that divide).

    Args:
        channels: C, divisible by 4.
        levels: L, of the transform: 1 to 4. One level is the paper's Lite block.
        mult: expansion of the channel mixing.
        inner: channels that it ends with, before upsampling; ``None`` is C. ``upsample="nearest"`` has no other.
        dropout: within the channel mixing.
        wavelet: ``"haar"``, or another orthogonal one that PyWavelets knows, continued around the border.
        upsample: ``"deconv"``: a transposed convolution, 4 x 4 at stride 2; ``"nearest"``: each pixel repeated, no weights.
        mixer: what mixes space. ``"dwt"``; or, to compare with: ``"average"``, the approximation alone, four times (what
            pooling keeps); ``"random"``, four orthonormal filters drawn at random, as lossless as the wavelet;
            ``"none"``, the four pixels of a square as they are.
    Raises:
        ValueError: an argument outside what is named above; images that are no floating (B, C, H, W), or too small.
    Example:
        >>> WaveletMixing(8, levels=2)(torch.zeros(2, 8, 17, 23)).shape
        torch.Size([2, 8, 17, 23])
    """

    random: Tensor
    order: Tensor

    def __init__(
        self,
        channels: int,
        *,
        levels: int = 1,
        mult: int = 2,
        inner: int | None = None,
        dropout: float = 0.5,
        wavelet: str = "haar",
        upsample: Upsample = "deconv",
        mixer: Mixer = "dwt",
    ) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise ValueError(f"channels must be divisible by 4, got {channels}; the block reduces them to a quarter")
        if levels not in (1, 2, 3, 4):
            raise ValueError(f"levels must be 1, 2, 3 or 4, got {levels}")
        if mult < 1:
            raise ValueError(f"mult must be at least 1, got {mult}")
        if mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {list(MIXERS)}, got {mixer!r}")
        if upsample not in UPSAMPLING:
            raise ValueError(f"upsample must be one of {list(UPSAMPLING)}, got {upsample!r}")
        if upsample == "nearest" and inner not in (None, channels):
            raise ValueError(f"upsample 'nearest' keeps inner at the channels, {channels}, got {inner}")
        if inner is not None and inner < 1:
            raise ValueError(f"inner must be at least 1, got {inner}")
        if wavelet != "haar":
            wavelet2d(torch.zeros(2, 2), wavelet)  # an unknown name fails here, not at the first batch
        self.channels, self.levels, self.wavelet, self.mixer = channels, levels, wavelet, mixer
        self.reduction = nn.Conv2d(channels, channels // 4, 1)
        self.mixing = nn.ModuleList(
            _channel_mixing(
                channels if level == levels - 1 else channels + channels // 2,
                channels if level == 0 else channels // 2,
                hidden=channels * mult,
                inner=inner or channels,
                dropout=dropout,
                upsample=upsample,
            )
            for level in range(levels)
        )
        quarter = channels // 4
        details = quarter + torch.arange(3 * quarter).view(quarter, 3)
        order = torch.cat((torch.arange(quarter)[:, None], details), 1).flatten()
        self.register_buffer("order", order, persistent=False)
        if mixer == "random":
            self.register_buffer("random", torch.linalg.qr(torch.randn(4, 4))[0])

    def forward(self, x: Tensor) -> Tensor:
        _check(x, self.channels, 2**self.levels)
        height, width = x.shape[-2:]
        cell = 2**self.levels
        y = x
        if height % cell or width % cell:
            y = F.pad(x, (0, -width % cell, 0, -height % cell), mode="replicate")
        y = self._mixed(self.reduction(y))
        return x + y[..., :height, :width]

    def _mixed(self, r: Tensor) -> Tensor:
        maps = []
        for _ in range(self.levels):
            maps.append(self._bands(r))
            r = maps[-1][:, :, 0]
        out = None
        for level in range(self.levels - 1, -1, -1):
            out = self._upward(self.mixing[level], maps[level], out)
        assert out is not None
        return out

    def _upward(self, mixing: nn.Module, bands: Tensor, deeper: Tensor | None) -> Tensor:
        """The channel mixing of one level, of its sub-bands (B, C/4, 4, h, w) and of what came up from the deeper one.

        The first convolution would want approximations first, then the details of one channel after another, then the deeper
        maps. Its weights are taken in the order in which the maps lie instead: weights are few, maps are large.
        """
        assert isinstance(mixing, nn.Sequential)
        first = mixing[0]
        assert isinstance(first, nn.Conv2d)
        weight = first.weight[:, self.order]
        out = F.conv2d(bands.flatten(1, 2), weight, first.bias)
        if deeper is not None:
            out = out + F.conv2d(deeper, first.weight[:, self.channels :])
        return mixing[1:](out)

    def _bands(self, r: Tensor) -> Tensor:
        """Sub-bands of every channel, (B, C/4, 4, h, w), the approximation first."""
        if self.mixer == "dwt":
            return (haar2d(r) if self.wavelet == "haar" else wavelet2d(r, self.wavelet))[0]
        parts = torch.stack(squares(r), 2)
        if self.mixer == "average":
            return 0.5 * parts.sum(2, keepdim=True).expand_as(parts)
        if self.mixer == "none":
            return parts
        return torch.einsum("ij,bcjhw->bcihw", self.random, parts)

    def reach(self) -> tuple[int, int]:
        """How far a pixel's influence goes, at most: pixels before and after it, along each side, for ``"haar"``.

        A cell of the deepest level gathers 2^L pixels and is spread over 2^L - 1 more before and 2 (2^L - 1) after its
        first; a pixel may be the cell's last or first.
        """
        cell = 2**self.levels
        return 2 * (cell - 1), 2 * (cell - 1)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, levels={self.levels}, mixer={self.mixer}, wavelet={self.wavelet}"


def _channel_mixing(
    inputs: int, outputs: int, *, hidden: int, inner: int, dropout: float, upsample: Upsample
) -> nn.Sequential:
    # The numbers of these parts are those of the authors' checkpoints.
    up: list[nn.Module]
    if upsample == "deconv":
        up = [nn.Conv2d(hidden, inner, 1), nn.ConvTranspose2d(inner, outputs, 4, stride=2, padding=1)]
    else:
        up = [nn.Conv2d(hidden, outputs, 1), nn.Upsample(scale_factor=2, mode="nearest")]
    return nn.Sequential(nn.Conv2d(inputs, hidden, 1), nn.GELU(), nn.Dropout(dropout), *up, nn.BatchNorm2d(outputs))


def _check(x: Tensor, channels: int, cell: int) -> None:
    if x.dim() != 4:
        hint = "; add the batch's axis: x[None]" if x.dim() == 3 else ""
        raise ValueError(f"x must have shape (B, {channels}, H, W), got {tuple(x.shape)}{hint}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating, got {x.dtype}; convert it with x.float() / 255")
    if x.shape[1] != channels:
        raise ValueError(f"x must have {channels} channels, got {x.shape[1]}")
    if min(x.shape[-2:]) < cell:
        raise ValueError(
            f"sides must be at least {cell} for {int(math.log2(cell))} levels, got {x.shape[-2]} x {x.shape[-1]}"
        )
