"""A classifier of image folders: what is trained on a folder, kept with all that reading an image again takes, and asked.

Shapes: B images of a batch, K classes, (channels, side, side) an image.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixtura.core.checkpoint import atomic_directory, check_replaceable, read_json, write_json
from mixtura.core.training import History, TrainConfig, fit
from mixtura.data.images import Fit, ImageFolder, OnProblem, batches, unpack, warn_problem
from mixtura.vision.residual_network import ResidualNetwork
from mixtura.vision.wavelet.models import WaveletClassifier

__all__ = ["ARCHITECTURES", "Answer", "ImageClassifier", "Recipe", "Trained", "split_rows", "train_classifier"]

ARCHITECTURES = ("wavelet-mixer", "residual")
LEAST_IMAGES = 2  # a class needs one to learn from and one to be tested on
CHECKPOINTS = 20  # of a training
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        arch: ``"wavelet-mixer"`` or ``"residual"``.
        side: images are brought to side x side pixels.
        channels: 3 (colours) or 1 (grey).
        crop: ``"crop"`` or ``"stretch"``, how they are.
        width: channels of the wavelet blocks, divisible by 4; of the first stage of the residual network.
        depth: blocks.
        levels: of the wavelet transform.
        stride: of each of the two convolutions of the wavelet network's stem.
        dropout: within wavelet blocks.
        epochs, batch_size, lr: of AdamW, its rate falling by a cosine.
        held_out: share of each class that is tested on, in (0, 1).
        flip: whether images may be mirrored.
        shift: images are moved by up to this share of their side.
        seed: of everything that chance enters.
    """

    arch: str = "wavelet-mixer"
    side: int = 64
    channels: int = 3
    crop: Fit = "crop"
    width: int = 64
    depth: int = 6
    levels: int = 1
    stride: int = 2
    dropout: float = 0.1
    epochs: int = 30
    batch_size: int = 32
    lr: float = 3e-3
    held_out: float = 0.2
    flip: bool = True
    shift: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {list(ARCHITECTURES)}, got {self.arch!r}")
        for name in ("side", "width", "depth", "epochs", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (batch norm needs two images), got {self.batch_size}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be > 0 and finite, got {self.lr}")
        if not 0 <= self.shift < 1:
            raise ValueError(f"shift must be at least 0 and below 1, got {self.shift}")
        if self.arch == "wavelet-mixer" and self.width % 4:
            raise ValueError(f"width must be divisible by 4, got {self.width}; the block reduces it to a quarter")
        if self.arch == "wavelet-mixer" and not 1 <= self.levels <= 4:
            raise ValueError(f"levels must be 1 to 4, got {self.levels}")
        if self.arch == "wavelet-mixer" and self.side // self.stride**2 < 2**self.levels:
            least = self.stride**2 * 2**self.levels
            raise ValueError(
                f"side must be at least {least} for stride {self.stride} and {self.levels} levels, got {self.side}"
            )

    def network(self, classes: int) -> nn.Module:
        """The untrained network."""
        if self.arch == "residual":
            return ResidualNetwork(self.width, classes=classes, channels=self.channels, blocks=self.depth)
        return WaveletClassifier(
            self.channels, classes, self.width, self.depth, self.levels, stride=self.stride, dropout=self.dropout
        )


@dataclass(frozen=True)
class Answer:
    """What the classifier says of some images of a folder.

    Attributes:
        rows: their numbers in the folder, shape (B,).
        probabilities: shape (B, K), each row adds to one.
    """

    rows: NDArray[np.int64]
    probabilities: NDArray[np.float32]


class ImageClassifier:
    """A trained network with the names of its classes and how images are brought to it.

    Args:
        network: (B, channels, side, side) -> logits (B, K).
        recipe: it was made by.
        labels: names of the K classes.
        mean, spread: of the pixels that it was trained on, in [0, 1], by channel.
    """

    def __init__(
        self, network: nn.Module, recipe: Recipe, labels: tuple[str, ...], mean: list[float], spread: list[float]
    ) -> None:
        self.network, self.recipe, self.labels = network, recipe, labels
        self.mean, self.spread = mean, spread

    def inputs(self, images: NDArray[np.uint8]) -> Tensor:
        """Pixels (B, channels, side, side), uint8, as the network takes them."""
        device = next(self.network.parameters()).device
        x = torch.from_numpy(np.ascontiguousarray(images)).to(device).float().div_(255)
        shape = (1, -1, 1, 1)
        return (x - x.new_tensor(self.mean).view(shape)) / x.new_tensor(self.spread).view(shape)

    @torch.inference_mode()
    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probability of each class for images (B, channels, side, side), uint8: shape (B, K)."""
        want = (self.recipe.channels, self.recipe.side, self.recipe.side)
        if images.ndim != 4 or images.shape[1:] != want or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 of shape (B, {want[0]}, {want[1]}, {want[2]}), got {images.dtype} of {images.shape}"
            )
        self.network.eval()
        return self.network(self.inputs(images)).softmax(1).cpu().numpy()

    def classify_folder(
        self, folder: ImageFolder, *, batch_size: int = 64, on_problem: OnProblem = warn_problem
    ) -> Iterator[Answer]:
        """Answers for the images of a folder, a batch at a time; files that are no images are reported and left out."""
        recipe = self.recipe
        for batch in batches(
            folder, recipe.side, channels=recipe.channels, fit=recipe.crop, batch_size=batch_size, on_problem=on_problem
        ):
            yield Answer(batch.rows, self.classify(batch.images))

    def to(self, device: str) -> "ImageClassifier":
        """The classifier with its network on a device."""
        self.network.to(device)
        return self

    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights (safetensors) and everything else (JSON), whole or not at all.

        Raises:
            ValueError: the directory holds other things, which would be lost.
        """
        check_replaceable(directory, CONFIG)
        with atomic_directory(directory) as beside:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
            save_file(state, beside / WEIGHTS, metadata={"format": "pt"})
            facts = {"model": "mixtura.vision.ImageClassifier", "recipe": asdict(self.recipe)}
            write_json(
                beside / CONFIG, {**facts, "labels": list(self.labels), "mean": self.mean, "spread": self.spread}
            )

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: str = "cpu") -> "ImageClassifier":
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: no such directory, or no classifier in it.
            ValueError: it holds another kind of model, or weights that do not fit.
        """
        directory = Path(directory)
        if not (directory / CONFIG).exists():
            raise FileNotFoundError(
                f"{directory} holds no image classifier ({CONFIG} is missing); train one: mixtura classify train"
            )
        facts = read_json(directory / CONFIG)
        if facts.get("model") != "mixtura.vision.ImageClassifier":
            raise ValueError(f"{directory} holds another kind of model: {facts.get('model', 'unnamed')}")
        recipe = Recipe(**facts["recipe"])
        network = recipe.network(len(facts["labels"]))
        try:
            network.load_state_dict(load_file(directory / WEIGHTS))
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(
                f"{directory / WEIGHTS} does not fit {CONFIG} beside it: {str(error).splitlines()[0]}"
            ) from error
        return cls(network.to(device).eval(), recipe, tuple(facts["labels"]), facts["mean"], facts["spread"])


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        classifier: ready to be asked.
        confusion: held-out images by true class (rows) and answer (columns), shape (K, K).
        history: losses, one a step.
        images: how many were trained on.
    """

    classifier: ImageClassifier
    confusion: NDArray[np.int64]
    history: History
    images: int

    @property
    def accuracy(self) -> float:
        """Share of held-out images that were told right."""
        return float(np.trace(self.confusion) / self.confusion.sum())


def split_rows(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows to test on: the share of every class, at least one and never all of it."""
    rng = np.random.default_rng(seed)
    test = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        n = min(max(1, round(share * len(mine))), len(mine) - 1)
        test.append(rng.choice(mine, n, replace=False))
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def train_classifier(
    folder: ImageFolder,
    recipe: Recipe,
    state: str | Path,
    *,
    device: str = "cpu",
    on_problem: OnProblem = warn_problem,
) -> Trained:
    """Train on a folder of class folders.

    Args:
        folder: from :func:`mixtura.data.images.image_folder`, with classes.
        recipe: network and training.
        state: directory for the decoded images and the checkpoint of an unfinished run, which the same call resumes; it is
            removed at the end. Images are read from there as they are needed, so memory does not grow with the folder.
        device: to train on.
        on_problem: told of every file that is left out or converted.
    Raises:
        ValueError: fewer than two classes, a class of fewer than two images that can be read (named).
    """
    state = Path(state)
    if len(folder.classes) < 2:
        found = f"one, {folder.classes[0]}" if folder.classes else "none"
        raise ValueError(f"{folder.root} must hold at least two class folders, got {found}")
    pixels, rows = _unpacked(folder, recipe, state, on_problem)
    labels = folder.labels[rows]
    counts = np.bincount(labels, minlength=len(folder.classes))
    if counts.min() < LEAST_IMAGES:
        name, n = folder.classes[int(counts.argmin())], int(counts.min())
        raise ValueError(
            f"class {name} has {n} image{'s' * (n != 1)} that can be read; each class needs at least {LEAST_IMAGES}"
        )
    train, test = split_rows(labels, recipe.held_out, recipe.seed)
    mean, spread = _pixel_moments(pixels, train)
    torch.manual_seed(recipe.seed)
    network = recipe.network(len(folder.classes)).to(device)
    classifier = ImageClassifier(network, recipe, folder.classes, mean, spread)
    batch = min(recipe.batch_size, len(train))
    per_epoch = max(1, len(train) // batch)
    y = torch.from_numpy(labels)

    def loss_at(step: int) -> Tensor:
        epoch, part = divmod(step, per_epoch)
        order = np.random.default_rng([recipe.seed, epoch]).permutation(train)
        chosen = np.sort(order[part * batch : (part + 1) * batch])
        x = _augmented(classifier.inputs(pixels[chosen]), recipe)
        return F.cross_entropy(network(x), y[chosen].to(x.device), label_smoothing=0.1)

    steps = recipe.epochs * per_epoch
    config = TrainConfig(
        steps=steps, lr=recipe.lr, weight_decay=0.05, checkpoint_every=max(1, steps // CHECKPOINTS), seed=recipe.seed
    )
    facts = {"images": len(train), "classes": "/".join(folder.classes)}
    history = fit(network, loss_at, config, out=state / "training", label=recipe.arch, describe=facts)
    confusion = np.zeros((len(counts), len(counts)), dtype=np.int64)
    for part in np.array_split(test, max(1, len(test) // 256)):
        np.add.at(confusion, (labels[part], classifier.classify(pixels[part]).argmax(1)), 1)
    shutil.rmtree(state)
    return Trained(classifier, confusion, history, len(train))


def _unpacked(
    folder: ImageFolder, recipe: Recipe, state: Path, on_problem: OnProblem
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The folder's images from the unfinished run's directory, decoded anew where the folder or the recipe changed."""
    digest = hashlib.sha256(repr((recipe.side, recipe.channels, recipe.crop)).encode())
    for path in folder.files:
        digest.update(f"{path.relative_to(folder.root)} {path.stat().st_size}\n".encode())
    mark, array = state / "images.json", state / "images" / "images.npy"
    if mark.exists() and array.exists():
        known = read_json(mark)
        if known["of"] == digest.hexdigest():
            rows = np.array(known["rows"])
            return np.load(array, mmap_mode="r", allow_pickle=False)[: len(rows)], rows
    state.mkdir(parents=True, exist_ok=True)
    pixels, rows = unpack(
        folder, recipe.side, state / "images", channels=recipe.channels, fit=recipe.crop, on_problem=on_problem
    )
    write_json(mark, {"of": digest.hexdigest(), "rows": rows.tolist()})
    return pixels, rows


def _pixel_moments(pixels: NDArray[np.uint8], rows: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and deviation of the pixels of each channel, in [0, 1]; a channel of one value has deviation 1."""
    channels = pixels.shape[1]
    sums, squares, n = np.zeros(channels), np.zeros(channels), 0
    for part in np.array_split(rows, max(1, len(rows) // 256)):
        x = pixels[part] / 255.0
        sums += x.sum((0, 2, 3))
        squares += (x * x).sum((0, 2, 3))
        n += x.size // channels
    mean = sums / n
    spread = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return mean.tolist(), np.where(spread > 1e-3, spread, 1.0).tolist()


def _augmented(x: Tensor, recipe: Recipe) -> Tensor:
    """Mirrored by chance and moved by chance, each image for itself; what comes in at an edge repeats it."""
    if recipe.flip:
        mirrored = torch.rand(len(x), device=x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    most = int(recipe.shift * recipe.side)
    if most:
        side = x.shape[-1]
        rows, columns = torch.randint(0, 2 * most + 1, (2, len(x), 1), device=x.device)
        along = torch.arange(side, device=x.device)
        y = F.pad(x, (most,) * 4, mode="replicate")
        # One gather for the batch: rows and columns of each image's own window.
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        x = y.permute(0, 2, 3, 1)[batch, (rows + along)[:, :, None], (columns + along)[:, None, :]].permute(0, 3, 1, 2)
    return x
