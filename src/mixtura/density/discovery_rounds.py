"""The rounds of discovering classes: a start, EM with pinned labels, moves, and so on until the number of clusters stays.

Shapes: N samples, F features (reduced), C known classes, K clusters.
Source: 2305.06144, sec. 3.2 (semi-supervised k-means, then EM with stochastic splits and merges); greedy last rounds are ours.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixtura.core.gaussian import Covariance, Gaussians
from mixtura.core.natural_form import Frame, block_rows
from mixtura.core.progress import bar
from mixtura.density.cluster_moves import Move, Rules, move_clusters, partition_evidence
from mixtura.density.em import Samples, assess, expect
from mixtura.density.set_evidence import ClusterPrior, map_mixture, set_statistics
from mixtura.density.sources import Arrays
from mixtura.density.starts import lloyd, start_means

__all__ = ["Found", "Round", "Schedule", "known_kmeans", "nearest_centre", "run_rounds"]

log = logging.getLogger(__name__)

START_ROWS, START_ROWS_EACH = 4096, 128  # rows that a start looks at, or so many a cluster
LLOYD_STEPS = 100
QUIET_ROUNDS = 3  # without a move, each with halves of its own
EM_TOLERANCE = 1e-5  # nats a sample
LEAST_SAMPLES = 2  # a new cluster of fewer is dissolved


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long the rounds go on.

    Attributes:
        rounds: of EM and moves, >= 0.
        anneal: last rounds that take a move where H > 1 and never else.
        em_steps: steps before the moves of a round.
        final_steps: most steps at the end.
    """

    rounds: int
    anneal: int
    em_steps: int = 3
    final_steps: int = 50


@dataclass(frozen=True)
class Round:
    """What a round did.

    Attributes:
        n_clusters: after its moves.
        moves: that were made.
        log_evidence: of the partition after its moves, tempered; in nats.
    """

    n_clusters: int
    moves: tuple[Move, ...]
    log_evidence: float


@dataclass(frozen=True)
class Found:
    """What the rounds ended with.

    Attributes:
        gaussians: the mixture; component c < C is known class c.
        sets: cluster of each sample, shape (N,); labelled ones in that of their class.
        history: of the rounds.
        converged: whether the last round made no move.
        log_evidence: of the partition at the end, tempered; in nats.
    """

    gaussians: Gaussians
    sets: Tensor
    history: list[Round]
    converged: bool
    log_evidence: float


def known_kmeans(
    x: np.ndarray, classes: np.ndarray, n_classes: int, n_clusters: int, *, n_init: int, rng: np.random.RandomState
) -> np.ndarray:
    """Semi-supervised k-means: labelled rows stay in the cluster of their class, whose centre starts at their mean.

    Args:
        x: shape (N, F).
        classes: shape (N,), in [0, n_classes), -1 where unlabelled.
        n_classes: C; clusters 0 .. C - 1 are theirs.
        n_clusters: K >= C.
        n_init: starts; that with the least squared distance stays.
        rng: source of chance.
    Returns:
        Centres, shape (K, F).
    """
    most = max(START_ROWS, START_ROWS_EACH * n_clusters)
    rows = np.arange(len(x))
    if len(x) > most:
        rows = np.sort(rng.choice(len(x), most, replace=False))
        # Every class keeps a row.
        rows = np.union1d(rows, [np.flatnonzero(classes == c)[0] for c in range(n_classes)])
    x_MF, class_M = x[rows], classes[rows]
    allowed_MK = np.ones((len(rows), n_clusters), dtype=bool)
    allowed_MK[class_M >= 0] = np.arange(n_clusters) == class_M[class_M >= 0, None]
    best, least = np.empty(0), np.inf
    for _ in range(n_init):
        means_KF = start_means(
            x_MF,
            n_clusters,
            "k-means++",
            classes=class_M,
            class_components={c: [c] for c in range(n_classes)},
            sample_weight=None,
            random_state=rng,
        )
        centres_KF, label_M = lloyd(x_MF, means_KF, steps=LLOYD_STEPS, allowed=allowed_MK)
        spread = float(((x_MF - centres_KF[label_M]) ** 2).sum())
        if spread < least:
            best, least = centres_KF, spread
    return best


def nearest_centre(x: Tensor, centres: Tensor, classes: Tensor) -> Tensor:
    """Nearest centre of each row, shape (N,); that of a labelled row is its class's."""
    label_N = (x @ centres.mT - 0.5 * centres.square().sum(1)).argmax(1)
    return torch.where(classes >= 0, classes, label_N)


def run_rounds(
    x: Tensor,
    classes: Tensor,
    sets: Tensor,
    prior: ClusterPrior,
    rules: Rules,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    device: str = "cpu",
) -> Found:
    """EM with pinned labels and moves in turn.

    Args:
        x: shape (N, F), float64, of about unit spread.
        classes: of each sample, shape (N,), in [0, rules.n_known), -1 where unlabelled.
        sets: clusters to start from, shape (N,).
        prior, rules, schedule: of clusters, moves and rounds.
        generator: source of chance.
        device: of the EM steps.
    """
    labelled_N = classes >= 0
    n = max(int(sets.max()) + 1, rules.n_known)
    history, quiet, step = list[Round](), 0, 0
    with bar(desc="discover", unit="round", total=schedule.rounds) as shown:
        while step < schedule.rounds:
            _, sets, n = _settle(x, classes, sets, n, rules, prior, schedule.em_steps, device)
            greedy = step >= schedule.rounds - schedule.anneal
            sets, n, moves = move_clusters(x, sets, labelled_N, n, prior, rules, generator=generator, greedy=greedy)
            assert bool((sets[labelled_N] == classes[labelled_N]).all()), "a labelled sample left its class"
            history.append(Round(n, tuple(moves), _evidence(x, sets, n, prior, rules)))
            shown.set_postfix(clusters=n)
            shown.update()
            quiet = 0 if moves else quiet + 1
            step += 1
            if quiet >= QUIET_ROUNDS:
                if greedy or not schedule.anneal:
                    break
                # Nothing left that chance would take; on to the greedy end.
                step, quiet = max(step, schedule.rounds - schedule.anneal), 0
    gaussians, sets, n = _settle(x, classes, sets, n, rules, prior, schedule.final_steps, device)
    return Found(gaussians, sets, history, not history or not history[-1].moves, _evidence(x, sets, n, prior, rules))


def _evidence(x: Tensor, sets: Tensor, n: int, prior: ClusterPrior, rules: Rules) -> float:
    return partition_evidence(set_statistics(x, sets, n, prior.covariance), prior, rules)


def _settle(
    x: Tensor, classes: Tensor, sets: Tensor, n: int, rules: Rules, prior: ClusterPrior, steps: int, device: str
) -> tuple[Gaussians, Tensor, int]:
    """EM from hard clusters: the mixture, the most probable cluster of each sample, and how many; the smallest go."""
    while True:
        gaussians = map_mixture(set_statistics(x, sets, n, prior.covariance), prior)
        samples = _samples(x, classes, n, rules.n_known, prior.covariance, device)
        before = -np.inf
        for _ in range(steps):
            found = expect(samples, gaussians)
            gaussians = map_mixture(found, prior)
            now = float(found.log_likelihood) / len(x)
            if abs(now - before) < EM_TOLERANCE:
                break
            before = now
        label_N = torch.from_numpy(assess(samples, gaussians)[1])
        sets, kept = _dissolve(x, label_N, gaussians, rules.n_known)
        if kept == n:
            return gaussians, label_N, n
        n = kept


def _dissolve(x: Tensor, labels: Tensor, gaussians: Gaussians, n_known: int) -> tuple[Tensor, int]:
    """Clusters without new ones of fewer than ``LEAST_SAMPLES``, whose samples go to the most probable of the others."""
    stays_C = torch.bincount(labels, minlength=gaussians.n_components) >= LEAST_SAMPLES
    stays_C[:n_known] = True
    kept = stays_C.nonzero()[:, 0]
    number_C = torch.full((len(stays_C),), -1)
    number_C[kept] = torch.arange(len(kept))
    found_N = number_C[labels]
    lost = (found_N < 0).nonzero()[:, 0]
    if len(lost):
        found_N[lost] = gaussians.log_joint(x[lost])[:, kept].argmax(1)
    return found_N, len(kept)


def _samples(x: Tensor, classes: Tensor, n: int, n_known: int, covariance: Covariance, device: str) -> Samples:
    f = x.shape[1]
    frame = Frame(torch.zeros(f, dtype=torch.float64), torch.ones(f, dtype=torch.float64))
    return Samples(
        source=Arrays(x.numpy(), None),
        frame=frame,
        covariance=covariance,
        floor=torch.zeros(f, dtype=torch.float64),
        n=len(x),
        weight=float(len(x)),
        classes=classes,
        table=torch.eye(n_known, n, dtype=torch.bool),
        rows=block_rows(f, n, covariance, torch.float64, device),
        device=device,
    )
