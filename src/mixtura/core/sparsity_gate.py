"""A gate without parameters: a token visits the experts that would fire the fewest hidden units on it.

How many units of a ReLU expert fire is read off its weights before it runs. The entries of one column of its input matrix
are taken as draws of a normal, so that the pre-activations of a token are about normal too:

    m = sum_j mean_j x_j,  v = sum_j var_j x_j^2,  expected share of active units = P(z > 0) = (1 + erf(m / sqrt(2 v))) / 2

and the score is -erf(m / sqrt(2 v)). A bias is one more input that is always 1. Nothing is detached: the gate learns by
reshaping the experts' weights. The cost is O(E D) a token, and O(E H D) once a forward pass for means and variances, which
are kept between passes that need no gradient.

Shapes: T tokens, D width, H hidden units of one expert, E experts, K experts a token visits.
Source: MoE-X (2503.07639), eq. 9-11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mixtura.core.gates import Routing, top_k

__all__ = ["Gather", "SparsityAwareGate", "Statistics", "column_statistics", "expected_active", "sparsity_scores"]

Statistics = Literal["diagonal", "full"]
# Means and variances of the experts that are here -> those of all experts, with gradients.
Gather = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
EPS = 1e-6  # added to a variance before its square root


def expected_active(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, statistics: Statistics = "diagonal"
) -> Tensor:
    """Share of each ReLU expert's hidden units that a token is expected to make fire, in [0, 1]; see `sparsity_scores`.

    Args:
        x: shape (..., D).
        weight, bias, statistics: as for `sparsity_scores`.
    Returns:
        Shape (..., E); one half at x = 0 without bias.
    Example:
        >>> expected_active(torch.zeros(3), torch.ones(2, 4, 3))
        tensor([0.5000, 0.5000])
    """
    scores_TE = sparsity_scores(x.reshape(-1, x.shape[-1]), weight, bias, statistics=statistics)
    return (0.5 * (1 - scores_TE)).reshape(*x.shape[:-1], -1)


def sparsity_scores(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, statistics: Statistics = "diagonal"
) -> Tensor:
    """Minus the expected activity of each ReLU expert: high when few of its hidden units would fire on the token.

    Args:
        x: shape (T, D).
        weight: the experts' input matrices, shape (E, H, D).
        bias: their biases, shape (E, H).
        statistics: ``"diagonal"`` takes inputs as independent, v = sum_j var_j x_j^2 (the paper); ``"full"`` uses the exact
            variance over the hidden units, v = x' Cov x. The mean is exact in both.
    Returns:
        Shape (T, E), in (-1, 1), float32 or wider. Gradients reach ``x``, ``weight`` and ``bias``.
    Raises:
        ValueError: shapes that do not fit, or an unknown kind of statistics.
    """
    _check(x, weight, bias, statistics)
    with torch.autocast(x.device.type, enabled=False):
        mean_ED, spread = column_statistics(weight, bias, statistics)
        return _scores(x, mean_ED, spread, biased=bias is not None)


def column_statistics(weight: Tensor, bias: Tensor | None, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean over hidden units of every column, (E, D), and its variance (E, D) or, ``full``, covariances (E, D, D).

    A bias is the last column, so D is one larger with it. Population variances, float32 or wider.
    """
    if statistics == "diagonal":
        parts = [_moments(_wide(weight))] + ([] if bias is None else [_moments(_wide(bias).unsqueeze(-1))])
        mean_ED, var_ED = (torch.cat(found, dim=-1) for found in zip(*parts, strict=True))
        return mean_ED, var_ED
    columns_EHD = _wide(weight)
    if bias is not None:
        columns_EHD = torch.cat([columns_EHD, _wide(bias).unsqueeze(-1)], dim=-1)
    mean_ED = columns_EHD.mean(1)
    centred_EHD = columns_EHD - mean_ED.unsqueeze(1)
    return mean_ED, centred_EHD.mT @ centred_EHD / columns_EHD.shape[1]


class SparsityAwareGate(nn.Module):
    """Gate without parameters; call it with the experts' input matrices, ``gate(x, weight)``. See `sparsity_scores`.

    Weights are the softmax over the chosen scores; ``Routing.probs``, which a balance loss reads, is the softmax over all
    of them. A balance loss is needed: without it one expert whose weights have a negative mean wins every token.

    In evaluation, and where no gradient is wanted, the statistics of the last weights are kept and used again until the
    weights change. A change behind autograd's back (``weight.data[...] = ``) is not seen; ``train()`` forgets them.

    Args:
        k: experts a token visits.
        statistics: ``"diagonal"`` (the paper) or ``"full"``.
    """

    def __init__(self, k: int, *, statistics: Statistics = "diagonal") -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        _check_statistics(statistics)
        self.k = k
        self.statistics = statistics
        self._kept: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gather: Gather | None = None
    ) -> Routing:
        """Routing of x (..., D), tokens flattened, over experts of weight (E, H, D) and bias (E, H).

        Where the weights are those of a part of the experts, ``gather`` makes of their statistics (`column_statistics`) those
        of all. It is called in every pass, and nothing is kept.

        Raises:
            ValueError: k above the experts, shapes that do not fit, or scores that are NaN; the experts are named.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        _check(x_TD, weight, bias, self.statistics)
        with torch.autocast(x.device.type, enabled=False):
            if gather is None:
                mean_ED, spread = self._statistics(weight, bias)
            else:
                mean_ED, spread = gather(*column_statistics(weight, bias, self.statistics))
            scores_TE = _scores(x_TD, mean_ED, spread, biased=bias is not None)
        if bool(scores_TE.isnan().any()):
            bad = scores_TE.isnan().any(0).nonzero().flatten().tolist()
            raise ValueError(
                f"scores of experts {bad} are NaN: the input, or the weights of these experts, is not finite"
            )
        return top_k(scores_TE, self.k)

    def train(self, mode: bool = True) -> SparsityAwareGate:
        """Switch the mode; kept statistics are forgotten."""
        self._kept = None
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"k={self.k}, statistics={self.statistics!r}"

    def _statistics(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        wanted = [t for t in (weight, bias) if t is not None]
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in wanted)
        if self.training or learning or any(t.is_inference() for t in wanted):
            return column_statistics(weight, bias, self.statistics)
        key = tuple(part for t in wanted for part in (t.data_ptr(), t._version, t.shape, t.dtype, t.device))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, *column_statistics(weight, bias, self.statistics))
        return self._kept[1], self._kept[2]


def _moments(columns_EHD: Tensor) -> tuple[Tensor, Tensor]:
    return _Moments.apply(columns_EHD)  # type: ignore[no-any-return, no-untyped-call]


class _Moments(torch.autograd.Function):
    """Mean and population variance over dimension 1. `Tensor.var` and its backward pass take five times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor) -> tuple[Tensor, Tensor]:
        mean_ED = columns.mean(1)
        ctx.save_for_backward(columns, mean_ED)
        return mean_ED, (columns - mean_ED.unsqueeze(1)).square_().mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        columns, mean_ED = ctx.saved_tensors
        slope_ED = grad_var * (2 / columns.shape[1])
        constant_ED = grad_mean / columns.shape[1] - slope_ED * mean_ED
        return torch.addcmul(constant_ED.unsqueeze(1), columns, slope_ED.unsqueeze(1))


def _scores(x_TD: Tensor, mean_ED: Tensor, spread: Tensor, *, biased: bool) -> Tensor:
    x_TD = _wide(x_TD)
    if biased:
        x_TD = F.pad(x_TD, (0, 1), value=1.0)
    mean_TE = x_TD @ mean_ED.T
    if spread.dim() == 2:
        var_TE = x_TD.square() @ spread.T
    else:
        var_TE = torch.einsum("td,edf,tf->te", x_TD, spread, x_TD).clamp(min=0)  # rounding may leave -1e-9
    return -torch.erf(mean_TE / (2 * (var_TE + EPS)).sqrt())


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, statistics: str) -> None:
    if weight.dim() != 3 or x.dim() != 2 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x (T, D) and weight (E, H, D) must share D, got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias must have shape (E, H) = {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    _check_statistics(statistics)


def _check_statistics(statistics: str) -> None:
    if statistics not in get_args(Statistics):
        raise ValueError(f"statistics must be one of {sorted(get_args(Statistics))}, got {statistics!r}")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
