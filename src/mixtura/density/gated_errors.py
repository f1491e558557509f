"""How sure the parameters of a gated regression are: Fisher information, its flat directions, standard errors.

Along a flat direction the density does not change at all, so no number of samples tells where on it the truth lies. What
does not move along it still has an error bar: slopes over temperature, for a linear gate.

Shapes: P parameters, those of `gated_law.Layout`, with the temperature and the variances themselves and not their logs.
"""

from __future__ import annotations

import numpy as np
import torch

from mixtura.density.gated_law import Layout, Likelihood, Parts

__all__ = ["FLAT", "fisher_information", "flat_directions", "standard_errors"]

FLAT = 1e-10  # eigenvalue of the information with unit diagonal, below which a direction is flat


def fisher_information(likelihood: Likelihood, theta: torch.Tensor) -> np.ndarray:
    """Mean outer product of the pairs' gradients at one theta (P,), shape (P, P), by variance and temperature themselves."""
    layout = likelihood.layout
    parts = layout.split(theta[None])
    ones = Parts(*(torch.ones_like(part) for part in parts))
    jacobian_P = layout.join(
        ones._replace(log_variance=(-parts.log_variance).exp(), log_temperature=(-parts.log_temperature).exp())
    )[0]
    found = likelihood.information(theta[None])[0] * jacobian_P[:, None] * jacobian_P
    return found.cpu().numpy()


def flat_directions(fisher: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Relative eigenvalues over the free parameters, rising, and their directions as columns, in units of unit diagonal."""
    information = fisher[np.ix_(free, free)]
    scale = np.sqrt(np.maximum(np.diagonal(information), 1e-300))
    values, vectors = np.linalg.eigh(information / scale[:, None] / scale)
    return values / max(values[-1], 1e-300), vectors


def standard_errors(
    layout: Layout, fisher: np.ndarray, free: np.ndarray, theta: torch.Tensor, n: float
) -> dict[str, np.ndarray]:
    """Standard error of every parameter, and of slopes and biases over the temperature.

    Args:
        layout: of theta.
        fisher: from `fisher_information`.
        free: which parameters were learned, boolean (P,).
        theta: shape (P,).
        n: number of pairs.
    Returns:
        Arrays shaped as the estimator's attributes; NaN for what a flat direction moves, 0 for what was held fixed.
    """
    values, vectors = flat_directions(fisher, free)
    scale = np.sqrt(np.maximum(np.diagonal(fisher)[free], 1e-300))
    flat = values < FLAT
    information = fisher[np.ix_(free, free)] / scale[:, None] / scale
    strength = np.einsum("ij,ik,kj->j", vectors, information, vectors)
    safe = np.where(flat, np.inf, np.maximum(strength, 1e-300))

    def error(direction_P: np.ndarray) -> float:
        along = vectors.T @ (direction_P[free] / scale)
        # A quantity that a flat direction moves; rounding leaves about 1e-8 of one that it does not.
        if np.linalg.norm(along[flat]) > 1e-6 * np.linalg.norm(along):
            return float("nan")
        return float(np.sqrt((along**2 / safe).sum() / n))

    index = layout.split(torch.arange(layout.n_parameters)[None])
    parts = layout.split(theta[None])
    tau = float(parts.log_temperature.exp())
    eye = np.eye(layout.n_parameters)

    def errors(at: torch.Tensor) -> np.ndarray:
        return np.array([error(eye[p]) for p in at.flatten().tolist()]).reshape(at.shape)

    def free_of_scale(at: torch.Tensor, values: torch.Tensor) -> np.ndarray:
        last = eye[-1]
        pairs = zip(at.flatten().tolist(), values.flatten().tolist(), strict=True)
        return np.array([error(eye[p] / tau - v / tau**2 * last) for p, v in pairs]).reshape(at.shape)

    return {
        "gate_weights": errors(index.slope[0]),
        "gate_bias": errors(index.bias[0]),
        "coef": errors(index.coef[0]),
        "intercept": errors(index.intercept[0]),
        "variance": errors(index.log_variance[0]),
        "temperature": errors(index.log_temperature)[0],
        "scale_free_weights": free_of_scale(index.slope[0], parts.slope[0]),
        "scale_free_bias": free_of_scale(index.bias[0], parts.bias[0]),
    }
