"""The pretraining method of ``regress``: a line in factors that rows without a target teach, against ridge on the columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np

__all__ = ["ask", "draw", "makers", "report", "unlabelled_rows"]


def unlabelled_rows(path: Path | None, own: np.ndarray, names: list[str]) -> np.ndarray:
    """Rows without a target: those of the table itself, and those of a file with the same columns in any order.

    Raises:
        ValueError: no such row, a column that the file lacks (named), text or gaps in it.
    """
    import numpy as np

    from mixtura.data.tables import numbers, read_table

    if path is None:
        if not len(own):
            raise ValueError("no row is without a target: give more rows with --unlabeled FILE, or leave targets empty")
        return own
    table = read_table(path)
    lacking = [name for name in names if name not in table.columns]
    if lacking:
        raise ValueError(f"{path} lacks the column {lacking[0]!r}; it needs those that the target is predicted from")
    try:
        found, _ = numbers(table[names])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return np.vstack([own, found])


class _Line:
    """A fitted line and the spread of targets around it, for bands."""

    def __init__(self, fit: Callable[[Any, Any], Any]) -> None:
        self._fit = fit

    def fit(self, X: np.ndarray, y: np.ndarray) -> _Line:
        """Fit, and measure the spread by five-fold cross-validation: residuals of the fit itself would be too small."""
        import numpy as np

        parts = np.array_split(np.random.default_rng(0).permutation(len(y)), min(5, len(y) // 2))
        away = [self._fit(np.delete(X, part, 0), np.delete(y, part))(X[part]) - y[part] for part in parts]
        self.spread = float(np.sqrt(np.square(np.concatenate(away)).mean()))
        self.predict = self._fit(X, y)
        return self


def makers(unlabelled: np.ndarray, factors: int | None, seed: int) -> dict[str, Callable[[], _Line]]:
    """How to make the model and its rival; the factors are fitted once, without any target.

    Raises:
        ValueError: a number of factors that the columns do not allow.
    """
    from mixtura.density.latent_models import fit_latent
    from mixtura.density.latent_pretraining import PretrainedRegressor
    from mixtura.density.pretraining_ways import Fitted

    if factors is not None and factors < 1:
        raise ValueError(f"--factors must be >= 1, got {factors}")
    latent = Fitted(fit_latent("factor", factors or "auto", unlabelled, seed))

    def factored(X: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return PretrainedRegressor(latent, head="ridge").fit(X, y, unlabelled).predict

    def ridge(X: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        from mixtura.density.small_heads import fit_ridge

        middle, scale = X.mean(0), X.std(0)
        scale[scale == 0] = 1.0
        line = fit_ridge((X - middle) / scale, y, intercept=True)
        return lambda rows: line.predict((rows - middle) / scale)

    return {"factors": lambda: _Line(factored), "ridge": lambda: _Line(ridge)}


def ask(model: _Line, X: np.ndarray, y: np.ndarray, band: float) -> tuple[np.ndarray, ...]:
    """Prediction, ends of the Gaussian band, and log density of the targets (NaN where unknown)."""
    from scipy.stats import norm

    location, reach = model.predict(X), norm.ppf((1 + band) / 2) * model.spread
    return location, location - reach, location + reach, norm.logpdf(y, location, model.spread)


def report(unlabelled: np.ndarray, X: np.ndarray, y: np.ndarray, factors: int | None, folds: int, seed: int) -> str:
    """Which way to use the targets, in lines."""
    import numpy as np

    from mixtura.density.pretraining_ways import pretraining_report

    known = np.isfinite(y)
    parts = max(2, min(folds, int(known.sum()) // 2))
    found = pretraining_report(
        unlabelled, X[known], y[known], latent="factor", n_latent=factors or "auto", cv=parts, seed=seed
    )
    return str(found)


def draw(path: Path, y: np.ndarray, held: dict[str, Any], target: str, band: float) -> None:
    """Write the picture: predicted against observed, the factors beside ridge."""
    import numpy as np

    from mixtura.cli.regress_picture import against_observed
    from mixtura.core.page import new_figure, save_figure

    figure = new_figure(10.5, 5.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (name, found) in zip(panels, held.items(), strict=True):
        against_observed(axes, y, target, found, band)
        error = np.sqrt(np.nanmean((found.location - y) ** 2))
        axes.set_title(f"{name}: held-out RMSE {error:.4g}", fontsize=10)
    save_figure(figure, path)
