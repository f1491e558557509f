"""Least squares with an operator that is only given as products: LSMR, on any device.

Source: Fong and Saunders 2011 (1006.0758), algorithm LSMR without damping; norms by its sec. 3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LeastSquares", "lsmr"]


@dataclass(frozen=True)
class LeastSquares:
    """What the iteration found.

    Attributes:
        x: the solution.
        iterations: products with the operator and its adjoint.
        converged: whether the stopping rule was met.
        residual: ||A^T r|| / (||A|| ||r||) at the end, 0 at a solution.
    """

    x: Tensor
    iterations: int
    converged: bool
    residual: float


def lsmr(
    product: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    tol: float = 1e-10,
    max_iterations: int = 1000,
) -> LeastSquares:
    """x that minimises ||A x - b||, from x = 0.

    Args:
        product: x of shape (n,) -> A x of shape (m,).
        adjoint: y of shape (m,) -> A^T y of shape (n,).
        b: right-hand side, shape (m,).
        tol: stop when ||A^T r|| <= tol ||A|| ||r||, or ||r|| <= tol (||A|| ||x|| + ||b||).
        max_iterations: give up after so many.
    """
    beta = float(b.norm())
    u = b / beta if beta > 0 else b.clone()
    v = adjoint(u)
    alpha = float(v.norm())
    x = torch.zeros_like(v)
    if alpha * beta == 0:
        return LeastSquares(x, 0, True, 0.0)
    v = v / alpha
    h, hbar = v.clone(), torch.zeros_like(v)
    zetabar, alphabar = alpha * beta, alpha
    rho, rhobar, cbar, sbar = 1.0, 1.0, 1.0, 0.0
    betadd, betad, rhodold, tautildeold, thetatilde, zeta = beta, 0.0, 1.0, 0.0, 0.0, 0.0
    norm_b, norm_a_squared, ratio = beta, alpha**2, 1.0
    for iteration in range(1, max_iterations + 1):
        u = product(v).add_(u, alpha=-alpha)
        beta = float(u.norm())
        if beta > 0:
            u /= beta
            v = adjoint(u).add_(v, alpha=-beta)
            alpha = float(v.norm())
            if alpha > 0:
                v /= alpha
        # Two plane rotations: the bidiagonal matrix to upper bidiagonal, then that one's transpose.
        rhoold = rho
        c, s, rho = _rotation(alphabar, beta)
        thetanew, alphabar = s * alpha, c * alpha
        rhobarold, zetaold = rhobar, zeta
        thetabar = sbar * rho
        cbar, sbar, rhobar = _rotation(cbar * rho, thetanew)
        zeta, zetabar = cbar * zetabar, -sbar * zetabar
        hbar.mul_(-(thetabar * rho) / (rhoold * rhobarold)).add_(h)
        x.add_(hbar, alpha=zeta / (rho * rhobar))
        h.mul_(-thetanew / rho).add_(v)
        # Norm of the residual, by a third rotation.
        betahat, betadd = c * betadd, -s * betadd
        thetatildeold = thetatilde
        ctildeold, stildeold, rhotildeold = _rotation(rhodold, thetabar)
        thetatilde, rhodold = stildeold * rhobar, ctildeold * rhobar
        betad = -stildeold * betad + ctildeold * betahat
        tautildeold = (zetaold - thetatildeold * tautildeold) / rhotildeold
        taud = (zeta - thetatilde * tautildeold) / rhodold
        norm_r = ((betad - taud) ** 2 + betadd**2) ** 0.5
        norm_a_squared += beta**2
        norm_a = norm_a_squared**0.5
        norm_a_squared += alpha**2
        norm_ar = abs(zetabar)
        ratio = norm_ar / (norm_a * norm_r) if norm_r > 0 else 0.0
        if ratio <= tol or norm_r <= tol * (norm_a * float(x.norm()) + norm_b):
            return LeastSquares(x, iteration, True, ratio)
    return LeastSquares(x, max_iterations, False, ratio)


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """(c, s, r) with c a + s b = r and -s a + c b = 0."""
    r = (a * a + b * b) ** 0.5
    return (1.0, 0.0, 0.0) if r == 0 else (a / r, b / r, r)
