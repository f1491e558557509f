"""Models of wavelet blocks: image classes, a class a pixel, twice the resolution.

One stack serves the three, since a block keeps the shape of its maps: a stem, blocks, a head.

Shapes: B images, H height, W width.
Source: Jeevan et al. 2022 (2205.14375v5), sec. 3; heads as in the authors' package.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from mixtura.vision.wavelet.block import Mixer, Upsample, WaveletMixing

__all__ = ["STEMS", "Stem", "WaveletClassifier", "WaveletSegmenter", "WaveletSuperResolution", "wavelet_lite"]

Stem = Literal["strided", "patchify"]
STEMS = ("strided", "patchify")
HUB: dict[str, Any] = {"library_name": "mixtura", "tags": ["wavelet-mixer"], "license": "apache-2.0"}


class _Stacked(nn.Module):
    """Stem and blocks, what the three models share: (B, channels in, H, W) -> (B, channels, H / scale, W / scale)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        *,
        stem: Stem,
        stride: int,
        patch: int,
        block: dict[str, Any],
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {list(STEMS)}, got {stem!r}")
        for name, value in (("in_channels", in_channels), ("depth", depth), ("stride", stride), ("patch", patch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        blocks = [WaveletMixing(channels, **block) for _ in range(depth)]  # checks channels
        # No activation between the stem's convolutions, as in the paper's code.
        if stem == "strided":
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, channels // 2, 3, stride, 1), nn.Conv2d(channels // 2, channels, 3, stride, 1)
            )
            self.scale = stride * stride
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, channels // 4, 3, 1, 1),
                nn.Conv2d(channels // 4, channels // 2, 3, 1, 1),
                nn.Conv2d(channels // 2, channels, patch, patch),
                nn.GELU(),
                nn.BatchNorm2d(channels),
            )
            self.scale = patch
        self.in_channels = in_channels
        self.blocks = nn.Sequential(*blocks)

    def features(self, images: Tensor) -> Tensor:
        """Maps that the head reads, (B, channels, H / scale, W / scale)."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            hint = "; add the batch's axis: images[None]" if images.dim() == 3 else ""
            raise ValueError(f"images must have shape (B, {self.in_channels}, H, W), got {tuple(images.shape)}{hint}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating, got {images.dtype}; convert them with images.float() / 255")
        return self.blocks(self.stem(images))


class WaveletClassifier(_Stacked, PyTorchModelHubMixin, **HUB):  # type: ignore[misc]
    """Class logits of images, (B, in_channels, H, W) -> (B, classes).

    Args:
        in_channels: of the images.
        num_classes: number of classes; or give ``labels``.
        channels: width of the blocks, divisible by 4.
        depth: number of blocks.
        levels: of each block's transform, 1 to 4.
        stem: ``"strided"``: two 3 x 3 convolutions, each of ``stride``; ``"patchify"``: two, then one of ``patch`` by
            ``patch`` pixels, GELU and batch norm.
        stride: of each of the strided stem's convolutions.
        patch: side of a patch.
        mult, inner, dropout, wavelet, upsample, mixer: of the blocks, see :class:`WaveletMixing`.
        labels: names of the classes, which ``predict`` then returns.
    Raises:
        ValueError: an argument outside what is named, images of another shape or type.
    Example:
        >>> WaveletClassifier(1, 10, channels=8, depth=5)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        channels: int = 64,
        depth: int = 6,
        levels: int = 1,
        stem: Stem = "strided",
        stride: int = 1,
        patch: int = 4,
        mult: int = 2,
        inner: int | None = None,
        dropout: float = 0.5,
        wavelet: str = "haar",
        upsample: Upsample = "deconv",
        mixer: Mixer = "dwt",
        labels: Sequence[str] | None = None,
    ) -> None:
        if labels is not None and len(labels) != num_classes:
            raise ValueError(f"labels must name {num_classes} classes, got {len(labels)}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        block: dict[str, Any] = {"levels": levels, "mult": mult, "inner": inner, "dropout": dropout}
        block |= {"wavelet": wavelet, "upsample": upsample, "mixer": mixer}
        super().__init__(in_channels, channels, depth, stem=stem, stride=stride, patch=patch, block=block)
        self.labels = None if labels is None else list(labels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))

    @torch.inference_mode()
    def predict(self, images: Tensor) -> list[str] | Tensor:
        """Most likely class of each image: its name where ``labels`` are known, else its number, (B,)."""
        with _evaluating(self):
            numbers = self(images).argmax(1)
        return numbers if self.labels is None else [self.labels[i] for i in numbers.tolist()]


class WaveletSegmenter(_Stacked, PyTorchModelHubMixin, **HUB):  # type: ignore[misc]
    """Class logits of every pixel, (B, in_channels, H, W) -> (B, classes, H, W).

    As many transposed convolutions bring the maps back as halvings the stem made: ``stride`` must be 1 or 2. The paper's
    stem has stride 2 and 2. Odd sides are cropped back.

    Args: as :class:`WaveletClassifier`, strided stem.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 2,
        channels: int = 64,
        depth: int = 6,
        levels: int = 1,
        stride: int = 2,
        mult: int = 2,
        inner: int | None = None,
        dropout: float = 0.5,
        wavelet: str = "haar",
        upsample: Upsample = "deconv",
        mixer: Mixer = "dwt",
    ) -> None:
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}; the head doubles the sides once for every halving")
        block: dict[str, Any] = {"levels": levels, "mult": mult, "inner": inner, "dropout": dropout}
        block |= {"wavelet": wavelet, "upsample": upsample, "mixer": mixer}
        super().__init__(in_channels, channels, depth, stem="strided", stride=stride, patch=1, block=block)
        if stride == 2:
            self.head = nn.Sequential(
                nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1),
                nn.ConvTranspose2d(channels // 2, channels // 4, 4, stride=2, padding=1),
                nn.Conv2d(channels // 4, num_classes, 1),
            )
        else:
            self.head = nn.Sequential(nn.Conv2d(channels, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))[..., : images.shape[-2], : images.shape[-1]]

    @torch.inference_mode()
    def segment(self, images: Tensor) -> Tensor:
        """Most likely class of each pixel, (B, H, W)."""
        with _evaluating(self):
            return self(images).argmax(1)


class WaveletSuperResolution(_Stacked, PyTorchModelHubMixin, **HUB):  # type: ignore[misc]
    """Images of twice the sides, (B, channels in, H, W) -> (B, channels in, 2H, 2W).

    Args: as :class:`WaveletClassifier`, strided stem of stride 1.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        depth: int = 6,
        levels: int = 1,
        mult: int = 2,
        inner: int | None = None,
        dropout: float = 0.5,
        wavelet: str = "haar",
        upsample: Upsample = "deconv",
        mixer: Mixer = "dwt",
    ) -> None:
        block: dict[str, Any] = {"levels": levels, "mult": mult, "inner": inner, "dropout": dropout}
        block |= {"wavelet": wavelet, "upsample": upsample, "mixer": mixer}
        super().__init__(in_channels, channels, depth, stem="strided", stride=1, patch=1, block=block)
        self.head = nn.Sequential(
            nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1),
            nn.Conv2d(channels // 2, in_channels, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @torch.inference_mode()
    def upscale(self, images: Tensor) -> Tensor:
        """The images at twice the sides, (B, channels in, 2H, 2W)."""
        with _evaluating(self):
            return self(images)


def wavelet_lite(channels: int, depth: int, **options: Any) -> WaveletClassifier:
    """The paper's small classifiers by their names, WaveMix-Lite-``channels``/``depth``: one level, no dropout.

    Args:
        channels, depth: 8/5, 8/10, 32/7 and 64/6 are in the paper's table.
        options: of :class:`WaveletClassifier`.
    Example:
        >>> sum(p.numel() for p in wavelet_lite(8, 5, in_channels=1).parameters())
        7156
    """
    return WaveletClassifier(channels=channels, depth=depth, levels=1, **({"dropout": 0.0} | options))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)
