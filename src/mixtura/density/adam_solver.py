"""The paper's own algorithm: joint gradient steps on field, kernel and precisions.

Adam on the log joint, everything at once, from u = 0 and precisions 1. Slow (1e5 steps and more), kept as the reference
that the profile solver is checked against.

Differences from the authors' program: the covariance is factored by Cholesky instead of LU; a slow trend is one more
component of the kernel (a sum of independent processes is one process with the sum of their kernels), learned together
with the rest instead of after it; the step with the best log joint is kept, not the one with the least error.

Source: 2311.04465, sec. 4.3 and appendix.
"""

from collections.abc import Sequence

import torch

from mixtura.core.progress import bar
from mixtura.density.grid_problem import GridProblem
from mixtura.density.log_joint import Precisions, plain_log_joint
from mixtura.density.profile_solver import Fit
from mixtura.density.spectral_mixture import SpectralMixture1D

__all__ = ["adam_fit"]


def adam_fit(
    kernels: Sequence[SpectralMixture1D],
    problem: GridProblem,
    *,
    n_steps: int,
    boundary_weight: float,
    jitter: float,
    lr: float = 1e-2,
) -> Fit:
    """Maximise the log joint by Adam; the kernels end at the best step's parameters.

    Args:
        n_steps: Adam steps, >= 0.
        lr: the paper's rate for everything.
    Raises:
        RuntimeError: the log joint is no longer finite.
    """
    device = problem.source.device
    u = torch.zeros(problem.shape, dtype=torch.float64, device=device, requires_grad=True)
    log_tau = torch.zeros(2, dtype=torch.float64, device=device, requires_grad=True)
    parameters = [u, log_tau, *(p for kernel in kernels for p in kernel.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    best, kept = -torch.inf, [p.detach().clone() for p in parameters]
    history: list[dict[str, float]] = []
    with bar(desc="adam", unit="step", total=n_steps + 1) as shown:
        for step in range(n_steps + 1):
            optimizer.zero_grad(set_to_none=True)
            value = plain_log_joint(
                kernels, problem, u, log_tau[0], log_tau[1], boundary_weight=boundary_weight, jitter=jitter
            )
            if not torch.isfinite(value):
                raise RuntimeError(f"the log joint became {value.item()} at step {step}; raise jitter={jitter:g}")
            reached = value.item()
            history.append({"log_joint": reached})
            if reached > best:
                best, kept = reached, [p.detach().clone() for p in parameters]
            shown.update()
            if step < n_steps:
                (-value).backward()
                optimizer.step()
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    log_boundary, log_equation = log_tau.detach().tolist()
    return Fit(u.detach(), Precisions(log_boundary, log_equation), best, history)
