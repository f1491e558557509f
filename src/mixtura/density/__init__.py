"""Populations taken apart: mixtures of Gaussians, processes whose scale or spectrum is a mixture, unnormalised models.

>>> from mixtura.density import GaussianMixture     # doctest: +SKIP

Estimators in scikit-learn's conventions: NumPy in and out, torch inside. Each name imports its module when it is first
used.
"""

from mixtura._lazy import lazy_names

__all__ = [
    "BurrXII",
    "CompositionalLikelihood",
    "EnergyDensity",
    "FixedScale",
    "GatedRegression",
    "GaussianMixture",
    "InverseGamma",
    "MixingMeasure",
    "NoiseContrastive",
    "ScaleMixtureClassifier",
    "ScaleMixtureGP",
    "ScaleMixtureRegressor",
    "WideNetworkKernel",
    "activation_independence",
    "kmeans_plus_plus",
    "lloyd",
    "merge_components",
    "ood_score",
    "rate_experiment",
    "region_probabilities",
    "required_active",
    "select_components",
    "split_component",
    "suggest_active",
    "voronoi_cells",
    "voronoi_loss",
]

NAMES: dict[str, str] = {
    "BurrXII": "mixtura.density.scale_priors",
    "CompositionalLikelihood": "mixtura.density.unnormalized",
    "EnergyDensity": "mixtura.density.energy_model",
    "FixedScale": "mixtura.density.scale_priors",
    "GatedRegression": "mixtura.density.gated_regression",
    "GaussianMixture": "mixtura.density.mixture",
    "InverseGamma": "mixtura.density.scale_priors",
    "MixingMeasure": "mixtura.density.voronoi",
    "NoiseContrastive": "mixtura.density.unnormalized",
    "ScaleMixtureClassifier": "mixtura.density.scale_mixture_classifier",
    "ScaleMixtureGP": "mixtura.density.scale_mixture_process",  # another name of ScaleMixtureRegressor
    "ScaleMixtureRegressor": "mixtura.density.scale_mixture_process",
    "WideNetworkKernel": "mixtura.density.wide_network_kernel",
    "activation_independence": "mixtura.density.activations",
    "kmeans_plus_plus": "mixtura.density.starts",
    "lloyd": "mixtura.density.starts",
    "merge_components": "mixtura.density.split_and_merge",
    "ood_score": "mixtura.density.energy_model",
    "rate_experiment": "mixtura.density.rates",
    "region_probabilities": "mixtura.density.voronoi",
    "required_active": "mixtura.density.voronoi",
    "select_components": "mixtura.density.selection",
    "split_component": "mixtura.density.split_and_merge",
    "suggest_active": "mixtura.density.active_experts",
    "voronoi_cells": "mixtura.density.voronoi",
    "voronoi_loss": "mixtura.density.voronoi",
}

__getattr__ = lazy_names(__name__, NAMES)
