"""The gated method of ``regress``: lines, each in charge where the gate says so, against one line."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np

__all__ = ["GateName", "added_columns", "ask", "draw", "experts_table", "makers"]

MOST_SHOWN = 3  # coefficients named for an expert
STARTS = 5


class GateName(StrEnum):
    """Gates of the gated method."""

    softmax = "softmax"
    temperature = "temperature"
    activation = "activation"
    topk = "topk"


def makers(
    gate: GateName, experts: int, active: int | None, activation: str | None, device: str, seed: int
) -> dict[str, Callable[[], Any]]:
    """How to make the model and its rival, one line.

    Raises:
        ValueError: an option that the gate does not have, or out of range.
    """
    from mixtura.density import GatedRegression

    if experts < 2:
        raise ValueError(f"--experts must be >= 2, got {experts}; one expert is the line that is compared with anyway")
    if active is not None and gate is not GateName.topk:
        raise ValueError(f"--active is for --gate topk, not for --gate {gate.value}")
    if active is not None and not 1 <= active <= experts:
        raise ValueError(f"--active must be between 1 and the {experts} experts, got {active}")
    if activation is not None and gate is not GateName.activation:
        raise ValueError(f"--activation is for --gate activation, not for --gate {gate.value}")
    common = {"n_init": STARTS, "device": device, "seed": seed}
    if gate is GateName.topk:
        # With the bias in the choice, a region's border may lie anywhere and not only through the mean of the inputs.
        common |= {"gate": "top-k", "top_k": active or 1, "top_k_bias": True}
    elif gate is GateName.activation:
        common |= {"gate": "activation", "activation": activation or "tanh"}
    else:
        common |= {"gate": gate.value}
    return {f"{gate.value} gate": lambda: GatedRegression(experts, **common), "one line": lambda: GatedRegression(1)}


def ask(model: Any, X: np.ndarray, y: np.ndarray, band: float) -> tuple[np.ndarray, ...]:
    """Prediction, ends of the band, and log density of the targets that are known (else NaN)."""
    import numpy as np

    low, high = model.predict_quantile(X, [(1 - band) / 2, (1 + band) / 2]).T
    log_density = np.full(len(y), np.nan)
    known = np.isfinite(y)
    if known.any():
        log_density[known] = model.score_samples(X[known], y[known])
    return model.predict(X), low, high, log_density


def added_columns(model: Any, X: np.ndarray) -> dict[str, np.ndarray]:
    """The likeliest expert of each row, from 1, and its weight, by the model that saw all rows."""
    gate = model.predict_proba(X)
    return {"expert": gate.argmax(1) + 1, "expert_weight": gate.max(1)}


def experts_table(model: Any, X: np.ndarray, names: list[str]) -> Table:
    """Where each expert is in charge, its line, and its spread."""
    import numpy as np

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("expert", justify="right")
    for name in ("in charge of", "spread"):
        table.add_column(name, justify="right")
    table.add_column("line, strongest first")
    if model.regions_ is not None:
        table.add_column(f"answers for {names[0]}")
    share = np.bincount(model.predict_proba(X).argmax(1), minlength=model.n_experts) / len(X)
    size = np.abs(model.coef_) * X.std(0)
    for i in range(model.n_experts):
        strongest = np.argsort(-size[i])[:MOST_SHOWN]
        terms = [f"{model.intercept_[i]:.4g}", *(f"{model.coef_[i, j]:+.3g} {names[j]}" for j in strongest)]
        row = [str(i + 1), f"{share[i]:.0%}", f"{np.sqrt(model.variance_[i]):.3g}", " ".join(terms)]
        if model.regions_ is not None:
            row.append(", ".join(f"{a:.4g} to {b:.4g}" for a, b, active in model.regions_ if i in active) or "nowhere")
        table.add_row(*row)
    return table


def draw(path: Path, model: Any, X: np.ndarray, y: np.ndarray, names: list[str], target: str, band: float) -> None:
    """Write the picture; drawing libraries are loaded here."""
    from mixtura.cli.gated_picture import draw as drawn

    drawn(path, model, X, y, names, target, band)
