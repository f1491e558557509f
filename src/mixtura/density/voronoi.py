"""How far a fitted mixture of experts is from the true one: losses over Voronoi cells, with an exponent for each cell.

A fit with more experts than there are splits a true one into several, and the parts approach it more slowly than one would.
So each fitted atom belongs to the nearest true atom, its cell, and a loss raises its errors to a power that depends on how
many atoms share the cell: then the loss falls like n^-1/2 where the paper says so.

Shapes: k atoms, d features.
Sources: 2401.13875, sec. 3 and 4 (D1, D2, D4; exponents of D4 as printed for the sister gate in 2402.03226, eq. 7, the one
of the temperature is ours); 2309.13850, sec. 2 and 3 (top-k: the worst set of experts that answer together).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from mixtura.core.gates import best_experts

__all__ = [
    "RBAR",
    "LossKind",
    "MixingMeasure",
    "cell_errors",
    "region_probabilities",
    "required_active",
    "voronoi_cells",
    "voronoi_loss",
]

LossKind = Literal["exact", "over", "linear-gate", "top-k", "top-k-over"]

# Exponent by the number of atoms that share a cell; it is known up to three, and 7 is a bound from there on.
RBAR: Mapping[int, int] = {1: 1, 2: 4, 3: 6}


class MixingMeasure(NamedTuple):
    """The atoms of a gated regression.

    Attributes:
        weight: exp(b0 / tau), > 0, shape (k,); they need not sum to 1.
        slope: b1, shape (k, d).
        temperature: tau, > 0; 1 for gates without.
        coef: a, shape (k, d).
        intercept: b, shape (k,).
        variance: v, shape (k,).
    Example:
        >>> truth = MixingMeasure.of([1.0, 1.0], [[3.0], [0.0]], 1.0, [[2.0], [-1.0]], [0.0, 1.0], [0.2, 0.3])
        >>> voronoi_loss(truth, truth)
        0.0
    """

    weight: np.ndarray
    slope: np.ndarray
    temperature: float
    coef: np.ndarray
    intercept: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, weight: Any, slope: Any, temperature: float, coef: Any, intercept: Any, variance: Any) -> MixingMeasure:
        """From array-likes, checked.

        Raises:
            ValueError: shapes that do not fit, weights, variances or a temperature that are not above 0, numbers that are not
                finite.
        """
        found = cls(
            np.atleast_1d(np.asarray(weight, dtype=np.float64)),
            np.atleast_2d(np.asarray(slope, dtype=np.float64)),
            float(temperature),
            np.atleast_2d(np.asarray(coef, dtype=np.float64)),
            np.atleast_1d(np.asarray(intercept, dtype=np.float64)),
            np.atleast_1d(np.asarray(variance, dtype=np.float64)),
        )
        k, d = found.slope.shape
        for name, shape in (("weight", (k,)), ("coef", (k, d)), ("intercept", (k,)), ("variance", (k,))):
            if getattr(found, name).shape != shape:
                raise ValueError(
                    f"{name} must have shape {shape}, as slope has {(k, d)}, got {getattr(found, name).shape}"
                )
        for name, value in found._asdict().items():
            if not np.isfinite(value).all():
                raise ValueError(f"{name} must be finite")
        for name in ("weight", "temperature", "variance"):
            if not np.all(np.asarray(getattr(found, name)) > 0):
                raise ValueError(f"{name} must be > 0, got a smallest of {np.min(getattr(found, name)):g}")
        return found

    @classmethod
    def from_estimator(cls, estimator: Any) -> MixingMeasure:
        """The atoms of a fitted `GatedRegression`, in the user's units, inputs counted from its ``origin_``."""
        return cls.of(
            np.exp(estimator.gate_bias_ / estimator.temperature_),
            estimator.gate_weights_,
            estimator.temperature_,
            estimator.coef_,
            estimator.intercept_ + estimator.coef_ @ estimator.origin_,
            estimator.variance_,
        )

    @property
    def n_atoms(self) -> int:
        """k."""
        return len(self.weight)

    def gauge(self, reference: int | Iterable[int] = -1, *, slopes: bool = True) -> MixingMeasure:
        """The same gate written so that the atoms ``reference`` together have weight 1 and mean slope 0.

        Args:
            reference: one atom or several; several have their slopes averaged by weight.
            slopes: whether slopes move; they may not under an activation, where that is another gate.
        """
        chosen = [reference] if isinstance(reference, int) else list(reference)
        total = self.weight[chosen].sum()
        slope = self.slope
        if slopes:
            slope = slope - self.weight[chosen] @ slope[chosen] / total
        return self._replace(weight=self.weight / total, slope=slope)

    def pick(self, atoms: Iterable[int]) -> MixingMeasure:
        """Some atoms, in that order."""
        rows = list(atoms)
        return MixingMeasure(
            self.weight[rows],
            self.slope[rows],
            self.temperature,
            self.coef[rows],
            self.intercept[rows],
            self.variance[rows],
        )


def voronoi_cells(measure: MixingMeasure, truth: MixingMeasure) -> list[list[int]]:
    """For each true atom the fitted atoms that are nearest to it in (b1, tau, a, b, v), Euclidean; of equals the first.

    Raises:
        ValueError: two true atoms are equal, or the numbers of features differ.
    """
    _check_pair(measure, truth)
    got, want = _points(measure), _points(truth)
    nearest = ((got[:, None] - want[None]) ** 2).sum(-1).argmin(1)
    return [np.flatnonzero(nearest == j).tolist() for j in range(truth.n_atoms)]


def voronoi_loss(
    measure: MixingMeasure,
    truth: MixingMeasure,
    kind: LossKind = "exact",
    order: float = 1.0,
    *,
    active: int | None = None,
    regions: Mapping[frozenset[int], float] | None = None,
    slopes_shift: bool | None = None,
) -> float:
    """Distance of a fitted mixing measure from the true one, 0 only where both are the same up to order and gauge.

    Args:
        measure: the fit, at least one atom.
        truth: the true atoms, all different; its last atom is the reference of the gauge.
        kind: ``"exact"`` (D2: all errors to the power 1), ``"over"`` (D4: by the size of the cell), ``"linear-gate"`` (D1: all
            to the power ``order``); ``"top-k"`` and ``"top-k-over"``: the worst over the sets of ``active`` true atoms.
        order: exponent of ``"linear-gate"``, >= 1.
        active: true experts that answer at an input, for top-k. With 1 no weight and no slope is identified by the density
            within a region, so both are left out, and atoms count by their share of the cell.
        regions: probability of each set of experts (`region_probabilities`); sets of probability 0 are left out.
        slopes_shift: whether slopes are determined up to a common vector only; by default for top-k and ``"linear-gate"``.
    Raises:
        ValueError: an unknown kind, ``active`` missing or out of range, regions that are all empty, equal true atoms.
    Source:
        See the top of the module.
    """
    if kind not in ("exact", "over", "linear-gate", "top-k", "top-k-over"):
        raise ValueError(f"kind must be one of ['exact', 'linear-gate', 'over', 'top-k', 'top-k-over'], got {kind!r}")
    if order < 1:
        raise ValueError(f"order must be >= 1, got {order}")
    _check_pair(measure, truth)
    sets: list[tuple[int, ...]] = [tuple(range(truth.n_atoms))]
    if kind.startswith("top-k"):
        sets = _active_sets(truth.n_atoms, active, regions)
    elif active is not None or regions is not None:
        raise ValueError(f"active and regions belong to the top-k losses, not to {kind!r}")
    identified = not (kind.startswith("top-k") and active == 1)
    shift = kind not in ("exact", "over") if slopes_shift is None else slopes_shift
    truth = truth.gauge(slopes=shift)
    losses = []
    # The reference may be any fitted atom, or lie in several: each is tried, and the nearest reading counts.
    for i in range(measure.n_atoms if shift else 1):
        gauged = measure.gauge(i, slopes=shift)
        cells = voronoi_cells(gauged, truth)
        if not cells[-1]:
            losses.append(math.inf)
            continue
        gauged = measure.gauge(cells[-1], slopes=shift)
        terms = _cell_terms(gauged, truth, voronoi_cells(gauged, truth), kind, order, identified)
        losses.append(max(float(sum(terms[j] for j in chosen)) for chosen in sets))
    if math.isinf(min(losses)):  # no atom near the reference: its weight, 1, is missing altogether
        gauged = measure.gauge(range(measure.n_atoms), slopes=False)
        terms = _cell_terms(gauged, truth, voronoi_cells(gauged, truth), kind, order, identified)
        return max(float(sum(terms[j] for j in chosen)) for chosen in sets)
    return min(losses)


def _cell_terms(
    measure: MixingMeasure, truth: MixingMeasure, cells: list[list[int]], kind: str, order: float, identified: bool
) -> list[float]:
    """What each true atom adds to the loss."""
    terms = []
    for j, cell in enumerate(cells):
        weight = measure.weight[cell] if identified else measure.weight[cell] / max(measure.weight[cell].sum(), 1e-300)
        missing = abs(measure.weight[cell].sum() - truth.weight[j]) if identified else float(not cell)
        errors = _errors(measure, truth, cell, j)
        if not identified:
            errors["slope"] = np.zeros(len(cell))
        powers = dict.fromkeys(errors, order if kind == "linear-gate" else 1.0)
        if kind.endswith("over") and len(cell) > 1:
            rbar = float(RBAR.get(len(cell), 7))
            powers = {"slope": 2.0, "temperature": 1.0, "coef": 2.0, "intercept": rbar, "variance": rbar / 2}
            if kind == "top-k-over":
                powers |= {"slope": rbar, "coef": rbar / 2}
        terms.append(missing + float(weight @ sum(errors[name] ** powers[name] for name in errors)))
    return terms


def _errors(measure: MixingMeasure, truth: MixingMeasure, cell: list[int], j: int) -> dict[str, np.ndarray]:
    return {
        "slope": np.linalg.norm(measure.slope[cell] - truth.slope[j], axis=1),
        "temperature": np.full(len(cell), abs(measure.temperature - truth.temperature)),
        "coef": np.linalg.norm(measure.coef[cell] - truth.coef[j], axis=1),
        "intercept": np.abs(measure.intercept[cell] - truth.intercept[j]),
        "variance": np.abs(measure.variance[cell] - truth.variance[j]),
    }


def region_probabilities(
    measure: MixingMeasure, X: Any, k: int, *, with_bias: bool = False
) -> dict[frozenset[int], float]:
    """How often each set of k experts answers together, over the inputs; sets that never do are left out.

    Args:
        measure: the atoms; only slopes matter, and weights with ``with_bias``.
        X: inputs, shape (N, d), drawn from the law of the inputs.
        k: experts that answer.
        with_bias: choose by slope and bias.
    Raises:
        ValueError: k out of range.
    Example:
        >>> three = MixingMeasure.of([1, 1, 1], [[4], [-4], [0]], 1, [[0], [1], [2]], [0, 0, 0], [1, 1, 1])
        >>> sorted((sorted(s), p) for s, p in region_probabilities(three, [[-1.0], [0.5]], 2).items())
        [([0, 2], 0.5), ([1, 2], 0.5)]
    """
    inputs = np.asarray(X, dtype=np.float64).reshape(len(X), -1)
    scores = inputs @ measure.slope.T
    if with_bias:
        scores = scores + measure.temperature * np.log(measure.weight)
    chosen = best_experts(torch.from_numpy(scores), k).numpy()
    found, counts = np.unique(chosen, axis=0, return_counts=True)
    return {
        frozenset(np.flatnonzero(row).tolist()): float(count / len(inputs))
        for row, count in zip(found, counts, strict=True)
    }


def required_active(cells: Iterable[Iterable[int]], subsets: Iterable[Iterable[int]]) -> int:
    """Experts that a fit must activate so that its density surely converges: the most atoms that one region's cells hold.

    It is sufficient, not necessary: copies of an expert can serve a region each. Where cells are unknown, K + k - k* is
    always enough.

    Args:
        cells: of each true atom, the fitted atoms (`voronoi_cells`).
        subsets: sets of true atoms that answer together.
    Source:
        2309.13850, theorem on the over-specified case.
    Example:
        >>> required_active([[0], [1], [2, 3]], [(0, 2), (1, 2)])
        3
    """
    sizes = [len(list(cell)) for cell in cells]
    return max(sum(sizes[j] for j in subset) for subset in subsets)


def _active_sets(
    n_atoms: int, active: int | None, regions: Mapping[frozenset[int], float] | None
) -> list[tuple[int, ...]]:
    if active is None or not 1 <= active <= n_atoms:
        raise ValueError(f"active must be between 1 and the {n_atoms} true experts, got {active}")
    sets = list(itertools.combinations(range(n_atoms), active))
    if regions is None:
        return sets
    kept = [chosen for chosen in sets if regions.get(frozenset(chosen), 0.0) > 0]
    if not kept:
        raise ValueError(
            f"no set of {active} true experts has a region of positive probability; got regions {dict(regions)}"
        )
    return kept


def _check_pair(measure: MixingMeasure, truth: MixingMeasure) -> None:
    if measure.slope.shape[1] != truth.slope.shape[1]:
        raise ValueError(
            f"measure has {measure.slope.shape[1]} features and truth {truth.slope.shape[1]}; both need the same"
        )
    points = np.column_stack([truth.slope, truth.coef, truth.intercept, truth.variance])
    if len(np.unique(points, axis=0)) < len(points):
        raise ValueError("truth has two equal atoms; merge them, or their weights cannot be told apart")


def _points(measure: MixingMeasure) -> np.ndarray:
    tau = np.full(measure.n_atoms, measure.temperature)
    return np.column_stack([measure.slope, tau, measure.coef, measure.intercept, measure.variance])


def cell_errors(
    measure: MixingMeasure,
    truth: MixingMeasure,
    part: Literal["slope", "coef", "intercept", "variance"],
    *,
    split: bool,
    slopes_shift: bool = False,
) -> float:
    """Mean error of one part of the parameters, over the atoms that share their cell (split) or have it for themselves.

    Where no atom is of that kind, the mean is over all: a replicate that went astray stays in the average.

    Args:
        measure, truth, slopes_shift: as for `voronoi_loss`; the fit's last atom is near the reference.
        part: which parameters.
        split: the atoms of cells with several, or those of cells with one.
    """
    truth = truth.gauge(slopes=slopes_shift)
    gauged = measure.gauge(slopes=slopes_shift)
    gauged = gauged.gauge(voronoi_cells(gauged, truth)[-1] or -1, slopes=slopes_shift)
    cells = voronoi_cells(gauged, truth)
    errors = [_errors(gauged, truth, cell, j)[part] for j, cell in enumerate(cells)]
    kept = [e for e, cell in zip(errors, cells, strict=True) if cell and (len(cell) > 1) == split]
    return float(np.concatenate(kept or errors).mean())
