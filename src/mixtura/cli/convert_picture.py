"""The picture of ``convert``, and its words: where the multiply-adds go, before and after."""

from pathlib import Path

from mixtura.core.flops import FlopReport
from mixtura.core.isoflop import branches, widening
from mixtura.core.page import new_figure, save_figure

__all__ = ["KEPT", "draw", "named"]

KEPT = {
    "wide": "all its weights are new",
    "parallel": "its branches are new, its embeddings, norms and head are the old ones",
    "factorized": "its factors are new, its embeddings, norms and head are the old ones",
    "doped": "it keeps the largest weights, and of the rest what the rank can hold",
}


def named(kind: str, s: float) -> str:
    """A transformation in words."""
    if kind == "wide":
        return f"wide, s = {s:g}, {widening(s):.3g} times as wide"
    if kind == "parallel":
        return f"parallel, s = {s:g}, {branches(s)} branches a layer"
    return f"{kind}, s = {s:g}"


def draw(path: Path, before: FlopReport, after: FlopReport, *, title: str) -> None:
    """A picture of where the multiply-adds go, kind by kind of layer, before and after.

    Args:
        path: .png, .svg or .pdf.
        before, after: counts of the dense and of the converted model.
        title: above it.
    """
    kinds = {kind: None for report in (before, after) for kind in _by_kind(report, dense=False)}
    figure = new_figure(8.0, 0.42 * len(kinds) + 1.6)
    axes = figure.subplots()
    rows = range(len(kinds))
    for shift, report, dense, label, color in (
        (-0.26, before, False, "dense model", "#4a5568"),
        (0.0, after, False, "converted, active weights", "#2b6cb0"),
        (0.26, after, True, "converted, masks ignored", "#bee3f8"),
    ):
        found = _by_kind(report, dense=dense)
        values = [found.get(kind, 0.0) / 1e6 for kind in kinds]
        axes.barh([row + shift for row in rows], values, height=0.24, color=color, label=label)
    axes.set_yticks(list(rows), list(kinds))
    axes.invert_yaxis()
    axes.set_xlabel("million multiply-adds of a forward pass")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _by_kind(report: FlopReport, *, dense: bool) -> dict[str, float]:
    """Multiply-adds summed over layers: the part of a name that says which projection it is."""
    found: dict[str, float] = {}
    for name, item in report.weights.items():
        words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()]
        inner = {"layers", "u", "v", "sparse"}
        plain = [word for i, word in enumerate(words) if i < 2 or word not in inner]
        kind = plain[-1] if len(plain) > 1 else words[-1]
        found[kind] = found.get(kind, 0.0) + (item.dense if dense else item.sparse)
    if report.other:
        found["attention scores"] = report.other
    return found
