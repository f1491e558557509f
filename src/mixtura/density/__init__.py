"""Populations taken apart: mixtures of Gaussians, processes whose scale or spectrum is a mixture, unnormalised models.

>>> from mixtura.density import GaussianMixture     # doctest: +SKIP

Estimators in scikit-learn's conventions: NumPy in and out, torch inside. Each name imports its module when it is first
used.
"""

from mixtura._lazy import lazy_names

__all__ = [
    "AdjustedSDPClustering",
    "Advection",
    "AliasingWarning",
    "AllenCahn",
    "BurrXII",
    "CompositionalLikelihood",
    "EnergyDensity",
    "FixedScale",
    "GatedRegression",
    "GaussianMixture",
    "Helmholtz",
    "InverseGamma",
    "Linear",
    "MixingMeasure",
    "MultiscaleSolver",
    "NoiseContrastive",
    "Poisson",
    "ScaleMixtureClassifier",
    "ScaleMixtureGP",
    "ScaleMixtureRegressor",
    "SpectralMixture1D",
    "SpectralProcessSolver",
    "Term",
    "Terms",
    "WideNetworkKernel",
    "activation_independence",
    "kmeans_plus_plus",
    "kmeans_sdp",
    "lloyd",
    "membership_lower_bound",
    "merge_components",
    "ood_score",
    "rate_experiment",
    "region_probabilities",
    "required_active",
    "select_components",
    "solve_membership_sdp",
    "split_component",
    "suggest_active",
    "voronoi_cells",
    "voronoi_loss",
]

NAMES: dict[str, str] = {
    "AdjustedSDPClustering": "mixtura.density.adjusted_clustering",
    "Advection": "mixtura.density.grid_equations",
    "AliasingWarning": "mixtura.density.equation_process",
    "AllenCahn": "mixtura.density.grid_equations",
    "BurrXII": "mixtura.density.scale_priors",
    "CompositionalLikelihood": "mixtura.density.unnormalized",
    "EnergyDensity": "mixtura.density.energy_model",
    "FixedScale": "mixtura.density.scale_priors",
    "GatedRegression": "mixtura.density.gated_regression",
    "GaussianMixture": "mixtura.density.mixture",
    "Helmholtz": "mixtura.density.grid_equations",
    "InverseGamma": "mixtura.density.scale_priors",
    "Linear": "mixtura.density.grid_equations",
    "MixingMeasure": "mixtura.density.voronoi",
    "MultiscaleSolver": "mixtura.density.equation_process",  # another name of SpectralProcessSolver
    "NoiseContrastive": "mixtura.density.unnormalized",
    "Poisson": "mixtura.density.grid_equations",
    "ScaleMixtureClassifier": "mixtura.density.scale_mixture_classifier",
    "ScaleMixtureGP": "mixtura.density.scale_mixture_process",  # another name of ScaleMixtureRegressor
    "ScaleMixtureRegressor": "mixtura.density.scale_mixture_process",
    "SpectralMixture1D": "mixtura.density.spectral_mixture",
    "SpectralProcessSolver": "mixtura.density.equation_process",
    "Term": "mixtura.density.grid_equations",
    "Terms": "mixtura.density.grid_equations",
    "WideNetworkKernel": "mixtura.density.wide_network_kernel",
    "activation_independence": "mixtura.density.activations",
    "kmeans_plus_plus": "mixtura.density.starts",
    "kmeans_sdp": "mixtura.density.semidefinite",
    "lloyd": "mixtura.density.starts",
    "membership_lower_bound": "mixtura.density.membership_program",
    "merge_components": "mixtura.density.split_and_merge",
    "ood_score": "mixtura.density.energy_model",
    "rate_experiment": "mixtura.density.rates",
    "region_probabilities": "mixtura.density.voronoi",
    "required_active": "mixtura.density.voronoi",
    "select_components": "mixtura.density.selection",
    "solve_membership_sdp": "mixtura.density.semidefinite",
    "split_component": "mixtura.density.split_and_merge",
    "suggest_active": "mixtura.density.active_experts",
    "voronoi_cells": "mixtura.density.voronoi",
    "voronoi_loss": "mixtura.density.voronoi",
}

__getattr__ = lazy_names(__name__, NAMES)
