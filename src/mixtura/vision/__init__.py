"""Images: networks to classify them with, sparse at equal cost too; hyperspectral cubes taken apart into materials."""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.vision.image_classifier import ImageClassifier
    from mixtura.vision.residual_network import ResidualNetwork
    from mixtura.vision.unmixing import SpectralUnmixing, read_cube
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
    "SpectralUnmixing": "mixtura.vision.unmixing.robust_sparse",
    "WaveletClassifier": "mixtura.vision.wavelet",
    "WaveletMixing": "mixtura.vision.wavelet",
    "WaveletSegmenter": "mixtura.vision.wavelet",
    "WaveletSuperResolution": "mixtura.vision.wavelet",
    "convert_mixing": "mixtura.vision.wavelet",
    "read_cube": "mixtura.vision.unmixing.cubes",
    "wavelet_lite": "mixtura.vision.wavelet",
}

__all__ = [
    "ImageClassifier",
    "ResidualNetwork",
    "SpectralUnmixing",
    "WaveletClassifier",
    "WaveletMixing",
    "WaveletSegmenter",
    "WaveletSuperResolution",
    "convert_mixing",
    "read_cube",
    "wavelet_lite",
]

__getattr__ = lazy_names(__name__, NAMES)
