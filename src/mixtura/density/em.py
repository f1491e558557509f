"""Expectation maximisation over any source of samples, in one process or several.

A step reads the samples once, block by block, adds up the statistics, sums them over processes, and maximises. Nothing
else is exchanged or kept, so memory does not grow with the number of samples, and every process ends with the same model.

Shapes: N samples of this process, F features, C components, B samples of a block.
Source: Dempster, Laird and Rubin 1977; weights, labels and gaps enter the expectation only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mixtura.core.gaussian import Covariance, Gaussians, LostRank
from mixtura.core.natural_form import Frame, Pass
from mixtura.core.processes import ALONE, Processes
from mixtura.core.progress import bar
from mixtura.core.sufficient import Statistics, maximise
from mixtura.density.missing import GapPass
from mixtura.density.sources import Source

__all__ = ["Collapsed", "Fit", "Samples", "Sweep", "assess", "expect", "fit_em", "improve", "lost_rank"]

log = logging.getLogger(__name__)

IDLE_WEIGHT = 1e-200  # of a sample: far below any density that a sample could have
LEAST_WEIGHT = 1e-3  # a component that holds less than a thousandth of a sample has collapsed


class Collapsed(ValueError):
    """Components collapsed more often than they may be re-seeded; the message says the likely cause and what helps."""


@dataclass(frozen=True)
class Samples:
    """What EM reads: samples with what is known of each.

    Attributes:
        source: the samples.
        frame: coordinates to compute in.
        covariance: the kind of the components.
        floor: variance added in every maximisation, in the frame's coordinates, shape (F,).
        variance: of every component where it is known (spherical), in the frame's coordinates.
        n, weight: number and summed weight of the samples of all processes.
        weights: of this process's samples, shape (N,), or None for one each.
        classes: of this process's samples, shape (N,): row of ``table``, or -1 where unlabelled; None without labels.
        table: which components a class may have, shape (classes, C), boolean.
        idle: components that no sample may come from, since all samples are labelled and no class has them.
        missing: whether NaN is a missing value.
        rows: samples a block.
        dtype, device: of the arithmetic of a block.
        processes: that hold the other shards.
    """

    source: Source
    frame: Frame
    covariance: Covariance
    floor: Tensor
    n: int
    weight: float
    weights: Tensor | None = None
    classes: Tensor | None = None
    table: Tensor | None = None
    idle: tuple[int, ...] = ()
    missing: bool = False
    rows: int = 2048
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    processes: Processes = ALONE
    variance: float | None = None


@dataclass(frozen=True)
class Fit:
    """What EM found; the mixture is in the coordinates of the frame.

    Attributes:
        gaussians: the mixture after the last step.
        lower_bounds: mean log likelihood a sample before each step, and that of ``gaussians`` last.
        converged: whether the last change was below the tolerance.
        n_reseeded: how many components were re-seeded.
        labels: most probable component of each sample of this process, shape (N,).
    """

    gaussians: Gaussians
    lower_bounds: list[float]
    converged: bool
    n_reseeded: int
    labels: np.ndarray

    @property
    def n_iter(self) -> int:
        """Number of steps."""
        return len(self.lower_bounds) - 1


class Sweep:
    """One pass over samples: complete ones in products, those with gaps pattern by pattern.

    Args:
        samples: what to read.
        gaussians: the mixture, in the coordinates of the frame.
        statistics: whether to add up statistics.
    """

    def __init__(self, samples: Samples, gaussians: Gaussians, *, statistics: bool = False) -> None:
        self._samples = samples
        self._run = Pass(gaussians, samples.frame, dtype=samples.dtype, device=samples.device, statistics=statistics)
        self._gaps = GapPass(gaussians, samples.frame) if samples.missing else None

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each block the samples (B, F), their log densities (B,), and responsibilities times weights (C, B).

        The next block overwrites the responsibilities.
        """
        start = 0
        for x_BF in self._samples.source.blocks(self._samples.rows):
            rows = slice(start, start + len(x_BF))
            start += len(x_BF)
            weights = None if self._samples.weights is None else self._samples.weights[rows]
            allowed = self._allowed(rows)
            gap_B = x_BF.isnan().any(1) if self._gaps is not None else None
            if gap_B is None or not bool(gap_B.any()):
                yield x_BF, self._add(self._run, x_BF, weights, allowed), self._run.responsibilities
            else:
                yield x_BF, *self._mixed(x_BF, gap_B, weights, allowed)

    def statistics(self) -> Statistics:
        """The statistics of all blocks so far, in the coordinates of the frame."""
        found = self._run.statistics()
        return found if self._gaps is None else found + self._gaps.statistics()

    def _allowed(self, rows: slice) -> Tensor | None:
        if self._samples.classes is None or self._samples.table is None:
            return None
        class_B = self._samples.classes[rows]
        if not bool((class_B >= 0).any()):
            return None
        return self._samples.table[class_B.clamp(min=0)] | (class_B < 0)[:, None]

    def _add(self, run: Pass | GapPass, x_BF: Tensor, weights: Tensor | None, allowed: Tensor | None) -> Tensor:
        device = self._samples.device if run is self._run else "cpu"
        return run.add(
            x_BF.to(device),
            weights=None if weights is None else weights.to(device),
            allowed=None if allowed is None else allowed.to(device),
        )

    def _mixed(
        self, x_BF: Tensor, gap_B: Tensor, weights: Tensor | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self._gaps is not None
        logs_B = torch.empty(len(x_BF), dtype=torch.float64)
        r_CB = torch.empty(self._gaps.responsibilities.shape[0], len(x_BF), dtype=torch.float64)
        for run, chosen in ((self._run, ~gap_B), (self._gaps, gap_B)):
            if bool(chosen.any()):
                picked = (None if part is None else part[chosen] for part in (weights, allowed))
                logs_B[chosen] = self._add(run, x_BF[chosen], next(picked), next(picked)).cpu()
                r_CB[:, chosen] = run.responsibilities.cpu().double()
        return logs_B, r_CB


def expect(samples: Samples, gaussians: Gaussians) -> Statistics:
    """The expected statistics of the samples of all processes, in the coordinates of the frame."""
    sweep, n = Sweep(samples, gaussians, statistics=True), 0
    with samples.processes.together():
        for x_BF, _, _ in sweep.blocks():
            n += len(x_BF)
    found = sweep.statistics()
    own = torch.cat([found.as_vector(), torch.tensor([float(n)], dtype=torch.float64)])
    total = samples.processes.sum(own)
    if int(total[-1]) != samples.n:
        raise ValueError(
            f"X gave {int(total[-1])} samples in this step and {samples.n} in the first reading; "
            "an iterable of batches must give the same samples each time"
        )
    return found.from_vector(total[:-1])


def assess(samples: Samples, gaussians: Gaussians) -> tuple[float, np.ndarray]:
    """Mean log likelihood a sample over all processes, and the most probable component of each sample of this one."""
    total, labels, start = 0.0, list[np.ndarray](), 0
    # Without weights, whose zeros would hide which component is the most probable.
    sweep = Sweep(replace(samples, weights=None), gaussians)
    with samples.processes.together():
        for x_BF, logs_B, r_CB in sweep.blocks():
            weights = None if samples.weights is None else samples.weights[start : start + len(x_BF)]
            start += len(x_BF)
            logs_B = logs_B.cpu()
            total += float(logs_B.sum() if weights is None else logs_B @ weights)
            labels.append(r_CB.argmax(0).cpu().numpy())
    whole = samples.processes.sum(torch.tensor([total], dtype=torch.float64))
    found = np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)
    return float(whole[0]) / samples.weight, found


def fit_em(
    samples: Samples,
    start: Gaussians,
    *,
    tol: float,
    max_iter: int,
    names: Sequence[str] | None = None,
    describe: str = "mixture",
) -> Fit:
    """Fit a mixture from a start, given in the coordinates of the frame.

    Args:
        samples: what to fit.
        start: first mixture.
        tol: the fit ends when the mean log likelihood a sample changes by less.
        max_iter: largest number of steps, >= 0.
        names: of the features, for messages.
        describe: name on the progress bar.
    Raises:
        Collapsed: components collapsed more often than there are components, or a covariance has no rank to speak of.
    """
    gaussians, bounds, n_reseeded, converged = start, list[float](), 0, False
    with bar(desc=describe, unit="step", total=max_iter) as shown:
        for _ in range(max_iter):
            found = expect(samples, gaussians)
            bounds.append(float(found.log_likelihood) / samples.weight)
            gaussians, reseeded = improve(samples, gaussians, found, n_reseeded, names)
            n_reseeded += reseeded
            shown.set_postfix(log_likelihood=f"{bounds[-1]:.5g}")
            shown.update()
            # No bound has seen a re-seeded component yet.
            if len(bounds) > 1 and abs(bounds[-1] - bounds[-2]) < tol and not reseeded:
                converged = True
                break
    bound, labels = assess(samples, gaussians)
    return Fit(gaussians, [*bounds, bound], converged, n_reseeded, labels)


def improve(
    samples: Samples, gaussians: Gaussians, found: Statistics, n_before: int, names: Sequence[str] | None
) -> tuple[Gaussians, int]:
    """The mixture that maximises the statistics, with collapsed components re-seeded, and how many those were.

    Raises:
        Collapsed: more re-seedings than components, ``n_before`` earlier ones included.
    """
    found = _rest(found, samples)
    low_C = found.weight < LEAST_WEIGHT * samples.weight / samples.n
    weak = [c for c in low_C.nonzero()[:, 0].tolist() if c not in samples.idle]
    reseeded = 0
    while True:
        reseeded += len(weak)
        if n_before + reseeded > gaussians.n_components or (weak and gaussians.n_components == 1):
            raise Collapsed(
                f"component {weak[0]} collapsed: it holds less than {LEAST_WEIGHT} of a sample after {n_before} re-seedings. "
                f"{gaussians.n_components} components are likely too many for these samples; use fewer, or give means_init"
            )
        if weak:
            found = _reseed(samples, gaussians, found, weak)
        try:
            return maximise(found, samples.covariance, samples.floor, variance=samples.variance), reseeded
        except LostRank as error:
            spent = n_before + reseeded >= gaussians.n_components
            # Where a floor did not hold it, or all components share it, another seed will not.
            if spent or gaussians.n_components == 1 or samples.covariance == "tied" or bool(samples.floor.any()):
                raise Collapsed(lost_rank(error, names)) from error
            weak = [error.component]


def _rest(found: Statistics, samples: Samples) -> Statistics:
    """Statistics in which idle components have next to no weight, spread as all samples are."""
    if not samples.idle:
        return found
    idle = list(samples.idle)
    weight_C, first_CF, second = found.weight.clone(), found.first.clone(), found.second.clone()
    weight_C[idle], first_CF[idle] = IDLE_WEIGHT, 0.0
    if samples.covariance == "full":
        second[idle] = IDLE_WEIGHT * torch.eye(first_CF.shape[1], dtype=second.dtype)
    elif samples.covariance != "tied":
        second[idle] = IDLE_WEIGHT * (1.0 if samples.covariance == "diag" else first_CF.shape[1])
    return Statistics(weight_C, first_CF, second, found.log_likelihood)


def _reseed(samples: Samples, gaussians: Gaussians, found: Statistics, weak: Sequence[int]) -> Statistics:
    """Statistics in which each weak component stands for a share of all samples around one of the worst explained."""
    worst_WF = _worst_explained(samples, gaussians, len(weak))
    weight_C, first_CF, second = found.weight.clone(), found.first.clone(), found.second.clone()
    share = samples.weight / (2 * gaussians.n_components)
    pooled_FF = _pooled(found, weak, samples.covariance)
    for c, seed_F in zip(weak, worst_WF, strict=True):
        log.info("component %d collapsed; re-seeded from a sample that the others explain worst", c)
        weight_C[c], first_CF[c] = share, share * seed_F
        outer_FF = pooled_FF + torch.outer(seed_F, seed_F)
        if samples.covariance == "full":
            second[c] = share * outer_FF
        elif samples.covariance == "tied":
            second = second + share * outer_FF
        elif samples.covariance == "diag":
            second[c] = share * outer_FF.diagonal()
        else:
            second[c] = share * outer_FF.trace()
    return Statistics(weight_C, first_CF, second, found.log_likelihood)


def _worst_explained(samples: Samples, gaussians: Gaussians, n: int) -> Tensor:
    """The n samples of lowest log density over all processes, in the frame's coordinates, shape (n, F), in float64."""
    f = gaussians.n_features
    worst, lowest = torch.empty(0, f, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    start = 0
    for x_BF, logs_B, _ in Sweep(replace(samples, weights=None), gaussians).blocks():
        weights = None if samples.weights is None else samples.weights[start : start + len(x_BF)]
        start += len(x_BF)
        logs_B = logs_B.cpu() if weights is None else logs_B.cpu().masked_fill(weights == 0, torch.inf)
        lowest, order = torch.cat([lowest, logs_B]).sort(stable=True)
        worst = torch.cat([worst, x_BF.double()])[order][:n]
        lowest = lowest[:n]
    every = torch.cat(samples.processes.gather(lowest))
    rows_F = torch.cat([part.reshape(-1, f) for part in samples.processes.gather(worst.reshape(-1))])
    chosen = every.argsort(stable=True)[:n]
    z_WF = (rows_F[chosen] - samples.frame.centre) / samples.frame.scale
    return z_WF.nan_to_num(0.0).repeat(-(-n // max(len(z_WF), 1)), 1)[:n]


def _pooled(found: Statistics, weak: Sequence[int], covariance: Covariance) -> Tensor:
    """Mean covariance of the components that are not weak, shape (F, F); that of the frame where there are none."""
    f = found.first.shape[1]
    strong = [c for c in range(len(found.weight)) if c not in set(weak)]
    if not strong:
        return torch.eye(f, dtype=torch.float64)
    means_SF = found.first[strong] / found.weight[strong][:, None]
    total = found.weight[strong].sum()
    if covariance == "tied":
        scatter = found.second - means_SF.mT @ (found.weight[strong][:, None] * means_SF)
        return scatter / total
    if covariance == "full":
        return (found.second[strong].sum(0) - means_SF.mT @ (found.weight[strong][:, None] * means_SF)) / total
    squares = found.weight[strong] @ means_SF.square()
    if covariance == "diag":
        return torch.diag((found.second[strong].sum(0) - squares) / total)
    return torch.eye(f, dtype=torch.float64) * (found.second[strong].sum() - squares.sum()) / (total * f)


def lost_rank(error: LostRank, names: Sequence[str] | None) -> str:
    """What to tell a person whose samples leave a covariance without rank, with the column by its name."""
    column = f"column {names[error.feature]!r}" if names is not None else f"column {error.feature}"
    return (
        f"the covariance of component {error.component} lost its rank: {column} has no variance there that the other columns "
        f"do not explain. Likely causes: a constant or repeated column, duplicated samples, or fewer samples than features. "
        "Raise reg, use covariance='diag' or 'spherical', use fewer components, or drop the column"
    )
