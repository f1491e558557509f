"""Separation: what a query asks for, out of a recording. Each name imports its module when it is first used."""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.audio.separate.metrics import SeparationScores, bss_eval, si_sdr
    from mixtura.audio.separate.noise_invariant import NoiseInvariantLoss, query_loss
    from mixtura.audio.separate.query import QuerySeparator, apply_masks
    from mixtura.audio.separate.ready import SOUNDS, default_separator, train_default
    from mixtura.audio.separate.training import Mixing, fit_from_text, fit_from_video, fit_separator
    from mixtura.audio.separate.unet import SpectrumUNet

__all__ = [
    "SOUNDS",
    "Mixing",
    "NoiseInvariantLoss",
    "QuerySeparator",
    "SeparationScores",
    "SpectrumUNet",
    "apply_masks",
    "bss_eval",
    "default_separator",
    "fit_from_text",
    "fit_from_video",
    "fit_separator",
    "query_loss",
    "si_sdr",
    "train_default",
]

__getattr__ = lazy_names(
    __name__,
    {
        "SOUNDS": "mixtura.audio.separate.ready",
        "Mixing": "mixtura.audio.separate.training",
        "NoiseInvariantLoss": "mixtura.audio.separate.noise_invariant",
        "QuerySeparator": "mixtura.audio.separate.query",
        "SeparationScores": "mixtura.audio.separate.metrics",
        "SpectrumUNet": "mixtura.audio.separate.unet",
        "apply_masks": "mixtura.audio.separate.query",
        "bss_eval": "mixtura.audio.separate.metrics",
        "default_separator": "mixtura.audio.separate.ready",
        "fit_from_text": "mixtura.audio.separate.training",
        "fit_from_video": "mixtura.audio.separate.training",
        "fit_separator": "mixtura.audio.separate.training",
        "query_loss": "mixtura.audio.separate.noise_invariant",
        "si_sdr": "mixtura.audio.separate.metrics",
        "train_default": "mixtura.audio.separate.ready",
    },
)
