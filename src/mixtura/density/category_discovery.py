"""Classes that nobody named: some classes are labelled, some are not known at all, and their number is found.

- A mixture of Gaussians with labelled samples pinned to their class, whose clusters split and merge by a ratio of marginal
  likelihoods. The number of classes is never given, and never read from the truth.
- How far a cluster must be from one Gaussian before it splits is learned from the known classes.

Shapes: N samples, F features, D features after reduction, C known classes, K classes in all.
Source: Learning semi-supervised Gaussian mixture models for generalized category discovery (2305.06144); the temper, shedding,
absorbing and the greedy end are ours, and ``rule="paper"`` leaves them out.
"""

from __future__ import annotations

import logging
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mixtura.core.gaussian import Gaussians
from mixtura.core.keeping import Keeping
from mixtura.density.cluster_moves import Rules, halves_of, log_split_ratio
from mixtura.density.discovery_inputs import LEAST_ROWS, check_whole, held_out_rows, known_classes
from mixtura.density.discovery_rounds import Found, Schedule, known_kmeans, nearest_centre, run_rounds
from mixtura.density.inputs import as_matrix, device_of
from mixtura.density.known_classes import Calibration, calibrate, calibrated_prior, within_covariance
from mixtura.density.labels import UNLABELLED, as_labels
from mixtura.density.set_evidence import ClusterPrior

__all__ = ["CategoryDiscovery"]

log = logging.getLogger(__name__)

RULES, CALIBRATIONS, COVARIANCES = ("calibrated", "paper"), ("heldout", "members", None), ("full", "diag")
CALIBRATED_KAPPA, PAPER_KAPPA = 1e-2, 1e-4
EXTRA_FREEDOM = 50.0  # nu0 - D of the calibrated rule: the prior's covariance counts as about so many samples
PAPER_SCALE = 0.005  # Psi0 over the mean squared length of a sample: the paper's features have length 1
BLOCK = 4096  # samples centred at once
WIDE_START, ROWS_EACH = 3, 20  # clusters of the wide start, times those of the other; samples each at least
NEAREST = {"calibrated": 3, "paper": 1}  # clusters that a merge looks at


class CategoryDiscovery(Keeping, ClassifierMixin, ClusterMixin, BaseEstimator):
    """Classes of samples of which some are labelled with some of the classes; the number of the others is found.

    Parameters
    ----------
    initial_novel : int or "auto", default="auto"
        Clusters beside the known classes to start with; "auto" takes as many as there are known classes. The rounds change it,
        and, but by the paper's rule, a second run starts from three times as many clusters; that of higher evidence is kept.
    max_novel : int, optional
        Most new classes.
    covariance : {"full", "diag"}, default="full"
    pca : int or None, default=16
        Principal components that clusters are looked for in; None, or at least F, keeps the columns as they are.
    rule : {"calibrated", "paper"}, default="calibrated"
        "paper" is the published rule: prior scale 0.005 for samples of length 1, no temper, clusters of known classes
        neither split nor merge, moves by chance to the end, one start. It leaves ``calibration``, ``margin``, ``shed``,
        ``absorb`` and ``anneal`` unused.
    alpha : float, default=1.0
        How willing a cluster is to split, > 0.
    nu0 : float or "auto", default="auto"
        Degrees of freedom of the prior: D + 50, and D + 1 by the paper's rule (1 for D with "diag").
    kappa0 : float or "auto", default="auto"
        How many samples the prior's mean counts as: 0.01, and 0.0001 by the paper's rule.
    calibration : {"heldout", "members", None}, default="heldout"
        What the width of a class and the temper are learned from. "heldout": labelled samples, those in ``held_out`` where
        ``fit`` is told which. "members": unlabelled samples in known clusters of k-means with twice as many clusters as there
        are known classes, for embeddings that were trained on all labels; it takes no other class to be among them. None:
        width from labelled samples, temper 1.
    margin : float, default=0.25
        Where the temper lies between the largest at which a known class would still be halved (0) and the least at which two
        would merge (1).
    shed : float or None, default=0.95
        A known cluster may give away a half when at least this share of its labelled samples lies in the other; None: never.
    absorb : bool, default=True
        Whether a new cluster may merge into a known one.
    rounds : int, default=25
        Of EM and moves.
    anneal : int, default=5
        Last rounds, in which a move is made where it is probable and never by chance.
    n_init : int, default=5
        Starts of k-means; the tightest is kept.
    device : str, default="cpu"
        Of the EM steps: "cpu", "cuda", "cuda:0", or "auto".
    seed : int, default=0
        Seed of everything that chance enters.

    Attributes
    ----------
    classes_ : ndarray of shape (K,)
        Known classes, sorted, then new ones with fresh numbers.
    n_classes_, n_novel_ : int
        K, and how many of them are new.
    novel_classes_ : ndarray of shape (n_novel_,)
    labels_ : ndarray of shape (N,)
        Class of each sample of the fit; a labelled one has its own.
    prototypes_ : ndarray of shape (K, F)
        Mean of the samples of each class.
    mean_, components_ : ndarrays of shape (F,) and (D, F)
        The reduction: ``(X - mean_) @ components_.T``.
    weights_, means_, covariances_, precisions_cholesky_ : ndarrays
        Of the mixture in reduced coordinates: shapes (K,), (K, D), (K, D, D), (K, D, D), or (K, D) for diag.
    temper_ : float
        What differences of evidence were divided by.
    calibration_ : Calibration or None
        Where the temper comes from.
    split_scores_ : ndarray of shape (K,)
        log H of halving each class at the end: far below 0 is one class by far.
    history_ : list of Round
        Number of clusters, moves and log evidence of each round.
    converged_ : bool
        Whether the last round made no move.

    Notes
    -----
    A round takes 3 EM steps of about N K D^2 multiplications; the moves take N D^2. Memory beyond X: 4 N D + N F numbers and
    K D^2. A class is one Gaussian in D dimensions: classes of several separate parts are found as several.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> t = np.repeat([0, 1, 2, 3], 60)
    >>> X = rng.normal(size=(240, 2)) + 8 * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])[t]
    >>> y = np.where((t < 2) & (np.arange(240) % 2 == 0), t, -1)  # half of classes 0 and 1 are labelled
    >>> CategoryDiscovery().fit(X, y).classes_.tolist()
    [0, 1, 2, 3]
    """

    def __init__(
        self,
        initial_novel: int | str = "auto",
        *,
        max_novel: int | None = None,
        covariance: str = "full",
        pca: int | None = 16,
        rule: str = "calibrated",
        alpha: float = 1.0,
        nu0: float | str = "auto",
        kappa0: float | str = "auto",
        calibration: str | None = "heldout",
        margin: float = 0.25,
        shed: float | None = 0.95,
        absorb: bool = True,
        rounds: int = 25,
        anneal: int = 5,
        n_init: int = 5,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.initial_novel = initial_novel
        self.max_novel = max_novel
        self.covariance = covariance
        self.pca = pca
        self.rule = rule
        self.alpha = alpha
        self.nu0 = nu0
        self.kappa0 = kappa0
        self.calibration = calibration
        self.margin = margin
        self.shed = shed
        self.absorb = absorb
        self.rounds = rounds
        self.anneal = anneal
        self.n_init = n_init
        self.device = device
        self.seed = seed

    def fit(self, X: Any, y: Any, *, held_out: Any = None) -> Self:
        """Find the classes.

        Parameters
        ----------
        X : array-like of shape (N, F)
            Embeddings or measurements, finite; columns count by their variance, so scale measurements of different units.
        y : array-like of shape (N,)
            Class of each sample, a whole number >= 0, or -1 where it is unlabelled.
        held_out : array-like of shape (N,), boolean, optional
            Labelled samples that the training of the embeddings did not see as labelled, for ``calibration="heldout"``. Without
            it all labelled samples count as such.

        Raises
        ------
        ValueError
            No labelled sample, a known class of fewer than two, negative labels other than -1, values that are not finite (first
            position named), held-out samples that leave no class of two, a parameter out of its range.
        """
        self._check()
        device = device_of(self.device)
        if y is None:
            raise ValueError(
                "CategoryDiscovery requires y to be passed, but the target y is None; give -1 where a sample is unlabelled"
            )
        x_NF = as_matrix(self, X, reset=True, ensure_min_samples=2)
        y_N = as_labels(y)
        known = known_classes(y_N, len(x_NF))
        class_N = np.where(y_N == UNLABELLED, UNLABELLED, np.searchsorted(known, y_N))
        held_N = held_out_rows(held_out, y_N, self.calibration if self.rule == "calibrated" else "paper")
        self._set_reduction(x_NF)
        z_ND = self._project(x_NF)
        # One scale for all features: distances keep their meaning, and the arithmetic is about 1.
        self.scale_ = float(np.sqrt(z_ND.var(0).mean())) or 1.0
        z_ND /= self.scale_
        rng = check_random_state(self.seed)
        generator = torch.Generator().manual_seed(int(rng.randint(2**31)))
        z, classes = torch.from_numpy(z_ND), torch.from_numpy(class_N)
        prior, self.calibration_ = self._prior(z, classes, len(known), held_N, rng, generator)
        self.temper_ = 1.0 if self.calibration_ is None else self.calibration_.temper
        rules = self._rules(len(known))
        schedule = Schedule(rounds=self.rounds, anneal=0 if self.rule == "paper" else self.anneal)
        runs = [
            run_rounds(z, classes, start, prior, rules, schedule, generator=generator, device=device)
            for start in self._starts(z, classes, len(known), rng)
        ]
        found = max(runs, key=lambda run: run.log_evidence)
        self._adopt(found, known, x_NF)
        first, second = halves_of(z, found.sets, self.n_classes_, prior.covariance, generator)
        self.split_scores_ = log_split_ratio(first, second, prior, rules).numpy()
        return self

    def fit_predict(self, X: Any, y: Any = None, *, held_out: Any = None) -> np.ndarray:
        """Fit, and the class of each sample, shape (N,); a labelled one has its own."""
        return self.fit(X, y, held_out=held_out).labels_

    def predict(self, X: Any) -> np.ndarray:
        """Most probable class of each sample, known or new, shape (N,)."""
        best_N = self._log_joint(X).argmax(1).numpy()
        return self.classes_[best_N]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each class, in the order of ``classes_``, shape (N, K), rows sum to 1."""
        return self._log_joint(X).softmax(1).numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        """Log density of the mixture at each sample in reduced coordinates, shape (N,), in nats."""
        return self._log_joint(X).logsumexp(1).numpy()

    @property
    def novel_classes_(self) -> np.ndarray:
        """Numbers of the new classes, shape (n_novel_,)."""
        check_is_fitted(self, "means_")
        return self.classes_[self.n_classes_ - self.n_novel_ :]

    @property
    def gaussians_(self) -> Gaussians:
        """The mixture in reduced coordinates."""
        check_is_fitted(self, "means_")
        parts = (self.weights_, self.means_, self.covariances_, self.precisions_cholesky_)
        weights, means, sigma, upper = (torch.from_numpy(np.asarray(part)) for part in parts)
        return Gaussians(weights, means, sigma, upper, self.covariance)  # type: ignore[arg-type]

    def reduce(self, X: Any) -> np.ndarray:
        """Reduced coordinates, shape (N, D)."""
        check_is_fitted(self, "means_")
        return self._project(as_matrix(self, X, reset=False))

    def _log_joint(self, X: Any) -> Tensor:
        return self.gaussians_.log_joint(torch.from_numpy(self.reduce(X)))

    def _check(self) -> None:
        for name, least in (("rounds", 0), ("anneal", 0), ("n_init", 1)):
            check_whole(name, getattr(self, name), least)
        for name in ("max_novel", "pca"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 0 if name == "max_novel" else 1)
        if self.initial_novel != "auto":
            check_whole("initial_novel", self.initial_novel, 0)
        for name, known in (("rule", RULES), ("calibration", CALIBRATIONS), ("covariance", COVARIANCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        for name in ("alpha", "kappa0", "nu0"):
            value = getattr(self, name)
            if value != "auto" and not (isinstance(value, (int, float, np.number)) and 0 < value < np.inf):
                raise ValueError(f"{name} must be a number > 0, got {value!r}")
        if self.alpha == "auto":
            raise ValueError("alpha must be a number > 0, got 'auto'")
        if not 0 <= self.margin <= 1:
            raise ValueError(f"margin must be between 0 and 1, got {self.margin!r}")
        if self.shed is not None and not 0.5 < self.shed <= 1:
            raise ValueError(f"shed must be above 0.5 and at most 1, or None, got {self.shed!r}")

    def _set_reduction(self, x_NF: np.ndarray) -> None:
        """Set ``mean_`` and ``components_``."""
        n, f = x_NF.shape
        self.mean_ = x_NF.mean(0)
        d = f if self.pca is None else min(self.pca, f)
        if d >= n:
            log.warning("%d samples span fewer than %d dimensions; reduced to %d", n, d, n - 1)
            d = n - 1
        if d == f:
            self.components_ = np.eye(f)
            return
        # Block by block, so that no centred copy of X is made.
        scatter_FF = np.zeros((f, f))
        for start in range(0, n, BLOCK):
            block_BF = x_NF[start : start + BLOCK] - self.mean_
            scatter_FF += block_BF.T @ block_BF
        vectors_FF = np.linalg.eigh(scatter_FF)[1]
        self.components_ = np.ascontiguousarray(vectors_FF[:, ::-1][:, :d].T)

    def _project(self, x_NF: np.ndarray) -> np.ndarray:
        return x_NF @ self.components_.T - self.components_ @ self.mean_

    def _prior(
        self,
        z: Tensor,
        classes: Tensor,
        n_known: int,
        held_N: np.ndarray | None,
        rng: np.random.RandomState,
        generator: torch.Generator,
    ) -> tuple[ClusterPrior, Calibration | None]:
        d, kind = z.shape[1], self.covariance
        wide = d if kind == "full" else 1
        mean = z.new_zeros(d)  # z is centred
        paper = self.rule == "paper"
        kappa = float(self.kappa0) if self.kappa0 != "auto" else PAPER_KAPPA if paper else CALIBRATED_KAPPA
        nu = float(self.nu0) if self.nu0 != "auto" else wide + (1.0 if paper else EXTRA_FREEDOM)
        least = wide - 1 if paper else wide + 1
        if not nu > least:
            raise ValueError(f"nu0 must be above {least} for {d} features and covariance={kind!r}, got {nu:g}")
        if paper:
            ball = torch.eye(d, dtype=z.dtype) if kind == "full" else torch.ones(d, dtype=z.dtype)
            return ClusterPrior(mean, kappa, nu, PAPER_SCALE * float(z.square().sum(1).mean()) * ball), None
        learn = classes
        if self.calibration == "members":
            centres = known_kmeans(z.numpy(), classes.numpy(), n_known, 2 * n_known, n_init=self.n_init, rng=rng)
            near = nearest_centre(z, torch.from_numpy(centres), classes)
            members = torch.where((near < n_known) & (classes < 0), near, UNLABELLED)
            small = torch.bincount(members[members >= 0], minlength=n_known) < LEAST_ROWS
            learn = members
            if bool(small.any()):
                log.warning(
                    "%d known classes have no unlabelled members; calibrated on labelled samples", int(small.sum())
                )
                learn = classes
        elif held_N is not None:
            learn = torch.where(torch.from_numpy(held_N), classes, UNLABELLED)
        prior = calibrated_prior(within_covariance(z, learn, n_known, kind), mean, kappa, nu)  # type: ignore[arg-type]
        if self.calibration is None:
            return prior, None
        sizes = self._sizes(z, classes, n_known, rng)
        if n_known == 1:
            log.warning("one known class tells of no pair that must not merge; the temper is 1 (label a second class)")
        return prior, calibrate(z, learn, n_known, prior, margin=float(self.margin), sizes=sizes, generator=generator)

    def _sizes(self, z: Tensor, classes: Tensor, n_known: int, rng: np.random.RandomState) -> Tensor:
        """Samples of each known class, labelled or near its k-means centre, shape (C,)."""
        centres = known_kmeans(z.numpy(), classes.numpy(), n_known, 2 * n_known, n_init=self.n_init, rng=rng)
        near = nearest_centre(z, torch.from_numpy(centres), classes)
        return torch.bincount(near, minlength=2 * n_known)[:n_known]

    def _rules(self, n_known: int) -> Rules:
        paper = self.rule == "paper"
        return Rules(
            n_known=n_known,
            alpha=float(self.alpha),
            temper=self.temper_,
            shed=None if paper else self.shed,
            absorb=self.absorb and not paper,
            nearest=NEAREST[self.rule],
            most=None if self.max_novel is None else n_known + self.max_novel,
        )

    def _starts(self, z: Tensor, classes: Tensor, n_known: int, rng: np.random.RandomState) -> list[Tensor]:
        """Clusters of semi-supervised k-means: as many as asked for and, but by the paper's rule, many more as well.

        A cluster that holds parts of two classes may have no half worth splitting off, while parts of one class always find
        each other. So the second run starts from too many; the one with the higher evidence is kept.
        """
        unknown = int((classes < 0).sum())
        asked = n_known if self.initial_novel == "auto" else int(self.initial_novel)
        many = min(WIDE_START * max(n_known + asked, 2 * n_known), len(z) // ROWS_EACH) - n_known
        numbers = [asked] if self.rule == "paper" or many <= asked else [asked, many]
        most = unknown if self.max_novel is None else min(unknown, self.max_novel)
        starts = list[Tensor]()
        for novel in sorted({min(number, most) for number in numbers}):
            if not unknown:
                starts.append(classes)
                continue
            centres = known_kmeans(z.numpy(), classes.numpy(), n_known, n_known + novel, n_init=self.n_init, rng=rng)
            starts.append(nearest_centre(z, torch.from_numpy(centres), classes))
        return starts

    def _adopt(self, found: Found, known: np.ndarray, x_NF: np.ndarray) -> None:
        gaussians = found.gaussians.mapped(
            torch.full((len(self.components_),), self.scale_, dtype=torch.float64),
            torch.zeros(len(self.components_), dtype=torch.float64),
        )
        self.weights_, self.means_ = gaussians.weights.numpy(), gaussians.means.numpy()
        self.covariances_ = gaussians.covariances.numpy()
        self.precisions_cholesky_ = gaussians.precisions_cholesky.numpy()
        self.n_classes_ = len(self.weights_)
        self.n_novel_ = self.n_classes_ - len(known)
        self.classes_ = np.concatenate([known, known[-1] + 1 + np.arange(self.n_novel_)])
        set_N = found.sets.numpy()
        self.labels_ = self.classes_[set_N]
        self.history_, self.converged_ = found.history, found.converged
        self.prototypes_ = np.stack([x_NF[set_N == c].mean(0) for c in range(self.n_classes_)])
