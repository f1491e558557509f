"""Images: networks to classify them with, sparse at equal cost among them."""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.vision.residual_network import ResidualNetwork

__all__ = ["ResidualNetwork"]

__getattr__ = lazy_names(__name__, {"ResidualNetwork": "mixtura.vision.residual_network"})
