"""A U-Net from a spectrum to maps of the same size, to which a condition may be joined at either end.

Shapes: B spectra, M bands, L frames, K maps, C channels of the condition.
Source: CLIPSep (2212.07065), sec. 3.1 and its released network, which is that of Zhao et al. 2018 (1804.03160).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SpectrumUNet"]

WIDEST = 8  # widths double to this multiple of the first
LEAK = 0.2


class SpectrumUNet(nn.Module):
    """Maps of a spectrum, (B, M, L) -> (B, K, M, L), without an activation at the end.

    Each level halves both axes by a convolution (kernel 4, stride 2), then doubles them bilinearly before a 3 x 3
    convolution; levels are joined across. Sizes that do not divide by 2 ** depth are padded with the last value and cut again.

    Args:
        maps: K.
        depth: levels.
        width: channels of the first level; they double up to 8 times that.
        early: channels of a condition that is tiled onto the input.
        middle: channels of a condition that is joined at the innermost level.
    Raises:
        ValueError: maps, depth or width below 1.
    Example:
        >>> SpectrumUNet(4, depth=2, width=8)(torch.zeros(1, 10, 9)).shape
        torch.Size([1, 4, 10, 9])
    """

    def __init__(self, maps: int, *, depth: int = 7, width: int = 64, early: int = 0, middle: int = 0) -> None:
        super().__init__()
        if min(maps, depth, width) < 1:
            raise ValueError(f"maps, depth and width must be at least 1, got {maps}, {depth} and {width}")
        self.depth, self.early, self.middle = depth, early, middle
        widths = [width * min(2**level, WIDEST) for level in range(depth)]
        self.input_norm = nn.BatchNorm2d(1)
        self.down, self.down_norm = nn.ModuleList(), nn.ModuleList()
        self.up, self.up_norm = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(widths):
            inputs = widths[level - 1] if level else 1 + early
            outermost, innermost = level == 0, level == depth - 1
            self.down.append(nn.Conv2d(inputs, channels, 4, stride=2, padding=1, bias=False))
            # The first level's input is normalised already; the innermost has too few places for statistics.
            self.down_norm.append(nn.Identity() if outermost or innermost else nn.BatchNorm2d(channels))
            joined = channels + middle if innermost else 2 * channels
            self.up.append(nn.Conv2d(joined, maps if outermost else inputs, 3, padding=1, bias=outermost))
            self.up_norm.append(nn.Identity() if outermost else nn.BatchNorm2d(inputs))
        self.apply(_start)
        # Channels last: a training step on a CPU takes two thirds of the time.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Maps of a spectrum.

        Args:
            x: shape (B, M, L).
            condition: shape (B, C), where the network was built with one.
        Raises:
            ValueError: a condition is missing or was not provided for.
        """
        wanted = self.early + self.middle
        if (condition is None) != (wanted == 0):
            raise ValueError(
                f"this network takes {wanted} channels of condition, got {None if condition is None else tuple(condition.shape)}"
            )
        bands, frames = x.shape[-2:]
        x = self.input_norm(self._padded(x)[:, None]).contiguous(memory_format=torch.channels_last)
        if self.early:
            x = torch.cat([x, _tiled(condition, x)], 1)
        across: list[Tensor] = []
        for level in range(self.depth):
            x = self.down_norm[level](self.down[level](F.leaky_relu(x, LEAK) if level else x))
            across.append(x)
        x = across.pop()
        if self.middle:
            x = torch.cat([x, _tiled(condition, x)], 1)
        for level in reversed(range(self.depth)):
            # align_corners=False: a place then sees its neighbours only, whatever the length of the recording. The
            # reference stretches over the whole window, which ties every output to the window's length.
            x = F.interpolate(F.relu(x), scale_factor=2, mode="bilinear", align_corners=False)
            x = self.up_norm[level](self.up[level](x))
            if level:
                x = torch.cat([across.pop(), x], 1)
        return x[..., :bands, :frames]

    def _padded(self, x: Tensor) -> Tensor:
        step = 2**self.depth
        more = (-x.shape[-1] % step, -x.shape[-2] % step)
        if not any(more):
            return x
        return F.pad(x[:, None], (0, more[0], 0, more[1]), mode="replicate")[:, 0]


def _tiled(condition: Tensor | None, x: Tensor) -> Tensor:
    assert condition is not None
    return condition[:, :, None, None].expand(-1, -1, *x.shape[-2:])


def _start(module: nn.Module) -> None:
    # Tiny weights: the maps start near 0, so that every mask starts at 1/2 whatever is asked for.
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 1e-3)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
