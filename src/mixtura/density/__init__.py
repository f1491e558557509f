"""Populations taken apart: mixtures of Gaussians, processes whose scale or spectrum is a mixture, unnormalised models.

>>> from mixtura.density import GaussianMixture     # doctest: +SKIP

Estimators in scikit-learn's conventions: NumPy in and out, torch inside. Each name imports its module when it is first
used.
"""

from mixtura._lazy import lazy_names

__all__ = [
    "CompositionalLikelihood",
    "EnergyDensity",
    "GaussianMixture",
    "NoiseContrastive",
    "kmeans_plus_plus",
    "lloyd",
    "merge_components",
    "ood_score",
    "select_components",
    "split_component",
]

NAMES: dict[str, str] = {
    "CompositionalLikelihood": "mixtura.density.unnormalized",
    "EnergyDensity": "mixtura.density.energy_model",
    "GaussianMixture": "mixtura.density.mixture",
    "NoiseContrastive": "mixtura.density.unnormalized",
    "kmeans_plus_plus": "mixtura.density.starts",
    "lloyd": "mixtura.density.starts",
    "merge_components": "mixtura.density.split_and_merge",
    "ood_score": "mixtura.density.energy_model",
    "select_components": "mixtura.density.selection",
    "split_component": "mixtura.density.split_and_merge",
}

__getattr__ = lazy_names(__name__, NAMES)
