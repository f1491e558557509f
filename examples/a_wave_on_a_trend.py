"""A wave of 80 periods on a slow trend, u'' = f on [0, 1]: solved on 400 points, with the spectrum that was learned."""

import numpy as np

from mixtura.core.page import new_figure
from mixtura.density import Poisson, SpectralProcessSolver


def truth(x: np.ndarray) -> np.ndarray:
    """What the solver should find."""
    return np.sin(500 * x) - 2 * (x - 0.5) ** 2


def source(x: np.ndarray) -> np.ndarray:
    """Its second derivative."""
    return -250_000 * np.sin(500 * x) - 4


grid, between = np.linspace(0, 1, 400), np.linspace(0, 1, 3001)
fits = [
    SpectralProcessSolver(Poisson(), kind, max_frequency=100.0).fit(grid, source, truth)
    for kind in ("gaussian", "student")
]
model = max(fits, key=lambda fit: fit.log_joint_)  # the likelier kind, not the one nearer to the truth
found = model.predict(between)
error = np.linalg.norm(found - truth(between)) / np.linalg.norm(truth(between))
print(f"{model.kind}: relative error {error:.1e}, {model.effective_components():.1f} of 30 bumps left")
for part in model.components_()[:3]:
    print(
        f"  weight {part.weight:.3f} at {part.frequency:.2f} cycles a unit of length (the wave's: {500 / (2 * np.pi):.2f})"
    )

figure = new_figure(10, 3.6)
left, right = figure.subplots(1, 2)
left.plot(between, found, linewidth=0.6)
left.set(xlabel="x", ylabel="u")
frequencies = np.linspace(0, 120, 2000)
right.semilogy(frequencies, model.spectrum(frequencies))
right.set(xlabel="cycles per unit of length", ylabel="spectral density")
figure.savefig("a_wave_on_a_trend.png", dpi=140)
print("a_wave_on_a_trend.png is written")
