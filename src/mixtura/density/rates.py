"""How fast an estimator finds the truth: fits over sizes and replicates, slopes in log-log with intervals.

All replicates of a size are fitted at once, shared out where there are several processes. Finished replicates are kept on
disk, so that a run that was cut off goes on, and more replicates can be added to it.

Shapes: R replicates, N pairs, D features, P parameters.
Source: 2401.13875, sec. 5; the interval is the percentile bootstrap over replicates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mixtura.core.checkpoint import read_json, write_json
from mixtura.core.processes import Processes, join
from mixtura.core.progress import bar
from mixtura.density.gated_em import Box, Given, fit_em
from mixtura.density.gated_law import GateRule, Layout, Pairs, Parts, evaluate, gate_logits
from mixtura.density.gated_law import chosen as choose
from mixtura.density.gated_polish import polish
from mixtura.density.voronoi import MixingMeasure

__all__ = ["Fits", "RateResult", "Truth", "fit_near", "measured_rates", "rate_experiment", "total_variation"]

BOOTSTRAP = 1000
Summary = Literal["mean", "median"]


@dataclass(frozen=True)
class Truth:
    """A law to draw from, inputs uniform in a box.

    Attributes:
        measure: its atoms; the last one's slope is 0 and its weight 1.
        rule: its gate.
        interval: range of every input.
    """

    measure: MixingMeasure
    rule: GateRule
    interval: tuple[float, float] = (-1.0, 1.0)

    @property
    def layout(self) -> Layout:
        """Of its parameters."""
        return Layout(*self.measure.slope.shape)

    @property
    def theta(self) -> Tensor:
        """Its parameters, shape (1, P)."""
        return theta_of(self.measure)[None]

    def sample(self, n: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """X (R, n, D) and y (R, n), one replicate a generator."""
        low, high = self.interval
        d, parts = self.layout.n_features, self.layout.split(self.theta)
        X_RND = (
            torch.stack([torch.rand(n, d, generator=g, dtype=torch.float64) for g in generators]) * (high - low) + low
        )
        x_RDN = torch.cat([X_RND, torch.ones_like(X_RND[..., :1])], -1).mT
        score_REN, logit_REN = gate_logits(self.rule, parts, x_RDN)
        mask = choose(self.rule, score_REN, logit_REN)
        p_REN = (logit_REN if mask is None else logit_REN.masked_fill(~mask, -torch.inf)).softmax(1)
        u_RN = torch.stack([torch.rand(n, generator=g, dtype=torch.float64) for g in generators])
        expert_RN = (p_REN.cumsum(1) < u_RN[:, None]).sum(1).clamp(max=self.layout.n_experts - 1)
        noise_RN = torch.stack([torch.randn(n, generator=g, dtype=torch.float64) for g in generators])
        mean_RN = (parts.coef[0][expert_RN] * X_RND).sum(-1) + parts.intercept[0][expert_RN]
        return X_RND, mean_RN + (parts.log_variance[0] / 2).exp()[expert_RN] * noise_RN


def theta_of(measure: MixingMeasure) -> Tensor:
    """Parameters (P,) of a mixing measure."""
    layout = Layout(*measure.slope.shape)
    given = (
        measure.slope,
        measure.temperature * np.log(measure.weight),
        measure.coef,
        measure.intercept,
        np.log(measure.variance),
        np.array(math.log(measure.temperature)),
    )
    return layout.join(Parts(*(torch.from_numpy(np.asarray(v, dtype=np.float64))[None] for v in given)))[0]


def measure_of(layout: Layout, theta: Tensor) -> MixingMeasure:
    """The mixing measure of parameters (P,)."""
    parts = layout.split(theta[None])
    tau = float(parts.log_temperature.exp())
    return MixingMeasure(
        (parts.bias[0] / tau).exp().numpy(),
        parts.slope[0].numpy(),
        tau,
        parts.coef[0].numpy(),
        parts.intercept[0].numpy(),
        parts.log_variance[0].exp().numpy(),
    )


@dataclass(frozen=True)
class Fits:
    """R fits of one size.

    Attributes:
        rule, layout: of the law that was fitted.
        theta: shape (R, P).
        value: mean log density, shape (R,).
        edge: whether a parameter ended at the edge of the box, boolean (R,).
    """

    rule: GateRule
    layout: Layout
    theta: Tensor
    value: Tensor
    edge: Tensor

    def measures(self) -> list[MixingMeasure]:
        """One mixing measure a fit."""
        return [measure_of(self.layout, row) for row in self.theta]


Fit = Callable[[Tensor, Tensor, Sequence[torch.Generator]], Fits]
Metric = Callable[[Fits, Truth], Sequence[float]]
Measure = Callable[[int, Sequence[int], Sequence[torch.Generator]], Mapping[str, Sequence[float]]]


def fit_near(
    truth: Truth,
    *,
    rule: GateRule | None = None,
    copies: Sequence[int] = (),
    spread: Mapping[str, float] | None = None,
    n_starts: int = 1,
    em_iterations: int = 3,
    box: Box | None = None,
    temperature: bool = True,
    drop: Sequence[int] = (),
) -> Fit:
    """A fit that starts wide around the truth: the same starts, optimiser and budget whatever the gate.

    Args:
        truth: centre of the starts.
        rule: the gate that is fitted; by default the truth's.
        copies: true atoms that the start holds once more, for over-specified fits. A copy has half of the atom's weight and
            noise of its own. The last atom stays the reference.
        spread: standard deviations of the start's noise: slope, bias, coef, intercept, log_variance, log_temperature. Not
            small: a fit that starts at the truth measures the start.
        n_starts: starts; the best likelihood is kept.
        em_iterations: of EM before the likelihood is climbed.
        box: where parameters may be.
        temperature: whether the temperature is learned, where the gate has one.
        drop: atoms that the start leaves out.
    """
    rule = rule or truth.rule
    kept = [i for i in range(truth.measure.n_atoms) if i not in set(drop)]
    # Copies stand before the atoms, so that the reference stays last.
    atoms = truth.measure.pick([*copies, *kept])
    weight = atoms.weight.copy()
    for i, j in enumerate([*copies, *kept]):
        weight[i] /= 1 + list(copies).count(j)
    atoms = atoms._replace(weight=weight).gauge(slopes=rule.slopes_shift)
    layout, centre = Layout(*atoms.slope.shape), theta_of(atoms)
    free = layout.free(rule, temperature=temperature)
    size = {"slope": 0.5, "bias": 0.2, "coef": 0.2, "intercept": 0.2, "log_variance": 0.2, "log_temperature": 0.3}
    size |= dict(spread or {})
    noise = sum(layout.mask(name) * value for name, value in size.items()) * free
    limits = box or Box()

    def fit(X: Tensor, y: Tensor, generators: Sequence[torch.Generator]) -> Fits:
        given = Given(rule, layout, Pairs.of(X, y), free, limits)
        lower, upper = limits.edges(layout)
        best: Tensor | None = None
        value = torch.empty(0)
        for _ in range(n_starts):
            drawn = torch.stack([torch.randn(len(centre), generator=g, dtype=torch.float64) for g in generators])
            theta = (centre + noise * drawn).clamp(lower, upper)
            if em_iterations:
                theta, _ = fit_em(given, theta, max_iter=em_iterations, tol=1e-6)
            end = polish(given, theta)
            if best is None:
                best, value = end.theta, end.value
            else:
                better = end.value > value
                best, value = torch.where(better[:, None], end.theta, best), torch.where(better, end.value, value)
        assert best is not None
        edge = (((best <= lower + 1e-9) | (best >= upper - 1e-9)) & free).any(1)
        return Fits(rule, layout, best, value, edge)

    return fit


def total_variation(fits: Fits, truth: Truth, *, nodes: int = 64, targets: int = 300) -> list[float]:
    """Half the L1 distance of fitted and true density of y given x, mean over uniform x in one feature: R numbers.

    Gauss-Legendre in x on both halves of the interval (top-k gates jump at 0), trapezoids in y over ten standard deviations
    beyond every line.

    Raises:
        ValueError: more than one feature.
    """
    if truth.layout.n_features != 1:
        raise ValueError(f"total variation is by quadrature in one feature, the truth has {truth.layout.n_features}")
    low, high = truth.interval
    at, weight_Q = np.polynomial.legendre.leggauss(nodes)
    cuts = [low, 0.0, high] if low < 0 < high else [low, high]
    x_Q = np.concatenate([(a + b) / 2 + (b - a) / 2 * at for a, b in itertools.pairwise(cuts)])
    w_Q = np.concatenate([weight_Q * (b - a) / 2 / (high - low) for a, b in itertools.pairwise(cuts)])
    m = truth.measure
    lines_QE = x_Q[:, None] * m.coef[:, 0] + m.intercept
    reach = 10 * math.sqrt(m.variance.max())
    y_QG = np.linspace(lines_QE.min(1) - reach, lines_QE.max(1) + reach, targets, axis=1)
    step_Q = y_QG[:, 1] - y_QG[:, 0]
    pairs = Pairs.of(
        torch.from_numpy(np.repeat(x_Q, targets)[:, None]), torch.from_numpy(np.ascontiguousarray(y_QG.ravel()))
    )
    area = torch.from_numpy(np.repeat(w_Q * step_Q, targets))
    true_N = evaluate(truth.rule, truth.layout, truth.theta, pairs).log_density[0].exp()
    found = []
    for row in fits.theta:
        fitted_N = evaluate(fits.rule, fits.layout, row[None], pairs).log_density[0].exp()
        found.append(float((area * (fitted_N - true_N).abs()).sum()) / 2)
    return found


@dataclass(frozen=True)
class RateResult:
    """Errors over sizes and replicates.

    Attributes:
        sizes: Q sample sizes, rising.
        values: metric -> errors, Q rows of R replicates.
        seed: of the bootstrap.
    """

    sizes: tuple[int, ...]
    values: Mapping[str, Sequence[Sequence[float]]]
    seed: int = 0
    _drawn: dict[tuple[str, str], tuple[float, float, float]] = field(default_factory=dict, compare=False, repr=False)

    def summary(self, metric: str, by: Summary = "mean") -> list[float]:
        """Mean or median over replicates, for each size."""
        return [float(_over(by, np.asarray(row))) for row in self._rows(metric)]

    def slope(self, metric: str, by: Summary = "mean") -> float:
        """Least-squares slope of the log of the mean (or median) error on the log of the size."""
        return self._all(metric, by)[0]

    def interval(self, metric: str, by: Summary = "mean") -> tuple[float, float]:
        """95 % bootstrap interval of the slope, replicates drawn anew within each size.

        Raises:
            ValueError: fewer than 3 replicates or 2 sizes.
        """
        return self._all(metric, by)[1:]

    @property
    def slopes(self) -> dict[str, dict[str, float]]:
        """Slope of the mean and of the median of every metric."""
        return {name: {by: self.slope(name, by) for by in ("mean", "median")} for name in self.values}

    def plot(self, axes: Any, metrics: Sequence[str] | None = None, by: Summary = "median") -> None:
        """Draw errors over sizes in log-log, one line a metric, with the quarters of the replicates as a band."""
        for name in metrics or tuple(self.values):
            rows = np.asarray(self._rows(name))
            low, high = np.quantile(rows, [0.25, 0.75], axis=1)
            (line,) = axes.plot(
                self.sizes, self.summary(name, by), "o-", markersize=3, label=f"{name}  {self.slope(name, by):.2f}"
            )
            axes.fill_between(self.sizes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="sample size")

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain numbers; `from_json` reads it back."""
        values = {name: [list(map(float, row)) for row in rows] for name, rows in self.values.items()}
        return {"sizes": list(self.sizes), "values": values, "seed": self.seed}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RateResult:
        """From what `to_json` gave."""
        return cls(tuple(record["sizes"]), dict(record["values"]), int(record["seed"]))

    def _rows(self, metric: str) -> Sequence[Sequence[float]]:
        if metric not in self.values:
            raise ValueError(f"metric must be one of {sorted(self.values)}, got {metric!r}")
        return self.values[metric]

    def _all(self, metric: str, by: Summary) -> tuple[float, float, float]:
        if (metric, by) not in self._drawn:
            rows = np.asarray(self._rows(metric), dtype=np.float64)
            if rows.shape[1] < 3 or len(rows) < 2:
                raise ValueError(
                    f"an interval needs at least 3 replicates and 2 sizes, got {rows.shape[1]} replicates and {len(rows)} sizes"
                )
            rng = np.random.default_rng(self.seed)
            x = np.log(self.sizes)
            x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
            tiny = np.finfo(np.float64).tiny
            drawn = rng.integers(rows.shape[1], size=(BOOTSTRAP, *rows.shape))
            again = np.take_along_axis(rows[None].repeat(BOOTSTRAP, 0), drawn, axis=2)
            slopes = np.log(np.maximum(_over(by, again), tiny)) @ x
            low, high = np.quantile(slopes, [0.025, 0.975])
            whole = float(np.log(np.maximum(_over(by, rows), tiny)) @ x)
            self._drawn[metric, by] = (whole, float(low), float(high))
        return self._drawn[metric, by]


def _over(by: str, rows: np.ndarray) -> np.ndarray:
    if by not in ("mean", "median"):
        raise ValueError(f"by must be 'mean' or 'median', got {by!r}")
    return rows.mean(-1) if by == "mean" else np.median(rows, -1)


def rate_experiment(
    truth: Truth,
    fit: Fit,
    sizes: Sequence[int],
    replicates: int,
    metrics: Mapping[str, Metric],
    seed: int = 0,
    *,
    folder: Path | None = None,
    at_once: int = 64,
    distributed: bool | Literal["auto"] = False,
) -> RateResult:
    """Draw, fit and measure, for every size and replicate.

    Args:
        truth: what is drawn from.
        fit: X (R, N, D), y (R, N) and a generator a replicate -> fits; `fit_near`.
        sizes: sample sizes, at least 2, rising.
        replicates: R, at least 3.
        metrics: name -> one number a fit. A replicate that went astray is kept.
        seed: replicate r of size n always draws the same data, however many there are.
        folder: where finished replicates are kept; a second run there does only what is missing. It must be another folder
            for another fit.
        at_once: replicates that a process fits together; memory grows with it.
        distributed: share the replicates out over the processes of a group (`processes.join`); ``"auto"`` where there is one.
            All get the whole result. The folder must be one that all see.
    Raises:
        ValueError: fewer than 3 replicates or 2 sizes, sizes that do not rise, a metric of another length, ``distributed=True``
            without a group.
    """

    def measure(n: int, _: Sequence[int], generators: Sequence[torch.Generator]) -> dict[str, Sequence[float]]:
        fits = fit(*truth.sample(n, generators), generators)
        return {name: metric(fits, truth) for name, metric in metrics.items()}

    return measured_rates(
        measure,
        tuple(metrics),
        sizes,
        replicates,
        seed,
        folder=folder,
        at_once=at_once,
        distributed=distributed,
    )


def measured_rates(
    measure: Measure,
    metrics: Sequence[str],
    sizes: Sequence[int],
    replicates: int,
    seed: int = 0,
    *,
    folder: Path | None = None,
    at_once: int = 64,
    distributed: bool | Literal["auto"] = False,
) -> RateResult:
    """The same of whatever is measured: anything that has errors over sizes and replicates.

    Args:
        measure: a size, replicate numbers and a generator each -> for every metric one number a replicate.
        metrics: their names.
        sizes, replicates, seed, folder, at_once, distributed: as in `rate_experiment`.
    Raises:
        ValueError: as there.
    """
    if replicates < 3:
        raise ValueError(f"replicates must be at least 3 for an interval, got {replicates}")
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes must be at least 2 and rise, got {list(sizes)}")
    crew = join(distributed)
    values: dict[str, list[list[float]]] = {name: [] for name in metrics}
    with bar(desc="rates", unit="fit", total=len(sizes) * replicates) as shown:
        for n in sizes:
            kept = _finished(folder, n, seed, metrics)
            missing = [r for r in range(replicates) if r not in kept]
            for start in range(0, len(missing), at_once * crew.size):
                part = missing[start : start + at_once * crew.size]
                kept |= _measured(measure, n, part, metrics, seed, crew)
                if folder is not None and crew.rank == 0:
                    write_json(_place(folder, n, seed), {str(r): row for r, row in kept.items()})
                shown.update(len(part))
            for name in metrics:
                values[name].append([kept[r][name] for r in range(replicates)])
    return RateResult(tuple(sizes), values, seed)


def _measured(
    measure: Measure, n: int, part: list[int], metrics: Sequence[str], seed: int, crew: Processes
) -> dict[int, dict[str, float]]:
    """Replicates of a size, each process doing every so-manieth."""
    mine, found = part[crew.rank :: crew.size], np.empty((0, len(metrics)))
    with crew.together():
        if mine:
            generators = [torch.Generator().manual_seed((seed * 1_000_003 + n) * 10_007 + r) for r in mine]
            told = measure(n, mine, generators)
            columns = {name: [float(v) for v in told[name]] for name in metrics}
            for name, column in columns.items():
                if len(column) != len(mine):
                    raise ValueError(f"metric {name!r} gave {len(column)} numbers for {len(mine)} fits")
            found = np.column_stack(list(columns.values()))
    rows: dict[int, dict[str, float]] = {}
    for rank, flat in enumerate(crew.gather(torch.from_numpy(found.ravel()))):
        for r, row in zip(part[rank :: crew.size], flat.reshape(-1, len(metrics)).tolist(), strict=True):
            rows[r] = dict(zip(metrics, row, strict=True))
    return rows


def _place(folder: Path, n: int, seed: int) -> Path:
    return folder / f"n{n}-seed{seed}.json"


def _finished(folder: Path | None, n: int, seed: int, metrics: Sequence[str]) -> dict[int, dict[str, float]]:
    """Replicates of a size that an earlier run kept, if it measured the same."""
    if folder is None or not _place(folder, n, seed).exists():
        return {}
    rows = {int(r): row for r, row in read_json(_place(folder, n, seed)).items()}
    return {r: row for r, row in rows.items() if set(row) >= set(metrics)}
