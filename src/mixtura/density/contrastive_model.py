"""Features that tell which two rows belong together, learned from pairs; up to a rotation they are a latent of x.

Pairs are two views of one row or two rows that share a latent; rows of different pairs are the contrast. Under
P(together | x, x') = sigmoid(f(x)'f(x') + b) the loss is the likelihood of the pairs.

Shapes: N rows, F features, B pairs of a batch, R features of the encoder.
Source: 2303.01566, sec. 6 (logistic likelihood of balanced pairs); InfoNCE as in ``core.contrast``. The bias b is ours: without
it, features of mean zero cannot say "apart" to unrelated rows, whose inner product is zero on average.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.core.contrast import info_nce, pair_logistic
from mixtura.core.keeping import Keeping
from mixtura.core.training import TrainConfig
from mixtura.core.training import fit as train
from mixtura.density.inputs import as_matrix, device_of

__all__ = ["ContrastiveModel", "jitter"]

LOSSES = ("logistic", "infonce")
ENCODERS = ("mlp", "linear")
BLOCK = 4096
FLOATS = (np.float64, np.float32)

Views = Callable[[Tensor, torch.Generator], Tensor]


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """A view of rows in units of their spread: noise of half a standard deviation, and a fifth of the features at their mean."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    kept = (torch.rand(x.shape, generator=generator) > 0.2).to(x.device)
    return (x + 0.5 * noise) * kept


class ContrastiveModel(Keeping, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features learned from pairs; ``transform`` gives them.

    Parameters
    ----------
    encoder : {"mlp", "linear"}, nn.Module or callable, default="mlp"
        What maps (B, F) to (B, R): a network with one hidden layer of ``width``, a matrix, a module of which a copy is
        trained, or a callable that builds one from F. Only those by name can be saved.
    views : "jitter", "pairs" or callable, default="jitter"
        Two views of each row by :func:`jitter`, or by ``views(x, generator)`` on rows in their own units; "pairs": ``fit`` is
        given pairs of rows.
    loss : {"logistic", "infonce"}, default="logistic"
        The likelihood of pairs, as many together as apart; or finding the other view among all of the batch.
    dim : int, default=32
        R, of encoders by name.
    width : int, default=128
        Hidden width of "mlp".
    epochs : int, default=50
    batch_size : int, default=256
        Pairs a step, at least 2.
    lr : float, default=1e-3
    weight_decay : float, default=1e-4
    temperature : float, default=0.2
        Of "infonce", on features of unit length.
    device : str, default="cpu"
    seed : int, default=0

    Attributes
    ----------
    encoder_ : the trained network.
    state_ : dict
        Its weights.
    bias_ : float
        b, with the logistic loss.
    loss_curve_ : ndarray
        Loss of every step, in nats.
    mean_, scale_ : ndarray of shape (F,)
        By which "jitter" and encoders by name see the rows; 0 and 1 with ``views`` or an encoder of one's own.

    Notes
    -----
    Time: epochs * N * 2 evaluations of the encoder forward and backward. Memory: the activations of one batch.
    Features are identified up to a rotation (logistic), or a rotation of directions (infonce).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(300, 1, 1))
    >>> pairs = z * [3.0, 0.0] + rng.normal(size=(300, 2, 2))       # the first column is shared
    >>> model = ContrastiveModel("linear", views="pairs", dim=1, lr=0.02).fit(pairs)
    >>> shared, other = np.abs(model.transform(np.eye(2)) - model.transform(np.zeros((1, 2))))[:, 0]
    >>> bool(shared > 5 * other)
    True
    """

    def __init__(
        self,
        encoder: Any = "mlp",
        *,
        views: Literal["jitter", "pairs"] | Views = "jitter",
        loss: str = "logistic",
        dim: int = 32,
        width: int = 128,
        epochs: int = 50,
        batch_size: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        temperature: float = 0.2,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.encoder = encoder
        self.views = views
        self.loss = loss
        self.dim = dim
        self.width = width
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.temperature = temperature
        self.device = device
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the features.

        Parameters
        ----------
        X : array-like of shape (N, F); for views="pairs" (N, 2, F)
        y : ignored

        Raises
        ------
        ValueError
            Values that are not finite, fewer than 2 rows, another shape, a parameter out of its range.
        mixtura.core.training.NonFiniteLoss
            The loss became NaN or infinite.
        """
        self._check_parameters()
        paired = isinstance(self.views, str) and self.views == "pairs"
        given = np.asarray(X) if paired else X
        if paired and (given.ndim != 3 or given.shape[1] != 2):
            raise ValueError(f"views='pairs' needs X of shape (pairs, 2, features), got {given.shape}")
        flat = given.reshape(-1, given.shape[-1]) if paired else given
        rows_NF = self._rows(flat, reset=True)
        own = not isinstance(self.encoder, str) or callable(self.views)
        self.mean_ = np.zeros(rows_NF.shape[1]) if own else rows_NF.mean(0)
        spread_F = np.ones(rows_NF.shape[1]) if own else rows_NF.std(0)
        self.scale_ = np.where(spread_F > 0, spread_F, 1.0)
        device = device_of(self.device)
        x = torch.from_numpy((rows_NF - self.mean_) / self.scale_).float().to(device)
        pairs = x.reshape(-1, 2, x.shape[1]) if paired else x
        if len(pairs) < 2:
            raise ValueError(f"a contrast needs at least 2 rows, got n_samples = {len(pairs)}")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = _Encoded(self._built(rows_NF.shape[1])).to(device)
        size = min(self.batch_size, len(pairs))
        steps = self.epochs * -(-len(pairs) // size)
        config = TrainConfig(
            steps=steps, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.999), seed=self.seed
        )
        history = train(model, lambda step: self._loss_at(model, pairs, step, size), config, label="contrast")
        self._network, self.bias_, self.loss_curve_ = (
            model.encoder.eval(),
            float(model.bias.detach()),
            np.array(history.losses),
        )
        self.state_ = {name: t.detach().cpu() for name, t in model.encoder.state_dict().items()}
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features of each row, shape (N, R), float64."""
        check_is_fitted(self, "mean_")
        return self._encoded((self._rows(X, reset=False) - self.mean_) / self.scale_)

    def _encoded(self, x_NF: np.ndarray) -> np.ndarray:
        encoder, device = self.encoder_, device_of(self.device)
        with torch.no_grad():
            blocks = torch.from_numpy(x_NF).float().split(BLOCK)
            return np.concatenate([encoder(block.to(device)).double().cpu().numpy() for block in blocks])

    @property
    def encoder_(self) -> nn.Module:
        """The trained network; that of a loaded model is built from its weights when it is first asked for."""
        check_is_fitted(self, "state_")
        if "_network" not in vars(self):
            self._network = self._built(len(self.mean_)).to(device_of(self.device)).eval()
            self._network.load_state_dict(self.state_)
        return self._network

    @property
    def _n_features_out(self) -> int:
        return self._encoded(np.zeros((1, len(self.mean_)))).shape[1]

    def _rows(self, X: Any, *, reset: bool) -> np.ndarray:
        found = as_matrix(self, X, reset=reset, dtype=FLOATS, ensure_min_samples=2 if reset else 1)
        return np.asarray(found, dtype=np.float64)

    def _built(self, n_features: int) -> nn.Module:
        if self.encoder == "linear":
            return nn.Linear(n_features, self.dim, bias=False)
        if self.encoder == "mlp":
            return nn.Sequential(nn.Linear(n_features, self.width), nn.GELU(), nn.Linear(self.width, self.dim))
        return copy.deepcopy(self.encoder) if isinstance(self.encoder, nn.Module) else self.encoder(n_features)

    def _loss_at(self, model: _Encoded, pairs: Tensor, step: int, size: int) -> Tensor:
        """Loss of one batch, which is drawn from the step's number."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        batch = pairs[torch.randint(len(pairs), (size,), generator=generator).to(pairs.device)]
        if isinstance(self.views, str) and self.views == "pairs":
            first, second = batch[:, 0], batch[:, 1]
        else:
            view = jitter if isinstance(self.views, str) else self.views
            first, second = view(batch, generator), view(batch, generator)
        f, g = model.encoder(first), model.encoder(second)
        if self.loss == "infonce":
            return info_nce(F.normalize(f, dim=1), F.normalize(g, dim=1), self.temperature)
        # As many apart as together: each first row also meets the second one of another pair. The bias rides along as one
        # more feature of the inner product.
        one, bias = f.new_ones(len(f), 1), model.bias.expand(len(f), 1)
        left, right = torch.cat([f, one], 1), torch.cat([g, bias], 1)
        same = torch.cat([f.new_ones(len(f)), f.new_zeros(len(f))])
        return pair_logistic(torch.cat([left, left]), torch.cat([right, right.roll(1, 0)]), same)

    def _check_parameters(self) -> None:
        if isinstance(self.encoder, str) and self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {list(ENCODERS)}, a module or a callable, got {self.encoder!r}")
        if not callable(self.views) and self.views not in ("jitter", "pairs"):
            raise ValueError(f"views must be 'jitter', 'pairs' or a callable, got {self.views!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {list(LOSSES)}, got {self.loss!r}")
        for name, least in (("dim", 1), ("width", 1), ("epochs", 1), ("batch_size", 2)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


class _Encoded(nn.Module):
    """An encoder, and the bias of its logits."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.bias = nn.Parameter(torch.zeros(()))
