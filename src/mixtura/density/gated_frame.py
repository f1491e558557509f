"""A gated regression between the user's units and those of a fit, and its law as NumPy sees it.

Shapes: N pairs, F features, E experts, P parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtura.core.gates import log_weights
from mixtura.density.gated_law import GateRule, Layout, Pairs, Parts, gate_logits
from mixtura.density.gated_law import chosen as choose

__all__ = ["Frame", "Law", "Region"]

Region = tuple[float, float, tuple[int, ...]]
ROWS = 1 << 16  # inputs looked at together


@dataclass(frozen=True)
class Frame:
    """Units of a fit: inputs and target centred and scaled.

    Attributes:
        centre, scale: of the inputs, shape (F,). A gate whose form depends on where inputs count from may keep zero.
        level, height: of the target.
    """

    centre: np.ndarray
    scale: np.ndarray
    level: float
    height: float

    @classmethod
    def of(cls, X: np.ndarray, y: np.ndarray, weight: np.ndarray | None, rule: GateRule, origin: str) -> Frame:
        """From the data; a constant column or target keeps its unit."""
        share = np.full(len(y), 1 / len(y)) if weight is None else weight / weight.sum()
        mean_F, level = share @ X, float(share @ y)
        scale_F = np.sqrt(share @ (X - mean_F) ** 2)
        height = float(np.sqrt(share @ (y - level) ** 2))
        scale_F = np.where(scale_F > 1e-13 * np.abs(X).max(0), scale_F, 1.0)
        height = height if height > 1e-13 * max(np.abs(y).max(), 1e-300) else 1.0
        return cls(mean_F if rule.affine or origin == "mean" else np.zeros_like(mean_F), scale_F, level, height)

    def inputs(self, X: np.ndarray) -> np.ndarray:
        """In units of the fit."""
        return (X - self.centre) / self.scale

    def targets(self, y: np.ndarray) -> np.ndarray:
        """In units of the fit."""
        return (y - self.level) / self.height

    def theta(self, layout: Layout, given: Mapping[str, Any], rule: GateRule) -> Tensor:
        """Parameters (P,) of a start in the user's units.

        Raises:
            ValueError: a part that is missing, unknown, of another shape or not finite; variances or a temperature not above 0.
        """
        e, f = layout.n_experts, layout.n_features
        shapes: dict[str, tuple[int, ...]] = {
            "gate_weights": (e, f),
            "gate_bias": (e,),
            "temperature": (),
            "coef": (e, f),
        }
        shapes |= {"intercept": (e,), "variance": (e,)}
        if set(given) != set(shapes) and set(given) != set(shapes) - {"temperature"}:
            raise ValueError(
                f"init must be a dict with {list(shapes)} (temperature may be left out), got {sorted(given)}"
            )
        found = {name: np.asarray(given.get(name, 1.0), dtype=np.float64) for name in shapes}
        for name, value in found.items():
            if value.shape != shapes[name]:
                raise ValueError(f"init[{name!r}] must have shape {shapes[name]}, got {value.shape}")
            if not np.isfinite(value).all():
                raise ValueError(f"init[{name!r}] must be finite")
        for name in ("temperature", "variance"):
            if not (found[name] > 0).all():
                raise ValueError(f"init[{name!r}] must be > 0, got {found[name].min():g}")
        # The reference is the last expert; with slopes that may shift, any start can be written so.
        slope_EF, bias_E = found["gate_weights"] * self.scale, found["gate_bias"].copy()
        if rule.affine:
            bias_E = bias_E + found["gate_weights"] @ self.centre
        if rule.slopes_shift:
            slope_EF = slope_EF - slope_EF[-1]
        elif np.any(slope_EF[-1]):
            raise ValueError("init['gate_weights'] must be 0 for the last expert, the reference of an activation gate")
        parts = Parts(
            *(
                torch.from_numpy(np.asarray(v))[None]
                for v in (
                    slope_EF,
                    bias_E - bias_E[-1],
                    found["coef"] * self.scale / self.height,
                    (found["intercept"] + found["coef"] @ self.centre - self.level) / self.height,
                    np.log(found["variance"] / self.height**2),
                    np.log(found["temperature"]),
                )
            )
        )
        return layout.join(parts)[0]


@dataclass(frozen=True)
class Law:
    """A fitted law in the user's units.

    Attributes:
        rule, layout: of the law.
        theta: shape (P,), for inputs that count from ``origin``.
        origin: shape (F,).
    """

    rule: GateRule
    layout: Layout
    theta: Tensor
    origin: np.ndarray

    def pairs(self, X: np.ndarray, y: np.ndarray, weight: np.ndarray | None) -> Pairs:
        """What `gated_law` evaluates."""
        weights = None if weight is None else torch.from_numpy(weight)[None]
        return Pairs.of(torch.from_numpy(X - self.origin), torch.from_numpy(y), weights)

    def gate(self, X: np.ndarray) -> np.ndarray:
        """Weight of each expert at each input, shape (N, E)."""
        found = []
        for i in range(0, max(len(X), 1), ROWS):
            pairs = self.pairs(X[i : i + ROWS], np.zeros(len(X[i : i + ROWS])), None)
            score_1EN, logit_1EN = gate_logits(self.rule, self.layout.split(self.theta[None]), pairs.x)
            log_gate_1EN = log_weights(logit_1EN, choose(self.rule, score_1EN, logit_1EN), dim=1)
            found.append(log_gate_1EN[0].T.exp().numpy())
        return np.concatenate(found)

    def lines(self, X: np.ndarray) -> np.ndarray:
        """Mean of each expert at each input, shape (E, N)."""
        parts = self.layout.split(self.theta[None])
        return parts.coef[0].numpy() @ (X - self.origin).T + parts.intercept[0].numpy()[:, None]

    def regions(self, X: np.ndarray) -> list[Region]:
        """In one feature: intervals from the lowest to the highest input, and the experts that answer in each."""
        slope_E = self.layout.split(self.theta[None]).slope[0, :, 0].numpy()
        bias_E = self.layout.split(self.theta[None]).bias[0].numpy()
        bias_E = bias_E if self.rule.top_k_bias or self.rule.kind != "top-k" else np.zeros_like(bias_E)
        i, j = np.triu_indices(len(slope_E), 1)
        apart = slope_E[i] - slope_E[j]
        crossings = (bias_E[j] - bias_E[i])[apart != 0] / apart[apart != 0] + self.origin[0]
        low, high = float(X.min()), float(X.max())
        cuts = [low, *sorted(set(crossings[(crossings > low) & (crossings < high)].tolist())), high]
        found: list[Region] = []
        for a, b in itertools.pairwise(cuts):
            active = tuple(np.flatnonzero(self.gate(np.array([[(a + b) / 2]]))[0] > 0).tolist())
            if found and found[-1][2] == active:
                found[-1] = (found[-1][0], b, active)
            else:
                found.append((a, b, active))
        return found
