"""Point clouds in the plane that densities are tried on: they look easy and are hard to fit.

Shapes: N points, 2 coordinates.
Source: the sets are those of the flow and energy literature, e.g. Grathwohl et al. 2018 (1810.01367), fig. 2; sizes are ours.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PLANAR", "planar"]


def _eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    angle_N = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centre_N2 = 2.8 * torch.stack([angle_N.cos(), angle_N.sin()], 1)
    return centre_N2 + 0.35 * torch.randn(n, 2, generator=generator)


def _pinwheel(n: int, generator: torch.Generator) -> Tensor:
    arm_N = torch.randint(5, (n,), generator=generator) * (2 * math.pi / 5)
    radius_N = 2 + 0.6 * torch.randn(n, generator=generator)
    across_N = 0.2 * torch.randn(n, generator=generator)
    turn_N = arm_N + 0.5 * (radius_N - 2)
    return torch.stack(
        [radius_N * turn_N.cos() - across_N * turn_N.sin(), radius_N * turn_N.sin() + across_N * turn_N.cos()], 1
    )


def _spirals(n: int, generator: torch.Generator) -> Tensor:
    turn_N = torch.rand(n, generator=generator).sqrt() * 3 * math.pi
    side_N = torch.randint(2, (n,), generator=generator) * 2.0 - 1
    point_N2 = (side_N * turn_N / 3)[:, None] * torch.stack([-turn_N.cos(), turn_N.sin()], 1)
    return point_N2 + 0.15 * torch.randn(n, 2, generator=generator)


def _checkerboard(n: int, generator: torch.Generator) -> Tensor:
    column_N = torch.rand(n, generator=generator) * 4 - 2
    row_N = torch.rand(n, generator=generator) + 2 * torch.randint(2, (n,), generator=generator) - 2
    return 1.5 * torch.stack([column_N, row_N + column_N.floor() % 2], 1)


PLANAR: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "8 gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
    "pinwheel": _pinwheel,
    "spirals": _spirals,
}


def planar(name: str, n: int, *, seed: int = 0) -> Tensor:
    """n points of a set, shape (n, 2), float32, within about 4 of the origin.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    Example:
        >>> planar("pinwheel", 3).shape
        torch.Size([3, 2])
    """
    if name not in PLANAR:
        raise ValueError(f"name must be one of {sorted(PLANAR)}, got {name!r}")
    return PLANAR[name](n, torch.Generator().manual_seed(seed))
