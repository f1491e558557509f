"""The claim of likelihood-adjusted clustering: groups of different shapes, high dimension, starts, and real tables."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.data.samples import sample
from mixtura.density import AdjustedSDPClustering, GaussianMixture, kmeans_sdp

__all__ = ["CLAIM"]

REG = 1e-3
ABOVE = 0.05  # an error that counts as a failure
EM_STEPS = 200

LIMITS = (
    "In low dimension EM ties: with ten starts, or with as many as fit into the same time, it is level on row 1. On row 4 "
    "what fails is EM with a covariance for each group (50 samples in 20 columns): k-means, its relaxation and EM with one "
    "shape for all (`row4_em_tied`) are level with this method there, and lose on row 1. Drawing covariances to the common "
    "one is not what helps: without it (`row4_full`) the error is the same. Random labels as a start were judged on row 1 "
    "only, and even there they are worse than the default start. Rows 2, 3, 5, the spherical one, wine and breast_cancer "
    "have no bar. On breast_cancer, whose groups are no Gaussians, k-means and its relaxation are better; with spherical "
    "groups nothing is gained. The paper's tables were not consulted."
)


@dataclass(frozen=True)
class Row:
    """A family of data sets: N samples of F features in K groups, means on a sphere, rotated diag(exp U(-spread, spread))."""

    n: int
    f: int
    k: int
    apart: float
    spread: float


ROWS = {
    "row1": Row(240, 8, 3, 3.0, 2.0),
    "row2": Row(240, 12, 4, 4.5, 1.7),
    "row3": Row(200, 15, 4, 5.0, 2.0),
    "row4": Row(200, 20, 4, 5.0, 1.0),
    "row5": Row(150, 30, 3, 5.0, 1.5),
    "spherical": Row(200, 6, 3, 3.5, 0.0),
}
JUDGED = ("row1", "row4")
TABLES = ("iris", "wine", "breast_cancer")


@dataclass(frozen=True)
class Size:
    """How much a scale runs: data sets of a judged row and of another, starts and data sets of the sensitivity, tables.

    ``turns`` is the most that the method takes.
    """

    judged: int
    reported: int
    start_sets: int
    starts: int
    tables: tuple[str, ...]
    turns: int = 20


SCALES: dict[Scale, Size] = {
    "smoke": Size(1, 0, 1, 1, ("iris",), turns=2),
    "cpu": Size(10, 3, 3, 10, TABLES),
    "gpu": Size(10, 10, 10, 10, TABLES),
}


def draw(row: Row, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, shape (N, F), labels, shape (N,), and covariances of the groups, shape (K, F, F), of one data set."""
    rng = np.random.default_rng(seed)
    means_KF = rng.normal(size=(row.k, row.f))
    means_KF *= row.apart / np.linalg.norm(means_KF, axis=1, keepdims=True)
    labels_N = np.arange(row.n) % row.k
    x_NF, sigma_KFF = np.empty((row.n, row.f)), np.empty((row.k, row.f, row.f))
    for k in range(row.k):
        turn_FF = np.linalg.qr(rng.normal(size=(row.f, row.f)))[0]
        root_FF = turn_FF * np.exp(rng.uniform(-row.spread, row.spread, row.f) / 2)
        sigma_KFF[k] = root_FF @ root_FF.T
        mine = labels_N == k
        x_NF[mine] = means_KF[k] + rng.normal(size=(int(mine.sum()), row.f)) @ root_FF.T
    return x_NF, labels_N, sigma_KFF


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A real table in standardised columns; breast_cancer on its first six principal components."""
    found = sample(name)
    z_NF = StandardScaler().fit_transform(found.X)
    if name == "breast_cancer":
        left, values, _ = np.linalg.svd(z_NF, full_matrices=False)
        z_NF = left[:, :6] * values[:6]
    return z_NF, found.y


def error(found: np.ndarray, labels: np.ndarray) -> float:
    """Share of wrong labels under the best naming of groups."""
    counts = np.zeros((int(found.max()) + 1, int(labels.max()) + 1))
    np.add.at(counts, (found, labels), 1)
    groups, classes = linear_sum_assignment(-counts)
    return float(1 - counts[groups, classes].sum() / len(labels))


def adjusted(x_NF: np.ndarray, k: int, seed: int, **options: Any) -> np.ndarray:
    """Labels by the method, defaults but for ``options``."""
    return AdjustedSDPClustering(k, reg=REG, seed=seed, **options).fit(x_NF).labels_


def em(x_NF: np.ndarray, k: int, seed: int, n_init: int = 1, **options: Any) -> tuple[np.ndarray, float]:
    """Labels and mean log likelihood by EM with the same floor of variances; full covariances but for ``options``."""
    found = GaussianMixture(k, reg=REG, n_init=n_init, max_iter=EM_STEPS, random_state=seed, **options).fit(x_NF)
    return found.labels_, found.lower_bound_


def em_for(seconds: float, x_NF: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, int]:
    """The likeliest of as many starts of EM as fit into ``seconds``, and their number."""
    began, starts, best = time.process_time(), 0, (np.zeros(len(x_NF), dtype=int), -np.inf)
    while starts == 0 or time.process_time() - began < seconds:
        best = max(best, em(x_NF, k, 1000 * (seed + 1) + starts), key=lambda pair: pair[1])
        starts += 1
    return best[0], starts


def compare(
    x_NF: np.ndarray, labels_N: np.ndarray, k: int, seed: int, turns: int, *, full: bool = False
) -> dict[str, float]:
    """Error of the method and of its rivals on one data set; all see the same standardised columns."""
    x_NF = StandardScaler().fit_transform(x_NF)
    began = time.process_time()
    found = {"error": error(adjusted(x_NF, k, seed, max_iter=turns), labels_N)}
    found["seconds"] = time.process_time() - began
    timed, found["em_starts"] = em_for(found["seconds"], x_NF, k, seed)
    rivals: dict[str, Callable[[], np.ndarray]] = {
        "sdp": lambda: kmeans_sdp(x_NF, k, seed=seed),
        "kmeans": lambda: KMeans(k, n_init=10, random_state=seed).fit_predict(x_NF),
        "em10": lambda: em(x_NF, k, seed, 10)[0],
        "em_random": lambda: em(x_NF, k, seed, init="random")[0],
        "em_tied": lambda: em(x_NF, k, seed, 10, covariance="tied")[0],
        "em_timed": lambda: timed,
    }
    if full:
        rivals["full"] = lambda: adjusted(x_NF, k, seed, max_iter=turns, covariance="full")
    return found | {name: error(rival(), labels_N) for name, rival in rivals.items()}


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """All parts for one seed."""
    size = SCALES[scale]
    figures: dict[str, Any] = {}
    detail: dict[str, Any] = {}
    with warnings.catch_warnings():
        # A rival that does not settle is judged by where it stopped, as a user would find it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for i, (name, row) in enumerate(ROWS.items()):
            n_sets = size.judged if name in JUDGED else size.reported
            sets = [
                compare(*draw(row, (seed, i, s))[:2], row.k, seed, size.turns, full=name == "row4")
                for s in range(n_sets)
            ]
            if sets:
                detail[name] = {key: [one[key] for one in sets] for key in sets[0]}
                figures |= summary(name, detail[name])
        figures |= starts(size, seed)
        for name in size.tables:
            x_NF, labels_N = table(name)
            detail[name] = compare(x_NF, labels_N, int(labels_N.max()) + 1, seed, size.turns)
            figures |= {f"{name}_{key}": value for key, value in detail[name].items()}
    for rival in ("sdp", "kmeans", "em_random"):
        figures[f"row1_of_{rival}"] = figures["row1_error"] / max(figures[f"row1_{rival}"], 1e-3)
    figures["row1_over_em10"] = figures["row1_error"] - figures["row1_em10"]
    figures["row4_of_em10"] = figures["row4_error"] / max(figures["row4_em10"], 1e-3)
    return figures | {"detail": detail}


def summary(name: str, errors: dict[str, list[float]]) -> dict[str, float]:
    """Mean of everything; of the method and of EM with ten starts also median, worst and how many failed."""
    found = {f"{name}_{key}": float(np.mean(values)) for key, values in errors.items()}
    for key in ("error", "em10", "em_timed"):
        values = np.array(errors[key])
        found[f"{name}_{key}_median"] = float(np.median(values))
        found[f"{name}_{key}_failed"] = float((values > ABOVE).mean())
    found[f"{name}_worst"] = max(errors["error"])
    return found


def starts(size: Size, seed: int) -> dict[str, Any]:
    """Error from random labels, and of EM from random means, over starts and data sets of row 1."""
    ours, theirs = [], []
    row = ROWS["row1"]
    for s in range(size.start_sets):
        x_NF, labels_N, _ = draw(row, (seed, 0, s))
        x_NF = StandardScaler().fit_transform(x_NF)
        for start in range(size.starts):
            ours.append(error(adjusted(x_NF, row.k, 100 * seed + start, max_iter=size.turns, init="random"), labels_N))
            theirs.append(error(em(x_NF, row.k, 100 * seed + start, init="random")[0], labels_N))
    found = {"starts_error": float(np.mean(ours)), "starts_em": float(np.mean(theirs))}
    return found | {"starts_of_em": found["starts_error"] / max(found["starts_em"], 1e-3), "starts": [ours, theirs]}


RIVALS = {
    "error": ("this method", "#2b6cb0"),
    "sdp": ("one-shape SDP", "#c05621"),
    "kmeans": ("k-means, 10 starts", "#dd9b6a"),
    "em10": ("EM, 10 starts", "#4a5568"),
    "em_timed": ("EM, equal time", "#718096"),
    "em_random": ("EM, 1 random start", "#b8c0cc"),
    "em_tied": ("EM, one shape, 10 starts", "#c9a0c8"),
}


def plot(record: Record, figure: Any) -> None:
    """Mean error by row and rival; errors over random starts; real tables; all on one scale."""
    seeds = record["seeds"]
    rows = [name for name in ROWS if name in seeds[0]["detail"]]
    tables = [name for name in TABLES if name in seeds[0]["detail"]]
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(len(rows) + 0.5, 1.5, len(tables) + 0.5))
    _bars(left, seeds, rows)
    left.set_ylabel("share of wrong labels")
    left.set_title("drawn groups, mean over data sets", fontsize=9)
    ours, theirs = (np.concatenate([row["starts"][i] for row in seeds], axis=None) for i in (0, 1))
    for at, (values, (_, color)) in enumerate(zip((ours, theirs), (RIVALS["error"], RIVALS["em_random"]), strict=True)):
        spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(values))
        middle.scatter(at + spread, values, s=7, color=color, alpha=0.7, linewidths=0)
        middle.hlines(values.mean(), at - 0.4, at + 0.4, color="black", linewidth=1.5)
    middle.set_xticks([0, 1], ["this", "EM"], fontsize=8)
    middle.set_title("row 1,\nrandom starts", fontsize=9)
    _bars(right, seeds, tables)
    right.set_title("real tables", fontsize=9)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _bars(axes: Any, seeds: Any, names: list[str]) -> None:
    """Mean over seeds, with their range."""
    width = 0.84 / len(RIVALS)
    for i, (key, (label, color)) in enumerate(RIVALS.items()):
        values = np.array([[row[f"{name}_{key}"] for name in names] for row in seeds])
        at = np.arange(len(names)) + (i - (len(RIVALS) - 1) / 2) * width
        axes.bar(at, values.mean(0), width, color=color, label=label)
        axes.vlines(at, values.min(0), values.max(0), color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n").replace("row", "row ") for name in names], fontsize=7.5)


CLAIM = Claim(
    system="adjusted-sdp",
    sentence=(
        "A semidefinite program that knows each group's shape, alternated with the shapes, finds heterogeneous groups that "
        "k-means and its relaxation miss, depends less on its start than EM, and stays stable in high dimension."
    ),
    paper=(
        "Lower mis-clustering than K-means, SDP and EM over simulations and real data, less sensitive than EM to its start "
        "(abstract, section 5); its tables were not at hand, so no figure of theirs stands here"
    ),
    metric="Share of wrong labels under the best naming of groups, mean over ten data sets a seed; lower is better.",
    baseline=(
        "The same standardised columns, EM with the same floor of variances: the relaxation of k-means (one shape), k-means "
        "with 10 starts, EM with full covariances from one random start, from 10 k-means++ starts, and from as many as fit "
        "into the method's own time (the likeliest is kept). Reported beside them: EM with one covariance for all, 10 starts."
    ),
    checks=(
        Check(figure="row1_of_sdp", at_most=0.5, why="N=240, F=8, K=3: error over that of the one-shape relaxation"),
        Check(figure="row1_of_kmeans", at_most=0.5, why="the same over k-means"),
        Check(figure="row1_of_em_random", at_most=0.5, why="the same over EM from one random start"),
        Check(figure="row1_over_em10", at_most=0.015, why="the same less EM with ten starts"),
        Check(figure="row4_of_em10", at_most=0.5, why="N=200, F=20, K=4: error over EM with ten starts"),
        Check(figure="row4_worst", at_most=ABOVE, over="every", why="the same, worst data set"),
        Check(figure="iris_error", at_most=0.033, why="iris, error"),
        Check(figure="starts_of_em", at_most=0.7, why="random starts on three data sets of row 1: error over EM's"),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
)
