"""The claim of scale mixtures of wide-network processes: small real tables, the paper's synthetic sets, shifted digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.data.samples import sample
from mixtura.density.scale_mixture_classifier import ScaleMixtureClassifier
from mixtura.density.scale_mixture_process import ScaleMixtureRegressor
from mixtura.density.scale_priors import BurrXII, FixedScale, InverseGamma, Prior, condition, log_marginal
from mixtura.density.wide_network_kernel import WideNetworkKernel

__all__ = ["CLAIM"]

Pair = tuple[np.ndarray, np.ndarray]

TABLES = ("diabetes", "wine", "breast_cancer", "iris", "boston", "autompg")
SIZES = (8, 15, 30, 100)
NOISES = tuple(10.0 ** (e / 2) for e in range(-6, 3))
MIXTURE, PLAIN = InverseGamma(2.0, 2.0), FixedScale("evidence")

# Grids of the paper's first version.
DEPTHS, WEIGHTS, BIASES = (1, 4, 16), (1.0, 2.0, 4.0), (0.0, 0.09, 1.0)
PAPER_NOISES = tuple(10.0 ** (-6 + e / 2) for e in range(5, 10))
READOUTS = (1.0, 4.0)
SHAPES, BURR_SHAPES = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0), (1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Size:
    """How much of each part a scale runs."""

    splits: int
    tables: int
    depths: tuple[int, ...]
    shapes: tuple[float, ...]
    burr: tuple[float, ...]
    digits: int
    epochs: int


LIMITS = (
    "Set A has ten test targets, the same for every seed, and the paper's gap there does not come back: with depth 16 in the "
    "grid the plain process, too, finds kernels rough enough to pass as noise (without that depth the gain was 1.2, 0.8 and 0.5 "
    "for the three seeds). On set B the gain is over a plain process whose error bars are far too narrow for Cauchy noise; one "
    "with scale and noise by evidence comes close. On spoilt digits the mixture is ahead of a scale fixed at 1 and level with "
    "one that is learned, since labels by the hundred leave little doubt about it. One shared scale does not down-weight single "
    "outliers."
)

SCALES: dict[Scale, Size] = {
    "smoke": Size(1, 2, (1,), (0.5, 2.0), (2.0,), 100, 10),
    "cpu": Size(20, len(TABLES), DEPTHS, SHAPES, BURR_SHAPES, 500, 400),
    "gpu": Size(20, len(TABLES), DEPTHS, SHAPES, BURR_SHAPES, 500, 400),
}


def table(name: str) -> Pair:
    """Inputs and target of one of the tables."""
    found = sample(name)
    if name == "wine":
        return found.predicting("alcohol")
    if name == "breast_cancer":
        return found.predicting("mean area", found.columns[4:10])
    if name == "iris":
        return found.predicting("petal width (cm)")
    return found.X, found.y


def small_tables(size: Size, seed: int) -> dict[str, Any]:
    """Mean gain in test log density of the mixture over the plain process, by table and number of training rows."""
    kernels = [
        WideNetworkKernel(depth, activation, weight, bias)
        for depth in (1, 2)
        for activation in ("relu", "erf")
        for weight in (1.0, 2.0)
        for bias in (0.1, 1.0)
    ]
    gains: dict[str, list[float]] = {}
    for name in TABLES[: size.tables]:
        X, y = table(name)
        for n in SIZES:
            found = []
            for split in range(size.splits):
                order = np.random.default_rng([seed, split, n]).permutation(len(y))
                train, test = standardised((X[order[:n]], y[order[:n]]), (X[order[n:]], y[order[n:]]))
                scores = [by_evidence(kernels, prior, train).score_samples(*test).mean() for prior in (MIXTURE, PLAIN)]
                found.append(scores[0] - scores[1])
            gains[f"{name} {n}"] = found
    figures: dict[str, Any] = {
        f"gain_{n}": float(np.mean([np.mean(v) for k, v in gains.items() if k.endswith(f" {n}")])) for n in SIZES
    }
    return figures | {"detail": {"gains": {k: float(np.mean(v)) for k, v in gains.items()}}}


def standardised(train: Pair, *others: Pair) -> list[Pair]:
    """All parts centred and scaled by the training part."""
    means, widths = zip(*((part.mean(0), np.where(part.std(0) > 0, part.std(0), 1.0)) for part in train), strict=True)
    return [tuple((v - m) / w for v, m, w in zip(part, means, widths, strict=True)) for part in (train, *others)]  # type: ignore[misc]


@dataclass(frozen=True)
class Spectrum:
    """A Gram matrix by its eigenvectors: every noise then costs no new factor.

    Attributes:
        values: eigenvalues, shape (N,), >= 0.
        vectors: shape (N, N).
        turned: targets in that basis, shape (N,).
    """

    values: np.ndarray
    vectors: np.ndarray
    turned: np.ndarray

    @classmethod
    def of(cls, kernel: WideNetworkKernel, train: Pair) -> Spectrum:
        values, vectors = np.linalg.eigh(kernel(train[0]))
        return cls(np.maximum(values, 0.0), vectors, vectors.T @ train[1])

    def quadratic(self, noise: float) -> float:
        return float((self.turned**2 / (self.values + noise)).sum())

    def log_evidence(self, prior: Prior, noise: float) -> float:
        log_density = condition(prior, self.quadratic(noise), len(self.values))[1]
        return log_density - float(np.log(self.values + noise).sum()) / 2


def by_evidence(kernels: Sequence[WideNetworkKernel], prior: Prior, train: Pair) -> ScaleMixtureRegressor:
    """The kernel and noise of largest evidence under a prior, fitted."""
    best: tuple[float, WideNetworkKernel, float] | None = None
    for kernel in kernels:
        spectrum = Spectrum.of(kernel, train)
        for noise in NOISES:
            found = spectrum.log_evidence(prior, noise)
            if best is None or found > best[0]:
                best = (found, kernel, noise)
    assert best is not None
    model = ScaleMixtureRegressor(best[1], scale_prior=prior, noise=best[2], optimize=False, normalize_y=False)
    return model.fit(*train)


def synthetic(name: str) -> Pair:
    """The paper's synthetic sets: a smooth process seen through Gaussian (A) or Cauchy (B) noise."""
    n, seed = (100, 829) if name == "A" else (300, 761)
    chance = np.random.RandomState(seed)
    x = np.linspace(-n / 2, n / 2, n)[:, None]
    f = chance.multivariate_normal(np.zeros(n), np.exp(-0.5 * (x - x.T) ** 2))
    return x, f + (0.2 * chance.standard_normal(n) if name == "A" else 0.8 * chance.standard_t(1, n))


def synthetic_sets(size: Size, seed: int) -> dict[str, Any]:
    """Test NLL on the paper's synthetic sets, everything chosen on the validation part from the paper's grids."""
    kernels = [
        WideNetworkKernel(depth, activation, weight, bias)
        for depth in size.depths
        for activation in ("relu", "erf")
        for weight in WEIGHTS
        for bias in BIASES
    ]
    families: dict[str, list[Prior]] = {
        "nngp": [FixedScale(s) for s in READOUTS],
        "inverse_gamma": [InverseGamma(a, b) for a in size.shapes for b in size.shapes],
        "burr": [BurrXII(c, d) for c in size.burr for d in size.burr],
    }
    figures: dict[str, Any] = {}
    for name in ("A", "B"):
        train, valid, test = paper_parts(*synthetic(name), seed)
        held = np.concatenate([valid[0], test[0]]), np.concatenate([valid[1], test[1]])
        best: dict[str, tuple[float, float]] = {}
        for kernel in kernels:
            spectrum, cross, own = Spectrum.of(kernel, train), kernel(train[0], held[0]), kernel.diag(held[0])
            turned = spectrum.vectors.T @ cross
            for noise in PAPER_NOISES:
                damped = turned / (spectrum.values + noise)[:, None]
                location, variance = spectrum.turned @ damped, own - (turned * damped).sum(0) + noise
                distances = torch.from_numpy((held[1] - location) ** 2 / variance)
                for family, priors in families.items():
                    for prior in priors:
                        posterior = condition(prior, spectrum.quadratic(noise), len(train[1]))[0]
                        nll = np.log(variance) / 2 - log_marginal(posterior, distances, 1).numpy()
                        figure = (float(nll[: len(valid[1])].mean()), float(nll[len(valid[1]) :].mean()))
                        if family not in best or figure[0] < best[family][0]:
                            best[family] = figure
        figures |= {f"{name}_{family}": on_test for family, (_, on_test) in best.items()}
        figures[f"{name}_nngp_ml2"] = -float(by_evidence(kernels, PLAIN, train).score_samples(*test).mean())
        figures[f"gain_{name}"] = figures[f"{name}_nngp"] - figures[f"{name}_inverse_gamma"]
    return figures


def paper_parts(x: np.ndarray, y: np.ndarray, seed: int) -> list[Pair]:
    """80/10/10 as the paper's code has it: the test part is the same for every seed, the other two are dealt by the seed."""
    order = np.random.RandomState(10).permutation(len(y))
    first, second = int(0.8 * len(y)), int(0.9 * len(y))
    order[:second] = order[np.random.RandomState(seed).permutation(second)]
    parts = [(x[rows], y[rows]) for rows in (order[:first], order[first:second], order[second:])]
    return standardised(parts[0], *parts[1:])


def corrupted(X: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Digits of 8 x 8 with values in [0, 1], clean and spoilt in three ways."""
    uniform = rng.random(X.shape)
    return {
        "clean": X,
        "shot": np.clip(rng.poisson(4 * X) / 4, 0, 1),
        "impulse": np.where(uniform < 0.1, 0.0, np.where(uniform > 0.9, 1.0, X)),
        "blur": gaussian_filter(X.reshape(-1, 8, 8), (0, 1, 1)).reshape(X.shape),
    }


def shifted_digits(size: Size, seed: int) -> dict[str, Any]:
    """Digits 0 to 4 learned, then met spoilt: test NLL of the mixture less that of the process with one scale, learned too."""
    found = sample("digits")
    X, y = found.X / 16, found.y
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(y < 5))
    train, test, others = rows[: size.digits], rows[size.digits :], np.flatnonzero(y >= 5)
    center, width = X[train].mean(), X[train].std()
    views = corrupted(X[test], rng)
    figures: dict[str, Any] = {}
    rivals: dict[str, Prior] = {"svtp": MIXTURE, "svgp": PLAIN, "svgp_one": FixedScale(1.0)}
    for name, prior in rivals.items():
        model = ScaleMixtureClassifier(
            WideNetworkKernel(2, "relu", 2.0, 0.1), scale_prior=prior, n_inducing=100, epochs=size.epochs, seed=seed
        ).fit((X[train] - center) / width, y[train])
        for view, pixels in views.items():
            log_proba = model.log_proba((pixels - center) / width)
            figures[f"{name}_{view}"] = -float(log_proba[np.arange(len(test)), y[test]].mean())
            if view == "clean":
                figures[f"{name}_accuracy"] = 100 * float((log_proba.argmax(1) == y[test]).mean())
        figures[f"{name}_confidence_5_to_9"] = float(model.predict_proba((X[others] - center) / width).max(1).mean())
    for rival, suffix in (("svgp", ""), ("svgp_one", "_one")):
        worse = [figures[f"svtp_{v}"] - figures[f"{rival}_{v}"] for v in ("shot", "impulse", "blur")]
        figures[f"worst_shift{suffix}"] = max(worse)
    figures["accuracy_gap"] = abs(figures["svtp_accuracy"] - figures["svgp_accuracy"])
    return figures


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed over the three parts."""
    size = SCALES[scale]
    return small_tables(size, seed) | synthetic_sets(size, seed) | shifted_digits(size, seed)


def plot(record: Record, figure: Any) -> None:
    """Gain over training rows, table by table; test NLL on the synthetic sets; NLL on spoilt digits."""
    seeds = record["seeds"]
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 0.9, 1.2))
    names = sorted({key.rsplit(" ", 1)[0] for key in seeds[0]["detail"]["gains"]})
    for name in names:
        gains = [np.mean([row["detail"]["gains"][f"{name} {n}"] for row in seeds]) for n in SIZES]
        left.plot(SIZES, gains, "o-", markersize=3, linewidth=1, label=name.replace("_", " "))
    left.plot(
        SIZES, [np.mean([row[f"gain_{n}"] for row in seeds]) for n in SIZES], color="black", linewidth=2.5, label="mean"
    )
    left.axhline(0, color="gray", linewidth=0.8)
    left.set(xscale="log", xticks=SIZES, xticklabels=SIZES, xlabel="training rows", ylabel="gain, nats a target")
    left.minorticks_off()
    left.legend(frameon=False, fontsize=7)
    _bars(
        middle,
        seeds,
        ("A", "B"),
        {
            "nngp": ("NNGP, grid", "#c05621"),
            "nngp_ml2": ("NNGP, evidence", "#dd9b6a"),
            "inverse_gamma": ("mixture, IG", "#2b6cb0"),
            "burr": ("mixture, Burr", "#76a9d8"),
        },
        "{view}_{rival}",
    )
    middle.set(yscale="log", ylabel="test NLL, log axis", xlabel="synthetic set")
    _bars(
        right,
        seeds,
        ("clean", "shot", "impulse", "blur"),
        {"svgp_one": ("scale 1", "#c05621"), "svgp": ("scale learned", "#dd9b6a"), "svtp": ("mixture", "#2b6cb0")},
        "{rival}_{view}",
    )
    right.set(ylabel="test NLL", xlabel="digits 0 to 4")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Any, seeds: Sequence[Any], views: Sequence[str], rivals: dict[str, tuple[str, str]], key: str) -> None:
    width = 0.8 / len(rivals)
    for i, (rival, (label, color)) in enumerate(rivals.items()):
        values = np.array([[row[key.format(rival=rival, view=view)] for view in views] for row in seeds])
        at = np.arange(len(views)) + (i - (len(rivals) - 1) / 2) * width
        axes.bar(at, np.median(values, 0), width, color=color, label=label)
        axes.vlines(at, values.min(0), values.max(0), color="black", linewidth=0.8)
    axes.set_xticks(range(len(views)), views, fontsize=8)
    # Above the axes, clear of whiskers that run to the top.
    axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


CLAIM = Claim(
    system="scale-mixture-gp",
    sentence=(
        "A prior on the one variance of the read-out turns the process of a wide network into a heavy-tailed mixture whose "
        "error bars follow the targets: test likelihoods rise where data are few, where the scale is misspecified and off the "
        "distribution, and it costs one Cholesky factor."
    ),
    paper=(
        "Test NLL, NNGP / inverse gamma / Burr: Boston 1.14 / 1.08 / 1.06, Naval -3.82 / -3.49 / -3.53 (a loss), synthetic A "
        "2.40 / 1.01 / 1.66, B 2.06 / 1.77 / 1.96 (arXiv v1, as kept in the authors' code)"
    ),
    metric=(
        "Log predictive density of observed targets, nats a target: gain of the mixture over the plain process, higher is "
        "better; for digits, test NLL of the mixture less that of its rival, lower is better."
    ),
    baseline=(
        "Tables: the plain process with scale q/n, kernel and noise of largest evidence over the same grid; the mixture "
        "is IG(2, 2) throughout. Synthetic sets: the plain process on the paper's grid, chosen on the validation part as the "
        "mixture is; one with scale and noise by evidence is reported. Digits: the same classifier with one scale, "
        "learned; one with scale 1 is reported."
    ),
    checks=(
        Check(figure="gain_8", at_least=0.15, why="mean gain over six tables, 8 training rows"),
        Check(figure="gain_15", at_least=0.05, why="mean gain over six tables, 15 training rows"),
        Check(figure="gain_100", at_least=-0.02, why="mean gain over six tables, 100 training rows"),
        Check(figure="gain_A", at_least=1.0, why="gain on synthetic set A over the process on the paper's grid"),
        Check(figure="gain_B", at_least=0.0, why="gain on synthetic set B over the process on the paper's grid"),
        Check(
            figure="worst_shift_one", at_most=0.0, why="NLL less that of scale 1 on spoilt digits, worst of three kinds"
        ),
        Check(figure="worst_shift", at_most=0.0, why="NLL less that of a learned scale, worst of three kinds"),
        Check(figure="accuracy_gap", at_most=0.5, why="points of accuracy between the two on clean digits"),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
)
