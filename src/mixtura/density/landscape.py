"""How flat noise contrast is, on the smallest example: the mean of a Gaussian, by quadrature and without sampling.

Data N(R, 1), noise N(0, 1), model log p0 = -(x - θ)² / 2. The likelihood has second derivative 1 in θ for every R, so gradient
descent with step 1 lands in one step. Noise contrast in (θ, c) has a Hessian at its optimum whose smallest eigenvalue falls
like exp(-R² / 8) and worse: the classifier is right everywhere, and its loss says nothing any more.

One coincidence to know: at θ = 0 with the right c the model is the noise law, the classifier answers one half everywhere, and
the gradient is (-R / 2, 0): a step of exactly 2 lands on the optimum for any R. Steps are therefore counted from a constant
that is off by one. All of this is about expectations: with noise points sampled from N(0, 1) the weights of the likelihood
explode for R >= 4, and there it is noise contrast that does better. The remedy is a noise law that covers the data.

Source: Jiang et al. 2023 (2306.07485), the Gaussian mean example; Liu et al. 2021 (2110.11271), sec. 3.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

__all__ = [
    "LOG_Z",
    "contrast_gradient",
    "contrast_hessian",
    "contrast_steps",
    "fewest_contrast_steps",
    "likelihood_gradient",
]

LOG_Z = 0.5 * math.log(2 * math.pi)
REACH = 14.0  # standard deviations beyond both means that the grid covers
Vector = NDArray[np.float64]


def _grid(distance: float, points: int) -> tuple[Vector, Vector, Vector]:
    """Grid points and the mass of data and noise at each; the trapezoid rule is exact to rounding for Gaussians."""
    x = np.linspace(-REACH, distance + REACH, points)
    width = x[1] - x[0]
    return x, *(width * np.exp(-0.5 * (x - mean) ** 2 - LOG_Z) for mean in (distance, 0.0))


def likelihood_gradient(distance: float, theta: float, *, points: int = 4001) -> float:
    """dF/dθ of the expected negative log-likelihood, with log Z by importance weights against the noise law."""
    x, data, noise = _grid(distance, points)
    log_weight = -0.5 * (x - theta) ** 2 + 0.5 * x**2 + LOG_Z
    mass = noise * np.exp(log_weight)
    return float(-(data * (x - theta)).sum() + (mass * (x - theta)).sum() / mass.sum())


def contrast_gradient(distance: float, theta: float, log_z: float, *, points: int = 4001) -> Vector:
    """(dL/dθ, dL/dc) of the expected logistic loss, as many noise as data points."""
    x, data, noise = _grid(distance, points)
    h = -0.5 * (x - theta) ** 2 + 0.5 * x**2 + LOG_Z - log_z
    pull = noise * expit(h) - data * expit(-h)
    return np.array([(pull * (x - theta)).sum(), -pull.sum()])


def contrast_hessian(distance: float, *, points: int = 40_001) -> Vector:
    """Hessian of the expected logistic loss at its optimum θ = R, c = log Z, shape (2, 2)."""
    x, data, noise = _grid(distance, points)
    h = -0.5 * (x - distance) ** 2 + 0.5 * x**2
    doubt = (data + noise) * expit(h) * expit(-h)
    slope_2N = np.stack([x - distance, -np.ones_like(x)])
    return (slope_2N * doubt) @ slope_2N.T


def contrast_steps(distance: float, step: float, *, log_z: float, most: int = 1000, within: float = 0.05) -> int:
    """Gradient steps of noise contrast from θ = 0 until both θ and c are ``within`` of the optimum; ``most`` + 1 if never."""
    theta, c = 0.0, log_z
    for taken in range(1, most + 1):
        slope = contrast_gradient(distance, theta, c, points=1201)
        theta, c = theta - step * slope[0], c - step * slope[1]
        if abs(theta - distance) <= within and abs(c - LOG_Z) <= within:
            return taken
        if not abs(theta) < 1e3:
            break
    return most + 1


def fewest_contrast_steps(distance: float, *, most: int = 1000, tries: int = 40) -> int:
    """Steps with the best of ``tries`` constant step sizes between 0.2 and 20, from θ = 0 and c one below log Z."""
    best = most
    for step in np.geomspace(0.2, 20, tries):
        best = min(best, contrast_steps(distance, float(step), log_z=LOG_Z - 1, most=best))
    return best
