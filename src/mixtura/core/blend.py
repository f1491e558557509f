"""Mixing data: pairs blended point by point or cut into one another, with targets in the same proportion.

``lam`` is always the share of the first of the two, ``x``. Which pairs are mixed and what the targets are is the caller's
method; the arithmetic is the same.

Shapes: B batch, K classes; images (B, channels, height, width).
Source: mixup, Zhang et al. 2018 (1710.09412), eq. 1-2; cutmix, Yun et al. 2019 (1905.04899), eq. 1-2, with ``lam`` counted anew
after the box was clipped.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import betaincinv
from torch import Tensor

__all__ = ["OPS", "Mixed", "Op", "draw_shares", "mix_pairs", "soft_cross_entropy", "soft_targets"]

Op = Literal["mixup", "cutmix"]
OPS: tuple[Op, ...] = ("mixup", "cutmix")


@dataclass(frozen=True)
class Mixed:
    """A mixed batch.

    Attributes:
        inputs: shape of ``x``.
        lam: the share of ``x`` that is in it, shape () or (B,), in [0, 1].
    """

    inputs: Tensor
    lam: Tensor


def draw_shares(alpha: float, n: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws from Beta(alpha, alpha), float32: shape () where ``n`` is None, else (n,).

    Small alpha gives shares near 0 or 1, 1 the uniform law, large alpha shares near a half.

    Raises:
        ValueError: alpha <= 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(() if n is None else (n,), dtype=torch.float64, generator=generator, device=device).cpu()
    # The inverse of the distribution function: torch's own Beta can not be given a generator.
    shares = uniform if alpha == 1 else torch.as_tensor(betaincinv(alpha, alpha, uniform.numpy()))
    return shares.float()


def mix_pairs(
    x: Tensor, other: Tensor, lam: Tensor | float, op: Op = "mixup", generator: torch.Generator | None = None
) -> Mixed:
    """Mix each row of ``x`` with the row of ``other`` at the same place.

    Args:
        x, other: shape (B, ...), the same for both; (B, channels, height, width) for cutmix.
        lam: share of ``x``, in [0, 1]: a number or shape () for the whole batch, (B,) for a share a row.
        op: ``"mixup"``: lam x + (1 - lam) other. ``"cutmix"``: a box of ``other``, of sides sqrt(1 - lam) times those of the
            image, rounded down, around a pixel drawn uniformly and clipped at the borders, is pasted into ``x``.
        generator: draws the pixel, one for each row or one for the batch, as ``lam`` is.
    Returns:
        The mixture and the share of ``x`` in it: ``lam`` itself, or after cutmix the exact share of pixels of ``x``.
    Raises:
        ValueError: shapes that differ, cutmix of what is no image, an unknown op, ``lam`` outside [0, 1] or of another shape.
    Example:
        >>> mix_pairs(torch.ones(2, 3), torch.zeros(2, 3), 0.25).inputs
        tensor([[0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500]])
    """
    if x.shape != other.shape:
        raise ValueError(f"x and other must have one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
    if op not in OPS:
        raise ValueError(f"op must be one of {list(OPS)}, got {op!r}")
    share = torch.as_tensor(lam, dtype=torch.float32).detach()
    if share.dim() and share.shape != (len(x),):
        raise ValueError(f"lam must be one number or have shape ({len(x)},), one a row, got {tuple(share.shape)}")
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"lam is a share and must be between 0 and 1, got {share.tolist()}")
    if op == "mixup":
        share = share.to(x.device)
        weight = share.to(x.dtype).reshape(-1, *([1] * (x.dim() - 1)))
        # lerp from other to x, so that lam = 1 gives x to the bit.
        return Mixed(torch.lerp(other, x, weight), share)
    if x.dim() != 4:
        raise ValueError(
            f"cutmix needs images of shape (B, channels, height, width), got {tuple(x.shape)}; use op='mixup'"
        )
    height, width = x.shape[-2:]
    rows_N, columns_N = _box(share.reshape(-1), height, generator), _box(share.reshape(-1), width, generator)
    inside = (rows_N[:, :, None] & columns_N[:, None, :])[:, None].to(x.device)  # (1 or B, 1, height, width)
    # Counted, not computed from the sides: the target must hold what is there.
    kept = 1 - inside.flatten(1).sum(1).to(torch.float32) / (height * width)
    return Mixed(torch.where(inside, other, x), kept if share.dim() else kept[0])


def soft_targets(
    y: Tensor, lam: Tensor | float, num_classes: int, other: Tensor | Literal["uniform"] = "uniform"
) -> Tensor:
    """Targets in the proportion of the mixture: lam of class y, the rest of ``other``.

    Args:
        y: classes, shape (B,), integers in [0, num_classes).
        lam: share of y, shape () or (B,).
        num_classes: K, at least 2.
        other: ``"uniform"`` spreads the rest evenly over all classes; or the classes of the others, shape (B,).
    Returns:
        Shape (B, K), rows sum to 1.
    Raises:
        ValueError: a class outside [0, K), or fewer than 2 classes. TypeError: classes that are no integers.
    Example:
        >>> soft_targets(torch.tensor([1]), 0.5, 2)
        tensor([[0.2500, 0.7500]])
    """
    if num_classes < 2:
        raise ValueError(
            f"num_classes must be at least 2, got {num_classes}; with one class there is nothing to be unsure about"
        )
    share = torch.as_tensor(lam, dtype=torch.float32, device=y.device).reshape(-1, 1)
    first_BK = _one_hot(y, num_classes, "y")
    rest = (1 / num_classes) if isinstance(other, str) else _one_hot(other.to(y.device), num_classes, "other")
    return share * first_BK + (1 - share) * rest


def soft_cross_entropy(logits: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
    """Cross entropy to targets that are distributions, nats: minus the sum of targets times log-softmax of the logits.

    Args:
        logits, targets: shape (B, K).
        reduction: over the batch.
    Raises:
        ValueError: shapes that differ, or an unknown reduction.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"logits and targets must have one shape, got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    loss_B = -(targets.to(logits.dtype) * torch.log_softmax(logits, -1)).sum(-1)
    if reduction == "none":
        return loss_B
    if reduction == "sum":
        return loss_B.sum()
    if reduction == "mean":
        return loss_B.mean()
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _box(share_N: Tensor, side: int, generator: torch.Generator | None) -> Tensor:
    """Which places along one side the box covers, shape (N, side), bool."""
    device = "cpu" if generator is None else generator.device
    centre_N = torch.randint(side, share_N.shape, generator=generator, device=device).cpu()
    length_N = (side * (1 - share_N.cpu()).sqrt()).floor().long()
    first_N = centre_N - length_N // 2
    place = torch.arange(side)
    return (place >= first_N[:, None]) & (place < (first_N + length_N)[:, None])


def _one_hot(y: Tensor, num_classes: int, name: str) -> Tensor:
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {y.dtype}")
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < num_classes):
        raise ValueError(f"{name} must lie in [0, {num_classes}), got {int(y.min())} to {int(y.max())}")
    return torch.nn.functional.one_hot(y.long(), num_classes).float()
