"""Mixtures of Gaussians by expectation maximisation: density, clusters, samples, in scikit-learn's conventions.

- Any amount of samples: arrays, DataFrames, memory maps, batches, Parquet folders, several processes; memory stays at the
  samples (where they are in memory at all) and one block.
- Partial labels are constraints, sample weights count as repetitions, missing values are integrated out.
- Sums are float64 whatever the samples are; convergence is judged per sample.

Source: Dempster, Laird and Rubin 1977, sec. 4.3; the modules of each part name theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from mixtura.core.gaussian import Gaussians
from mixtura.core.keeping import Keeping
from mixtura.core.natural_form import Frame, block_rows
from mixtura.core.processes import join
from mixtura.density.criteria import criteria
from mixtura.density.em import Fit, Samples, Sweep, fit_em
from mixtura.density.inputs import Given, as_source, check_parameters, device_of, dtype_of, prepare
from mixtura.density.labels import Classes, as_labels
from mixtura.density.sources import Checked, merge
from mixtura.density.starts import start_mixture
from mixtura.density.stream import Stream, begin, implied_statistics, proceed

__all__ = ["GaussianMixture"]


class GaussianMixture(Keeping, ClusterMixin, DensityMixin, BaseEstimator):
    """A mixture of Gaussians, fitted by expectation maximisation.

    Parameters
    ----------
    n_components : int, default=1
        Number of components C.
    covariance : {"full", "tied", "diag", "spherical"}, default="full"
        What a component's covariance may be: any of its own, one for all, along the axes, a ball.
    tol : float, default=1e-3
        EM ends when the mean log likelihood a sample changes by less, in nats.
    variance : float, optional
        Of every feature in every component, where it is known: it is held, and only weights and means are learned. For
        "spherical", in squared units of the samples; ``reg`` is not added to it.
    reg : float, default=1e-6
        Added to every variance, in units of ``reg_unit``.
    reg_unit : {"variance", "absolute"}, default="variance"
        "variance": of each feature's own variance (the mean variance for spherical), so that units do not matter.
        "absolute": in squared units of the samples, as scikit-learn's ``reg_covar``.
    max_iter : int, default=100
        Most EM steps.
    n_init : int, default=1
        Starts; the one that ends with the highest likelihood is kept.
    init : {"k-means++", "random"}, default="k-means++"
        First means: far from each other and moved by a few Lloyd steps, or samples drawn evenly.
    means_init, weights_init, precisions_init : array-like, optional
        A start of one's own: shapes (C, F), (C,), and inverse covariances shaped as the covariances.
    missing : {"error", "expect"}, default="error"
        Whether NaN is an error or a missing value, which EM integrates out exactly.
    class_components : dict, optional
        Class -> list of its components, for fits with labels; by default one each, in the order of the classes.
    block_size : int or "auto", default="auto"
        Samples a block.
    device : str, default="cpu"
        "cpu", "cuda", "cuda:0", or "auto".
    dtype : float32, float64 or None, default=None
        Of a block's arithmetic; None takes float32 for float32 samples and float64 for all others. Sums are float64.
    distributed : bool or "auto", default="auto"
        Whether processes fit together: "auto" where torchrun started several. Each gives its own shard to ``fit``.
    random_state : int, RandomState or None, default=None
        Source of chance.

    Attributes
    ----------
    weights_ : ndarray of shape (C,)
    means_ : ndarray of shape (C, F)
    covariances_ : ndarray of shape (C, F, F), (F, F), (C, F) or (C,), by ``covariance``
    precisions_cholesky_ : ndarray
        U with U U' = inverse covariance; inverse standard deviations for diag and spherical.
    labels_ : ndarray of shape (N,)
        Component of each sample of the fit; that of a labelled sample is one of its class's.
    classes_ : ndarray of shape (classes,)
        Classes among the labels; only after a fit with labels.
    component_classes_ : ndarray of shape (C,)
        Class of each component, -1 for one that has none; only after a fit with labels.
    converged_ : bool
    n_iter_ : int
        EM steps taken.
    n_reseeded_ : int
        Components that collapsed on the way and were re-seeded.
    lower_bound_ : float
        Mean log likelihood a sample of the fitted mixture.
    lower_bounds_ : ndarray of shape (n_iter_ + 1,)
        The same before every step, and at the end.
    n_features_in_, feature_names_in_
        As scikit-learn sets them.

    Notes
    -----
    A step takes N C F (F + 3) multiplications for "full" (half of what C triangular solves take), about 4 N C F for
    "diag" and "spherical", 4 N C F + 2 N F^2 for "tied". Memory beyond the samples: about 10 MB, C F^2 numbers, and
    8 bytes a sample for ``labels_``.

    EM finds the nearest local maximum; ``n_init`` and :func:`select_components` try several.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.array([[0.0], [0.2], [0.4], [9.0], [9.2], [9.4]])
    >>> model = GaussianMixture(2, random_state=0).fit(X)
    >>> sorted(model.means_[:, 0].round(3).tolist())
    [0.2, 9.2]
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance: str = "full",
        tol: float = 1e-3,
        variance: float | None = None,
        reg: float = 1e-6,
        reg_unit: str = "variance",
        max_iter: int = 100,
        n_init: int = 1,
        init: str = "k-means++",
        means_init: Any = None,
        weights_init: Any = None,
        precisions_init: Any = None,
        missing: str = "error",
        class_components: Mapping[int, Sequence[int]] | None = None,
        block_size: int | str = "auto",
        device: str = "cpu",
        dtype: Any = None,
        distributed: bool | str = "auto",
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.covariance = covariance
        self.tol = tol
        self.variance = variance
        self.reg = reg
        self.reg_unit = reg_unit
        self.max_iter = max_iter
        self.n_init = n_init
        self.init = init
        self.means_init = means_init
        self.weights_init = weights_init
        self.precisions_init = precisions_init
        self.missing = missing
        self.class_components = class_components
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self.distributed = distributed
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the mixture.

        Parameters
        ----------
        X : array-like, DataFrame or memory map of shape (N, F); iterable of such batches; path of a Parquet file or folder
            An iterable is read once a step, so a generator will not do. In several processes, this process's shard, in
            the order of ranks; it may be empty.
        y : array-like of shape (N,), optional
            Class of each sample, a whole number >= 0, or -1 where it is unlabelled. A constraint, not a prior.
        sample_weight : array-like of shape (N,), optional
            A sample of weight 2 counts as two.

        Raises
        ------
        ValueError
            Values that are not finite (counted, first position named), text in a table (column named), fewer samples than
            components, shapes that do not match, labels that are no whole numbers or without a component, a column whose
            squares do not fit float64, a covariance that loses its rank (:class:`mixtura.density.em.Collapsed`).

        Warns
        -----
        ConvergenceWarning
            The steps ran out; with the last change and what to try.
        """
        check_parameters(self)
        processes = join(self.distributed)  # type: ignore[arg-type]
        rng = processes.chance(self.random_state)
        given = prepare(self, X, y, sample_weight, processes)
        fixed = self.means_init is not None and self.weights_init is not None and self.precisions_init is not None
        best: Fit | None = None
        for _ in range(1 if fixed else self.n_init):
            found = fit_em(
                given.samples,
                start_mixture(given, self, rng),
                tol=self.tol,
                max_iter=self.max_iter,
                names=given.names,
                describe=f"{self.n_components} components",
            )
            if best is None or found.lower_bounds[-1] > best.lower_bounds[-1]:
                best = found
        assert best is not None
        return self._adopt(given, best)

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Fit, and the component of each sample, shape (N,); that of a labelled sample is one of its class's."""
        return self.fit(X, y, sample_weight=sample_weight).labels_

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Learn from one more batch of a stream, by stochastic approximation of the statistics.

        The first batch starts the mixture and must have at least as many samples as there are components. Later ones move
        it by (t + 2)^-0.6, where t counts the batches before. After ``fit``, it goes on from there.

        Parameters
        ----------
        X : array-like of shape (N, F)
            One batch.
        y, sample_weight : as in ``fit``; labels must be of the classes of the first batch.
        """
        check_parameters(self)
        rng = check_random_state(self.random_state)
        known = hasattr(self, "weights_")
        stream: Stream | None = getattr(self, "stream_", None)
        if not known:
            given = prepare(self, X, y, sample_weight, join(False))
            stream, gaussians = begin(given.samples, start_mixture(given, self, rng), given.summary)
        else:
            given = self._another(X, y, sample_weight)
            if stream is None:
                frame = Frame.of(self.gaussians_)
                seen = replace(
                    given.summary, mean=frame.centre.numpy(), scatter=(frame.scale**2).numpy() * given.summary.seen
                )
                stream = Stream(implied_statistics(frame.enter(self.gaussians_)), frame, seen, 1)
            summary = merge(stream.summary, given.summary)
            samples = replace(given.samples, frame=summary.frame(self.covariance, given.names))
            if self.reg_unit == "absolute":
                samples = replace(samples, floor=self.reg / samples.frame.scale.square())
            if self.variance is not None:
                samples = replace(samples, variance=float(self.variance / samples.frame.scale[0] ** 2))
            stream, gaussians = proceed(stream, samples, samples.frame.enter(self.gaussians_), summary)
        self.stream_ = stream
        self._set_parameters(stream.frame.leave(gaussians))
        self.lower_bound_ = float(stream.statistics.log_likelihood)
        self.n_iter_ = stream.n_batches
        if given.classes is not None and not known:
            self.classes_ = given.classes.labels
            self.component_classes_ = given.classes.of_components()
        return self

    @property
    def gaussians_(self) -> Gaussians:
        """The fitted mixture as :class:`mixtura.core.gaussian.Gaussians`: marginals, conditionals, log densities."""
        check_is_fitted(self, "weights_")
        parts = (self.weights_, self.means_, self.covariances_, self.precisions_cholesky_)
        weights, means, sigma, upper = (torch.from_numpy(np.asarray(part)) for part in parts)
        return Gaussians(weights, means, sigma, upper, self.covariance)  # type: ignore[arg-type]

    def score_samples(self, X: Any) -> np.ndarray:
        """Log density at each sample, shape (N,), in nats; of what was observed where ``missing="expect"``."""
        return np.concatenate([logs_B.cpu().numpy() for _, logs_B, _ in self._sweep(X).blocks()])

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log density a sample, in nats."""
        total, n = 0.0, 0
        for _, logs_B, _ in self._sweep(X).blocks():
            total, n = total + float(logs_B.sum()), n + len(logs_B)
        return total / n

    def predict(self, X: Any) -> np.ndarray:
        """Most probable component of each sample, shape (N,)."""
        return np.concatenate([r_CB.argmax(0).cpu().numpy() for _, _, r_CB in self._sweep(X).blocks()])

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each component for each sample, shape (N, C), rows sum to 1."""
        # Copied block by block: the next one overwrites the responsibilities.
        return np.concatenate([r_CB.mT.cpu().numpy().astype(np.float64) for _, _, r_CB in self._sweep(X).blocks()])

    def predict_class(self, X: Any) -> np.ndarray:
        """Most probable class of each sample after a fit with labels, shape (N,); -1 for a component without class.

        Probabilities of the components of a class add; a component without class stands for itself.
        """
        check_is_fitted(self, "component_classes_")
        groups = [np.flatnonzero(self.component_classes_ == label) for label in self.classes_]
        groups += [np.array([c]) for c in np.flatnonzero(self.component_classes_ < 0)]
        names = np.array([*self.classes_, *([-1] * (len(groups) - len(self.classes_)))])
        share = np.zeros((self.n_components, len(groups)))
        for g, components in enumerate(groups):
            share[components, g] = 1.0
        return names[(self.predict_proba(X) @ share).argmax(1)]

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draws from the mixture, shape (n_samples, F), and the component of each, shape (n_samples,)."""
        if not isinstance(n_samples, (int, np.integer)) or n_samples < 1:
            raise ValueError(f"n_samples must be a whole number >= 1, got {n_samples!r}")
        gaussians = self.gaussians_
        rng = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(rng.randint(np.iinfo(np.int32).max)))
        # In the mixture's own coordinates, where a Cholesky factor exists in any units.
        frame = Frame.of(gaussians)
        z, component = frame.enter(gaussians).sample(int(n_samples), generator=generator)
        return (z * frame.scale + frame.centre).numpy(), component.numpy()

    def bic(self, X: Any) -> float:
        """Bayesian information criterion, -2 log likelihood + parameters * log N; lower is better."""
        return self._criteria(X)["bic"]

    def aic(self, X: Any) -> float:
        """Akaike's criterion, -2 log likelihood + 2 * parameters; lower is better."""
        return self._criteria(X)["aic"]

    def icl(self, X: Any) -> float:
        """Integrated completed likelihood, bic + 2 * entropy of the responsibilities: prefers clusters that are apart.

        Source: Biernacki, Celeux and Govaert 2000, eq. 3, in its BIC form.
        """
        return self._criteria(X)["icl"]

    def n_parameters(self) -> int:
        """Free parameters: weights, means and covariances."""
        check_is_fitted(self, "weights_")
        c, f = self.means_.shape
        spread = {"full": c * f * (f + 1) // 2, "tied": f * (f + 1) // 2, "diag": c * f, "spherical": c}
        if self.variance is not None:
            return c - 1 + c * f
        return c - 1 + c * f + spread[self.covariance]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.missing == "expect"
        return tags

    def _criteria(self, X: Any) -> dict[str, float]:
        total, entropy, n = 0.0, 0.0, 0
        for _, logs_B, r_CB in self._sweep(X).blocks():
            total, n = total + float(logs_B.sum()), n + len(logs_B)
            entropy += float(torch.special.entr(r_CB.double()).sum())
        return criteria(total, entropy, float(n), self.n_parameters())

    def _sweep(self, X: Any) -> Sweep:
        """A pass over new samples, which are checked on the way."""
        gaussians = self.gaussians_
        source = as_source(self, X, reset=False)
        frame = Frame.of(gaussians)
        dtype, device = dtype_of(self.dtype, source), device_of(self.device)
        samples = Samples(
            source=Checked(source, missing=self.missing == "expect"),
            frame=frame,
            covariance=gaussians.covariance,
            floor=torch.zeros(gaussians.n_features, dtype=torch.float64),
            n=0,
            weight=0.0,
            missing=self.missing == "expect",
            rows=self._rows(gaussians, dtype, device),
            dtype=dtype,
            device=device,
        )
        return Sweep(samples, frame.enter(gaussians))

    def _rows(self, gaussians: Gaussians, dtype: torch.dtype, device: str) -> int:
        if self.block_size != "auto":
            return int(self.block_size)
        return block_rows(gaussians.n_features, gaussians.n_components, gaussians.covariance, dtype, device)

    def _another(self, X: Any, y: Any, sample_weight: Any) -> Given:
        """One more batch of a stream, checked against the batches before."""
        fresh = type(self)(**{**self.get_params(deep=False), "n_components": 1, "class_components": None})
        given = prepare(fresh, X, None, sample_weight, join(False))  # type: ignore[arg-type]
        as_source(self, X, reset=False)
        if y is None:
            return given
        y_N = as_labels(y)
        if len(y_N) != given.samples.n:
            raise ValueError(f"y has {len(y_N)} labels and X has {given.samples.n} samples; they must be as many")
        classes = getattr(self, "component_classes_", np.empty(0))
        for label in np.unique(y_N[y_N >= 0]):
            if label not in classes:
                raise ValueError(f"class {label} has no component: the first batch had no label {label}")
        known = Classes(
            self.classes_, [np.flatnonzero(classes == c).tolist() for c in self.classes_], self.n_components
        )
        rows, table = torch.from_numpy(known.rows(y_N)), torch.from_numpy(known.table())
        return replace(given, samples=replace(given.samples, classes=rows, table=table), classes=known)

    def _adopt(self, given: Given, found: Fit) -> Self:
        """Take over what a fit found, and forget any earlier one."""
        for name in ("classes_", "component_classes_", "stream_"):
            self.__dict__.pop(name, None)
        self._set_parameters(given.samples.frame.leave(found.gaussians))
        self.labels_ = found.labels
        self.converged_, self.n_iter_, self.n_reseeded_ = found.converged, found.n_iter, found.n_reseeded
        self.lower_bounds_ = np.array(found.lower_bounds)
        self.lower_bound_ = found.lower_bounds[-1]
        if given.classes is not None:
            self.classes_ = given.classes.labels
            self.component_classes_ = given.classes.of_components()
        if not found.converged and self.tol > 0 and self.max_iter > 0:
            last = abs(found.lower_bounds[-1] - found.lower_bounds[-2])
            warnings.warn(
                f"EM did not converge in max_iter={self.max_iter} steps: the last one changed the mean log likelihood by "
                f"{last:.2g} a sample (tol={self.tol:g}). Raise max_iter or tol, use fewer components, or raise reg",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def _set_parameters(self, gaussians: Gaussians) -> None:
        self.weights_, self.means_ = gaussians.weights.numpy(), gaussians.means.numpy()
        self.covariances_ = gaussians.covariances.numpy()
        self.precisions_cholesky_ = gaussians.precisions_cholesky.numpy()
