"""Populations taken apart: mixtures of Gaussians, processes whose scale or spectrum is a mixture, unnormalised models.

>>> from mixtura.density import GaussianMixture     # doctest: +SKIP

Estimators in scikit-learn's conventions: NumPy in and out, torch inside. Each name imports its module when it is first
used.
"""

from mixtura._lazy import lazy_names

__all__: list[str] = []

NAMES: dict[str, str] = {
    "BurrXII": "mixtura.density.scale_priors",
    "FixedScale": "mixtura.density.scale_priors",
    "InverseGamma": "mixtura.density.scale_priors",
    "ScaleMixtureClassifier": "mixtura.density.scale_mixture_classifier",
    "ScaleMixtureGP": "mixtura.density.scale_mixture_process",  # another name of ScaleMixtureRegressor
    "ScaleMixtureRegressor": "mixtura.density.scale_mixture_process",
    "WideNetworkKernel": "mixtura.density.wide_network_kernel",
}

__getattr__ = lazy_names(__name__, NAMES)
