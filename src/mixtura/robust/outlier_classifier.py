"""A classifier that also says what it does not know: trained on known rows, then fine-tuned with outliers.

Arrays of bytes with four dimensions are images and may lie on disk: only the rows of a batch are read. Everything else is a
table or embeddings, standardised column by column.

Shapes: N samples, F features, K classes; images (N, channels, height, width).
Source: Zhang et al. 2021 (2106.03917), sec. 4; see :mod:`mixtura.robust.outlier_exposure`.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn

from mixtura.core.keeping import Keeping
from mixtura.robust.exposure_training import ExposureConfig, Rows, expose, logits_of, shared_rows, shifted
from mixtura.robust.ood import SCORES, keep_threshold, score
from mixtura.robust.outlier_exposure import (
    EnergyExposure,
    Exposure,
    HardOutlierExposure,
    MixtureOutlierExposure,
    OutlierExposure,
    Plain,
)
from mixtura.robust.outlier_networks import dense_network, image_network

__all__ = ["OBJECTIVES", "OutlierExposedClassifier", "SharedRowsWarning"]

OBJECTIVES = ("mixoe", "oe", "oe-m", "energy", "plain")
# Clipped: without it the first steps of the convolutions, which come untrained, can lose every class for good.
BUILT_IN = {"lr": 0.03, "base_epochs": 30, "clip": 1.0}
GIVEN = {"lr": 1e-3, "base_epochs": 0, "clip": 0.0}  # a module of one's own is taken as trained; the paper's rate
BASE_RATE = 0.05
CHECKPOINT_EVERY = 200  # steps
LEAST_TO_VALIDATE = 40  # rows below which none is set aside


class SharedRowsWarning(UserWarning):
    """Some outliers equal known rows."""


class OutlierExposedClassifier(Keeping, ClassifierMixin, BaseEstimator):
    """Classes of known rows, and a score of how much a row looks like any of them.

    Args:
        module: (B, ...) -> logits (B, K), of which a copy is fine-tuned; None builds a small network for what comes and trains
            it first.
        objective: ``"mixoe"`` (mixtures of known rows and outliers), ``"oe"``, ``"oe-m"``, ``"energy"``, or ``"plain"``.
        alpha, mix: of ``"mixoe"``; the paper has ``"mixup"`` with 1 and ``"cutmix"`` (images only) with 2.
        beta: weight of the outliers; 5 suits large pretrained networks, 0.5 to 1 small ones.
        epochs: of fine-tuning.
        lr: its first rate; 0.001 for a module of one's own and 0.03 for a built-in one where it is None.
        batch_size: known rows a step.
        device: where torch computes; the CPU where it is None.
        seed: of weights, order, pairs and shares.
        base_epochs: of training on known rows alone before; 0 for a module of one's own and 30 for a built-in one where None.
        width: of the built-in network: channels of its first convolution, or an eighth of hidden units.
        confidence: what ``score_samples`` gives, see :func:`mixtura.robust.ood.score`.
        level: share of known rows that ``threshold_`` keeps.
        validation: share of rows set aside for it; of fewer than 40 rows none is, and the threshold is from the rows trained on.
        shift: largest move of images during training, as a share of their sides; 0 for none.
    Attributes:
        classes_: names of the K classes.
        threshold_: score above or at which a row counts as known; keeps ``level`` of the rows set aside.
        validation_accuracy_: share of the rows set aside that are classified right.
        held_out_: numbers of the rows set aside, or of all where there are few.
        losses_: of fine-tuning, one a step.
        n_outliers_: how many outliers were given.
        mean_, scale_: of the columns of a table; None for images.
        feature_shape_, n_features_in_: of a sample.
        weights_: the built-in network's state; None with a module of one's own.
    Does not do:
        Early stopping: the last weights are kept, at the end of the cosine, where the official code keeps the epoch with the
        best validation accuracy. A model with a module of one's own can not be saved: save the module.
    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.repeat([0, 1], 100)
        >>> X = rng.normal(size=(200, 2)) + 6 * y[:, None]
        >>> model = OutlierExposedClassifier(base_epochs=5, epochs=5).fit(X, y, outliers=rng.uniform(-20, 20, (200, 2)))
        >>> far, near = model.score_samples([[15.0, -15.0], [6.0, 6.0]])
        >>> bool(far < near)
        True
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        objective: str = "mixoe",
        alpha: float = 1.0,
        beta: float = 1.0,
        mix: str = "mixup",
        epochs: int = 10,
        lr: float | None = None,
        batch_size: int = 32,
        device: str | None = None,
        seed: int = 0,
        base_epochs: int | None = None,
        width: int = 16,
        confidence: str = "msp",
        level: float = 0.95,
        validation: float = 0.1,
        shift: float = 0.0,
    ) -> None:
        self.module = module
        self.objective = objective
        self.alpha = alpha
        self.beta = beta
        self.mix = mix
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.base_epochs = base_epochs
        self.width = width
        self.confidence = confidence
        self.level = level
        self.validation = validation
        self.shift = shift

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        outliers: ArrayLike | None = None,
        *,
        outlier_rows: NDArray[np.int64] | None = None,
        state: str | Path | None = None,
    ) -> "OutlierExposedClassifier":
        """Train on known rows, then fine-tune with outliers.

        Args:
            X: shape (N, F), or images (N, channels, height, width) of bytes or of numbers; finite.
            y: classes, shape (N,), at least two different ones.
            outliers: rows like those of X, of none of the classes and of nothing related to them; without any the fine-tuning
                sees known rows alone. Fewer than X are cycled, and no row of X is dropped.
            outlier_rows: numbers of the outliers to use, all where None; so that those of an array on disk can be chosen
                without reading it.
            state: directory in which an interrupted training is kept, and from which the same call goes on.
        Raises:
            ValueError: one class only, shapes that differ, NaN, an empty outlier set, or a setting out of range.
        Warns:
            SharedRowsWarning: outliers that equal known rows, with their number.
        """
        self.check_parameters()
        if _are_images(X):
            array, labels = self._images(X, reset=True), column_or_1d(y, warn=True)  # type: ignore[arg-type]
            if len(labels) != len(array):
                raise ValueError(f"X and y must have the same number of rows, got {len(array)} and {len(labels)}")
        else:
            array, labels = validate_data(self, X, y, dtype=np.float32, ensure_min_samples=2)
            self.feature_shape_ = tuple(array.shape[1:])
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        codes = codes.astype(np.int64)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y must hold at least two classes, got 1 class ({self.classes_[0]!r}); "
                "with one there is nothing to be unsure about"
            )
        others = None if outliers is None else self._outliers(array, outliers)
        self.n_outliers_ = 0 if others is None else len(others if outlier_rows is None else outlier_rows)
        self.mean_: NDArray[np.float32] | None = None
        self.scale_: NDArray[np.float32] | None = None
        if array.ndim == 2:
            self.mean_, self.scale_ = _standard(array)
        train, held = self._split(codes)
        model = self._network(len(self.classes_)).to(self.device or "cpu")
        ready = BUILT_IN if self.module is None else GIVEN
        states = (None, None) if state is None else (Path(state) / "base", Path(state) / "tuned")
        rows = self._rows(array, train)
        common: dict[str, Any] = {"batch_size": self.batch_size, "clip": ready["clip"], "seed": self.seed}
        plain = Plain(len(self.classes_))
        # Once fine-tuning has begun, its checkpoint holds the weights and training again would be for nothing.
        if states[1] is None or not (states[1] / "training.json").exists():
            epochs = ready["base_epochs"] if self.base_epochs is None else self.base_epochs
            config = ExposureConfig(epochs=int(epochs), lr=BASE_RATE, **common)
            self._run(model, plain, rows, codes[train], None, config, states[0], "training")
        config = ExposureConfig(epochs=self.epochs, lr=ready["lr"] if self.lr is None else self.lr, **common)
        objective = plain if others is None else self._objective(len(self.classes_))
        given = None if others is None else self._rows(others, outlier_rows)
        self.losses_ = self._run(model, objective, rows, codes[train], given, config, states[1], "fine-tuning")
        self._model = model.eval()
        self.weights_ = None
        if self.module is None:
            self.weights_ = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
        self.held_out_ = held
        logits = logits_of(model, self._rows(array, held))
        self.validation_accuracy_ = float((logits.argmax(1).numpy() == codes[held]).mean())
        self.threshold_ = keep_threshold(score(logits, self.confidence).numpy(), self.level)  # type: ignore[arg-type]
        return self

    def decision_logits(self, X: ArrayLike) -> Tensor:
        """Logits of each row, shape (N, K), on the CPU."""
        check_is_fitted(self)
        return logits_of(self._trained(), self._rows(self._validated(X)))

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probability of each class, shape (N, K)."""
        return torch.softmax(self.decision_logits(X).double(), 1).numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Likeliest class of each row, shape (N,), of unknown ones too; see :meth:`is_known`."""
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """How much each row looks like the known classes, shape (N,); higher is more."""
        return score(self.decision_logits(X), self.confidence).numpy()  # type: ignore[arg-type]

    def is_known(self, X: ArrayLike) -> NDArray[np.bool_]:
        """Whether each row scores at least ``threshold_``, shape (N,)."""
        return self.score_samples(X) >= self.threshold_

    def _run(
        self,
        model: nn.Module,
        objective: Exposure,
        rows: Rows,
        codes: NDArray[np.int64],
        outliers: Rows | None,
        config: ExposureConfig,
        state: Path | None,
        label: str,
    ) -> NDArray[np.float64]:
        moves = shifted(self.shift) if self.shift else None
        kept: dict[str, Any] = {} if state is None else {"out": state, "checkpoint_every": CHECKPOINT_EVERY}
        history = expose(model, objective, rows, codes, outliers, config, augment=moves, label=label, **kept)
        return np.array(history.losses)

    def check_parameters(self) -> None:
        """Refuse a setting that is out of range, before any work is done for it."""
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {self.objective!r}")
        if self.confidence not in SCORES:
            raise ValueError(f"confidence must be one of {list(SCORES)}, got {self.confidence!r}")
        if not 0 < self.level <= 1:
            raise ValueError(f"level must be in (0, 1], got {self.level}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must be in (0, 1), got {self.validation}")
        if not 0 <= self.shift < 0.5:
            raise ValueError(f"shift must be in [0, 0.5), got {self.shift}")
        if self.base_epochs is not None and self.base_epochs < 0:
            raise ValueError(f"base_epochs must be >= 0, got {self.base_epochs}")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width must be a multiple of 4, at least 4, got {self.width}")
        self._objective(2)

    def _objective(self, k: int) -> Exposure:
        made: dict[str, Callable[[], Exposure]] = {
            "mixoe": lambda: MixtureOutlierExposure(k, self.mix, self.alpha, self.beta),  # type: ignore[arg-type]
            "oe": lambda: OutlierExposure(k, self.beta),
            "oe-m": lambda: HardOutlierExposure(k, self.beta),
            "energy": lambda: EnergyExposure(k, self.beta),
            "plain": lambda: Plain(k),
        }
        return made[self.objective]()

    def _validated(self, X: ArrayLike) -> NDArray[Any]:
        """Rows to answer about, like those of ``fit``."""
        return self._images(X, reset=False) if _are_images(X) else validate_data(self, X, dtype=np.float32, reset=False)

    def _images(self, X: Any, *, reset: bool) -> NDArray[Any]:
        """Images as an array that may lie on disk: bytes as they are, everything else as float32."""
        if reset:
            if len(X) < 2:
                raise ValueError(f"X must hold at least 2 images, got {len(X)}")
            self.feature_shape_ = tuple(int(n) for n in X.shape[1:])
            self.n_features_in_ = int(np.prod(self.feature_shape_))
        elif X.shape[1:] != self.feature_shape_:
            raise ValueError(f"X must hold images of shape {self.feature_shape_}, as in fit, got {X.shape[1:]}")
        return X if X.dtype == np.uint8 else _finite(X, "X")

    def _outliers(self, array: NDArray[Any], outliers: ArrayLike) -> NDArray[Any]:
        found = outliers if isinstance(outliers, np.ndarray) else np.asarray(outliers)
        if not len(found):
            raise ValueError("outliers must hold at least one row, got none")
        if found.shape[1:] != array.shape[1:]:
            raise ValueError(f"outliers must have rows of shape {array.shape[1:]}, as X, got {found.shape[1:]}")
        if (found.dtype == np.uint8) != (array.dtype == np.uint8):
            raise ValueError(
                f"outliers and X must both be bytes or both be numbers, got {found.dtype} and {array.dtype}"
            )
        if found.dtype != np.uint8:
            found = _finite(found, "outliers")
        if n := shared_rows(array, found):
            warnings.warn(
                f"{n} of {len(found)} outliers equal rows of X, and the model is asked to be sure and unsure of them at once; "
                "leave them out of the outliers",
                SharedRowsWarning,
                stacklevel=3,
            )
        return found

    def _split(self, codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to train on and rows for the threshold, each class in both; the same ones where there are few."""
        everything = np.arange(len(codes))
        if len(codes) < LEAST_TO_VALIDATE:
            return everything, everything
        rng = np.random.default_rng([self.seed, 3])
        held = []
        for c in range(int(codes.max()) + 1):
            mine = rng.permutation(np.flatnonzero(codes == c))
            held.append(mine[: min(len(mine) - 1, round(self.validation * len(mine)))])
        chosen = np.sort(np.concatenate(held))
        if not len(chosen):
            return everything, everything
        return np.setdiff1d(everything, chosen), chosen

    def _network(self, k: int) -> nn.Module:
        if self.module is not None:
            return copy.deepcopy(self.module)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if len(self.feature_shape_) == 3:
                return image_network(self.feature_shape_[0], k, width=self.width)
            return dense_network(self.n_features_in_, k, hidden=8 * self.width)

    def _trained(self) -> nn.Module:
        if getattr(self, "_model", None) is None:
            self._model = self._network(len(self.classes_))
            assert self.weights_ is not None
            self._model.load_state_dict({name: torch.from_numpy(value) for name, value in self.weights_.items()})
            self._model.to(self.device or "cpu").eval()
        return self._model

    def _rows(self, array: NDArray[Any], only: NDArray[np.int64] | None = None) -> Rows:
        return Rows(array, only=only, shift=self.mean_, scale=self.scale_, device=self.device or "cpu")


def _are_images(X: Any) -> bool:
    return isinstance(X, np.ndarray) and X.ndim == 4


def _finite(found: NDArray[Any], name: str) -> NDArray[np.float32]:
    numbers = np.asarray(found, dtype=np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return numbers


def _standard(table: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and spread of every column; a constant one is left as it is."""
    mean, spread = table.mean(0, dtype=np.float64), table.std(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(spread > 0, spread, 1.0).astype(np.float32)
