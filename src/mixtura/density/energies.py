"""Built-in energies, and chains that walk on one.

A built-in energy tilts a base law: log p0 = net(y) + log base(x), with y the standardised features. It falls off in every
direction as the base does, so that it has a normalising constant at all; with the noise law as base the weights p0 / q are
exp(net), which starts at 1.

Shapes: N samples. Source of the chains: Roberts and Tweedie 1996, eq. 1.5 (Metropolis-adjusted Langevin).
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixtura.density.noise_laws import NoiseLaw

__all__ = ["ENERGIES", "Tilted", "evaluated", "langevin", "tilted"]

BLOCK = 8192  # rows an energy is evaluated on at once


class Tilted(nn.Module):
    """Log p0 = net(y) + log base(x), with y the features in units of the data's spread.

    Args:
        net: (N, ...) -> (N, 1).
        base: a law over flattened samples; no part of the state.
        feature_shape: of a sample.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, base: NoiseLaw, feature_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.base = base
        self.register_buffer("shift", torch.zeros(feature_shape))
        self.register_buffer("scale", torch.ones(feature_shape))

    def standardise(self, data: Tensor) -> None:
        """Take shift and scale from the data, shape (N, ...)."""
        self.shift.copy_(data.mean(0))
        self.scale.copy_(data.std(0, correction=0))

    def forward(self, x: Tensor) -> Tensor:
        """Log p0, shape (N,), float64."""
        tilt_N = self.net((x - self.shift) / self.scale).squeeze(-1).double()
        return tilt_N + self.base.log_prob(x.flatten(1)).to(tilt_N)


def _ready(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """A layer whose units bend at different places inside the data.

    With torch's own start, narrow weights and biases, a thousand steps fit the ring of eight Gaussians and not the eight:
    3.24 nats where this start reaches 2.84 and the entropy is 2.82.
    """
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.uniform_(layer.bias, -1.0, 1.0)
    return layer


def _mlp(feature_shape: tuple[int, ...], width: int, depth: int) -> nn.Sequential:
    sizes = [math.prod(feature_shape), *[width] * depth]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (_ready(nn.Linear(a, b)), nn.SiLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], 1))


def _conv(feature_shape: tuple[int, ...], width: int, depth: int) -> nn.Sequential:
    """Convolutions of stride 2, so that each layer halves the sides."""
    if len(feature_shape) != 3:
        raise ValueError(
            f"energy='conv' needs images of shape (n, channels, height, width), got {len(feature_shape) + 1} axes"
        )
    channels = [feature_shape[0], *[width] * depth]
    pairs = itertools.pairwise(channels)
    convolutions = (_ready(nn.Conv2d(a, b, 3, stride=2, padding=1)) for a, b in pairs)
    layers = [part for convolution in convolutions for part in (convolution, nn.SiLU())]
    sides = [math.ceil(edge / 2**depth) for edge in feature_shape[1:]]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * math.prod(sides), 1))


ENERGIES: dict[str, Callable[[tuple[int, ...], int, int], nn.Sequential]] = {"mlp": _mlp, "conv": _conv}


def tilted(kind: str, base: NoiseLaw, feature_shape: tuple[int, ...], width: int, depth: int) -> Tilted:
    """A built-in energy over a base law, which it equals before training.

    Args:
        kind: ``"mlp"`` or ``"conv"`` (images, stride 2 a layer).
        base: a law over flattened samples.
        feature_shape: of a sample.
        width, depth: of the hidden layers.
    """
    net = ENERGIES[kind](feature_shape, width, depth)
    for parameter in net[-1].parameters():
        nn.init.zeros_(parameter)
    return Tilted(net, base, feature_shape)


def evaluated(log_p0: nn.Module, x: Tensor) -> Tensor:
    """Log p0 without gradient, float64, shape (N,), in blocks of rows."""
    with torch.no_grad():
        return torch.cat([log_p0(block) for block in x.split(BLOCK)]).double()


def langevin(
    log_p0: Callable[[Tensor], Tensor], x: Tensor, step: Tensor, n_steps: int, generator: torch.Generator
) -> Tensor:
    """Chains after some Metropolis-adjusted Langevin steps: they keep the law exp(log p0), whatever the step.

    Args:
        log_p0: (N, ...) -> (N,), differentiable.
        x: where the chains start, shape (N, ...).
        step: standard deviation of the noise of a step, a number a feature, > 0.
        n_steps: >= 0.
        generator: source of chance.
    Returns:
        Shape (N, ...).
    """

    def value_and_slope(at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        value_N = log_p0(at)
        return value_N.detach(), torch.autograd.grad(value_N.sum(), at)[0]

    def log_move(to: Tensor, start: Tensor, slope: Tensor) -> Tensor:
        return -0.5 * ((to - start - 0.5 * step**2 * slope) / step).flatten(1).square().sum(1)

    value_N, slope = value_and_slope(x)
    for _ in range(n_steps):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        there = x + 0.5 * step**2 * slope + step * noise
        there_value_N, there_slope = value_and_slope(there)
        odds_N = there_value_N - value_N + log_move(x, there, there_slope) - log_move(there, x, slope)
        taken_N = torch.rand(len(x), generator=generator, dtype=x.dtype).log() < odds_N
        taken = taken_N.reshape(-1, *[1] * (x.dim() - 1))
        x, slope = torch.where(taken, there, x), torch.where(taken, there_slope, slope)
        value_N = torch.where(taken_N, there_value_N, value_N)
    return x.detach()
