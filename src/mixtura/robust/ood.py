"""How sure a classifier is, and how well that tells known classes from everything else.

A score is higher the more an input looks like the known classes (in-distribution, ID). ID is the positive class throughout.

Shapes: N samples, K classes.
Source: maximum softmax probability, Hendrycks and Gimpel 2017 (1610.02136); energy, Liu et al. 2020 (2010.03759), eq. 4; the
temperature of ODIN, Liang et al. 2018 (1706.02690), eq. 1, without its input gradient.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["SCORES", "OODMetrics", "holdout_split", "keep_threshold", "ood_metrics", "score"]

ScoreKind = Literal["msp", "max_logit", "energy", "odin_temperature"]
SCORES: tuple[ScoreKind, ...] = ("msp", "max_logit", "energy", "odin_temperature")
TEMPERATURES = {"energy": 1.0, "odin_temperature": 1000.0}


def score(logits: Tensor, kind: ScoreKind = "msp", temperature: float | None = None) -> Tensor:
    """How much each row looks like the known classes, shape (N,), float64; higher is more.

    Args:
        logits: shape (N, K), finite.
        kind: ``"msp"`` the largest softmax probability; ``"max_logit"`` the largest logit; ``"energy"`` T logsumexp(logits / T),
            which is minus the energy; ``"odin_temperature"`` the largest softmax probability of logits / T.
        temperature: T > 0; 1 for the energy and 1000 for ODIN where it is not given. The others have none.
    Raises:
        ValueError: an unknown kind, a temperature that is not positive or has no effect, or logits of
            another shape or not finite.
    Example:
        >>> score(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        tensor([0.8808, 0.5000], dtype=torch.float64)
    """
    if kind not in SCORES:
        raise ValueError(f"kind must be one of {list(SCORES)}, got {kind!r}")
    if temperature is not None and kind not in TEMPERATURES:
        raise ValueError(f"temperature has no effect on {kind!r}; leave it out")
    t = TEMPERATURES.get(kind, 1.0) if temperature is None else temperature
    if not t > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (N, K), got {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits must be finite, got NaN or infinity")
    # float64: in float32 every probability above 1 - 6e-8 is 1, and sure rows all tie.
    logits_NK = logits.detach().double()
    if kind == "max_logit":
        return logits_NK.amax(1)
    if kind == "energy":
        return t * torch.logsumexp(logits_NK / t, 1)
    return torch.softmax(logits_NK / t, 1).amax(1)


@dataclass(frozen=True)
class OODMetrics:
    """How well scores tell ID from the rest.

    Attributes:
        auroc: probability that an ID row scores above another one, ties counted half.
        aupr_in: average precision with ID positive.
        aupr_out: average precision with the others positive, by low scores.
        tnr: share of the others below ``threshold``; those that tie with it are not counted.
        threshold: the largest that keeps at least the level of ID: rows with a score >= threshold are kept.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    tnr: float
    threshold: float


def ood_metrics(
    id_scores: ArrayLike, ood_scores: ArrayLike, level: float = 0.95, *, balanced: bool = False
) -> OODMetrics:
    """Compare the scores of ID rows and of others.

    Args:
        id_scores, ood_scores: shapes (N,) and (M,), higher is more ID, finite.
        level: share of ID rows to keep, in (0, 1].
        balanced: weigh the two sets equally in both average precisions, whatever their sizes.
    Raises:
        ValueError: an empty set, scores that are not finite, or a level outside (0, 1].
    Example:
        >>> found = ood_metrics([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
        >>> round(found.auroc, 3), found.threshold
        (0.944, 3.0)
    """
    ours, others = (_scores(values, name) for values, name in ((id_scores, "id_scores"), (ood_scores, "ood_scores")))
    threshold = keep_threshold(ours, level)
    below = np.searchsorted(np.sort(others), ours, "left")
    above = len(others) - np.searchsorted(np.sort(others), ours, "right")
    auroc = 0.5 + 0.5 * float(below.sum() - above.sum()) / (len(ours) * len(others))
    ratio = len(ours) / len(others) if balanced else 1.0
    return OODMetrics(
        auroc,
        _average_precision(ours, others, ratio),
        _average_precision(-others, -ours, 1 / ratio),
        float((others < threshold).mean()),
        threshold,
    )


def keep_threshold(scores: ArrayLike, level: float = 0.95) -> float:
    """The largest threshold at which at least a share ``level`` of the scores is kept (score >= threshold)."""
    if not 0 < level <= 1:
        raise ValueError(f"level must be in (0, 1], got {level}")
    values = np.sort(_scores(scores, "scores"))[::-1]
    # 0.95 * 20 is 19.000000000000004 or less by an ulp elsewhere: rounding first keeps 19 of 20 and not 20.
    return float(values[math.ceil(round(level * len(values), 9)) - 1])


def holdout_split(labels: ArrayLike, n_id: int, split: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes that are known and classes that are held out, both sorted, by the rule of the paper's code.

    Args:
        labels: classes of a data set, any length; or the classes themselves.
        n_id: known classes, from 1 to one less than there are.
        split: number of the split; the paper has 0, 1 and 2.
    Source:
        ``RandomState(split).choice(classes, n_id, replace=False)`` in the official code.
    """
    classes = np.unique(np.asarray(labels)).astype(np.int64)
    if not 1 <= n_id < len(classes):
        raise ValueError(f"n_id must be between 1 and {len(classes) - 1}, one less than the classes, got {n_id}")
    known = np.sort(np.random.RandomState(split).choice(classes, n_id, replace=False))
    return known, np.setdiff1d(classes, known)


def _scores(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"{name} must be a list of at least one score, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(found)).sum())} NaN or infinite values")
    return found


def _average_precision(positive: NDArray[np.float64], negative: NDArray[np.float64], weight: float) -> float:
    """Mean over positives of the precision among all rows that score as high, a negative weighing ``weight``."""
    values = np.unique(positive)[::-1]
    at_least = [len(s) - np.searchsorted(np.sort(s), values, "left") for s in (positive, negative)]
    precision = at_least[0] / (at_least[0] + weight * at_least[1])
    gained = np.diff(at_least[0], prepend=0) / len(positive)
    return float((gained * precision).sum())
