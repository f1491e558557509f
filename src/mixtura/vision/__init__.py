"""Images: networks to classify them with, sparse at equal cost among them; hyperspectral cubes taken apart into materials."""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.vision.residual_network import ResidualNetwork
    from mixtura.vision.unmixing.cubes import read_cube
    from mixtura.vision.unmixing.robust_sparse import SpectralUnmixing

__all__ = ["ResidualNetwork", "SpectralUnmixing", "read_cube"]

__getattr__ = lazy_names(
    __name__,
    {
        "ResidualNetwork": "mixtura.vision.residual_network",
        "SpectralUnmixing": "mixtura.vision.unmixing.robust_sparse",
        "read_cube": "mixtura.vision.unmixing.cubes",
    },
)
