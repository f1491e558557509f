"""Unmixing that survives spoiled channels, and is as sparse as each pixel is pure.

Shapes: P pixels, L channels, M endmembers.
Source: Effective spectral unmixing via robust representation and learning-based sparsity (1409.0685). From its abstract and
introduction: l2,1 over channels, an lp penalty with one p a pixel, a guidance map learned with spectra and abundances,
multiplicative updates. Ours: Hoyer's measure as the map, when it is refreshed, the whitened start, all constants.
"""

from __future__ import annotations

import logging
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from mixtura.core.keeping import Keeping
from mixtura.core.processes import Processes, join
from mixtura.core.progress import bar
from mixtura.vision.unmixing.constrained import fcls
from mixtura.vision.unmixing.objective import (
    MOST_PURE,
    SPARSENESS,
    Pixels,
    Sums,
    Terms,
    channel_weights,
    sweep,
)
from mixtura.vision.unmixing.shards import Shard
from mixtura.vision.unmixing.starts import mixed, starting_point
from mixtura.vision.unmixing.stream import Stream

__all__ = ["SpectralUnmixing"]

log = logging.getLogger(__name__)

GUIDANCES, INITS = ("learn", "fixed", None), ("vca-whitened", "vca", "nmf-random")
REFRESH = 5  # iterations between two looks at the guidance map
LEARNING = 0.8  # share of the iterations in which it is learned
PATIENCE = 10  # iterations over which J must fall by ``tol``
SCALE_QUANTILE = 0.75  # of the channels' largest values: a quarter of them may be saturated
TRANSFORM_STEPS = 50  # more follow the sparsity further from the data (tried on seeds 100 to 104)
AUTO_LAM, AUTO_DELTA, AUTO_CHANNELS = 0.1, 4.0, 180  # tuned on synthetic scenes of 180 channels (seeds 100 to 104)


class SpectralUnmixing(Keeping, TransformerMixin, BaseEstimator):
    """Spectra of the materials in an image, and the share of each in every pixel; both unknown.

    Parameters
    ----------
    n_endmembers : int
        Materials, at least 2.
    lam : float or "auto", default="auto"
        Weight of the sparsity, >= 0, for pixels scaled to about 1 (done inside, so that units do not matter). "auto" is
        0.1 L / 180: the squared error, too, is a sum over channels.
    delta : float or "auto", default="auto"
        Weight of the sum to one, >= 0. "auto" is 4 sqrt(L / 180); several times that freezes the updates.
    robust : bool, default=True
        Whether each channel pays the norm of its residual (l2,1) or its square.
    guidance : {"learn", "fixed", None}, default="learn"
        Exponent of each pixel: learned from its abundances, ``p`` for all, or 1 for all.
    p : float, default=0.5
        Exponent of ``guidance="fixed"``, in (0, 1]. Not used otherwise.
    sparseness : {"hoyer", "gini"}, default="hoyer"
        What the guidance map measures.
    init : {"vca-whitened", "vca", "nmf-random"}, default="vca-whitened"
        Pixels that span the others, without what is noise to all of them, after the noise of all channels was made equal, or
        before; or random spectra.
        ``fit(M_init=..., A_init=...)`` goes before.
    clip_negative : bool, default=False
        Take negative values as 0 instead of refusing them.
    max_iter : int, default=500
    tol : float, default=1e-6
        Least relative decrease of the objective over 10 iterations; 0 never stops early. While the map is learned, in the first
        80 % of the iterations, nothing stops.
    device : str, default="cpu"
        "cpu", or a CUDA device, which then holds the pixels.
    distributed : bool or "auto", default="auto"
        Whether processes fit together: "auto" where torchrun started several. Each gives its own shard to ``fit``.
    seed : int, default=0

    Attributes
    ----------
    endmembers_ : ndarray of shape (M, L)
        Spectra, in the units of X.
    abundances_ : ndarray of shape (P, M)
        Shares of the pixels of the fit, rows sum to 1.
    guidance_ : ndarray of shape (P,)
        How pure each pixel is, in [0, 0.9]; the exponent is 1 minus this.
    channel_weight_ : ndarray of shape (L,)
        What the squared residual of each channel counts: about 1 for a typical one, near 0 for a spoiled one, 0 for a blank one.
    blank_channels_ : ndarray of shape (L,), boolean
        Channels that are 0 throughout. They are kept.
    objective_ : list of float
        J after each iteration.
    n_iter_ : int
    scale_ : float
        What X was divided by.
    stream_ : Stream
        Sums that ``partial_fit`` goes on from.
    n_features_in_ : int
        L.

    Notes
    -----
    An iteration reads X once, O(P L M) operations; memory beyond X is O(P M). X may be a memory map in float32 or float64 that is
    larger than memory: blocks of 4096 pixels are read at a time. Spatial neighbours are not looked at. In several processes an
    iteration exchanges M (L + M) numbers, and all end with the same spectra and weights.

    Examples
    --------
    >>> from mixtura.data.spectra import made_up_library, synthesize_scene
    >>> scene = synthesize_scene(made_up_library(), 3, 24, outlier_channels=18, seed=3)
    >>> model = SpectralUnmixing(3, max_iter=60).fit(scene.cube.reshape(-1, 180))
    >>> model.abundances_.shape, bool(model.channel_weight_[scene.outliers].max() < 0.5)
    ((576, 3), True)
    """

    stream_: Stream

    def __init__(
        self,
        n_endmembers: int,
        *,
        lam: float | str = "auto",
        delta: float | str = "auto",
        robust: bool = True,
        guidance: str | None = "learn",
        p: float = 0.5,
        sparseness: str = "hoyer",
        init: str = "vca-whitened",
        clip_negative: bool = False,
        max_iter: int = 500,
        tol: float = 1e-6,
        device: str = "cpu",
        distributed: bool | str = "auto",
        seed: int = 0,
    ) -> None:
        self.n_endmembers = n_endmembers
        self.lam = lam
        self.delta = delta
        self.robust = robust
        self.guidance = guidance
        self.p = p
        self.sparseness = sparseness
        self.init = init
        self.clip_negative = clip_negative
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.distributed = distributed
        self.seed = seed

    def fit(self, X: Any, y: Any = None, *, M_init: Any = None, A_init: Any = None) -> Self:
        """Find spectra and shares.

        Parameters
        ----------
        X : array-like of shape (P, L)
            Pixels, finite and >= 0, in any unit; float32 stays float32. In several processes, this process's shard, which may
            be empty.
        M_init : array-like of shape (M, L), optional
            Spectra to start from, in the units of X.
        A_init : array-like of shape (P, M), optional
            Shares to start from; those of least squares for the starting spectra where it is not given.

        Raises
        ------
        ValueError
            Fewer than M + 1 pixels, fewer channels than M, values that are not finite or negative (counted, channels named),
            only constant channels, a parameter out of its range.
        """
        self._check()
        processes = join(self.distributed)  # type: ignore[arg-type]
        shard = self._shard(X, processes, reset=True)
        X, high_L = shard.pixels, shard.high
        self.blank_channels_ = high_L == 0
        self.scale_ = float(np.quantile(high_L[~self.blank_channels_], SCALE_QUANTILE))
        first, shares = starting_point(
            X, self.n_endmembers, self.init, seed=self.seed, M_init=M_init, A_init=A_init, processes=processes
        )
        pixels = self._scaled(X)
        a = torch.from_numpy(shares).to(self.device, pixels.dtype)
        start = torch.from_numpy(first / self.scale_).to(self.device)
        return self._keep(*self._descend(pixels, start, a, shard.n, processes), shard.dtype)

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Learn from one more block of pixels, such as some rows of a cube that is larger than memory.

        The first block is fitted as ``fit`` does, and should show all materials: draw it from all over the scene. A later one,
        after ``fit`` as well, gets shares for the spectra that are known, and its sums join those of the blocks before it.
        Memory is that of a block.

        Parameters
        ----------
        X : array-like of shape (P, L)
            One block, at least one pixel. In several processes, this process's part of the block.

        Notes
        -----
        ``abundances_``, ``guidance_`` are of the last block; ``objective_`` and ``n_iter_`` stay those of the first.
        """
        if not hasattr(self, "stream_"):
            return self.fit(X)
        self._check()
        processes = join(self.distributed)  # type: ignore[arg-type]
        shard = self._shard(X, processes, reset=False)
        pixels, of = self._scaled(shard.pixels), self.strengths(self.n_features_in_)
        spectra, a, h = self._shares(pixels, shard.pixels, of)
        sums = sweep(pixels, a, h, spectra, None, of).over(processes)
        stream: Stream = self.stream_.joined(sums, processes.sum(pixels.power()), shard.n)
        spectra, weights = stream.better(spectra, of)
        self.stream_ = stream
        self.blank_channels_ = self.blank_channels_ & (shard.high == 0)
        return self._keep(spectra, weights, a, h, shard.dtype)

    def fit_transform(self, X: Any, y: Any = None, **inits: Any) -> np.ndarray:
        """Fit, and the shares of the pixels of the fit, shape (P, M)."""
        return self.fit(X, y, **inits).abundances_

    def transform(self, X: Any) -> np.ndarray:
        """Shares of pixels, shape (P, M), for the spectra and channel weights of the fit.

        The objective's minimum is looked for from the fully constrained least squares answer, pixel by pixel: a pixel's shares do
        not depend on the others. With ``lam=0`` it is that answer.
        """
        return self.abundances_and_guidance(X)[0]

    def abundances_and_guidance(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """What :meth:`transform` gives, and how pure each pixel is, shape (P,)."""
        check_is_fitted(self, "endmembers_")
        X = self._pixels(X, reset=False)
        _, a, h = self._shares(self._scaled(X), X, self.strengths(X.shape[1]))
        return (a / a.sum(1, keepdim=True)).cpu().numpy(), h.cpu().numpy()

    def inverse_transform(self, A: Any) -> np.ndarray:
        """Pixels of given abundances, shape (P, L)."""
        check_is_fitted(self, "endmembers_")
        A = np.asarray(A)
        if A.ndim != 2 or A.shape[1] != len(self.endmembers_):
            raise ValueError(f"A must have shape (pixels, {len(self.endmembers_)}), got {A.shape}")
        return A @ self.endmembers_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = not self.clip_negative
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return len(self.endmembers_)

    def _check(self) -> None:
        m = self.n_endmembers
        if isinstance(m, bool) or not isinstance(m, (int, np.integer)) or m < 2:
            raise ValueError(f"n_endmembers must be a whole number of at least 2, got {m!r}")
        for name in ("lam", "delta", "tol"):
            value = getattr(self, name)
            if value == "auto" and name != "tol":
                continue
            if isinstance(value, str) or not 0 <= value < np.inf:
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter!r}")
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be above 0 and at most 1, got {self.p!r}")
        known: tuple[tuple[str, Any], ...] = (
            ("guidance", GUIDANCES),
            ("sparseness", tuple(SPARSENESS)),
            ("init", INITS),
        )
        for name, choices in known:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")

    def _shard(self, X: Any, processes: Processes, *, reset: bool) -> Shard:
        """Pixels to learn from, checked here and over all processes."""
        with processes.together():
            X = self._pixels(X, reset=reset, least=1 if processes.size == 1 else 0)
        shard, m = Shard.of(X, processes), self.n_endmembers
        if reset and not 2 <= m <= X.shape[1]:
            raise ValueError(f"n_endmembers must be between 2 and the channels, n_features = {X.shape[1]}, got {m}")
        if reset and shard.n < m + 1:
            raise ValueError(f"{m} endmembers need at least {m + 1} pixels, got n_samples = {shard.n}")
        if reset and (shard.low == shard.high).all():
            raise ValueError(f"all {X.shape[1]} channels are constant: there is nothing to unmix")
        return shard

    def _scaled(self, X: np.ndarray) -> Pixels:
        dtype = torch.float32 if X.dtype == np.float32 else torch.float64
        return Pixels(X, scale=self.scale_, dtype=dtype, device=self.device)

    def _pixels(self, X: Any, *, reset: bool, least: int = 1) -> np.ndarray:
        """Pixels as float32 or float64, looked through block by block; a memory map stays one."""
        X = validate_data(
            self, X, reset=reset, dtype=(np.float64, np.float32), ensure_all_finite=False, ensure_min_samples=least
        )
        bad_L, low_L = np.zeros(X.shape[1], dtype=np.int64), np.zeros(X.shape[1])
        for start in range(0, len(X), 4096):
            block = X[start : start + 4096]
            finite = np.isfinite(block)
            bad_L += (~finite).sum(0)
            low_L = np.minimum(low_L, np.where(finite, block, 0).min(0))
        if bad_L.any():
            raise ValueError(
                f"X must be finite; it contains NaN or infinity {bad_L.sum():,} times, in {_channels(bad_L > 0)}; leave "
                "those pixels out, or set a channel that is never measured to 0"
            )
        if (low_L < 0).any():
            if not self.clip_negative:
                raise ValueError(
                    f"Negative values in data passed to SpectralUnmixing: X must be >= 0, its least value is {low_L.min():.4g}, "
                    f"in {_channels(low_L < 0)}; clip_negative=True takes them as 0"
                )
            X = X.clip(0)
        return X

    def strengths(self, channels: int) -> Terms:
        """Strengths for this number of channels."""
        lam = AUTO_LAM * channels / AUTO_CHANNELS if self.lam == "auto" else float(self.lam)
        delta = AUTO_DELTA * (channels / AUTO_CHANNELS) ** 0.5 if self.delta == "auto" else float(self.delta)
        return Terms(lam, delta, self.robust)

    def _guide(self, a: Tensor) -> Tensor:
        """Guidance of each pixel."""
        if self.guidance == "learn":
            return SPARSENESS[self.sparseness](a).clamp(0, MOST_PURE)
        return torch.full((len(a),), 0.0 if self.guidance is None else 1.0 - self.p, dtype=a.dtype, device=a.device)

    def _shares(self, pixels: Pixels, X: np.ndarray, of: Terms) -> tuple[Tensor, Tensor, Tensor]:
        """Spectra, scaled, and for them the abundances, which sum to nearly one, and guidance of pixels."""
        spectra = torch.from_numpy(self.endmembers_.astype(np.float64) / self.scale_).to(self.device)
        weights = torch.from_numpy(self.channel_weight_).to(self.device)
        shares = fcls(X, self.endmembers_, weights=self.channel_weight_)
        a = torch.from_numpy(shares).to(self.device, pixels.dtype)
        if of.lam == 0:
            return spectra, a, self._guide(a)
        a = mixed(a)
        for _ in range(TRANSFORM_STEPS // REFRESH):
            h = self._guide(a)
            sweep(pixels, a, h, spectra, weights, of, steps=REFRESH)
        return spectra, a, self._guide(a)

    def _descend(
        self, pixels: Pixels, spectra: Tensor, a: Tensor, n: int, processes: Processes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The updates, to the end: spectra, channel weights, abundances and guidance."""
        of = self.strengths(pixels.shape[1])
        power = processes.sum(pixels.power())
        learning = LEARNING * self.max_iter if self.guidance == "learn" and of.lam > 0 else 0
        h = self._guide(a)
        sums: Sums = sweep(pixels, a, h, spectra, None, of).over(processes)
        seen = ~torch.from_numpy(self.blank_channels_).to(power.device)
        residuals = sums.residuals(spectra, power)
        # The unit of a channel's residual, set once: J is one function from here on.
        c = max(float(residuals[seen].median()), 1e-12 * float(power.sum().sqrt()))
        weights = channel_weights(residuals, c, of)
        self.objective_ = []
        with bar(desc="unmixing", unit="iteration", total=self.max_iter, hidden=processes.rank > 0) as shown:
            for i in range(self.max_iter):
                if 0 < i < learning and i % REFRESH == 0:
                    h = self._guide(a)
                sums = sweep(pixels, a, h, spectra, weights, of).over(processes)
                spectra = sums.better_spectra(spectra)
                weights = channel_weights(sums.residuals(spectra, power), c, of)
                self.objective_.append(sums.objective(spectra, power, c, of))
                shown.update()
                if i >= learning + PATIENCE:
                    before, now = self.objective_[-1 - PATIENCE], self.objective_[-1]
                    if before - now < self.tol * abs(before):
                        break
        self.n_iter_ = len(self.objective_)
        self.stream_ = Stream.of(sums, power, n, c)
        return spectra, weights, a, h if learning else self._guide(a)

    def _keep(self, spectra: Tensor, weights: Tensor, a: Tensor, h: Tensor, dtype: Any) -> Self:
        self.endmembers_ = (spectra * self.scale_).cpu().numpy().astype(dtype)
        self.abundances_ = (a / a.sum(1, keepdim=True)).cpu().numpy()
        self.guidance_ = h.cpu().numpy()
        self.channel_weight_ = np.where(self.blank_channels_, 0.0, weights.cpu().numpy())
        return self


def _channels(mask: np.ndarray) -> str:
    """Channels in words: their number and the first few, counted from 0."""
    at = np.flatnonzero(mask)
    first = ", ".join(map(str, at[:5]))
    return f"{len(at)} channel{'s' if len(at) > 1 else ''} ({first}{', ...' if len(at) > 5 else ''})"
