"""Data of the pretraining claim that the theory does not make: bent pairs, digits and chunks of program text."""

from __future__ import annotations

import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.core.training import TrainConfig
from mixtura.core.training import fit as train
from mixtura.data.digits import digits
from mixtura.data.texts import read_texts
from mixtura.density.contrastive_model import ContrastiveModel
from mixtura.density.factor_model import FactorModel
from mixtura.density.latent_models import fit_latent
from mixtura.density.mixture import GaussianMixture
from mixtura.density.pretraining_ways import WAYS, Fitted, fitted_ways, pretraining_report
from mixtura.density.small_heads import fit_logistic, fit_ridge

__all__ = ["Cell", "bent_pairs", "contrast_on_images", "digit_cells", "outcome", "text_cells"]

# In every Python that this library runs on.
PACKAGES = ("asyncio", "email", "http", "importlib", "json", "multiprocessing", "tkinter", "xml")
CHUNK, WORDS = 1000, 100  # characters of a chunk, and words that are counted


def bent_pairs(pairs: int, epochs: int, draws: int, seed: int) -> dict[str, float]:
    """Excess squared error at 40 labels: contrastive features and least squares against ridge and a tuned network on x.

    x = tanh(W z) + noise in 50 columns with 5 latents that both rows of a pair share; y = beta'z + noise. The excess is that over
    knowing z, which no predictor from x does, so that ratios are drawn towards 1.
    """
    from sklearn.model_selection import GridSearchCV
    from sklearn.neural_network import MLPRegressor

    rng = np.random.default_rng([seed, 77])
    r, f, n = 5, 50, 40
    W_RF, beta_R = rng.normal(size=(r, f)), rng.normal(size=r)

    def views(z_NR: np.ndarray) -> np.ndarray:
        return np.tanh(z_NR @ W_RF) + 0.3 * rng.normal(size=(len(z_NR), f))

    z_NR = rng.normal(size=(pairs, r))
    both = np.stack([views(z_NR), views(z_NR)], 1)
    # As many features as latents, and the likelihood of pairs: of 5, 8, 10 and 32 features and both losses the best.
    model = ContrastiveModel(views="pairs", dim=r, epochs=epochs, lr=3e-3, seed=seed).fit(both)
    test_NR = rng.normal(size=(5000, r))
    test_X, test_y = views(test_NR), test_NR @ beta_R
    found: dict[str, list[float]] = {"contrastive": [], "ridge": [], "network": []}
    for draw in range(draws):
        labelled_NR = rng.normal(size=(n, r))
        X, y = views(labelled_NR), labelled_NR @ beta_R + 0.5 * rng.normal(size=n)
        head = fit_ridge(model.transform(X), y, intercept=True)
        answers = {
            "contrastive": head.predict(model.transform(test_X)),
            "ridge": fit_ridge(X, y, intercept=True).predict(test_X),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the network's steps run out; it is near its end then
            network = MLPRegressor(hidden_layer_sizes=(64,), max_iter=150, solver="lbfgs", random_state=draw)
            grid = GridSearchCV(network, {"alpha": [0.1, 1.0, 10.0]}, scoring="neg_mean_squared_error", cv=3)
            answers["network"] = grid.fit(X, y).predict(test_X)
        for name, answer in answers.items():
            found[name].append(float(np.square(answer - test_y).mean()))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    ratio = means["contrastive"] / min(means["ridge"], means["network"])
    return {f"bent_{name}": value for name, value in means.items()} | {"bent_over_best_rival": ratio}


Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Cell:
    """A real task: unlabelled rows, rows to draw labels from, unseen rows with their answers, and the latent."""

    name: str
    n: int
    unlabelled: np.ndarray
    X: np.ndarray
    y: np.ndarray
    unseen: np.ndarray
    answers: np.ndarray
    latent: Any


def digit_cells(sizes: tuple[int, ...], seed: int) -> list[Cell]:
    """Digits: 1297 images without labels, of which some get them; 500 to test on; components of a mixture of 60."""
    images, y = digits()
    X, order = images.reshape(len(images), -1) * 16, np.random.default_rng([seed, 1]).permutation(len(y))
    train, test = order[:1297], order[1297:]
    latent = GaussianMixture(60, covariance="spherical", random_state=seed, tol=1e-2)
    return [Cell(f"digits_{n}", n, X[train], X[train], y[train], X[test], y[test], latent) for n in sizes]


def text_cells(sizes: tuple[int, ...], seed: int) -> list[Cell]:
    """Which package of Python's library a chunk of its source is from: roots of word counts, 20 factors."""
    texts = {name: read_texts([Path(sysconfig.get_paths()["stdlib"]) / name]) for name in PACKAGES}
    chunks, labels = [], []
    for label, name in enumerate(PACKAGES):
        for text in texts[name]:
            found = [text[i : i + CHUNK] for i in range(0, len(text) - CHUNK, CHUNK)]
            chunks += found
            labels += [label] * len(found)
    words = [re.findall(r"[A-Za-z_]{3,}", chunk) for chunk in chunks]
    counts = Counter(word for chunk in words for word in set(chunk))
    place = {word: i for i, (word, _) in enumerate(sorted(counts.most_common(WORDS)))}
    X = np.zeros((len(chunks), len(place)))
    for row, chunk in enumerate(words):
        for word in chunk:
            if word in place:
                X[row, place[word]] += 1
    X, y = np.sqrt(X), np.array(labels)
    order = np.random.default_rng([seed, 2]).permutation(len(y))
    test, train = order[:500], order[500:]
    latent = FactorModel(20, noise="isotropic", seed=seed)
    return [Cell(f"text_{n}", n, X[train], X[train], y[train], X[test], y[test], latent) for n in sizes]


def outcome(cell: Cell, draws: int, seed: int) -> dict[str, Any]:
    """Accuracy of each way on the test rows, and of following the report, mean over draws of the labels."""
    once = fit_latent(cell.latent, "auto", cell.unlabelled, seed)
    right: dict[str, list[float]] = {way: [] for way in (*WAYS, "report")}
    advice = Counter[str]()
    for draw in range(draws):
        rng = np.random.default_rng([seed, cell.n, draw])
        chosen = rng.choice(len(cell.y), cell.n, replace=False)
        X, y = cell.X[chosen], cell.y[chosen]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ways without unlabelled rows say so
            report = pretraining_report(cell.unlabelled, X, y, latent=Fitted(once, cell.latent), seed=draw)
            for way, predict in fitted_ways(once, cell.latent, "auto", X, y, False, draw).items():
                right[way].append(float((predict(cell.unseen) == cell.answers).mean()))
        right["report"].append(right[report.recommended][-1])
        advice[report.recommended] += 1
    means = {way: float(np.mean(values)) for way, values in right.items()}
    regret = max(means[way] for way in WAYS) - means["report"]
    figures: dict[str, Any] = {f"{cell.name}_{way}": value for way, value in means.items()}
    return figures | {f"{cell.name}_regret": regret, f"{cell.name}_advice": advice.most_common(1)[0][0]}


class _Net(nn.Module):
    """Features of 8 x 8 images: two convolutions, one dense layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 16, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        side = round(x.shape[1] ** 0.5)
        return self.layers(x.reshape(-1, 1, side, side))


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to one pixel, brighter or darker, with noise: what contrast and the supervised network both see."""
    side = round(x.shape[1] ** 0.5)
    images = F.pad(x.reshape(-1, side, side), (1, 1, 1, 1))
    down, right = (torch.randint(3, (len(x), 1, 1), generator=generator).to(x.device) for _ in range(2))
    at = torch.arange(side, device=x.device)
    which = torch.arange(len(x), device=x.device)[:, None, None]
    moved = images[which, down + at[:, None], right + at]
    gain = 0.7 + 0.6 * torch.rand((len(x), 1, 1), generator=generator).to(x.device)
    return (moved * gain + 0.1 * torch.randn(moved.shape, generator=generator).to(x.device)).reshape(len(x), -1)


def contrast_on_images(
    X: np.ndarray,
    y: np.ndarray,
    test: tuple[np.ndarray, np.ndarray],
    sizes: tuple[int, ...],
    epochs: int,
    steps: int,
    seed: int,
    device: str,
) -> dict[str, float]:
    """Accuracy of a logistic head on contrastive features, of the same network on the labels with the same augmentations,
    and of logistic regression on pixels; images in [0, 1], rows of pixels."""
    model = ContrastiveModel(_Net(64), views=augmented, loss="infonce", epochs=epochs, seed=seed, device=device).fit(X)
    rng, found = np.random.default_rng([seed, 3]), dict[str, float]()
    sees: dict[str, Predict] = {"contrast": model.transform, "pixels": lambda rows: rows}
    n_classes = int(y.max()) + 1
    for n in sizes:
        chosen = rng.choice(len(y), n, replace=False)
        classes, coded = np.unique(y[chosen], return_inverse=True)
        for name, see in sees.items():
            head = fit_logistic(see(X[chosen]), coded, len(classes), seed=seed)
            guess = classes[head.predict_proba(see(test[0])).argmax(1)]
            found[f"images_{n}_{name}"] = float((guess == test[1]).mean())
        answer = same_network(X[chosen], y[chosen], n_classes, steps, seed, device)(test[0])
        found[f"images_{n}_supervised"] = float((answer == test[1]).mean())
    return found


def same_network(X: np.ndarray, y: np.ndarray, n_classes: int, steps: int, seed: int, device: str) -> Predict:
    """The network of the contrast trained on labels alone, with the same augmentations."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(_Net(64), nn.GELU(), nn.Linear(64, n_classes)).to(device)
    x, target = torch.from_numpy(X).float().to(device), torch.from_numpy(y).to(device)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = torch.randint(len(x), (min(64, len(x)),), generator=generator).to(device)
        return F.cross_entropy(net(augmented(x[batch], generator)), target[batch])

    train(net, loss_at, TrainConfig(steps=steps, lr=3e-3, weight_decay=1e-3, seed=seed), label="labels")
    with torch.no_grad():
        return lambda rows: net(torch.from_numpy(rows).float().to(device)).argmax(1).cpu().numpy()
