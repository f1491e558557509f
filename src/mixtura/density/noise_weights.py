"""The weights p0 / q of noise points: drawn, evaluated beside the data, and summed over all processes.

Under torch.distributed every process sees its own points, and the sums are those of all of them, so that what is followed is
one number everywhere. Shares may be uneven or, of the data, empty.

Shapes: B data points, J noise points, R processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixtura.core.training import NonFiniteLoss
from mixtura.density.noise_laws import NoiseLaw

__all__ = ["LogP0", "NoiseSums", "draw_noise", "evaluate_both", "noise_sums", "not_finite"]

LogP0 = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NoiseSums:
    """What all processes together know of a step.

    Attributes:
        log_mean: log of the mean weight p0 / q, in nats: the step's estimate of log Z.
        ess_fraction: (Σ w)² / Σ w² over the number of noise points, in (0, 1].
        n_noise: number of noise points of all processes.
        n_data: number of data points of all processes.
        mean_log_p0: mean of log p0 over the data, in nats.
        world: number of processes.
    """

    log_mean: float
    ess_fraction: float
    n_noise: int
    n_data: int
    mean_log_p0: float
    world: int


def draw_noise(noise: NoiseLaw, x: Tensor, given: Tensor | None, n: int, generator: torch.Generator | None) -> Tensor:
    """Noise points in the shape and dtype of the data, shape (J, ...)."""
    if x.dim() < 2:
        raise ValueError(f"x must have shape (points, features...), got {tuple(x.shape)}; one feature is x[:, None]")
    if given is None:
        with torch.no_grad():
            given = noise.sample(n or len(x), generator)
        given = given.to(x).reshape(-1, *x.shape[1:])
    if given.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"noise_batch must have points of shape {tuple(x.shape[1:])} as x has, got {tuple(given.shape[1:])}"
        )
    if len(given) == 0:
        raise ValueError("noise_batch must hold at least one point, got 0")
    return given


def evaluate_both(log_p0: LogP0, x: Tensor, z: Tensor) -> Tensor:
    """Log p0 at data and noise in one call, float64, shape (B + J,)."""
    n = len(x) + len(z)
    values = log_p0(torch.cat([x, z]))
    if values.shape != (n,):
        raise ValueError(f"log_p0 must give one value a point, shape ({n},), got {tuple(values.shape)}")
    return values.double()


def noise_sums(log_x_B: Tensor, log_w_J: Tensor, step: int) -> NoiseSums:
    """Sums over the noise and data points of all processes, computed without a gradient."""
    with torch.no_grad():
        # Sums of weights and of their squares, and of log p0.
        row = torch.cat([torch.stack([log_w_J, 2 * log_w_J]).logsumexp(1), log_x_B.sum()[None]])
        if dist.is_available() and dist.is_initialized() and (world := dist.get_world_size()) > 1:
            row = torch.cat([row, row.new_tensor([len(log_w_J), len(log_x_B)])])
            rows = [torch.empty_like(row) for _ in range(world)]
            dist.all_gather(rows, row)
            rows_R5 = torch.stack(rows)
            log_sum, log_squares = rows_R5[:, :2].logsumexp(0).tolist()
            total, n_noise, n_data = rows_R5[:, 2:].sum(0).tolist()
        else:
            world, n_noise, n_data = 1, len(log_w_J), len(log_x_B)
            log_sum, log_squares, total = row.tolist()  # the one wait for the device in a step
    if not (math.isfinite(log_sum) and math.isfinite(total)):
        raise not_finite(log_x_B, log_w_J, step)
    return NoiseSums(
        log_mean=log_sum - math.log(n_noise),
        ess_fraction=math.exp(2 * log_sum - log_squares) / n_noise,
        n_noise=int(n_noise),
        n_data=int(n_data),
        mean_log_p0=total / max(1.0, n_data),
        world=world,
    )


def not_finite(log_x_B: Tensor, log_w_J: Tensor, step: int) -> NonFiniteLoss:
    bad_data, bad_noise = int((~log_x_B.isfinite()).sum()), int((log_w_J.isnan() | log_w_J.isposinf()).sum())
    return NonFiniteLoss(
        f"log_p0 is not finite at step {step}: {bad_data} of {len(log_x_B)} data points and {bad_noise} of "
        f"{len(log_w_J)} noise points are NaN or infinite (or no noise point has any weight); lower the learning rate"
    )
