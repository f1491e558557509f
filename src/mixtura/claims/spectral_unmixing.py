"""The claim of robust sparse unmixing: spoiled channels do not spoil it, and one exponent a pixel beats one for all."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.data.spectra import Scene, SpectralLibrary, library, made_up_library, synthesize_scene
from mixtura.vision.unmixing.constrained import fcls, sunsal
from mixtura.vision.unmixing.objective import hoyer
from mixtura.vision.unmixing.robust_sparse import SpectralUnmixing
from mixtura.vision.unmixing.scores import abundance_rmse, match_endmembers, sad
from mixtura.vision.unmixing.starts import mixed, starting_point, whitening

__all__ = ["CLAIM"]

TUNING_SEEDS = (200, 201)


@dataclass(frozen=True)
class Size:
    """How much a scale runs."""

    materials: int
    shape: tuple[int, int]
    outliers: int
    iterations: int
    lams: tuple[float, ...]
    deltas: tuple[float, ...]
    sunsal_lams: tuple[float, ...]
    made_up: bool = False
    device: str = "cpu"


LAMS, DELTAS, SUNSAL_LAMS = (0.03, 0.1, 0.3, 1.0), (1.0, 4.0), (0.0, 0.01, 0.1, 1.0)
SCALES: dict[Scale, Size] = {
    "smoke": Size(3, (16, 16), 18, 40, (0.3,), (4.0,), (0.1,), made_up=True),
    "cpu": Size(5, (40, 40), 18, 500, LAMS, DELTAS, SUNSAL_LAMS),
    "gpu": Size(6, (307, 307), 30, 1000, LAMS, DELTAS, SUNSAL_LAMS, device="cuda"),
}

METHODS: dict[str, dict[str, Any]] = {
    "ours": {},
    "nmf": {"robust": False, "lam": 0.0},
    "half": {"robust": False, "guidance": "fixed", "p": 0.5},
    "dense": {"lam": 0.0},
}

DENSE: dict[str, Any] = {"lam": 0.0, "delta": 4.0}  # of the checks without sparsity

LIMITS = (
    "Three checks fail: the angle over L1/2-NMF's is 0.53 (bar 0.45), and over the same without sparsity angle and RMSE "
    "are 0.69 and 0.87 (bars 0.50 and 0.85). All methods start where the class does, at pure pixels within the signal's "
    "subspace, as VCA's authors have it. From raw pixels, where the bars were set and this claim started before, only "
    "the first of these failed (0.63), but a part of what was won there was won back from the noise of the start, which "
    "the better start does not bring in; it helps the rivals more. How little is left: on four other scenes (seeds 100 "
    "to 103) least squares on the true spectra has RMSE 0.086, ours 0.086 and the same without sparsity 0.093. Scenes "
    "are synthetic: measured spectra mixed linearly with white noise, the model that all methods here assume. Real "
    "scenes are in no package; on Samson, tried by hand while building, no channel is spoiled and little is gained: RMSE "
    "0.246 where NMF has 0.274 and L1/2-NMF 0.249, angles 0.076, 0.093 and 0.078 (from raw pixels). Of the paper's "
    "tables nothing is shown: its body could not be read. The map (Hoyer's measure), its schedule, the whitened start "
    "and the constants are ours. A material that is bright in one channel only would look like a spoiled channel. Some "
    "scenes hold simulated canopies beside measured materials. Strengths, of the sum to one as well, are tuned for each "
    "method on two scenes by the sum of both errors, and L1/2-NMF gains from it: from raw pixels, on four scenes, its "
    "angle is 0.046 to 0.065 with the sum to one at 1, where the check on its angle was set, and 0.036 at 4. The class's "
    "defaults (0.1 and 4) were set on five other scenes (seeds 100 to 104). Seeds 0 to 4 were seen while building. From "
    "raw pixels, three times as many iterations made RMSE worse (0.095 to 0.122 on seeds 100 to 104): ending at 500 is "
    "part of the method. Started at the truth (seeds 10 and 11) the objective ends lower than from there: the updates "
    "stop at a local minimum. From random starts no method here is good."
)


@dataclass(frozen=True)
class Case:
    """A scene with the start that all methods share.

    Attributes:
        factors: whitening of the channels, (L,).
        spectra: (M, L), pixels of the scene. shares: (P, M), constrained least squares in whitened channels.
    """

    scene: Scene
    X: np.ndarray
    factors: np.ndarray
    spectra: np.ndarray
    shares: np.ndarray

    @staticmethod
    def of(scene: Scene, seed: int) -> Case:
        X = scene.cube.reshape(-1, scene.cube.shape[-1])
        factors = whitening(X)
        k = scene.endmembers.shape[0]
        spectra, _ = starting_point(X, k, "vca-whitened", seed=seed, A_init=np.full((len(X), k), 1 / k))
        shares = fcls(X, spectra, weights=factors**2)
        return Case(scene, X, factors, spectra, shares)

    def errors(self, spectra: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
        """SAD on good channels and RMSE of abundances, after matching on good channels."""
        truth, good = self.scene.endmembers, ~self.scene.outliers
        order = match_endmembers(spectra, truth, bands=good)
        true = self.scene.abundances.reshape(len(self.X), -1)
        return sad(spectra, truth, bands=good), abundance_rmse(shares[:, order], true)

    def fit(self, size: Size, options: dict[str, Any], channels: np.ndarray | None = None) -> SpectralUnmixing:
        """A fit from the common start, on some channels where those are named."""
        k = len(self.spectra)
        seen = np.ones(self.X.shape[1], dtype=bool) if channels is None else channels
        model = SpectralUnmixing(k, max_iter=size.iterations, device=_device(size), **options)
        return model.fit(np.ascontiguousarray(self.X[:, seen]), M_init=self.spectra[:, seen], A_init=mixed(self.shares))

    def sunsal(self, lam: float, *, whitened: bool) -> np.ndarray:
        """Shares by SUnSAL: abundances divided by their sum; lam is relative to the mean power of a spectrum."""
        weights = self.factors**2 / np.median(self.factors**2) if whitened else np.ones_like(self.factors)
        power = float((weights * self.spectra**2).sum(1).mean())
        a = sunsal(self.X, self.spectra, lam * power, weights=weights)
        return (a + 1e-9) / (a + 1e-9).sum(1, keepdims=True)


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one scene."""
    size = SCALES[scale]
    case = Case.of(_scene(size, seed), seed)
    models = {name: case.fit(size, {**_tuned(scale, name), **options}) for name, options in METHODS.items()}
    models["fixed"] = case.fit(size, {"guidance": "fixed", "p": 0.5, **_tuned(scale, "ours")})
    figures: dict[str, Any] = {}
    for name, model in models.items():
        figures[f"sad_{name}"], figures[f"rmse_{name}"] = case.errors(model.endmembers_, model.abundances_)
    others = {
        "start": case.shares,
        "fcls": fcls(case.X, case.spectra),
        "sunsal": case.sunsal(_tuned_sunsal(scale, False), whitened=False),
        "sunsal_whitened": case.sunsal(_tuned_sunsal(scale, True), whitened=True),
    }
    for name, shares in others.items():
        figures[f"sad_{name}"], figures[f"rmse_{name}"] = case.errors(case.spectra, shares)
    for name in ("nmf", "half", "dense", "fixed"):
        figures[f"sad_over_{name}"] = figures["sad_ours"] / figures[f"sad_{name}"]
        figures[f"rmse_over_{name}"] = figures["rmse_ours"] / figures[f"rmse_{name}"]
    figures["rmse_over_fcls"] = figures["rmse_ours"] / min(figures["rmse_start"], figures["rmse_fcls"])
    figures["rmse_over_sunsal"] = figures["rmse_ours"] / min(figures["rmse_sunsal"], figures["rmse_sunsal_whitened"])
    figures["beats_fixed"] = float(figures["rmse_ours"] < figures["rmse_fixed"])
    figures |= (
        _map_and_weights(case, models["ours"])
        | _sanity(size, seed)
        | _random_starts(case, size, seed, _tuned(scale, "ours"))
    )
    figures["detail"] = {
        "tuned": {name: _tuned(scale, name) for name in METHODS},
        "materials": list(case.scene.names),
        **(_pictures(case, models) if seed == 0 and size.shape[0] <= 64 else {}),
    }
    return figures


def _map_and_weights(case: Case, model: SpectralUnmixing) -> dict[str, float]:
    """Correlation of the guidance map with the true one, and how well weights tell spoiled channels."""
    scene = case.scene
    true = hoyer(torch.from_numpy(scene.abundances.reshape(len(case.X), -1))).numpy()
    seen = ~scene.blank
    weight, spoiled = model.channel_weight_[seen], scene.outliers[seen]
    lower = (weight[spoiled][:, None] < weight[~spoiled][None]).mean()
    return {"map_correlation": float(np.corrcoef(model.guidance_, true)[0, 1]), "weights_auc": float(lower)}


def _sanity(size: Size, seed: int) -> dict[str, float]:
    """Where nothing is spoiled both losses agree; where something is, the loss does what leaving channels out would."""
    clean = Case.of(_scene(size, seed, outliers=0), seed)
    rmse = {robust: clean.errors(*_found(clean.fit(size, {**DENSE, "robust": robust})))[1] for robust in (True, False)}
    pure = Case.of(_scene(size, seed, snr=30.0), seed)
    good = ~pure.scene.outliers
    ours = pure.fit(size, DENSE)
    oracle = pure.fit(size, {**DENSE, "robust": False}, good)
    whole = np.zeros_like(pure.spectra)
    whole[:, good] = oracle.endmembers_
    told = pure.errors(whole, oracle.abundances_)[1]
    return {
        "clean_gap": abs(rmse[True] / rmse[False] - 1),
        "over_told_channels": pure.errors(*_found(ours))[1] / told,
    }


def _random_starts(case: Case, size: Size, seed: int, tuned: dict[str, float]) -> dict[str, float]:
    """Both losses from the same random start: the loss, and not the start, must do it."""
    found = {}
    for name, options in (("random", tuned), ("random_nmf", {"robust": False, "lam": 0.0, "delta": tuned["delta"]})):
        model = SpectralUnmixing(
            len(case.spectra),
            init="nmf-random",
            max_iter=size.iterations,
            device=_device(size),
            seed=seed,
            **options,  # type: ignore[arg-type]
        )
        found[f"sad_{name}"] = case.errors(*_found(model.fit(case.X)))[0]
    return found | {"sad_random_over_nmf": found["sad_random"] / found["sad_random_nmf"]}


def _found(model: SpectralUnmixing) -> tuple[np.ndarray, np.ndarray]:
    return model.endmembers_, model.abundances_


@functools.cache
def _library(made_up: bool) -> SpectralLibrary:
    return made_up_library() if made_up else library("earthlib")


def _scene(size: Size, seed: int, *, outliers: int | None = None, snr: float = 20.0) -> Scene:
    n = size.outliers if outliers is None else outliers
    return synthesize_scene(
        _library(size.made_up), size.materials, size.shape, snr_db=snr, outlier_channels=n, seed=seed
    )


@functools.cache
def _tuning_case(scale: Scale, seed: int) -> Case:
    return Case.of(_scene(SCALES[scale], seed), seed)


@functools.cache
def _tuned(scale: Scale, name: str) -> dict[str, float]:
    """Strengths of a method, by the sum of its errors on the tuning scenes; what the method fixes is left alone."""
    size, options = SCALES[scale], METHODS[name]
    grid = {"lam": size.lams, "delta": size.deltas}
    free = {key: values for key, values in grid.items() if key not in options}
    choices = [dict(zip(free, values, strict=True)) for values in itertools.product(*free.values())]

    def loss(choice: dict[str, float]) -> float:
        cases = [_tuning_case(scale, seed) for seed in TUNING_SEEDS]
        errors = [case.errors(*_found(case.fit(size, {**choice, **options}))) for case in cases]
        return sum(angle + rmse for angle, rmse in errors)

    return _best(choices, loss)


@functools.cache
def _tuned_sunsal(scale: Scale, whitened: bool) -> float:
    size = SCALES[scale]

    def loss(lam: float) -> float:
        cases = [_tuning_case(scale, seed) for seed in TUNING_SEEDS]
        return sum(case.errors(case.spectra, case.sunsal(lam, whitened=whitened))[1] for case in cases)

    return _best(list(size.sunsal_lams), loss)


def _best(choices: list[Any], loss: Callable[[Any], float]) -> Any:
    return choices[0] if len(choices) == 1 else min(choices, key=loss)


def _device(size: Size) -> str:
    return size.device if torch.cuda.is_available() else "cpu"


def _pictures(case: Case, models: dict[str, SpectralUnmixing]) -> dict[str, Any]:
    """Abundance maps in percent of the material that NMF gets most wrong, and the channels' weights."""
    h, w = case.scene.cube.shape[:2]
    truth, good = case.scene.endmembers, ~case.scene.outliers
    true = case.scene.abundances.reshape(len(case.X), -1)
    matched = {}
    for name in ("ours", "half", "nmf"):
        order = match_endmembers(models[name].endmembers_, truth, bands=good)
        matched[name] = models[name].abundances_[:, order]
    worst = int(((matched["nmf"] - true) ** 2).mean(0).argmax())
    maps = {"truth": true[:, worst], **{name: shares[:, worst] for name, shares in matched.items()}}
    return {
        "material": case.scene.names[worst],
        "maps": {name: np.rint(100 * values).astype(int).reshape(h, w) for name, values in maps.items()},
        "weights": models["ours"].channel_weight_.round(3),
        "wavelengths": case.scene.wavelengths.round(3),
        "outliers": np.flatnonzero(case.scene.outliers),
        "blank": np.flatnonzero(case.scene.blank),
    }


def plot(record: Record, figure: Any) -> None:
    """Errors of all methods, one material's maps, and the weights of the channels."""
    rows = record["seeds"]
    figure.set_size_inches(12.0, 6.4)
    detail = next((row["detail"] for row in rows if "maps" in row["detail"]), None)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    panels = upper.subplots(1, 2)
    shown = {
        "ours": "this method",
        "fixed": "exponent 1/2 for all",
        "dense": "without sparsity",
        "half": "L1/2-NMF",
        "nmf": "NMF",
        "start": "FCLS, whitened",
        "fcls": "FCLS",
        "sunsal_whitened": "SUnSAL, whitened",
        "sunsal": "SUnSAL",
    }
    for i, (figure_name, title) in enumerate((("rmse", "RMSE of abundances"), ("sad", "spectral angle, radians"))):
        axes = panels[i]
        names = list(shown) if figure_name == "rmse" else list(shown)[:6]
        for j, name in enumerate(names):
            values = [row[f"{figure_name}_{name}"] for row in rows]
            tone = "#0072B2" if j == 0 else "#9a9aa0"
            axes.plot(values, [j] * len(values), "o", color=tone, alpha=0.5, ms=4)
            axes.plot([np.mean(values)], [j], "|", color=tone, ms=16, mew=2.5)
        labels = [shown[name] for name in names]
        axes.set_yticks(
            range(len(names)), labels if figure_name == "rmse" else [*labels[:-1], "VCA, whitened"], fontsize=8
        )
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{title}; a bar is the mean")
        axes.spines[["top", "right"]].set_visible(False)
    if detail is None:
        return
    titles = {"truth": f"{detail['material']}, truth", "ours": "this method", "half": "L1/2-NMF", "nmf": "NMF"}
    *pictures, axes_of_weights = lower.subplots(1, 5, width_ratios=[1, 1, 1, 1, 2])
    for axes, (name, title) in zip(pictures, titles.items(), strict=True):
        axes.imshow(np.array(detail["maps"][name]), vmin=0, vmax=100, cmap="viridis")
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    axes = axes_of_weights
    waves, weights = np.array(detail["wavelengths"]), np.array(detail["weights"])
    spoiled = np.isin(np.arange(len(waves)), detail["outliers"])
    axes.plot(waves[~spoiled], weights[~spoiled], ".", color="#0072B2", ms=4, label="good")
    axes.plot(waves[spoiled], weights[spoiled], "x", color="#D55E00", ms=6, label="spoiled")
    axes.set_xlabel("wavelength, micrometres")
    axes.set_ylabel("weight of the channel")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


CLAIM = Claim(
    system="spectral-unmixing",
    sentence=(
        "With a loss that lets a spoiled channel count by its norm only, and a sparsity as strong as each pixel is pure, learned "
        "with the spectra, unmixing gets accurate maps of purity and much better shares than methods of its time."
    ),
    paper=(
        "Abstract: the guidance maps learned are accurate, the unmixing results much better than the state of the art of 2014. "
        "Its tables could not be read; no figure of the paper is given here."
    ),
    metric=(
        "Mean spectral angle on channels that are not spoiled, radians, and RMSE of abundances, both after matching: 5 measured "
        "materials, 40 x 40 pixels, 20 dB, 18 of 180 channels blank, noise or striped; a seed is a scene."
    ),
    baseline=(
        "NMF, L1/2-NMF, the same without sparsity and with exponent 1/2 for all, from the same start; FCLS and SUnSAL on the "
        "start's spectra, plain and whitened (the better counts). Strengths of all are tuned on two other scenes."
    ),
    checks=(
        Check(figure="rmse_over_nmf", at_most=0.50, why="RMSE over NMF's"),
        Check(figure="sad_over_nmf", at_most=0.30, why="spectral angle over NMF's"),
        Check(figure="rmse_over_half", at_most=0.55, why="RMSE over L1/2-NMF's"),
        Check(figure="sad_over_half", at_most=0.45, why="spectral angle over L1/2-NMF's"),
        Check(figure="rmse_over_dense", at_most=0.85, why="RMSE over that without sparsity"),
        Check(figure="sad_over_dense", at_most=0.50, why="spectral angle over that without sparsity"),
        Check(figure="beats_fixed", at_least=0.875, why="scenes with lower RMSE than exponent 1/2 for all, share"),
        Check(figure="rmse_over_fixed", at_most=0.98, why="RMSE over that of exponent 1/2 for all"),
        Check(figure="rmse_over_fcls", at_most=1.0, why="RMSE over the better FCLS's"),
        Check(figure="rmse_over_sunsal", at_most=1.0, why="RMSE over the better SUnSAL's"),
        Check(figure="map_correlation", at_least=0.75, over="every", why="guidance map with the true one, Pearson"),
        Check(figure="weights_auc", at_least=0.99, over="every", why="spoiled channels told by their weight, AUC"),
        Check(figure="clean_gap", at_most=0.03, why="nothing spoiled: RMSE of both losses, difference"),
        Check(figure="over_told_channels", at_most=1.15, why="30 dB: RMSE over NMF told which channels are good"),
        Check(figure="sad_random_over_nmf", at_most=1.0, why="random start: spectral angle over NMF's"),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
    seeds={"smoke": (0,), "cpu": tuple(range(8)), "gpu": tuple(range(20))},
)
