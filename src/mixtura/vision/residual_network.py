"""Residual networks of any width: what sparse layers of equal cost are tried on with images.

The layout for small images: a 3 x 3 stem without pooling, stages that each halve the sides (but the first) and double the
channels, blocks of two 3 x 3 convolutions around a shortcut.

Shapes: B images, channels times height times width.
Source: He et al. 2015 (1512.03385), sec. 4.2; widths: Zagoruyko and Komodakis 2016 (1605.07146).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResidualNetwork"]


class ResidualNetwork(nn.Module):
    """Class logits of images, (B, channels, height, width) -> (B, classes).

    Args:
        width: channels of the first stage.
        classes: number of them.
        channels: of the images.
        stages: each has twice the channels of the one before.
        blocks: residual blocks a stage.
    Raises:
        ValueError: a number below 1.
    Example:
        >>> ResidualNetwork(4, classes=3)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int, *, classes: int = 10, channels: int = 1, stages: int = 3, blocks: int = 1) -> None:
        super().__init__()
        if min(width, classes, channels, stages, blocks) < 1:
            raise ValueError(
                "width, classes, channels, stages and blocks must be at least 1, got "
                f"{width}, {classes}, {channels}, {stages} and {blocks}"
            )
        self.stem = _convolution(channels, width, 3, 1)
        self.stem_norm = nn.BatchNorm2d(width)
        rows: list[nn.Module] = []
        inputs = width
        for stage in range(stages):
            outputs = width * 2**stage
            for block in range(blocks):
                rows.append(_Block(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*rows)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem_norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = _convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = _convolution(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, side: int, stride: int) -> nn.Conv2d:
    made = nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, bias=False)
    with torch.no_grad():
        nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made
