"""Splits and merges of clusters, judged by a ratio of marginal likelihoods, and how far known classes temper that ratio.

- A cluster is halved by 2-means; the split is taken with probability min(1, H), a merge of the same halves with min(1, 1/H).
- Clusters of known classes come first, 0 .. n_known - 1. Two of them never merge. ``shed`` lets one give away the half
  without its labelled samples; ``absorb`` lets one take in a new cluster.
- Each cluster is in at most one move of a round, so no ratio is computed from statistics that a move has changed.

Shapes: N samples, F features, C clusters.
Source: 2305.06144, sec. 3.2, eq. 9-10; shedding, absorbing and the temper are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.core.gaussian import Covariance
from mixtura.core.sufficient import Statistics
from mixtura.density.set_evidence import ClusterPrior, log_evidence, set_statistics

__all__ = [
    "Move",
    "Rules",
    "halves",
    "halves_of",
    "log_split_ratio",
    "move_clusters",
    "partition_evidence",
    "rows_of",
    "split_terms",
]

LEAST_HALF = 5  # a half has more samples than this
TWO_MEANS_STEPS = 20
NEAREST = 3  # clusters that a merge looks at


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What moves are allowed, and how they are judged.

    Attributes:
        n_known: clusters of known classes, the first ones.
        alpha: of the Dirichlet process, > 0: how willing it is to open a cluster.
        temper: what every difference of log evidences is divided by, >= 1.
        shed: share of a known cluster's labelled samples that must lie in one half for the other to be given away; None
            never splits a known cluster.
        absorb: whether a new cluster may merge into a known one.
        nearest: how many nearest clusters a merge looks at.
        most: largest number of clusters.
    """

    n_known: int
    alpha: float = 1.0
    temper: float = 1.0
    shed: float | None = None
    absorb: bool = False
    nearest: int = NEAREST
    most: int | None = None


@dataclass(frozen=True)
class Move:
    """A move that was made.

    Attributes:
        kind: ``"split"``, ``"shed"``, ``"merge"`` or ``"absorb"``.
        clusters: by their numbers before the round; one for a split, two for a merge.
        log_ratio: log H of the move.
    """

    kind: str
    clusters: tuple[int, ...]
    log_ratio: float


def log_split_ratio(first: Statistics, second: Statistics, prior: ClusterPrior, rules: Rules) -> Tensor:
    """log H of splitting the union of two sets into the two, shape (C,); that of merging them is its negative, exactly.

    Source:
        2305.06144, eq. 9, with the differences of log h divided by the temper.
    """
    gain_C, price_C = split_terms(first, second, prior)
    return math.log(rules.alpha) + price_C + gain_C / rules.temper


def split_terms(first: Statistics, second: Statistics, prior: ClusterPrior) -> tuple[Tensor, Tensor]:
    """Gain of log evidence of two sets over their union, and log Gamma(a) Gamma(b) / Gamma(a + b); both of shape (C,)."""
    gain_C = log_evidence(first, prior) + log_evidence(second, prior) - log_evidence(first + second, prior)
    a_C, b_C = first.weight.clamp(min=1), second.weight.clamp(min=1)
    return gain_C, torch.lgamma(a_C) + torch.lgamma(b_C) - torch.lgamma(a_C + b_C)


def partition_evidence(found: Statistics, prior: ClusterPrior, rules: Rules) -> float:
    """Log of what moves climb: sum over clusters of log alpha + log Gamma(n) + log h / temper; empty ones count nothing."""
    full_C = found.weight > 0
    parts_C = (
        math.log(rules.alpha) + torch.lgamma(found.weight.clamp(min=1)) + log_evidence(found, prior) / rules.temper
    )
    return float(parts_C[full_C].sum())


def halves(x: Tensor, sets: Tensor, n_sets: int, generator: torch.Generator) -> Tensor:
    """Half of each sample within its set by 2-means, 0 or 1, shape (N,).

    All sets are halved at once, from two starts: along the longest axis, and from two samples far apart; the tighter stays.

    Args:
        x: shape (N, F).
        sets: of each sample, shape (N,), in [0, n_sets).
        n_sets: C.
        generator: source of chance.
    """
    along_N = _two_means(x, sets, n_sets, _axis_side(x, sets, n_sets))
    apart_N = _two_means(x, sets, n_sets, _pair_side(x, sets, n_sets, generator))
    better_C = _within(x, sets, n_sets, apart_N) < _within(x, sets, n_sets, along_N)
    return torch.where(better_C[sets], apart_N, along_N)


def halves_of(
    x: Tensor, sets: Tensor, n_sets: int, covariance: Covariance, generator: torch.Generator
) -> tuple[Statistics, Statistics]:
    """Statistics of the two halves of every set, as :func:`halves` draws them."""
    found = set_statistics(x, 2 * sets + halves(x, sets, n_sets, generator), 2 * n_sets, covariance)
    return rows_of(found, slice(0, None, 2)), rows_of(found, slice(1, None, 2))


def move_clusters(
    x: Tensor,
    sets: Tensor,
    labelled: Tensor,
    n_sets: int,
    prior: ClusterPrior,
    rules: Rules,
    *,
    generator: torch.Generator,
    greedy: bool = False,
) -> tuple[Tensor, int, list[Move]]:
    """One round of splits, then of merges among the clusters that did not split.

    Args:
        x: shape (N, F), float64.
        sets: cluster of each sample, shape (N,), in [0, n_sets).
        labelled: which samples are labelled, shape (N,), boolean; each is in the cluster of its class.
        n_sets: C.
        prior, rules: of the clusters.
        generator: source of chance.
        greedy: take a move where H > 1 instead of with probability min(1, H).
    Returns:
        Cluster of each sample afterwards, how many clusters there are, and the moves. Labelled samples stay where they are.
    """
    half_N = halves(x, sets, n_sets, generator)
    open_C = torch.ones(n_sets, dtype=torch.bool)
    for c in range(rules.n_known):
        mine_N = (sets == c) & labelled
        share = float(half_N[mine_N].double().mean()) if bool(mine_N.any()) else 0.0
        kept = int(share >= 0.5)
        open_C[c] = rules.shed is not None and max(share, 1 - share) >= rules.shed
        # The half of the labelled samples stays, with all of them, as half 0.
        half_N = torch.where(sets == c, (half_N != kept).long(), half_N)
        half_N[mine_N] = 0
    found = set_statistics(x, 2 * sets + half_N, 2 * n_sets, prior.covariance)
    first, second = rows_of(found, slice(0, None, 2)), rows_of(found, slice(1, None, 2))
    whole = first + second
    open_C &= (first.weight > LEAST_HALF) & (second.weight > LEAST_HALF)
    ratio_C = log_split_ratio(first, second, prior, rules)
    moves, busy, n = list[Move](), set[int](), n_sets
    target_N = sets.clone()
    order = ratio_C.masked_fill(~open_C, -torch.inf).argsort(descending=True).tolist()
    for c in order:
        if not open_C[c] or (rules.most is not None and n >= rules.most):
            continue
        if _accept(float(ratio_C[c]), greedy, generator):
            target_N[(sets == c) & (half_N == 1)] = n
            n += 1
            busy.add(c)
            moves.append(Move("shed" if c < rules.n_known else "split", (c,), float(ratio_C[c])))
    gone = set[int]()
    for ratio, a, b in _merge_candidates(whole, prior, rules, busy):
        if a in busy or b in busy or not _accept(ratio, greedy, generator):
            continue
        target_N[sets == b] = a
        busy |= {a, b}
        gone.add(b)
        moves.append(Move("absorb" if a < rules.n_known else "merge", (a, b), ratio))
    kept_numbers = [c for c in range(n) if c not in gone]
    renumber_C = torch.full((n,), -1)
    renumber_C[kept_numbers] = torch.arange(len(kept_numbers))
    return renumber_C[target_N], len(kept_numbers), moves


def rows_of(found: Statistics, chosen: Tensor | slice) -> Statistics:
    """The statistics of some of the sets; their log likelihood is not split."""
    return Statistics(found.weight[chosen], found.first[chosen], found.second[chosen], found.log_likelihood)


def _merge_candidates(
    whole: Statistics, prior: ClusterPrior, rules: Rules, busy: set[int]
) -> list[tuple[float, int, int]]:
    """Pairs (log ratio of merging, lower number, higher number) of near clusters, best first."""
    n = len(whole.weight)
    mean_CF = whole.first / whole.weight.clamp(min=1)[:, None]
    far_CC = torch.cdist(mean_CF, mean_CF)
    far_CC.fill_diagonal_(torch.inf)
    far_CC[whole.weight == 0] = torch.inf
    far_CC[:, whole.weight == 0] = torch.inf
    least = rules.n_known if not rules.absorb else 0
    pairs = set[tuple[int, int]]()
    for c in range(rules.n_known, n):
        if c in busy:
            continue
        row = far_CC[c].clone()
        row[:least] = torch.inf
        for other in row.argsort()[: rules.nearest].tolist():
            if math.isfinite(float(row[other])) and other not in busy:
                pairs.add((min(c, other), max(c, other)))
    if not pairs:
        return []
    a, b = torch.tensor(sorted(pairs)).mT
    ratio = -log_split_ratio(rows_of(whole, a), rows_of(whole, b), prior, rules)
    found = zip(ratio.tolist(), a.tolist(), b.tolist(), strict=True)
    return sorted(found, key=lambda pair: (-pair[0], pair[1:]))


def _accept(log_ratio: float, greedy: bool, generator: torch.Generator) -> bool:
    if greedy:
        return log_ratio > 0
    return math.log(max(float(torch.rand((), generator=generator, dtype=torch.float64)), 1e-300)) < log_ratio


def _axis_side(x: Tensor, sets: Tensor, n_sets: int) -> Tensor:
    """Side of its set's mean on which a sample lies, along the set's longest axis, shape (N,)."""
    found = set_statistics(x, sets, n_sets, "full")
    count_C = found.weight.clamp(min=1)
    mean_CF = found.first / count_C[:, None]
    sigma_CFF = found.second / count_C[:, None, None] - mean_CF[:, :, None] * mean_CF[:, None, :]
    axis_CF = torch.linalg.eigh(sigma_CFF).eigenvectors[:, :, -1]
    return ((x - mean_CF[sets]).mul_(axis_CF[sets]).sum(1) > 0).long()


def _pair_side(x: Tensor, sets: Tensor, n_sets: int, generator: torch.Generator) -> Tensor:
    """The nearer of two samples of the set, drawn at random and by squared distance from the first, shape (N,)."""
    first_C = _draw(torch.ones(len(x), dtype=torch.float64), sets, n_sets, generator)
    one_N = (x - x[first_C][sets]).square().sum(1)
    second_C = _draw(one_N.double(), sets, n_sets, generator)
    two_N = (x - x[second_C][sets]).square().sum(1)
    return (two_N < one_N).long()


def _draw(mass: Tensor, sets: Tensor, n_sets: int, generator: torch.Generator) -> Tensor:
    """One sample of each set, with probability proportional to its mass, shape (C,); 0 for an empty set."""
    # The largest of log mass + Gumbel noise is such a draw, for all sets at once.
    noise_N = -torch.empty_like(mass).exponential_(generator=generator).log()
    score_N = mass.clamp(min=1e-300).log() + noise_N
    best_C = torch.full((n_sets,), -torch.inf, dtype=mass.dtype).scatter_reduce(0, sets, score_N, "amax")
    hit = (score_N == best_C[sets]).nonzero()[:, 0]
    drawn_C = torch.zeros(n_sets, dtype=torch.long)
    drawn_C[sets[hit]] = hit
    return drawn_C


def _two_means(x: Tensor, sets: Tensor, n_sets: int, half: Tensor) -> Tensor:
    """2-means within every set at once, from given halves."""
    for _ in range(TWO_MEANS_STEPS):
        centre_HF = _centres(x, 2 * sets + half, 2 * n_sets)
        # Nearer of two centres: on which side of the plane between them.
        normal_CF = centre_HF[1::2] - centre_HF[::2]
        middle_CF = (centre_HF[1::2] + centre_HF[::2]) / 2
        offset_C = (normal_CF * middle_CF).sum(1)
        side_N = ((x * normal_CF[sets]).sum(1) > offset_C[sets]).long()
        if bool((side_N == half).all()):
            break
        half = side_N
    return half


def _centres(x: Tensor, groups: Tensor, n: int) -> Tensor:
    count_H = torch.bincount(groups, minlength=n).to(x)
    return x.new_zeros(n, x.shape[1]).index_add(0, groups, x) / count_H.clamp(min=1)[:, None]


def _within(x: Tensor, sets: Tensor, n_sets: int, half: Tensor) -> Tensor:
    """Sum of squared distances to the halves' centres, shape (C,)."""
    centre_HF = _centres(x, 2 * sets + half, 2 * n_sets)
    square_N = (x - centre_HF[2 * sets + half]).square().sum(1)
    return x.new_zeros(n_sets).index_add(0, sets, square_N)
