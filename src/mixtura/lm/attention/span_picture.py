"""How far each head looks, as a picture."""

from typing import Any

from mixtura.core.page import new_figure
from mixtura.lm.attention.span_rules import SpanPlan

__all__ = ["spans_figure"]


def spans_figure(plan: SpanPlan, length: int) -> Any:
    """Layers by key/value heads, coloured by the tokens that each keeps of ``length``."""
    layers, heads = plan.shape
    figure = new_figure(max(5.0, 0.26 * layers + 2.5), 0.3 * heads + 1.6)
    axes = figure.add_subplot()
    image = axes.imshow(plan.spans(length).T, aspect="auto", cmap="viridis", vmin=0, vmax=length)
    axes.set(xlabel="layer", ylabel="key/value head", yticks=range(heads))
    axes.set_title(f"{100 * plan.density(length):.0f} % of the cache at {length} tokens", loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, label="tokens kept")
    return figure
