"""Gaussian components: log densities, responsibilities, sampling, marginals and conditionals.

Shapes: N samples, F features, C components. A covariance kind says what the components share:

========= ========================== ===========
kind      covariances                 a component is
========= ========================== ===========
full      (C, F, F)                   an ellipsoid of its own
tied      (F, F)                      the same ellipsoid, elsewhere
diag      (C, F)                      an ellipsoid along the axes
spherical (C,)                        a ball
========= ========================== ===========

The slow and obvious forms stand here and in ``core.sufficient`` (statistics and maximisation) and define the meaning.
``core.natural_form`` computes the same in two matrix products a block, and is checked against them.

Source: Bishop, Pattern Recognition and Machine Learning, eq. 2.43 (density) and 2.81-2.98 (conditionals, marginals).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "COVARIANCES",
    "Covariance",
    "Gaussians",
    "LostRank",
    "covariance_shape",
    "log_density",
    "precisions_cholesky",
    "whiten",
]

Covariance = Literal["full", "tied", "diag", "spherical"]
COVARIANCES: tuple[str, ...] = get_args(Covariance)
LOG_2PI = math.log(2 * math.pi)


class LostRank(ValueError):
    """A covariance is not positive definite.

    Attributes:
        component: its number, 0 for a tied covariance.
        feature: the feature with the largest part in the direction that has no variance.
    """

    def __init__(self, component: int, feature: int) -> None:
        self.component, self.feature = component, feature
        super().__init__(
            f"the covariance of component {component} is not positive definite: feature {feature} has no variance there "
            "that the other features do not already explain; raise the regularisation or use fewer components"
        )


@dataclass(frozen=True)
class Gaussians:
    """A mixture of C Gaussians in F dimensions: its parameters, in float64 unless told otherwise.

    Attributes:
        weights: shape (C,), >= 0, sum 1.
        means: shape (C, F).
        covariances: shaped as the table at the top of the module says.
        precisions_cholesky: of the inverse covariances: U with U U' = inverse, upper triangular, for full and tied;
            inverse standard deviations for diag and spherical.
        covariance: the kind.
    Example:
        >>> mixture = Gaussians.build([0.5, 0.5], [[0.0], [4.0]], [1.0, 1.0], "spherical")
        >>> mixture.responsibilities(torch.tensor([[2.0]], dtype=torch.float64))
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    precisions_cholesky: Tensor
    covariance: Covariance

    @classmethod
    def build(
        cls,
        weights: Tensor | Sequence[float],
        means: Tensor | Sequence[Sequence[float]],
        covariances: Tensor | Sequence[object],
        covariance: Covariance,
    ) -> Gaussians:
        """From weights, means and covariances, checked.

        Raises:
            ValueError: an unknown kind, shapes that do not fit it, weights that are negative or do not sum to one.
            LostRank: a covariance that is not positive definite.
        """
        w_C, mu_CF, sigma = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covariances))
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance must be one of {list(COVARIANCES)}, got {covariance!r}")
        if mu_CF.dim() != 2:
            raise ValueError(f"means must have shape (components, features), got {tuple(mu_CF.shape)}")
        want = covariance_shape(len(mu_CF), mu_CF.shape[1], covariance)
        if tuple(sigma.shape) != want:
            raise ValueError(f"{covariance} covariances must have shape {want}, got {tuple(sigma.shape)}")
        if w_C.shape != mu_CF.shape[:1]:
            raise ValueError(f"weights must have shape {(len(mu_CF),)}, got {tuple(w_C.shape)}")
        if bool((w_C < 0).any()) or abs(float(w_C.sum()) - 1) > 1e-6:
            raise ValueError(f"weights must be >= 0 and sum to 1, got {w_C.tolist()}")
        return cls(w_C, mu_CF, sigma, precisions_cholesky(sigma, covariance), covariance)

    @property
    def n_components(self) -> int:
        """Number of components."""
        return self.means.shape[0]

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.means.shape[1]

    @property
    def log_weights(self) -> Tensor:
        """Logarithm of the weights, shape (C,); a weight of zero is about -708, so that no product makes NaN of it."""
        return self.weights.clamp(min=torch.finfo(self.weights.dtype).tiny).log()

    def log_joint(self, x: Tensor) -> Tensor:
        """log weight + log density of each component at each sample, shape (N, C)."""
        return log_density(x, self.means, self.precisions_cholesky, self.covariance) + self.log_weights

    def score_samples(self, x: Tensor) -> Tensor:
        """Log density of the mixture at each sample, shape (N,), in nats."""
        return self.log_joint(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Probability of each component given each sample, shape (N, C), rows sum to 1."""
        return self.log_joint(x).softmax(-1)

    def full_covariances(self) -> Tensor:
        """The covariances as matrices, shape (C, F, F), whatever the kind."""
        if self.covariance == "full":
            return self.covariances
        if self.covariance == "tied":
            return self.covariances.expand(self.n_components, -1, -1)
        if self.covariance == "diag":
            return torch.diag_embed(self.covariances)
        return torch.diag_embed(self.covariances[:, None].expand(-1, self.n_features))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean, shape (F,), and covariance, shape (F, F), of the whole mixture."""
        mean_F = self.weights @ self.means
        apart_CF = self.means - mean_F
        within_FF = torch.einsum("c,cij->ij", self.weights, self.full_covariances())
        return mean_F, within_FF + apart_CF.mT @ (self.weights[:, None] * apart_CF)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n draws.

        Returns:
            Samples, shape (n, F), and the component of each, shape (n,), in random order.
        Raises:
            ValueError: n below 1.
        """
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        component_N = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise_NF = torch.randn(n, self.n_features, dtype=self.means.dtype, generator=generator)
        if self.covariance in ("diag", "spherical"):
            spread = self.covariances.sqrt()  # a standard deviation, not the variance
            scaled_NF = noise_NF * (spread[component_N] if self.covariance == "diag" else spread[component_N, None])
        elif self.covariance == "tied":
            scaled_NF = noise_NF @ torch.linalg.cholesky(self.covariances).mT
        else:
            lower_CFF = torch.linalg.cholesky(self.covariances)
            scaled_NF = torch.empty_like(noise_NF)
            for c in range(self.n_components):
                mine = component_N == c
                scaled_NF[mine] = noise_NF[mine] @ lower_CFF[c].mT
        return self.means[component_N] + scaled_NF, component_N

    def marginal(self, features: Sequence[int]) -> Gaussians:
        """The mixture of the named features alone.

        Example:
            >>> both = Gaussians.build([1.0], [[0.0, 5.0]], [[1.0, 4.0]], "diag")
            >>> both.marginal([1]).means
            tensor([[5.]], dtype=torch.float64)
        """
        keep = _features(features, self.n_features)
        if self.covariance == "full":
            sigma = self.covariances[:, keep][:, :, keep]
        elif self.covariance == "tied":
            sigma = self.covariances[keep][:, keep]
        else:
            sigma = self.covariances[:, keep] if self.covariance == "diag" else self.covariances
        return Gaussians(
            self.weights, self.means[:, keep], sigma, precisions_cholesky(sigma, self.covariance), self.covariance
        )

    def condition(self, features: Sequence[int], values: Tensor | Sequence[float]) -> Gaussians:
        """The mixture of the other features, given the values of the named ones.

        Args:
            features: what is known; at least one feature must be left.
            values: shape (len(features),), finite.
        Returns:
            A mixture of the same number of components, of kind full (diag and spherical keep theirs).
        """
        known = _features(features, self.n_features)
        left = torch.tensor([f for f in range(self.n_features) if f not in set(known.tolist())], dtype=torch.long)
        value_K = torch.as_tensor(values, dtype=self.means.dtype)
        if len(left) == 0:
            raise ValueError(f"features must leave one of the {self.n_features} out, got all of them")
        if value_K.shape != known.shape:
            raise ValueError(f"values must have shape {tuple(known.shape)}, got {tuple(value_K.shape)}")
        weights_C = self.marginal(known.tolist()).responsibilities(value_K[None])[0]
        if self.covariance in ("diag", "spherical"):
            return replace(self.marginal(left.tolist()), weights=weights_C)
        sigma_CFF = self.full_covariances()
        known_CKK, cross_CLK = sigma_CFF[:, known][:, :, known], sigma_CFF[:, left][:, :, known]
        gain_CLK = torch.cholesky_solve(cross_CLK.mT, torch.linalg.cholesky(known_CKK)).mT
        means_CL = self.means[:, left] + torch.einsum("clk,ck->cl", gain_CLK, value_K - self.means[:, known])
        rest_CLL = sigma_CFF[:, left][:, :, left] - gain_CLK @ cross_CLK.mT
        rest_CLL = (rest_CLL + rest_CLL.mT) / 2
        return Gaussians(weights_C, means_CL, rest_CLL, precisions_cholesky(rest_CLL, "full"), "full")

    def pick(self, components: Sequence[int]) -> Gaussians:
        """The mixture of some components alone, in that order, their weights summing to one again."""
        picked = list(components)
        shared = self.covariance == "tied"
        return Gaussians(
            self.weights[picked] / self.weights[picked].sum(),
            self.means[picked],
            self.covariances if shared else self.covariances[picked],
            self.precisions_cholesky if shared else self.precisions_cholesky[picked],
            self.covariance,
        )

    def mapped(self, scale: Tensor, shift: Tensor) -> Gaussians:
        """The mixture of ``scale * x + shift``, feature by feature; both of shape (F,), scale > 0.

        A spherical kind needs one scale for all features.
        """
        if self.covariance in ("full", "tied"):
            sigma = self.covariances * scale[:, None] * scale
            upper = self.precisions_cholesky / scale[:, None]
        elif self.covariance == "diag":
            sigma, upper = self.covariances * scale * scale, self.precisions_cholesky / scale
        else:
            sigma, upper = self.covariances * scale[0] * scale[0], self.precisions_cholesky / scale[0]
        return Gaussians(self.weights, self.means * scale + shift, sigma, upper, self.covariance)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Gaussians:
        """The same parameters on another device or in another type."""
        parts = (self.weights, self.means, self.covariances, self.precisions_cholesky)
        weights, means, sigma, upper = (part.to(device=device, dtype=dtype) for part in parts)
        return Gaussians(weights, means, sigma, upper, self.covariance)


def covariance_shape(n_components: int, n_features: int, covariance: Covariance) -> tuple[int, ...]:
    """Shape of the covariances of a kind."""
    c, f = n_components, n_features
    return {"full": (c, f, f), "tied": (f, f), "diag": (c, f), "spherical": (c,)}[covariance]


def precisions_cholesky(covariances: Tensor, covariance: Covariance) -> Tensor:
    """U with U U' = inverse covariance (full, tied: upper triangular), or inverse standard deviations.

    Raises:
        LostRank: with the component and the feature.
    """
    if covariance in ("diag", "spherical"):
        if not bool((covariances > 0).all()):
            component, *feature = (~(covariances > 0)).nonzero()[0].tolist()
            raise LostRank(component, feature[0] if feature else 0)
        return covariances.rsqrt()
    stack = covariances if covariance == "full" else covariances[None]
    # Each matrix is brought to a unit diagonal first: features in units of 1e150 and 1e-150 then lose nothing.
    spread = stack.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    safe = torch.where(spread > 0, spread, 1.0)
    lower, info = torch.linalg.cholesky_ex(stack / safe.unsqueeze(-1) / safe.unsqueeze(-2))
    if bool(info.any()) or not bool(lower.isfinite().all()):
        component = int(((info != 0) | ~lower.isfinite().all(-1).all(-1)).nonzero()[0])
        raise LostRank(component, _weakest_feature(stack[component] / safe[component, :, None] / safe[component]))
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device).expand_as(stack)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    upper = inverse.mT / safe.unsqueeze(-1)
    return upper if covariance == "full" else upper[0]


def log_density(x: Tensor, means: Tensor, precisions_cholesky: Tensor, covariance: Covariance) -> Tensor:
    """Log density of every component at every sample, in nats.

    Args:
        x: shape (N, F).
        means: shape (C, F).
        precisions_cholesky: as :func:`precisions_cholesky` gives them.
        covariance: the kind.
    Returns:
        Shape (N, C).
    Source:
        Bishop, eq. 2.43. The difference to the mean is taken before the product, so nothing cancels.
    """
    log_density_NC = x.new_empty(len(x), len(means))
    for c in range(len(means)):
        y_NF, log_det = whiten(x, means, precisions_cholesky, covariance, c)
        log_density_NC[:, c] = log_det - 0.5 * (x.shape[1] * LOG_2PI + y_NF.square().sum(-1))
    return log_density_NC


def whiten(
    x: Tensor, means: Tensor, precisions_cholesky: Tensor, covariance: Covariance, component: int
) -> tuple[Tensor, Tensor]:
    """Samples in the coordinates in which a component is a standard normal, shape (N, F), and log det of U, scalar."""
    apart_NF = x - means[component]
    if covariance in ("full", "tied"):
        upper_FF = precisions_cholesky[component] if covariance == "full" else precisions_cholesky
        return apart_NF @ upper_FF, upper_FF.diagonal().log().sum()
    inverse = precisions_cholesky[component]
    log_det = inverse.log().sum() if covariance == "diag" else x.shape[1] * inverse.log()
    return apart_NF * inverse, log_det


def _weakest_feature(sigma_FF: Tensor) -> int:
    if not bool(sigma_FF.isfinite().all()):
        return int((~sigma_FF.isfinite()).any(0).nonzero()[0])
    return int(torch.linalg.eigh(sigma_FF).eigenvectors[:, 0].abs().argmax())


def _features(features: Sequence[int], n_features: int) -> Tensor:
    found = list(features)
    if not found or len(set(found)) != len(found) or not all(0 <= f < n_features for f in found):
        raise ValueError(f"features must be different numbers from 0 to {n_features - 1}, at least one, got {found}")
    return torch.tensor(found, dtype=torch.long)
