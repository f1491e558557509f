"""Images: networks to classify them with, by wavelets among them, sparse at equal cost too."""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.vision.image_classifier import ImageClassifier
    from mixtura.vision.residual_network import ResidualNetwork
    from mixtura.vision.wavelet import (
        WaveletClassifier,
        WaveletMixing,
        WaveletSegmenter,
        WaveletSuperResolution,
        convert_mixing,
        wavelet_lite,
    )

NAMES = {
    "ImageClassifier": "mixtura.vision.image_classifier",
    "ResidualNetwork": "mixtura.vision.residual_network",
    "WaveletClassifier": "mixtura.vision.wavelet",
    "WaveletMixing": "mixtura.vision.wavelet",
    "WaveletSegmenter": "mixtura.vision.wavelet",
    "WaveletSuperResolution": "mixtura.vision.wavelet",
    "convert_mixing": "mixtura.vision.wavelet",
    "wavelet_lite": "mixtura.vision.wavelet",
}

__all__ = [
    "ImageClassifier",
    "ResidualNetwork",
    "WaveletClassifier",
    "WaveletMixing",
    "WaveletSegmenter",
    "WaveletSuperResolution",
    "convert_mixing",
    "wavelet_lite",
]

__getattr__ = lazy_names(__name__, NAMES)
