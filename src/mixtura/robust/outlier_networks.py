"""Small classifiers for those who bring none: a dense one for tables and embeddings, a convolutional one for images.

Neither keeps running statistics, so what was saved is its parameters and nothing else, and outliers leave no trace in it.

Shapes: B rows, F features, K classes; images (B, channels, height, width).
"""

import itertools

import torch
from torch import Tensor, nn

__all__ = ["dense_network", "image_network"]


def dense_network(n_features: int, n_classes: int, *, hidden: int = 256, depth: int = 2) -> nn.Module:
    """Logits (B, K) of rows (B, ...) flattened to F features, through ``depth`` >= 1 hidden layers.

    Example:
        >>> dense_network(196, 7)(torch.zeros(2, 1, 14, 14)).shape
        torch.Size([2, 7])
    """
    parts: list[nn.Module] = [nn.Flatten()]
    for before in [n_features, *[hidden] * (depth - 1)]:
        parts += [nn.Linear(before, hidden), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(hidden, n_classes))


def image_network(channels: int, n_classes: int, *, width: int = 16) -> nn.Module:
    """Logits (B, K) of images of any size from 8 pixels on, through four convolutions, each but the first halving the sides.

    Example:
        >>> image_network(3, 5)(torch.zeros(2, 3, 32, 40)).shape
        torch.Size([2, 5])
    """
    parts: list[nn.Module] = []
    sizes = [channels, width, 2 * width, 4 * width, 8 * width]
    for before, after in itertools.pairwise(sizes):
        stride = 1 if after == width else 2
        # Groups, not batches: one row's answer must not depend on the others, nor known inputs' on outliers.
        parts += [nn.Conv2d(before, after, 3, padding=1, stride=stride), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*parts, _Pooled(), nn.Linear(2 * 8 * width, n_classes))


class _Pooled(nn.Module):
    """Mean and maximum over the pixels: how much of something there is, and whether there is any."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
