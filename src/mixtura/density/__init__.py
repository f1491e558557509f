"""Populations taken apart: mixtures of Gaussians, processes whose scale or spectrum is a mixture, unnormalised models.

>>> from mixtura.density import GaussianMixture     # doctest: +SKIP

Estimators in scikit-learn's conventions: NumPy in and out, torch inside. Each name imports its module when it is first
used.
"""

from mixtura._lazy import lazy_names

__all__ = [
    "Advection",
    "AliasingWarning",
    "AllenCahn",
    "Helmholtz",
    "Linear",
    "MultiscaleSolver",
    "Poisson",
    "SpectralMixture1D",
    "SpectralProcessSolver",
    "Term",
    "Terms",
]

NAMES: dict[str, str] = {
    **dict.fromkeys(
        ("Advection", "AllenCahn", "Helmholtz", "Linear", "Poisson", "Term", "Terms"), "mixtura.density.grid_equations"
    ),
    **dict.fromkeys(
        ("AliasingWarning", "MultiscaleSolver", "SpectralProcessSolver"), "mixtura.density.equation_process"
    ),
    "SpectralMixture1D": "mixtura.density.spectral_mixture",
}

__getattr__ = lazy_names(__name__, NAMES)
