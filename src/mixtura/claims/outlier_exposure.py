"""The claim of mixture outlier exposure: mixtures of known inputs and outliers teach what outliers alone do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.core.blend import Op, mix_pairs
from mixtura.core.training import NonFiniteLoss
from mixtura.data.digits import digits, fashion_mnist, halved, mnist_sample, patches
from mixtura.data.glyphs import glyphs
from mixtura.robust.exposure_training import ExposureConfig, Rows, expose, logits_of
from mixtura.robust.ood import SCORES, holdout_split, ood_metrics, score
from mixtura.robust.outlier_exposure import (
    EnergyExposure,
    Exposure,
    HardOutlierExposure,
    MixtureOutlierExposure,
    OutlierExposure,
    Plain,
)
from mixtura.robust.outlier_networks import dense_network

__all__ = ["CLAIM", "Task", "chosen_on", "confidence_gap", "inner_task"]

BETAS = (0.1, 0.5, 1.0, 5.0)
ALPHAS: dict[Op, float] = {"mixup": 1.0, "cutmix": 2.0}
MARGINS = ((-13.0, -6.0), (-8.0, -3.0))  # the paper's, and nearer ones: energies of a small network stay near zero
SHARES = tuple(i / 10 for i in range(11))
BASE_RATE, TUNED_RATE, BATCH = 0.1, 0.03, 64
ENERGY_CLIP = 10.0  # a help to that baseline alone: its squared margins make the first steps diverge otherwise
GARMENTS, GARMENTS_OUT = (0, 3, 4), (2, 6)  # T-shirt, dress and coat; pullover and shirt

LIMITS = (
    "Small grey images and a dense network trained from nothing; the paper has pretrained ResNet-50s on photographs of "
    "birds, butterflies, cars and aircraft, of which this says nothing. Held-out digits are fine only by the split; "
    "garments are. Weights are chosen by fine detection alone, on inner tasks where two known digits (one known garment) "
    "are held out, each method from as many candidates as it has there: OE 4, energy 4, MixOE 8, four for each operator; "
    "OE-M has OE's. A candidate that diverges is not chosen; energy alone has its gradients clipped, without which it "
    "diverges. The last weights count, where the official code keeps the epoch with the best validation accuracy. The "
    "distance of confidence from the share is measured on blends, where a share means the same everywhere, with the "
    "MixOE that was trained on blends; with boxes (gap_..._cutmix_pairs) neither method is near, since a box may miss "
    "the digit. Letters look like digits more than anything in the paper's coarse sets looks like a bird. One check "
    "fails, on garments: 1.0 point over outlier exposure (-2.5 to 4.9 by split), where 2 were asked for. Garments "
    "scatter, since one known garment that is held out says little about the two that are judged. Both, like the paper, "
    "are near the base model there (0.62, 0.61 and 0.59). With 10 epochs of fine-tuning, a sixth of the updates that the "
    "paper's 10 epochs are, garments had 3.4 points and another check failed, the ratio of the distances (1.6, now 2.4); "
    "the other margins have grown. Splits 0 to 2 were looked at while building. A first run of split 0, tuned on one "
    "inner task and with the distance on boxes as well, fell short of outlier exposure in fine detection; three inner "
    "tasks and blends came after it, then gradients of every method clipped at norm 10, which was dropped, since the "
    "paper's protocol has none."
)

Images = NDArray[np.float32]
Make = Callable[[int], Exposure]


@dataclass(frozen=True)
class Size:
    """How much a scale runs."""

    base_epochs: int
    epochs: int
    inits: int
    digits: int | None
    outliers: int
    coarse: int
    garments: int
    hidden: int = 256
    inner: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3), (4, 5))
    inner_garments: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,))
    made_up: bool = False


SCALES: dict[Scale, Size] = {
    "smoke": Size(2, 1, 1, 600, 300, 100, 150, hidden=32, inner=((0, 1),), inner_garments=((0,),), made_up=True),
    # 60 epochs of 2,000 rows are as many updates as the paper's 10 of 6,000 photographs.
    "cpu": Size(30, 60, 2, None, 12_000, 1000, 600),
    "gpu": Size(30, 60, 5, None, 60_000, 5000, 6000, hidden=1024),
}


@dataclass(frozen=True)
class Task:
    """Known classes to learn, outliers to learn from, and what must be told apart afterwards.

    Attributes:
        x, y: known rows, (N, 1, side, side), and their classes, (N,), integers in [0, K).
        x_test, y_test: more of them.
        outliers: auxiliary outliers.
        fine: rows of classes held out of the same data set.
        coarse: rows of sources that neither the known rows nor the outliers are from.
    """

    x: Images
    y: NDArray[np.int64]
    x_test: Images
    y_test: NDArray[np.int64]
    outliers: Images
    fine: Images
    coarse: Images | None = None

    @property
    def n_classes(self) -> int:
        return int(self.y.max()) + 1


def of_classes(
    images: Images,
    t: NDArray[np.int64],
    known: Sequence[int],
    held: Sequence[int],
    share: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Rows of the known classes, a share of them to train on, and those of the held-out ones, as arguments of a task."""
    order = rng.permutation(len(t))
    ours = order[np.isin(t[order], known)]
    cut = int(share * len(ours))
    y = np.searchsorted(np.sort(known), t)
    train, test = ours[:cut], ours[cut:]
    rows = {"x": images[train], "y": y[train], "x_test": images[test], "y_test": y[test]}
    return rows | {"fine": images[order[np.isin(t[order], held)]]}


def inner_task(task: Task, held: Sequence[int], seed: int) -> Task:
    """A task to choose settings on: some *known* classes are held out, and only rows to train on are used."""
    known = np.setdiff1d(np.arange(task.n_classes), held)
    rng = np.random.default_rng([seed, 1, *held])
    return Task(outliers=task.outliers, **of_classes(task.x, task.y, list(known), list(held), 0.7, rng))


def as_images(found: NDArray[np.float64], *, half: bool = True) -> Images:
    """Grey images (N, side, side) with a channel, at half resolution."""
    return (halved(found) if half else found).astype(np.float32)[:, None]


def digits_task(size: Size, split: int) -> Task:
    """Seven digits known and three held out; clothes to learn from; letters and photographs to be told apart."""
    images, t = mnist_sample()
    if size.digits is not None:
        rows = np.random.default_rng(0).permutation(len(t))[: size.digits]
        images, t = images[rows], t[rows]
    known, held = holdout_split(t, 7, split)
    if size.made_up:  # no Fashion-MNIST in a smoke run: photographs to learn from, letters to be told apart
        outliers, coarse = patches(size.outliers, 28, seed=2), glyphs(size.coarse, 28, seed=3)
    else:
        outliers = fashion_mnist()[0][: size.outliers]
        coarse = np.concatenate([glyphs(size.coarse // 2, 28, seed=3), patches(size.coarse // 2, 28, seed=2)])
    parts = of_classes(as_images(images), t, list(known), list(held), 0.6, np.random.default_rng([split, 0]))
    return Task(outliers=as_images(outliers), coarse=as_images(coarse), **parts)


def garments_task(size: Size, seed: int) -> Task:
    """Three garments known, two much like them held out; digits, letters and photographs to learn from."""
    rng = np.random.default_rng([seed, 2])
    if size.made_up:  # five digits stand in for clothes
        images, t = digits()
        chosen = np.flatnonzero(np.isin(t, GARMENTS + GARMENTS_OUT))
        parts = of_classes(as_images(images[chosen], half=False), t[chosen], GARMENTS, GARMENTS_OUT, 0.5, rng)
        return Task(outliers=as_images(patches(size.outliers, 8, seed=2), half=False), **parts)
    images, t = fashion_mnist()
    test, t_test = fashion_mnist("t10k")
    rows = np.concatenate([rng.permutation(np.flatnonzero(t == c))[: size.garments] for c in GARMENTS])
    known = np.isin(t_test, GARMENTS)
    others = np.concatenate([mnist_sample()[0], glyphs(3000, 28, seed=4), patches(3000, 28, seed=5)])
    y, y_test = np.searchsorted(GARMENTS, t[rows]), np.searchsorted(GARMENTS, t_test[known])
    seen, unseen = as_images(images[rows]), as_images(test[known])
    fine = as_images(test[np.isin(t_test, GARMENTS_OUT)])
    return Task(seen, y, unseen, y_test, as_images(others), fine)


CANDIDATES: dict[str, dict[str, Make]] = {
    "oe": {f"beta {b:g}": partial(OutlierExposure, beta=b) for b in BETAS},
    "energy": {
        f"beta {b:g}, margins {low:g} {high:g}": partial(EnergyExposure, beta=b, m_in=low, m_out=high)
        for b in (0.1, 1.0)
        for low, high in MARGINS
    },
}
for _op, _alpha in ALPHAS.items():
    CANDIDATES[_op] = {f"beta {b:g}": partial(MixtureOutlierExposure, mix=_op, alpha=_alpha, beta=b) for b in BETAS}


def base_model(task: Task, size: Size, seed: int) -> nn.Module:
    """A classifier that has seen no outlier."""
    torch.manual_seed(seed)
    model = dense_network(task.x[0].size, task.n_classes, hidden=size.hidden)
    config = ExposureConfig(epochs=size.base_epochs, lr=BASE_RATE, batch_size=BATCH, weight_decay=0.0, seed=seed)
    expose(model, Plain(task.n_classes), Rows(task.x), task.y, None, config, label="base")
    return model


def tuned(base: nn.Module, objective: Exposure, task: Task, size: Size, seed: int) -> nn.Module:
    """The base model, fine-tuned with an objective: the same epochs, rate and order of rows for each."""
    model = copy.deepcopy(base)
    outliers = None if isinstance(objective, Plain) else Rows(task.outliers)
    clip = ENERGY_CLIP if isinstance(objective, EnergyExposure) else 0.0
    config = ExposureConfig(epochs=size.epochs, lr=TUNED_RATE, batch_size=BATCH, weight_decay=0.0, clip=clip, seed=seed)
    expose(model, objective, Rows(task.x), task.y, outliers, config, label=type(objective).__name__)
    return model


def measured(model: nn.Module, task: Task) -> dict[str, float]:
    """Accuracy, and how well the largest softmax probability tells known rows from both kinds of others."""
    known, fine = logits_of(model, Rows(task.x_test)), logits_of(model, Rows(task.fine))
    found = ood_metrics(score(known), score(fine))
    figures = {"accuracy": float((known.argmax(1).numpy() == task.y_test).mean())}
    figures |= {"fine": found.auroc, "fine_tnr": found.tnr}
    if task.coarse is not None:
        found = ood_metrics(score(known), score(logits_of(model, Rows(task.coarse))))
        figures |= {"coarse": found.auroc, "coarse_tnr": found.tnr}
    return figures


def chosen_on(task: Task, size: Size, held: Sequence[Sequence[int]], seed: int) -> dict[str, str]:
    """The candidate of each method that tells held-out *known* classes best, and which operator mixes best.

    Args:
        task: its held-out classes are not looked at, nor its test rows.
        size: of the trainings.
        held: known classes to hold out, one inner task each; a candidate is judged by its mean over them.
        seed: of the trainings.
    """
    values: dict[str, dict[str, list[float]]] = {m: {name: [] for name in found} for m, found in CANDIDATES.items()}
    for i, classes in enumerate(held):
        inner = inner_task(task, classes, seed)
        base = base_model(inner, size, seed + i)
        for method, candidates in CANDIDATES.items():
            for name, make in candidates.items():
                try:
                    model = tuned(base, make(inner.n_classes), inner, size, seed + i)
                except NonFiniteLoss:  # a candidate that diverges is not chosen
                    values[method][name].append(-1.0)
                else:
                    values[method][name].append(measured(model, inner)["fine"])
    means = {m: {name: float(np.mean(v)) for name, v in found.items()} for m, found in values.items()}
    chosen = {m: max(found, key=found.__getitem__) for m, found in means.items()}
    return chosen | {"mixoe": max(ALPHAS, key=lambda op: means[op][chosen[op]])}


def confidence_gap(
    model: nn.Module, x: Images, outliers: Images, n_classes: int, op: Op, seed: int
) -> tuple[float, list[float]]:
    """How far confidence is from the share of known input, and its mean at each of :data:`SHARES`.

    Args:
        model: the classifier.
        x, outliers: pairs that it has not seen, (N, 1, side, side).
        n_classes: K.
        op: how they are mixed.
        seed: places of boxes.
    Returns:
        The mean over the shares lam of |mean MSP - (lam + (1 - lam) / K)|, and the mean MSPs.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.from_numpy(x), torch.from_numpy(outliers)
    gaps, means = [], []
    for lam in SHARES:
        mixed = mix_pairs(first, second, torch.full((len(first),), lam), op, generator)
        sure = score(logits_of(model, Rows(mixed.inputs)))
        want = (mixed.lam + (1 - mixed.lam) / n_classes).double()
        gaps.append(abs(float(sure.mean() - want.mean())))
        means.append(float(sure.mean()))
    return float(np.mean(gaps)), means


def compare(task: Task, chosen: dict[str, str], size: Size, seed: int, unseen: Images | None) -> dict[str, Any]:
    """Figures of every method, from one base model."""
    k = task.n_classes
    base = base_model(task, size, seed)
    made: dict[str, Exposure] = {method: CANDIDATES[method][chosen[method]](k) for method in CANDIDATES}
    made |= {"id": Plain(k), "oem": HardOutlierExposure(k, made["oe"].beta, candidates=50_000)}
    models = {"base": base} | {name: tuned(base, objective, task, size, seed) for name, objective in made.items()}
    models["mixoe"] = models[chosen["mixoe"]]
    figures: dict[str, Any] = {
        f"{name}_{key}": value for name, model in models.items() for key, value in measured(model, task).items()
    }
    known, fine = logits_of(models["id"], Rows(task.x_test)), logits_of(models["id"], Rows(task.fine))
    for kind in SCORES[1:]:
        figures[f"id_fine_{kind}"] = ood_metrics(score(known, kind), score(fine, kind)).auroc
    if unseen is not None:
        x = task.x_test[: len(unseen)]
        curves = {}
        for op, names in {"mixup": ("id", "oe", "mixup"), "cutmix": ("oe", "cutmix")}.items():
            for name in names:
                key = f"{name}_{op}_pairs"
                gap = confidence_gap(models[name], x, unseen[: len(x)], k, op, seed)  # type: ignore[arg-type]
                figures[f"gap_{key}"], curves[key] = gap
        figures["detail"] = {"curves": curves, "classes": k}
    return figures


def averaged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the initialisations; details of the first."""
    names = [name for name in runs[0] if name != "detail"]
    return {name: float(np.mean([run[name] for run in runs])) for name in names}


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one split: settings chosen once, then every method from the same base models."""
    size = SCALES[scale]
    task = digits_task(size, seed)
    chosen = chosen_on(task, size, size.inner, 100 * seed)
    unseen = as_images(patches(size.coarse, 28, seed=6) if size.made_up else fashion_mnist("t10k")[0][:1000])
    runs = [compare(task, chosen, size, 100 * seed + init, unseen) for init in range(size.inits)]
    figures = averaged(runs)
    figures["fine_over_base"] = 100 * (figures["mixoe_fine"] - figures["base_fine"])
    figures["fine_over_oe"] = 100 * (figures["mixoe_fine"] - figures["oe_fine"])
    figures["coarse_over_oe"] = 100 * (figures["mixoe_coarse"] - figures["oe_coarse"])
    figures["accuracy_over_id"] = 100 * (figures["mixoe_accuracy"] - figures["id_accuracy"])
    figures["gap"] = figures["gap_mixup_mixup_pairs"]
    figures["gap_ratio"] = figures["gap_oe_mixup_pairs"] / max(figures["gap"], 1e-9)
    clothes = garments_task(size, seed)
    chosen_clothes = chosen_on(clothes, size, size.inner_garments, 100 * seed)
    found = compare(clothes, chosen_clothes, size, 100 * seed, None)
    figures |= {f"garments_{name}": value for name, value in found.items()}
    figures["garments_over_oe"] = 100 * (found["mixoe_fine"] - found["oe_fine"])
    figures["garments_over_base"] = 100 * (found["mixoe_fine"] - found["base_fine"])
    detail = {"chosen": chosen, "chosen_garments": chosen_clothes, "shares": list(SHARES)}
    figures["detail"] = detail | runs[0]["detail"]
    return figures


def plot(record: Record, figure: Any) -> None:
    """Fine and coarse detection of every method, and confidence over the share of known input."""
    rows = record["seeds"]
    figure.set_size_inches(12.0, 4.2)
    axes = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    names = {
        "mixoe": "mixtures (MixOE)",
        "oe": "outliers (OE)",
        "oem": "hard outliers (OE-M)",
        "energy": "energy",
        "id": "known rows only",
        "base": "base model",
    }
    colours = {"mixoe": "#D55E00", "oe": "#0072B2", "id": "#6b6b70"}
    for kind, mark, shift in (("fine", "o", -0.13), ("coarse", "s", 0.13)):
        for i, name in enumerate(names):
            values = [row[f"{name}_{kind}"] for row in rows]
            tone = colours.get(name, "#9a9aa0")
            face = tone if kind == "fine" else "none"
            axes[0].plot(values, [i + shift] * len(values), mark, color=tone, mfc=face, alpha=0.5, ms=4)
            axes[0].plot([np.mean(values)], [i + shift], "|", color=tone, ms=13, mew=2.5)
    axes[0].set_yticks(range(len(names)), list(names.values()), fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("AUROC; filled: held-out digits, open: letters and photographs")
    axes[0].set_title("digits: a mark a split, a bar the mean", fontsize=10)
    shares = rows[0]["detail"]["shares"]
    k = rows[0]["detail"]["classes"]
    for name, tone in (("id", "#6b6b70"), ("oe", "#0072B2"), ("mixup", "#D55E00")):
        curves = np.array([row["detail"]["curves"][f"{name}_mixup_pairs"] for row in rows])
        axes[1].plot(shares, curves.mean(0), color=tone, lw=2, label=names.get(name, names["mixoe"]))
        axes[1].fill_between(shares, curves.min(0), curves.max(0), color=tone, alpha=0.15, lw=0)
    axes[1].plot([0, 1], [1 / k, 1], color="black", lw=1, ls="--", label="share + rest / classes")
    axes[1].set_xlabel("share of the known image in the mixture")
    axes[1].set_ylabel("mean confidence")
    axes[1].set_title("confidence on the way out", fontsize=10)
    axes[1].legend(frameon=False, fontsize=8)
    for i, name in enumerate(names):
        values = [row[f"garments_{name}_fine"] for row in rows]
        tone = colours.get(name, "#9a9aa0")
        axes[2].plot(values, [i] * len(values), "o", color=tone, alpha=0.5, ms=4)
        axes[2].plot([np.mean(values)], [i], "|", color=tone, ms=16, mew=2.5)
    axes[2].set_yticks(range(len(names)), [])
    axes[2].invert_yaxis()
    axes[2].axvline(0.5, color="black", lw=0.8, ls=":")
    axes[2].set_xlabel("AUROC of held-out garments; 0.5 is chance")
    axes[2].set_title("three garments against two others", fontsize=10)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)


CLAIM = Claim(
    system="outlier-exposure",
    sentence=(
        "Fine-tuning a classifier on mixtures of known inputs and outliers, with confidence asked for in proportion to the known "
        "share, tells both near and far unknown inputs better than outliers alone, at unchanged accuracy."
    ),
    paper=(
        "Higher fine and coarse TNR95 than the base model on birds, butterflies, cars and aircraft, 3 splits (main results "
        "table; cells not at hand); outlier exposure alone: fine 17/53/27/21 % where the base model has 18/56/30/22, coarse "
        "98/100/92/98 where it has 77/88/87/66 (aircraft, cars, butterflies, birds; read off the bars of the first evaluation)"
    ),
    metric=(
        "AUROC of the largest softmax probability, in points: 3 held-out digits (fine), and letters and photographs (coarse), "
        "against 7 known digits, MNIST at 14 x 14; mean distance of confidence from the share of known image."
    ),
    baseline=(
        "The base model, the same fine-tuned on known rows alone, outlier exposure (OE), OE on hard outliers and energy margins: "
        "same base, epochs, rate and outliers (12,000 of Fashion-MNIST); weights and operator of each chosen where two known "
        "digits are held out, three such pairs."
    ),
    checks=(
        Check(figure="fine_over_base", at_least=3.0, why="fine AUROC over the base model, points"),
        Check(figure="fine_over_oe", at_least=0.3, why="fine AUROC over OE, points"),
        Check(figure="coarse_over_oe", at_least=0.3, why="coarse AUROC over OE, points"),
        Check(figure="accuracy_over_id", at_least=-0.5, why="accuracy over fine-tuning on known rows alone, points"),
        Check(figure="gap", at_most=0.10, why="distance of confidence from lam + (1 - lam) / K on unseen mixups"),
        Check(figure="gap_ratio", at_least=2.0, why="that distance of OE over that of MixOE"),
        Check(figure="garments_over_oe", at_least=2.0, why="garments: fine AUROC over OE, points"),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
    seeds={"smoke": (0,), "cpu": tuple(range(8)), "gpu": tuple(range(8))},
)
