"""Hyperspectral unmixing: which materials an image shows, and what share of each is in every pixel."""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.vision.unmixing.constrained import fcls, nnls_unmix, sunsal
    from mixtura.vision.unmixing.cubes import Cube, read_cube
    from mixtura.vision.unmixing.robust_sparse import SpectralUnmixing
    from mixtura.vision.unmixing.scores import abundance_rmse, match_endmembers, sad, spectral_angles
    from mixtura.vision.unmixing.starts import estimate_count, estimate_noise, vca, vca_spectra, whitening

__all__ = [
    "Cube",
    "SpectralUnmixing",
    "abundance_rmse",
    "estimate_count",
    "estimate_noise",
    "fcls",
    "match_endmembers",
    "nnls_unmix",
    "read_cube",
    "sad",
    "spectral_angles",
    "sunsal",
    "vca",
    "vca_spectra",
    "whitening",
]

_MODULES = {
    "constrained": ("fcls", "nnls_unmix", "sunsal"),
    "cubes": ("Cube", "read_cube"),
    "robust_sparse": ("SpectralUnmixing",),
    "scores": ("abundance_rmse", "match_endmembers", "sad", "spectral_angles"),
    "starts": ("estimate_count", "estimate_noise", "vca", "vca_spectra", "whitening"),
}

__getattr__ = lazy_names(
    __name__, {name: f"mixtura.vision.unmixing.{module}" for module, names in _MODULES.items() for name in names}
)
