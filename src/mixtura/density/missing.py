"""Samples with missing values: their exact conditional expectations under a mixture of Gaussians.

Within a component the missing features given the observed ones are Gaussian; the E step takes the mean and the second
moment of that Gaussian where a complete sample has its value and its square. Leaving the conditional covariance out
(filling gaps with a guess) would make every variance too small.

Shapes: N samples, F features, C components, O observed and M missing features of a pattern.
Source: Ghahramani and Jordan 1994, Supervised learning from incomplete data via an EM approach, sec. 3.1; Little and
Rubin, Statistical Analysis with Missing Data, sec. 11.2. Values must be missing at random.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.core.gaussian import LOG_2PI, Covariance, Gaussians
from mixtura.core.natural_form import Frame
from mixtura.core.sufficient import Statistics

__all__ = ["GapPass", "second_of"]


class GapPass:
    """As :class:`mixtura.core.natural_form.Pass`, for samples in which NaN marks what is missing.

    Time grows with the number of different patterns of missing features in a block: each takes a factorisation a
    component.

    Args:
        gaussians: the mixture, in the coordinates of the frame.
        frame: coordinates to compute in.
    Attributes:
        responsibilities: of the last block, shape (C, N), times its weights.
    """

    def __init__(self, gaussians: Gaussians, frame: Frame) -> None:
        self._inside, self._frame = gaussians.to(device="cpu", dtype=torch.float64), frame
        self._sigma_CFF = self._inside.full_covariances()
        c, f = gaussians.n_components, gaussians.n_features
        self._weight_C = torch.zeros(c, dtype=torch.float64)
        self._first_CF = torch.zeros(c, f, dtype=torch.float64)
        self._second_CFF = torch.zeros(c, f, f, dtype=torch.float64)
        self._log_likelihood = torch.zeros((), dtype=torch.float64)
        self.responsibilities = torch.empty(c, 0, dtype=torch.float64)

    def add(self, x: Tensor, *, weights: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        """Take in samples, shape (N, F); returns the log density of what was observed of each, shape (N,)."""
        z_NF = (x.double() - self._frame.centre) / self._frame.scale
        patterns_PF, pattern_N = torch.unique(~z_NF.isnan(), dim=0, return_inverse=True)
        logs_N = z_NF.new_empty(len(x))
        self.responsibilities = z_NF.new_empty(self._inside.n_components, len(x))
        for p, observed_F in enumerate(patterns_PF):
            rows = (pattern_N == p).nonzero()[:, 0]
            logs_N[rows] = self._add_pattern(
                z_NF[rows],
                observed_F,
                rows,
                None if weights is None else weights[rows].double(),
                None if allowed is None else allowed[rows],
            )
        return logs_N

    def statistics(self) -> Statistics:
        """The expected statistics so far, in the coordinates of the frame."""
        kind = self._inside.covariance
        return Statistics(
            self._weight_C.clone(),
            self._first_CF.clone(),
            second_of(self._second_CFF, kind),
            self._log_likelihood.clone(),
        )

    def _add_pattern(
        self, z_NF: Tensor, observed_F: Tensor, rows: Tensor, weights: Tensor | None, allowed: Tensor | None
    ) -> Tensor:
        here, gone = observed_F.nonzero()[:, 0], (~observed_F).nonzero()[:, 0]
        means_CF, sigma_CFF = self._inside.means, self._sigma_CFF
        lower_COO = torch.linalg.cholesky(sigma_CFF[:, here][:, :, here])
        apart_CON = (z_NF[:, here] - means_CF[:, None, here]).mT
        white_CON = torch.linalg.solve_triangular(lower_COO, apart_CON, upper=False)
        log_det_C = lower_COO.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        joint_CN = -0.5 * (white_CON.square().sum(1) + len(here) * LOG_2PI) - log_det_C[:, None]
        joint_CN = joint_CN + self._inside.log_weights[:, None] - self._frame.scale[here].log().sum()
        if allowed is not None:
            joint_CN = joint_CN.masked_fill(~allowed.mT, -torch.inf)
        logs_N, r_CN = joint_CN.logsumexp(0), joint_CN.softmax(0)
        self._log_likelihood += logs_N.sum() if weights is None else logs_N @ weights
        if weights is not None:
            r_CN = r_CN * weights
        self.responsibilities[:, rows] = r_CN

        half_COM = torch.linalg.solve_triangular(lower_COO, sigma_CFF[:, here][:, :, gone], upper=False)
        filled_CNF = z_NF.expand(len(means_CF), -1, -1).clone()
        filled_CNF[:, :, gone] = means_CF[:, None, gone] + white_CON.mT @ half_COM
        mass_C = r_CN.sum(1)
        self._weight_C += mass_C
        self._first_CF += torch.einsum("cn,cnf->cf", r_CN, filled_CNF)
        self._second_CFF += filled_CNF.mT @ (r_CN.unsqueeze(-1) * filled_CNF)
        rest_CMM = sigma_CFF[:, gone][:, :, gone] - half_COM.mT @ half_COM
        self._second_CFF[:, gone[:, None], gone] += mass_C[:, None, None] * rest_CMM
        return logs_N


def second_of(second: Tensor, covariance: Covariance) -> Tensor:
    """Second statistics of a kind from those of kind full, shape (C, F, F)."""
    if covariance == "full":
        return second.clone()
    if covariance == "tied":
        return second.sum(0)
    squares_CF = second.diagonal(dim1=-2, dim2=-1)
    return squares_CF.clone() if covariance == "diag" else squares_CF.sum(1)
