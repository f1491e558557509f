"""The objective that lets noise heads explain what no query does, so that queries need not.

Shapes: B mixtures, n sources with one query and one noise head each, M bands, L frames.
Source: CLIPSep (2212.07065), sec. 3.2: the permutation-invariant loss of a mixture and its hinge. Weighted binary cross
entropy as in its released code.
"""

from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

__all__ = ["NoiseInvariantLoss", "query_loss"]

EXHAUSTIVE = 3  # up to so many sources every permutation is tried
EDGE = 1e-6  # a combined mask keeps this distance from 0 and 1, where its logarithm ends


def query_loss(query_logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Weighted binary cross entropy of each query's mask, the mean over sources and places (CLIPSep without noise heads).

    Args:
        query_logits, targets: shape (B, n, M, L); targets in [0, 1].
        weight: of each place, shape (B, M, L).
    Returns:
        Scalar.
    """
    return F.binary_cross_entropy_with_logits(query_logits, targets, weight=weight[:, None].expand_as(targets))


class NoiseInvariantLoss(nn.Module):
    """Loss of query masks each helped by one noise head, under the best assignment of heads to sources in each mixture.

    A source's mask is min(1, sigmoid(query) + sigmoid(noise)). A hinge keeps the noise heads' mean mask below ``gamma`` n / 2:
    without it they would explain all.

    Args:
        gamma: mean of the two noise masks' sum that costs nothing, for n = 2; in [0, 2].
        weight: of that hinge.
        hinge: weight of a second one, which asks that queries help: relu(loss with them - loss of the noise heads alone +
            epsilon). The paper names it, the released code leaves it at 0.
        epsilon: its margin.
    Raises:
        ValueError: a negative setting, or shapes that do not match.
    Example:
        >>> silent = torch.full((1, 2, 4, 4), -40.0)
        >>> query, targets, weight = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4), torch.ones(1, 4, 4)
        >>> NoiseInvariantLoss()(query, silent, targets, weight)  # log 2, as without noise heads
        tensor(0.6931)
    """

    def __init__(self, gamma: float = 0.25, weight: float = 0.1, hinge: float = 0.0, epsilon: float = 0.1) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("weight", weight), ("hinge", hinge), ("epsilon", epsilon)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self.gamma, self.weight, self.hinge, self.epsilon = gamma, weight, hinge, epsilon

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, weight={self.weight}, hinge={self.hinge}, epsilon={self.epsilon}"

    def forward(self, query_logits: Tensor, noise_logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """The loss.

        Args:
            query_logits, noise_logits, targets: shape (B, n, M, L), n >= 2; targets in [0, 1].
            weight: of each place, shape (B, M, L).
        Returns:
            Scalar, the mean over the mixtures.
        """
        if query_logits.dim() != 4 or query_logits.shape[1] < 2:
            raise ValueError(
                f"query_logits must have shape (B, n, bands, frames) with n >= 2, got {tuple(query_logits.shape)}"
            )
        for name, found in (("noise_logits", noise_logits), ("targets", targets)):
            if found.shape != query_logits.shape:
                raise ValueError(
                    f"{name} must have the shape of query_logits, {tuple(query_logits.shape)}, got {tuple(found.shape)}"
                )
        if weight.shape != targets[:, 0].shape:
            raise ValueError(f"weight must have shape {tuple(targets[:, 0].shape)}, got {tuple(weight.shape)}")
        noise = noise_logits.sigmoid()
        query = query_logits.sigmoid()
        # 1 - relu(1 - sum) is min(1, sum).
        pairs_Bnn = _cross_entropy(query[:, :, None] + noise[:, None], targets[:, :, None], weight[:, None, None])
        best_B = _smallest(pairs_Bnn)
        n = query_logits.shape[1]
        loss = best_B.mean() + self.weight * F.relu(noise.sum(1).mean() - self.gamma * n / 2)
        if self.hinge:
            alone_Bnn = _cross_entropy(
                noise[:, None].expand(-1, n, -1, -1, -1), targets[:, :, None], weight[:, None, None]
            )
            loss = loss + self.hinge * F.relu(best_B - _smallest(alone_Bnn) + self.epsilon).mean()
        return loss


def _cross_entropy(mask: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted binary cross entropy of masks cut at 1, the mean over bands and frames."""
    mask, target = torch.broadcast_tensors(mask.clamp(EDGE, 1 - EDGE), target)
    return F.binary_cross_entropy(mask, target, weight=weight.expand_as(mask), reduction="none").mean((-2, -1))


def _smallest(cost_Bnn: Tensor) -> Tensor:
    """Mean cost of a source under each mixture's own best assignment, shape (B,)."""
    n = cost_Bnn.shape[-1]
    rows = torch.arange(n, device=cost_Bnn.device)
    if n <= EXHAUSTIVE:
        orders = torch.tensor(list(permutations(range(n))), device=cost_Bnn.device)
        return cost_Bnn[:, rows, orders].mean(-1).amin(-1)
    found = [linear_sum_assignment(cost)[1] for cost in cost_Bnn.detach().double().cpu().numpy()]
    order_Bn = torch.from_numpy(np.stack(found)).to(cost_Bnn.device)
    return cost_Bnn.gather(2, order_Bn[:, :, None])[..., 0].mean(-1)
