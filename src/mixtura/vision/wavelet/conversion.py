"""Turn a residual network into one that mixes space by wavelets: each pair of its 3 x 3 convolutions becomes one block."""

import copy
from typing import TypeVar

from torch import nn

from mixtura.vision.wavelet.block import Mixer, Upsample, WaveletMixing

__all__ = ["convert_mixing"]

M = TypeVar("M", bound=nn.Module)


def convert_mixing(
    model: M,
    *,
    levels: int = 1,
    mult: int = 2,
    dropout: float = 0.0,
    upsample: Upsample = "deconv",
    mixer: Mixer = "dwt",
) -> M:
    """A copy of ``model`` with :class:`WaveletMixing` in place of its pairs of 3 x 3 convolutions, which are to be trained.

    A pair is what a module holds itself: exactly two 3 x 3 convolutions of stride 1, ungrouped, padded to keep the sides,
    from C channels to C, C divisible by 4: the basic block of a residual network, wherever it does not change resolution
    or width. The first becomes the wavelet block, the second nothing; norms, activations and the shortcut stay.

    Args:
        model: left as it is.
        levels, mult, dropout, upsample, mixer: of the wavelet blocks.
    Returns:
        the converted copy, on the device and with the dtype of the convolutions it had.
    Raises:
        ValueError: the model holds no such pair.
    Example:
        >>> from mixtura.vision import ResidualNetwork
        >>> type(convert_mixing(ResidualNetwork(8, stages=1)).blocks[0].first).__name__
        'WaveletMixing'
    """
    made = copy.deepcopy(model)
    found = 0
    for module in list(made.modules()):
        layers = [(name, child) for name, child in module.named_children() if isinstance(child, nn.Conv2d)]
        pair = [(name, layer) for name, layer in layers if _convertible(layer)]
        if len(layers) != 2 or len(pair) != 2 or pair[0][1].in_channels != pair[1][1].in_channels:
            continue
        weight = pair[0][1].weight
        block = WaveletMixing(
            pair[0][1].in_channels, levels=levels, mult=mult, dropout=dropout, upsample=upsample, mixer=mixer
        )
        setattr(module, pair[0][0], block.to(weight.device, weight.dtype))
        setattr(module, pair[1][0], nn.Identity())
        found += 1
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no module with two 3 x 3 convolutions of stride 1 from C channels to C, "
            "C divisible by 4, to convert"
        )
    return made


def _convertible(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == (1, 1)
        and layer.padding in ((1, 1), "same")
        and layer.groups == 1
        and layer.in_channels == layer.out_channels
        and layer.in_channels % 4 == 0
    )
