"""Where the channels of the larger width are: shares by kind of layer, and layer by layer."""

import re
from typing import Any

from torch import nn

from mixtura.core.page import new_figure
from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear

__all__ = ["high_shares", "share_figure"]


def high_shares(model: nn.Module) -> dict[str, float]:
    """Share of the output channels at the larger width, kind of layer (``"v_proj"``) -> share in [0, 1], largest first."""
    counts: dict[str, list[int]] = {}
    for _, kind, layer in _layers(model):
        count = counts.setdefault(kind, [0, 0])
        count[0] += len(layer.high.codes)
        count[1] += layer.out_features
    shares = {kind: high / rows for kind, (high, rows) in counts.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def share_figure(model: nn.Module) -> Any:
    """Kinds of layers by depth, coloured by the share of channels at the larger width; layers without are left white."""
    kinds = list(high_shares(model))
    found = list(_layers(model))
    depth = 1 + max(index for index, _, _ in found)
    counts = {(kind, index): [0, 0] for kind in kinds for index in range(depth)}
    for index, kind, layer in found:
        counts[kind, index][0] += len(layer.high.codes)
        counts[kind, index][1] += layer.out_features
    grid = [
        [100 * counts[kind, i][0] / counts[kind, i][1] if counts[kind, i][1] else float("nan") for i in range(depth)]
        for kind in kinds
    ]
    figure = new_figure(max(5.0, 0.26 * depth + 2.5), 0.36 * len(kinds) + 1.2)
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="channels at high bits, %")
    return figure


def _layers(model: nn.Module) -> Any:
    """(index of the decoder layer, kind, mixed layer) of all of them; experts' matrices by what they do."""
    for name, module in model.named_modules():
        if isinstance(module, MixedChannelLinear):
            number = re.search(r"\.(\d+)\.", name)
            expert = re.search(r"\.(up|down)\.\d+$", name)
            kind = f"experts {expert.group(1)}" if expert else name.rpartition(".")[2]
            yield int(number.group(1)) if number else 0, kind, module
