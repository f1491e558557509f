"""Sufficient statistics of Gaussian components, which add, and the mixture that maximises them.

Batches and processes add statistics; nothing else of the samples is needed. Shapes and kinds as in ``core.gaussian``:
N samples, F features, C components.

Source: Dempster, Laird and Rubin 1977, sec. 4.3; Bishop, Pattern Recognition and Machine Learning, eq. 9.23-9.28.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.core.gaussian import Covariance, Gaussians, precisions_cholesky

__all__ = ["Statistics", "maximise", "statistics"]


@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of weighted samples under responsibilities; those of two sets of samples add.

    Attributes:
        weight: sum of responsibilities, shape (C,).
        first: sum of responsibility times sample, shape (C, F).
        second: sum of responsibility times outer product, shaped as the kind's covariances: (C, F, F); summed over
            components (F, F) for tied; squares (C, F) for diag; squared lengths (C,) for spherical.
        log_likelihood: sum of weight times log density of the mixture, a scalar in nats.
    All are float64, whatever the type of the samples.
    """

    weight: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def scaled(self, factor: float) -> Statistics:
        """All sums times ``factor``: those of samples that weigh ``factor`` times as much."""
        return Statistics(*(part * factor for part in self._parts()))

    def mapped(self, scale: Tensor, shift: Tensor, covariance: Covariance) -> Statistics:
        """The statistics of ``scale * x + shift``, feature by feature; both have shape (F,).

        A spherical kind needs one scale for all features. The log likelihood stays that of the samples as they were.
        """
        moved = self.first * scale
        if covariance == "full":
            cross = moved.unsqueeze(-1) * shift
            second = self.second * torch.outer(scale, scale) + cross + cross.mT
            second = second + self.weight[:, None, None] * torch.outer(shift, shift)
        elif covariance == "tied":
            cross = torch.outer(moved.sum(0), shift)
            second = self.second * torch.outer(scale, scale) + cross + cross.mT
            second = second + self.weight.sum() * torch.outer(shift, shift)
        elif covariance == "diag":
            second = self.second * scale**2 + 2 * moved * shift + self.weight[:, None] * shift**2
        else:
            second = self.second * scale[0] ** 2 + 2 * moved @ shift + self.weight * shift.square().sum()
        return Statistics(self.weight, moved + self.weight[:, None] * shift, second, self.log_likelihood)

    def as_vector(self) -> Tensor:
        """All numbers in one float64 vector, so that processes add them in one call."""
        return torch.cat([part.reshape(-1) for part in self._parts()])

    def from_vector(self, vector: Tensor) -> Statistics:
        """Statistics of this one's shapes with the numbers of ``vector``."""
        parts = torch.split(vector, [part.numel() for part in self._parts()])
        return Statistics(*(new.reshape(old.shape) for new, old in zip(parts, self._parts(), strict=True)))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.first, self.second, self.log_likelihood


def statistics(
    x: Tensor,
    responsibilities: Tensor,
    covariance: Covariance,
    *,
    weights: Tensor | None = None,
    log_likelihood: Tensor | None = None,
) -> Statistics:
    """Sufficient statistics of a block of samples.

    Args:
        x: shape (N, F).
        responsibilities: shape (N, C).
        covariance: the kind.
        weights: of the samples, shape (N,), >= 0; one each by default.
        log_likelihood: log density of each sample, shape (N,), where it is known.
    """
    x_NF, r_NC = x.double(), responsibilities.double()
    if weights is not None:
        r_NC = r_NC * weights.double()[:, None]
    if covariance == "full":
        second = torch.einsum("nc,ni,nj->cij", r_NC, x_NF, x_NF)
    elif covariance == "tied":
        second = x_NF.mT @ (r_NC.sum(1, keepdim=True) * x_NF)
    else:
        second = r_NC.mT @ x_NF.square()
        second = second if covariance == "diag" else second.sum(1)
    total = x_NF.new_zeros(())
    if log_likelihood is not None:
        known_N = log_likelihood.double()
        total = known_N.sum() if weights is None else known_N @ weights.double()
    return Statistics(r_NC.sum(0), r_NC.mT @ x_NF, second, total)


def maximise(
    found: Statistics, covariance: Covariance, floor: Tensor | float = 0.0, *, variance: float | None = None
) -> Gaussians:
    """The mixture that explains the statistics best, with ``floor`` added to every variance.

    Args:
        found: statistics with every component's weight above 0.
        covariance: the kind.
        floor: variance, scalar or shape (F,), >= 0; spherical adds its mean.
        variance: that of every component where it is known, for spherical; then only weights and means are found.
    Raises:
        ValueError: a component without weight.
        LostRank: a covariance that is not positive definite.
    Source:
        Bishop, eq. 9.24-9.26. A variance that rounding made negative counts as zero before the floor is added.
    """
    if not bool((found.weight > 0).all()):
        raise ValueError(f"component {int((~(found.weight > 0)).nonzero()[0])} has no weight, so it has no mean")
    total = found.weight.sum()
    means_CF = found.first / found.weight[:, None]
    n_features = means_CF.shape[1]
    floor_F = torch.as_tensor(floor, dtype=means_CF.dtype, device=means_CF.device).expand(n_features)
    if covariance == "full":
        sigma = found.second / found.weight[:, None, None] - means_CF[:, :, None] * means_CF[:, None, :]
        sigma = _raise_diagonal(sigma, floor_F)
    elif covariance == "tied":
        sigma = (found.second - means_CF.mT @ (found.weight[:, None] * means_CF)) / total
        sigma = _raise_diagonal(sigma, floor_F)
    elif covariance == "diag":
        sigma = (found.second / found.weight[:, None] - means_CF.square()).clamp(min=0) + floor_F
    elif variance is not None:
        sigma = torch.full_like(found.weight, variance)
    else:
        sigma = found.second / found.weight - means_CF.square().sum(1)
        sigma = (sigma / n_features).clamp(min=0) + floor_F.mean()
    return Gaussians(found.weight / total, means_CF, sigma, precisions_cholesky(sigma, covariance), covariance)


def _raise_diagonal(sigma: Tensor, floor_F: Tensor) -> Tensor:
    diagonal = sigma.diagonal(dim1=-2, dim2=-1)
    return sigma + torch.diag_embed(diagonal.clamp(min=0) - diagonal + floor_F)
