"""Evidence of a process with an uncertain scale: factor of the noisy Gram matrix, and its best kernel variances and noise.

Shapes: N samples, C outputs. The noise lives inside the process, K_y = K + noise I, so the scale multiplies it too.
Source: Scale Mixtures of Neural Network Gaussian Processes (2107.01408), sec. 3; gradients as in Rasmussen and Williams 2006,
eq. 5.9, with the posterior mean of 1/s in the place of 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from mixtura.density.scale_priors import Integration, Posterior, Prior, condition

__all__ = ["Evidence", "NotPositiveDefinite", "evidence", "factor", "maximise"]

log = logging.getLogger(__name__)

JITTERS = (0.0, *(10.0**e for e in range(-10, -3)))  # relative to the mean of the diagonal
# Where the variances and the noise over the kernel's own size are sought.
BOUNDS = {"weight_variance": (1e-2, 1e2), "bias_variance": (1e-4, 1e2), "noise": (1e-8, 1e3)}


class NotPositiveDefinite(ValueError):
    """A Gram matrix that no tried jitter made positive definite."""


@dataclass(frozen=True)
class Evidence:
    """What one factorisation says of the targets.

    Attributes:
        cholesky: lower factor of K_y, shape (N, N).
        coefficients: K_y^-1 Y, shape (N, C).
        quadratic: y' K_y^-1 y, summed over outputs.
        posterior: of the scale.
        log_evidence: log density of the targets, nats.
        jitter: what had to be added to the diagonal.
    """

    cholesky: Tensor
    coefficients: Tensor
    quadratic: float
    posterior: Posterior
    log_evidence: float
    jitter: float


def factor(gram: Tensor, noise: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of gram + noise I and the jitter that it took.

    Args:
        gram: symmetric, shape (N, N), float64; not changed.
        noise: >= 0.
    Raises:
        NotPositiveDefinite: even the largest jitter, 1e-4 of the mean of the diagonal, does not help.
    """
    size = float(gram.diagonal().mean())
    for relative in JITTERS:
        jitter = relative * size
        noisy = gram.clone()
        noisy.diagonal().add_(noise + jitter)
        lower, info = torch.linalg.cholesky_ex(noisy)
        if int(info) == 0 and bool(lower.diagonal().isfinite().all()):
            if jitter:
                log.warning(
                    "the Gram matrix of %d inputs is not positive definite to rounding; added %.1e to its diagonal "
                    "(drop repeated inputs or raise noise)",
                    len(gram),
                    jitter,
                )
            return lower, jitter
    raise NotPositiveDefinite(
        f"the Gram matrix of {len(gram)} inputs is not positive definite, not even with 1e-10 to 1e-4 of its mean diagonal "
        f"({size:.3g}) added; the kernel is no covariance, or noise={noise:g} is too small for inputs this close"
    )


def evidence(
    gram: Tensor,
    noise: float,
    targets: Tensor,
    prior: Prior | Posterior,
    integration: Integration = "auto",
    *,
    seed: int = 0,
) -> Evidence:
    """Log evidence of targets (N, C) under the process with this Gram matrix, and what it took.

    Example:
        >>> from mixtura.density.scale_priors import FixedScale
        >>> found = evidence(torch.eye(2).double(), 0.0, torch.zeros(2, 1).double(), FixedScale())
        >>> round(found.log_evidence, 4)        # two standard normal values at 0: -log(2 pi)
        -1.8379
    """
    lower, jitter = factor(gram, noise)
    coefficients_NC = torch.cholesky_solve(targets, lower)
    quadratic = float((targets * coefficients_NC).sum())
    posterior, log_density = condition(prior, quadratic, targets.numel(), integration, seed=seed)
    log_det = 2 * float(lower.diagonal().log().sum())
    return Evidence(lower, coefficients_NC, quadratic, posterior, log_density - targets.shape[1] * log_det / 2, jitter)


def maximise(
    gram_at: Callable[..., Tensor],
    start: dict[str, float],
    targets: Tensor,
    prior: Prior,
    integration: Integration,
    *,
    n_restarts: int,
    seed: int,
) -> dict[str, float]:
    """Kernel variances and noise of largest evidence, by L-BFGS on their logarithms.

    Args:
        gram_at: keyword arguments named as in ``start`` except ``noise``, as tensors that need gradients -> Gram matrix.
        start: first values, ``noise`` among them.
        targets: shape (N, C).
        prior, integration: of the scale.
        n_restarts: starts beyond the first, drawn log-normally around it.
        seed: of those draws.
    Returns:
        The best values, keys of ``start``.
    """
    names = list(start)
    with torch.no_grad():
        size = float(
            gram_at(**{n: torch.tensor(v, dtype=torch.float64) for n, v in start.items() if n != "noise"})
            .diagonal()
            .mean()
        )
    unit = np.array([size if name == "noise" else 1.0 for name in names])
    bounds: Any = [tuple(math.log(edge * u) for edge in BOUNDS[name]) for name, u in zip(names, unit, strict=True)]

    def loss(theta: Any) -> Any:
        leaves = {
            n: torch.tensor(math.exp(t), dtype=torch.float64, requires_grad=True)
            for n, t in zip(names, theta, strict=True)
        }
        noise = float(leaves.pop("noise").detach())
        gram = gram_at(**leaves)
        try:
            found = evidence(gram.detach(), noise, targets, prior, integration, seed=seed)
        except NotPositiveDefinite:
            return 1e300, np.zeros(len(names))
        # d log p / dK_y: the scale enters through E[1/s | y] alone.
        slope_NN = 0.5 * found.posterior.mean_precision * found.coefficients @ found.coefficients.T
        slope_NN -= 0.5 * targets.shape[1] * torch.cholesky_inverse(found.cholesky)
        if leaves:
            gram.backward(slope_NN)  # type: ignore[no-untyped-call]
        by = {
            n: float(leaf.grad if leaf.grad is not None else 0.0) * float(leaf.detach()) for n, leaf in leaves.items()
        }
        by["noise"] = noise * float(slope_NN.trace())
        return -found.log_evidence, -np.array([by[n] for n in names])

    rng = np.random.default_rng(seed)
    first = np.clip([math.log(start[n]) for n in names], *np.transpose(bounds))
    best: tuple[float, np.ndarray] | None = None
    for turn in range(n_restarts + 1):
        begin = first if turn == 0 else np.clip(first + rng.normal(scale=1.5, size=len(names)), *np.transpose(bounds))
        found = optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 100})
        if best is None or found.fun < best[0]:
            best = (float(found.fun), found.x)
    assert best is not None
    return {n: math.exp(t) for n, t in zip(names, best[1], strict=True)}
