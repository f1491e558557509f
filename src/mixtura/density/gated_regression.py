"""Regression by a mixture of linear experts whose weights follow the input, with four gates.

Shapes: N pairs, F features, E experts.
Sources: 2401.13875 (temperature and activation), 2309.13850 (top-k); `gated_law` has the formulas.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from scipy.special import ndtr
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d
from torch import Tensor

from mixtura.core.gates import TemperatureSchedule
from mixtura.core.keeping import Keeping
from mixtura.data.tables import non_finite
from mixtura.density.activations import activation_named
from mixtura.density.gated_em import Box, Given
from mixtura.density.gated_errors import fisher_information, standard_errors
from mixtura.density.gated_frame import Frame, Law
from mixtura.density.gated_law import GATES, GateKind, GateRule, Joint, Layout, Likelihood, Pairs, Parts, evaluate
from mixtura.density.gated_search import Found, best_fit, screened
from mixtura.density.inputs import as_matrix, device_of

__all__ = ["GatedRegression"]


class GatedRegression(Keeping, RegressorMixin, BaseEstimator):
    """Lines, each in charge where the gate says so, by maximum likelihood: a density of y for every x.

    The last expert is the gate's reference: its slope and bias are 0.

    Args:
        n_experts: E, >= 1.
        gate: ``"softmax"``; ``"temperature"``, the same with a temperature (its size and the slopes' cannot be told apart:
            read ``scale_free_``); ``"activation"``, slopes through an activation before the temperature, which can be;
            ``"top-k"``, the softmax over the ``top_k`` experts of largest slope score, exactly 0 for the others.
        activation: of the activation gate: ``"tanh"``, ``"sigmoid"`` and others of `activations.ACTIVATIONS`.
        temperature: ``"learned"``, a number to hold it at, or a ``TemperatureSchedule`` (dense to sparse: one step an EM
            iteration, then held at its end).
        top_k: experts that answer, for ``"top-k"``.
        top_k_bias: let the bias take part in the choice, as gates of language models do.
        origin: where the inputs of an activation or top-k gate count from, ``"mean"`` or ``"zero"``; the formulas of the papers
            have zero. For other gates it makes no difference.
        init: ``"kmeans"``, or a dict of arrays to start from, named as the fitted attributes without the underscore:
            gate_weights, gate_bias, temperature, coef, intercept, variance.
        n_init: starts; the best likelihood is kept, of those in which no expert explains a handful of rows only.
        max_iter: iterations of EM.
        polish: climb the likelihood itself after EM; EM alone stops far from the top where experts are more than needed.
        tol: nats a pair; EM without ``polish`` ends there.
        bounds: of gate slopes, biases and lines, with inputs and target scaled to variance 1.
        var_floor: least variance of an expert, as a share of the target's.
        device: where torch computes.
        seed: of the starts.
    Attributes:
        gate_weights_, gate_bias_: shapes (E, F) and (E,); inputs count from ``origin_``.
        temperature_: 1 for gates without.
        scale_free_: ``gate_weights_`` and ``gate_bias_`` over the temperature, as a dict ``weights``, ``bias``.
        coef_, intercept_, variance_: of the lines, shapes (E, F), (E,), (E,).
        log_likelihood_: mean log density of the training targets, nats.
        fisher_: information of the parameters, mean over pairs, in the order of ``gated_law.Layout``.
        standard_errors_: dict named as the attributes; NaN where the likelihood is flat.
        active_share_: share of the training inputs at which each expert answers, shape (E,).
        regions_: for top-k in one feature: intervals and the experts that answer there.
        origin_: shape (F,); zeros for gates that need none.
        history_: mean log density over the iterations of the fit that was kept.
        at_bounds_: names of the parts with a parameter at the edge of its range.
        n_iter_, n_features_in_: iterations of EM and of the climb; F.
    Source:
        2401.13875, eq. 1 and 5; 2309.13850, eq. 1 and 2.
    Example:
        >>> x = np.linspace(-1, 1, 200)[:, None]
        >>> y = np.abs(x[:, 0]) + 0.01 * np.sin(40 * x[:, 0])
        >>> model = GatedRegression(2, gate="top-k", top_k=1, origin="zero").fit(x, y)
        >>> sorted(np.round(model.coef_[:, 0]).tolist())
        [-1.0, 1.0]
    """

    def __init__(
        self,
        n_experts: int = 2,
        *,
        gate: GateKind = "softmax",
        activation: str = "tanh",
        temperature: Literal["learned"] | float | TemperatureSchedule = "learned",
        top_k: int | None = None,
        top_k_bias: bool = False,
        origin: Literal["mean", "zero"] = "mean",
        init: Literal["kmeans"] | Mapping[str, Any] = "kmeans",
        n_init: int = 5,
        max_iter: int = 500,
        polish: bool = True,
        tol: float = 1e-8,
        bounds: float = 100.0,
        var_floor: float = 1e-6,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.n_experts = n_experts
        self.gate = gate
        self.activation = activation
        self.temperature = temperature
        self.top_k = top_k
        self.top_k_bias = top_k_bias
        self.origin = origin
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.polish = polish
        self.tol = tol
        self.bounds = bounds
        self.var_floor = var_floor
        self.device = device
        self.seed = seed

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Find the lines and the gate of largest likelihood.

        Args:
            X: shape (N, F), finite.
            y: shape (N,), finite; one output.
            sample_weight: shape (N,), >= 0, not all 0.
        Raises:
            ValueError: NaN or infinity (first place named), y of two dimensions, fewer pairs than parameters, a top_k out of
                range, an option that the gate does not have, a temperature that is not above 0.
        Warns:
            ConvergenceWarning: a fit that had not ended (its last change is named).
            UserWarning: parameters at the edge of their range, an expert that answers nowhere, an activation that leaves the
                temperature undetermined.
        """
        rule = self._checked_rule()
        X = self._inputs(X, reset=True)
        target_N = self._target(X, y)
        weight_N = None if sample_weight is None else _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        if weight_N is not None:
            if not weight_N.sum() > 0:
                raise ValueError("sample_weight must not be 0 for every sample")
            kept = weight_N > 0
            X, target_N, weight_N = X[kept], target_N[kept], weight_N[kept]
        layout = Layout(self.n_experts, X.shape[1])
        free = layout.free(rule, temperature=self.temperature == "learned")
        if len(X) < int(free.sum()):
            raise ValueError(
                f"n_samples={len(X)} is fewer than the {int(free.sum())} parameters of n_experts={self.n_experts} "
                f"in {X.shape[1]} features; use fewer experts or features"
            )
        frame = Frame.of(X, target_N, weight_N, rule, self.origin)
        device = device_of(self.device)
        Z_ND, t_N = (torch.from_numpy(v).to(device) for v in (frame.inputs(X), frame.targets(target_N)))
        weights = None if weight_N is None else torch.from_numpy(weight_N).to(device)[None]
        given = Given(rule, layout, Pairs.of(Z_ND, t_N, weights), free, Box(self.bounds, (self.var_floor, 1e2)))
        found = self._search(given, frame)
        self._hold(rule, layout, found, frame)
        self._tell(given, found)
        self._judge(rule, layout, X, target_N, weight_N, free)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Mean of y at each input, shape (M,)."""
        X, law = self._inputs(X), self._law()
        lines_EM = law.lines(X)
        return (law.gate(X) * lines_EM.T).sum(1)

    def predict_proba(self, X: Any) -> np.ndarray:
        """The gate: weight of each expert at each input, shape (M, E), rows sum to 1; exactly 0 for one not chosen."""
        X = self._inputs(X)
        return self._law().gate(X)

    def active_sets(self, X: Any) -> np.ndarray:
        """Which experts answer at each input, boolean (M, E)."""
        return self.predict_proba(X) > 0

    def predict_quantile(self, X: Any, q: Any) -> np.ndarray:
        """Quantiles of y at each input.

        Args:
            X: shape (M, F).
            q: in (0, 1), a number or shape (Q,).
        Returns:
            Shape (M,), or (M, Q).
        """
        wanted = np.atleast_1d(np.asarray(q, dtype=np.float64))
        if not ((wanted > 0) & (wanted < 1)).all():
            raise ValueError(f"q must be between 0 and 1, got {q}")
        X, law = self._inputs(X), self._law()
        gate_ME, lines_ME, spread_E = law.gate(X), law.lines(X).T, np.sqrt(self.variance_)
        found = np.empty((len(X), len(wanted)))
        for j, share in enumerate(wanted):
            low, high = (lines_ME - 40 * spread_E).min(1), (lines_ME + 40 * spread_E).max(1)
            for _ in range(100):  # halves an interval to the last bit
                middle = (low + high) / 2
                below = (gate_ME * ndtr((middle[:, None] - lines_ME) / spread_E)).sum(1) < share
                low, high = np.where(below, middle, low), np.where(below, high, middle)
            found[:, j] = (low + high) / 2
        return found[:, 0] if np.ndim(q) == 0 else found

    def score_samples(self, X: Any, y: Any) -> np.ndarray:
        """Log density of each target given its input, nats, shape (M,)."""
        return self._joint(X, y).log_density[0].numpy()

    def responsibilities(self, X: Any, y: Any) -> np.ndarray:
        """Probability of each expert given input and target, shape (M, E), rows sum to 1."""
        found = self._joint(X, y)
        return (found.joint - found.log_density[:, None]).exp()[0].T.numpy()

    def sample(self, X: Any, seed: int | None = None) -> np.ndarray:
        """One draw of y at each input, shape (M,); ``seed`` None takes the estimator's."""
        X, law = self._inputs(X), self._law()
        rng = np.random.default_rng(self.seed if seed is None else seed)
        edges_ME = law.gate(X).cumsum(1)
        expert_M = (edges_ME < rng.random(len(X))[:, None]).sum(1).clip(max=self.n_experts - 1)
        noise_M = rng.normal(size=len(X)) * np.sqrt(self.variance_)[expert_M]
        return law.lines(X)[expert_M, np.arange(len(X))] + noise_M

    def _checked_rule(self) -> GateRule:
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {list(GATES)}, got {self.gate!r}")
        for name in ("n_experts", "n_init", "max_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("tol", "bounds", "var_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.origin not in ("mean", "zero"):
            raise ValueError(f"origin must be 'mean' or 'zero', got {self.origin!r}")
        if isinstance(self.temperature, str):
            if self.temperature != "learned":
                raise ValueError(f"temperature must be 'learned', a number or a schedule, got {self.temperature!r}")
        elif self.gate not in ("temperature", "activation"):
            raise ValueError(f"temperature={self.temperature!r} has no effect with gate={self.gate!r}, which has none")
        elif isinstance(self.temperature, TemperatureSchedule):
            if self.temperature.steps >= self.max_iter:
                raise ValueError(
                    f"max_iter={self.max_iter} ends before the temperature's {self.temperature.steps} steps; raise max_iter or "
                    "shorten the schedule"
                )
        elif not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.gate == "top-k":
            if self.top_k is None or not 1 <= self.top_k <= self.n_experts:
                raise ValueError(f"top_k must be between 1 and n_experts={self.n_experts}, got {self.top_k}")
        elif self.top_k is not None:
            raise ValueError(f"top_k={self.top_k} has no effect with gate={self.gate!r}; use gate='top-k'")
        if (
            self.gate == "activation"
            and activation_named(self.activation).homogeneous
            and self.temperature == "learned"
        ):
            warnings.warn(
                f"activation={self.activation!r} is homogeneous: slopes, biases and temperature can grow together along one ray "
                "and nothing is seen, so none of them is determined; take tanh or sigmoid, or hold the temperature",
                UserWarning,
                stacklevel=3,
            )
        return GateRule(self.gate, self.activation, self.top_k or 1, self.top_k_bias)

    def _search(self, given: Given, frame: Frame) -> Found:
        schedule = self.temperature if isinstance(self.temperature, TemperatureSchedule) else None
        if isinstance(self.init, str):
            if self.init != "kmeans":
                raise ValueError(f"init must be 'kmeans' or a dict of arrays, got {self.init!r}")
            fixed = 1.0 if self.temperature == "learned" else float(schedule.end if schedule else self.temperature)  # type: ignore[arg-type]
            starts = screened(given, self.n_init, self.seed, fixed, self.max_iter)
        else:
            starts = frame.theta(given.layout, self.init, given.rule)[None].to(given.pairs.y.device)
        return best_fit(given, starts, max_iter=self.max_iter, tol=self.tol, climb=self.polish, schedule=schedule)

    def _hold(self, rule: GateRule, layout: Layout, found: Found, frame: Frame) -> None:
        parts = {name: value[0].numpy() for name, value in layout.split(found.theta[None])._asdict().items()}
        self.temperature_ = float(np.exp(parts["log_temperature"])) if rule.has_temperature else 1.0
        self.gate_weights_, self.gate_bias_ = parts["slope"] / frame.scale, parts["bias"].copy()
        self.origin_ = frame.centre.copy()
        self.coef_ = frame.height * parts["coef"] / frame.scale
        self.intercept_ = frame.level + frame.height * parts["intercept"] - self.coef_ @ frame.centre
        self.variance_ = frame.height**2 * np.exp(parts["log_variance"])
        if rule.affine:
            self.gate_bias_ = self.gate_bias_ - self.gate_weights_ @ frame.centre
            self.origin_ = np.zeros_like(frame.centre)
        self.scale_free_ = {
            "weights": self.gate_weights_ / self.temperature_,
            "bias": self.gate_bias_ / self.temperature_,
        }
        shift = float(np.log(frame.height))
        self.history_ = [value - shift for value in found.history]
        self.log_likelihood_ = self.history_[-1]
        self.n_iter_ = found.n_iter

    def _tell(self, given: Given, found: Found) -> None:
        """Warn of what the search could not settle."""
        if found.unfinished is not None:
            warnings.warn(
                f"the fit had not ended after {found.n_iter} iterations; its last was {found.unfinished}. Raise max_iter or "
                "tol, or use fewer experts",
                ConvergenceWarning,
                stacklevel=3,
            )
        if found.degenerate == found.fits:
            warnings.warn(
                f"all {found.fits} fits that were tried are degenerate: an expert explains fewer rows than a line has "
                "parameters, or its rows exactly, and says little about others. Use fewer experts, a larger var_floor or more "
                "starts (n_init)",
                UserWarning,
                stacklevel=3,
            )
        theta = found.theta
        lower, upper = given.box.edges(given.layout)
        at = ((theta <= lower + 1e-9) | (theta >= upper - 1e-9)) & given.free
        parts = given.layout.split(at[None])._asdict()
        self.at_bounds_ = [name for name, part in parts.items() if bool(part.any())]
        # Of a variance at its floor the warning above has spoken.
        told = [name for name in self.at_bounds_ if name != "log_variance" or found.degenerate < found.fits]
        if told:
            warnings.warn(
                f"{', '.join(told)} ended at the edge of the allowed range (bounds={self.bounds}, "
                f"var_floor={self.var_floor}): the likelihood may have no maximum inside; try fewer experts or other bounds",
                UserWarning,
                stacklevel=3,
            )

    def _judge(
        self, rule: GateRule, layout: Layout, X: np.ndarray, y: np.ndarray, weight: np.ndarray | None, free: Tensor
    ) -> None:
        """Information, standard errors, and what the gate does with the training inputs."""
        law = self._law()
        pairs = law.pairs(X, y, weight)
        self.fisher_ = fisher_information(Likelihood(rule, layout, pairs), law.theta)
        self.standard_errors_ = standard_errors(layout, self.fisher_, free.numpy(), law.theta, len(X))
        active_NE = law.gate(X) > 0
        self.active_share_ = active_NE.mean(0) if weight is None else np.average(active_NE, axis=0, weights=weight)
        self.regions_ = law.regions(X) if rule.kind == "top-k" and X.shape[1] == 1 else None
        idle = np.flatnonzero(self.active_share_ == 0).tolist()
        if idle:
            warnings.warn(
                f"experts {idle} answer at no training input; their parameters are those of the start. Use fewer experts, or "
                "more starts (n_init)",
                UserWarning,
                stacklevel=3,
            )
        if rule.kind == "top-k" and self.n_experts > 1 and not np.any(self.gate_weights_):
            warnings.warn(
                "all slopes of the gate are equal, so the choice is by ties: experts of lower index",
                UserWarning,
                stacklevel=3,
            )

    def _law(self) -> Law:
        check_is_fitted(self)
        layout = Layout(self.n_experts, self.n_features_in_)
        given = (
            self.gate_weights_,
            self.gate_bias_,
            self.coef_,
            self.intercept_ + self.coef_ @ self.origin_,
            np.log(self.variance_),
            np.array(np.log(self.temperature_)),
        )
        theta = layout.join(Parts(*(torch.from_numpy(np.asarray(v, dtype=np.float64))[None] for v in given)))[0]
        return Law(GateRule(self.gate, self.activation, self.top_k or 1, self.top_k_bias), layout, theta, self.origin_)

    def _inputs(self, X: Any, *, reset: bool = False) -> np.ndarray:
        if not reset:
            check_is_fitted(self)
        return as_matrix(self, X, reset=reset, ensure_min_samples=2 if reset else 1)

    def _target(self, X: np.ndarray, y: Any) -> np.ndarray:
        if y is None:
            raise ValueError("this regressor requires y to be passed, but the target y is None")
        y = np.asarray(y)
        shape = y.shape
        if len(shape) > 1 and shape[-1] > 1:
            raise ValueError(f"y must have one column, got shape {shape}; fit one GatedRegression an output")
        try:
            target_N = column_or_1d(y, warn=True, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"y must hold one number a row ({error})") from error
        if len(target_N) != len(X):
            raise ValueError(f"X and y must have as many rows, got {len(X)} and {len(target_N)}")
        if problem := non_finite(target_N[:, None]):
            raise ValueError(f"y contains {problem}")
        return target_N

    def _joint(self, X: Any, y: Any) -> Joint:
        X = self._inputs(X)
        law = self._law()
        return evaluate(law.rule, law.layout, law.theta[None], law.pairs(X, self._target(X, y), None))
