"""Objectives that teach a classifier to be unsure of what it does not know, by showing it outliers.

``MixtureOutlierExposure`` mixes each known input with an outlier and asks for confidence in proportion to the known share, so
that it falls steadily on the way out. The others are what it is compared with. All are called alike: with the model, a batch
and its classes, and a batch of outliers.

- The mixed batch takes a pass of its own: batch normalisation sees known inputs and mixtures apart. The other objectives
  send known inputs and outliers through the model together, as their authors do.
- The outliers must hold no class that is related to the known ones.

Shapes: B batch, K classes.
Source: Zhang et al. 2021 (2106.03917), sec. 4, with the details of their code; outlier exposure, Hendrycks et al. 2019
(1812.04606), eq. 1 and sec. 4.3; energy, Liu et al. 2020 (2010.03759), eq. 8-9.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.core.blend import OPS, Op, draw_shares, mix_pairs, soft_cross_entropy, soft_targets

__all__ = ["EnergyExposure", "Exposure", "HardOutlierExposure", "MixtureOutlierExposure", "OutlierExposure", "Plain"]

Model = Callable[[Tensor], Tensor]


class Exposure(nn.Module, ABC):
    """What these objectives share: their call and their checks.

    Args:
        num_classes: K, at least 2.
        beta: weight of what the outliers are for, >= 0.
    Attributes:
        outliers_per_input: outliers that a batch should bring for each of its rows.
    """

    outliers_per_input = 1

    def __init__(self, num_classes: int, beta: float) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"num_classes must be at least 2, got {num_classes}; with one class there is nothing to be unsure about"
            )
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be >= 0 and finite, got {beta}")
        self.num_classes = num_classes
        self.beta = beta

    def forward(
        self, model: Model, x: Tensor, y: Tensor, outliers: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss, a scalar in nats.

        Args:
            model: (B, ...) -> logits (B, K).
            x: known inputs, shape (B, ...), finite.
            y: their classes, shape (B,), integers in [0, K).
            outliers: at least ``outliers_per_input`` for each row of x, of the same shape beyond the batch; more are left
                unused by :class:`MixtureOutlierExposure`.
            generator: makes chance repeat.
        Raises:
            ValueError: too few outliers, other shapes, NaN, classes out of range, or logits that are not (B, K).
            TypeError: classes that are no integers.
        """
        parts = self.parts(model, x, y, outliers, generator=generator)
        return parts["id_loss"] + self.beta * parts["outlier_loss"]

    @abstractmethod
    def parts(
        self, model: Model, x: Tensor, y: Tensor, outliers: Tensor, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The terms of the loss before they are weighted: ``id_loss``, ``outlier_loss`` and what else there is to know."""

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, beta={self.beta:g}"

    def _check(self, x: Tensor, y: Tensor, outliers: Tensor) -> None:
        if not len(x):
            raise ValueError("x must hold at least one row, got none")
        if len(outliers) < len(x):
            raise ValueError(
                f"outliers must be at least as many as x: got {len(outliers)} outliers for {len(x)} rows of x"
            )
        if outliers.shape[1:] != x.shape[1:]:
            raise ValueError(
                "outliers must have the shape of x beyond the batch, got "
                f"{tuple(outliers.shape[1:])} and {tuple(x.shape[1:])}"
            )
        if y.is_floating_point() or y.dtype == torch.bool:
            raise TypeError(f"y must hold integers, got {y.dtype}")
        if y.shape != (len(x),):
            raise ValueError(f"y must have shape ({len(x)},), one class a row of x, got {tuple(y.shape)}")
        if not (int(y.min()) >= 0 and int(y.max()) < self.num_classes):
            raise ValueError(f"y must lie in [0, {self.num_classes}), got {int(y.min())} to {int(y.max())}")
        for name, values in (("x", x), ("outliers", outliers)):
            # A finite sum means finite terms; a sum that overflows is looked at again.
            if not bool(torch.isfinite(values.sum(dtype=torch.float32))) and not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} must be finite, got NaN or infinity")

    def _logits(self, model: Model, x: Tensor) -> Tensor:
        logits = model(x)
        if logits.shape != (len(x), self.num_classes):
            raise ValueError(
                f"model must give logits of shape ({len(x)}, num_classes={self.num_classes}), got {tuple(logits.shape)}"
            )
        return logits

    def _together(self, model: Model, x: Tensor, outliers: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both, from one pass."""
        logits = self._logits(model, torch.cat([x, outliers]))
        return logits[: len(x)], logits[len(x) :]


class MixtureOutlierExposure(Exposure):
    """Confidence in proportion to the known share of a mixture (MixOE).

    CE(f(x), y) + beta SoftCE(f(x~), lam y + (1 - lam) uniform), where x~ is ``x`` mixed with an outlier and lam ~ Beta(alpha,
    alpha) is the share of ``x`` in it. At the optimum the largest softmax probability of a mixture is lam + (1 - lam) / K.

    Args:
        num_classes: K.
        mix: ``"mixup"``, ``"cutmix"`` (a box of the outlier in the known image; lam is the share of pixels that remain), or
            ``"both"``, one of the two each call by the toss of a coin (ours, not the paper's).
        alpha: of the law of shares; the paper has 1 with mixup and 2 with cutmix.
        beta: weight of the mixed term; 5 suits large pretrained networks, 0.5 to 1 small ones.
        per_sample: a share for each row instead of one for the batch, which is the official way.
    Example:
        >>> objective = MixtureOutlierExposure(3)
        >>> x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
        >>> objective(nn.Linear(5, 3), x, y, torch.randn(4, 5), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        mix: Literal["mixup", "cutmix", "both"] = "mixup",
        alpha: float = 1.0,
        beta: float = 1.0,
        per_sample: bool = False,
    ) -> None:
        super().__init__(num_classes, beta)
        if mix not in (*OPS, "both"):
            raise ValueError(f"mix must be one of {[*OPS, 'both']}, got {mix!r}")
        if not alpha > 0:
            raise ValueError(f"alpha must be > 0, got {alpha}")
        self.mix = mix
        self.alpha = alpha
        self.per_sample = per_sample

    def parts(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        outliers: Tensor,
        *,
        generator: torch.Generator | None = None,
        lam: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """The terms: ``id_loss``, ``mixed_loss`` (also as ``outlier_loss``) and ``lam``, the shares that were mixed.

        Args:
            model, x, y, outliers, generator: as in :meth:`forward`.
            lam: shares to mix, instead of drawn ones.
        """
        self._check(x, y, outliers)
        if lam is None:
            lam = draw_shares(self.alpha, len(x) if self.per_sample else None, generator=generator)
        mixed = mix_pairs(x, outliers[: len(x)], lam, self._op(generator), generator)
        id_loss = F.cross_entropy(self._logits(model, x), y.long())
        # A pass of its own, not one with x: batch statistics are not shared between known inputs and mixtures.
        targets_BK = soft_targets(y, mixed.lam, self.num_classes)
        mixed_loss = soft_cross_entropy(self._logits(model, mixed.inputs), targets_BK)
        return {"id_loss": id_loss, "mixed_loss": mixed_loss, "outlier_loss": mixed_loss, "lam": mixed.lam}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mix={self.mix!r}, alpha={self.alpha:g}, per_sample={self.per_sample}"

    def _op(self, generator: torch.Generator | None) -> Op:
        if self.mix != "both":
            return self.mix  # type: ignore[return-value]
        device = "cpu" if generator is None else generator.device
        return OPS[int(torch.randint(2, (), generator=generator, device=device))]


class OutlierExposure(Exposure):
    """Uniform answers to outliers (OE): CE(f(x), y) + beta times the cross entropy of the uniform law and f(outlier).

    Args:
        num_classes: K.
        beta: weight of the outliers' term.
    """

    outliers_per_input = 2

    def __init__(self, num_classes: int, beta: float = 1.0) -> None:
        super().__init__(num_classes, beta)

    def parts(
        self, model: Model, x: Tensor, y: Tensor, outliers: Tensor, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The terms: ``id_loss`` and ``outlier_loss``, the mean of logsumexp(f) - mean(f) over the outliers."""
        self._check(x, y, outliers)
        ours, others = self._together(model, x, outliers)
        outlier_loss = (torch.logsumexp(others, 1) - others.mean(1)).mean()
        return {"id_loss": F.cross_entropy(ours, y.long()), "outlier_loss": outlier_loss}


class HardOutlierExposure(OutlierExposure):
    """Outlier exposure on the outliers that the model is most sure about (OE-M), chosen anew each epoch with :meth:`choose`.

    Args:
        num_classes: K.
        beta: weight of the outliers' term.
        candidates: outliers drawn at random to choose among.
    """

    def __init__(self, num_classes: int, beta: float = 1.0, candidates: int = 50_000) -> None:
        super().__init__(num_classes, beta)
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {candidates}")
        self.candidates = candidates

    @torch.no_grad()
    def choose(
        self,
        logits_of: Callable[[Tensor], Tensor],
        n_outliers: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Numbers of the n outliers with the highest largest probability among the candidates, shape (n,), surest first.

        Args:
            logits_of: numbers of outliers -> their logits, (m, K).
            n_outliers: how many there are.
            n: how many to choose; all candidates where there are fewer.
            generator: draws the candidates.
        """
        drawn = torch.randperm(n_outliers, generator=generator)[: self.candidates]
        sure = torch.log_softmax(logits_of(drawn).float(), 1).amax(1).cpu()
        return drawn[sure.argsort(descending=True, stable=True)[:n]]


class EnergyExposure(Exposure):
    """Low energy for known inputs and high energy for outliers, E = -logsumexp(f), each with a margin.

    CE(f(x), y) + beta (mean relu(E(x) - m_in)^2 + mean relu(m_out - E(outlier))^2).

    Args:
        num_classes: K.
        beta: weight of both hinges.
        m_in: energy below which a known input costs nothing, nats.
        m_out: energy above which an outlier costs nothing, nats; above ``m_in``.
    """

    outliers_per_input = 2

    def __init__(self, num_classes: int, beta: float = 0.1, m_in: float = -13.0, m_out: float = -6.0) -> None:
        super().__init__(num_classes, beta)
        if not m_in < m_out:
            raise ValueError(f"m_in must be below m_out, got {m_in} and {m_out}")
        self.m_in = m_in
        self.m_out = m_out

    def parts(
        self, model: Model, x: Tensor, y: Tensor, outliers: Tensor, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The terms: ``id_loss`` and ``outlier_loss``, the sum of both squared hinges."""
        self._check(x, y, outliers)
        ours, others = self._together(model, x, outliers)
        low = F.relu(-torch.logsumexp(ours, 1) - self.m_in).square().mean()
        high = F.relu(self.m_out + torch.logsumexp(others, 1)).square().mean()
        return {"id_loss": F.cross_entropy(ours, y.long()), "outlier_loss": low + high}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, m_in={self.m_in:g}, m_out={self.m_out:g}"


class Plain(Exposure):
    """Cross entropy alone, with the call of the others; the outliers are not looked at beyond the checks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, 0.0)

    def parts(
        self, model: Model, x: Tensor, y: Tensor, outliers: Tensor, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The terms: ``id_loss`` and a zero ``outlier_loss``."""
        id_loss = F.cross_entropy(self._logits(model, x), y.long())
        return {"id_loss": id_loss, "outlier_loss": torch.zeros_like(id_loss)}
