"""How many experts of a top-k gate should answer: fits compared over the number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mixtura.density.gated_regression import GatedRegression

__all__ = ["ActiveRow", "suggest_active"]


class ActiveRow(NamedTuple):
    """One number of active experts.

    Attributes:
        active: experts that answer.
        log_likelihood: mean log density of the training targets, nats.
        criterion: BIC (lower is better), or held-out mean log density (higher is better).
        active_share: share of inputs at which each expert answers.
        best: whether the criterion prefers it.
    """

    active: int
    log_likelihood: float
    criterion: float
    active_share: tuple[float, ...]
    best: bool


def suggest_active(
    X: Any,
    y: Any,
    n_experts: int,
    candidates: Sequence[int],
    *,
    criterion: Literal["bic", "cv"] = "bic",
    folds: int = 5,
    seed: int = 0,
    **options: Any,
) -> list[ActiveRow]:
    """A table of top-k gates by the number of experts that answer.

    A fit surely converges where it activates enough (`required_active`); fewer may do, since copies of an expert can serve a
    region each, so the data are asked.

    Args:
        X: shape (N, F).
        y: shape (N,).
        n_experts: of every fit.
        candidates: numbers of active experts, each between 1 and ``n_experts``.
        criterion: ``"bic"``, or ``"cv"``: mean log density of targets held out.
        folds: of the cross-validation, >= 2.
        seed: of starts and folds.
        options: further arguments of `GatedRegression`.
    Raises:
        ValueError: an unknown criterion, no candidate, or one out of range.
    """
    if criterion not in ("bic", "cv"):
        raise ValueError(f"criterion must be 'bic' or 'cv', got {criterion!r}")
    if not candidates or not all(1 <= c <= n_experts for c in candidates):
        raise ValueError(
            f"candidates must be between 1 and n_experts={n_experts}, at least one, got {list(candidates)}"
        )
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
    parts = np.array_split(np.random.default_rng(seed).permutation(len(y)), folds)
    rows = []
    for active in candidates:
        model = GatedRegression(n_experts, gate="top-k", top_k=active, seed=seed, **options)
        if criterion == "cv":
            held = []
            for part in parts:
                train = np.setdiff1d(np.arange(len(y)), part)
                held.append(model.fit(X[train], y[train]).score_samples(X[part], y[part]))
            found = float(np.concatenate(held).mean())
        model.fit(X, y)
        if criterion == "bic":
            # Slope and bias of the last expert are the gauge.
            n_free = n_experts * (2 * X.shape[1] + 3) - X.shape[1] - 1
            found = n_free * math.log(len(y)) - 2 * len(y) * model.log_likelihood_
        rows.append((active, model.log_likelihood_, found, tuple(model.active_share_.tolist())))
    best = min(rows, key=lambda row: row[2] if criterion == "bic" else -row[2])[0]
    return [ActiveRow(*row, best=row[0] == best) for row in rows]
