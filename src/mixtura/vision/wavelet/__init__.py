"""Networks that mix space by a wavelet transform without parameters: the block, models made of it, and a conversion."""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.vision.wavelet.block import WaveletMixing
    from mixtura.vision.wavelet.conversion import convert_mixing
    from mixtura.vision.wavelet.models import WaveletClassifier, WaveletSegmenter, WaveletSuperResolution, wavelet_lite
    from mixtura.vision.wavelet.reference import load_reference_checkpoint

NAMES = {
    "WaveletClassifier": "mixtura.vision.wavelet.models",
    "WaveletMixing": "mixtura.vision.wavelet.block",
    "WaveletSegmenter": "mixtura.vision.wavelet.models",
    "WaveletSuperResolution": "mixtura.vision.wavelet.models",
    "convert_mixing": "mixtura.vision.wavelet.conversion",
    "load_reference_checkpoint": "mixtura.vision.wavelet.reference",
    "wavelet_lite": "mixtura.vision.wavelet.models",
}

__all__ = [
    "WaveletClassifier",
    "WaveletMixing",
    "WaveletSegmenter",
    "WaveletSuperResolution",
    "convert_mixing",
    "load_reference_checkpoint",
    "wavelet_lite",
]

__getattr__ = lazy_names(__name__, NAMES)
