"""Kernels with a mixture as spectrum: derivatives against 50 digits, the spectrum against the Fourier transform."""

import math

import mpmath
import pytest
import torch

from mixtura.density.spectral_mixture import SpectralMixture1D

DISTANCES = (0.0, 1e-8, 0.1, 3.0, -0.1)


def small(kind: str, *, trend: float | None = None) -> SpectralMixture1D:
    """Three bumps of different weight, width and frequency."""
    kernel = SpectralMixture1D(kind, 3, 2.0, trend=trend)
    with torch.no_grad():
        kernel.raw_weight.copy_(torch.tensor([0.5, 0.3, 0.9]).log())
        kernel.log_scale.copy_(torch.tensor([-0.7, 0.2, 0.5]))
        kernel.frequency.copy_(torch.tensor([0.0, 0.7, 1.9]))
    return kernel


def exact(kernel: SpectralMixture1D, d: mpmath.mpf) -> mpmath.mpf:
    """k(d) in mpmath, from the definition."""
    total = mpmath.mpf(0)
    rows = list(zip(kernel.weights().tolist(), kernel.log_scale.tolist(), kernel.frequency.tolist(), strict=True))
    for weight, log_scale, frequency in rows:
        if kernel.kind == "gaussian":
            decay = mpmath.exp(-mpmath.exp(log_scale) * d**2)
        else:
            decay = matern(mpmath.exp(log_scale), d)
        total += weight * decay * mpmath.cos(2 * mpmath.pi * frequency * d)
    if kernel.trend is not None:
        total += mpmath.exp(kernel.trend[0].item()) * matern(mpmath.exp(kernel.trend[1].item()), d)
    return total


def matern(scale: mpmath.mpf, d: mpmath.mpf) -> mpmath.mpf:
    t = mpmath.sqrt(5) * scale * abs(d)
    return (1 + t + t**2 / 3) * mpmath.exp(-t)


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("trend", [None, 2.0])
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_every_derivative_equals_finite_differences_of_the_definition_at_zero_too(kind: str, trend, order: int):
    kernel = small(kind, trend=trend)
    got = kernel(torch.tensor(DISTANCES, dtype=torch.float64), order).tolist()
    with mpmath.workdps(60):
        # A Matern decay is not analytic at 0, where a central difference of step h errs by about h: 1e-13 is enough.
        step = mpmath.mpf(10) ** -13
        for d, value in zip(DISTANCES, got, strict=True):
            parts = [
                (-1) ** j
                * mpmath.binomial(order, j)
                * exact(kernel, mpmath.mpf(d) + (mpmath.mpf(order) / 2 - j) * step)
                for j in range(order + 1)
            ]
            want = mpmath.fsum(parts) / step**order
            assert abs(value - want) <= 1e-8 * max(1, abs(want)), (d, value, want)


@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_the_second_derivative_at_zero_is_the_most_negative_one_in_closed_form(kind: str):
    kernel = small(kind)
    m, scale = 2 * math.pi * kernel.frequency, kernel.log_scale.exp()
    bend = 2 * scale if kind == "gaussian" else 5 * scale**2 / 3
    want = -(kernel.weights() * (bend + m**2)).sum()
    torch.testing.assert_close(kernel(torch.zeros((), dtype=torch.float64), 2), want, rtol=1e-13, atol=0)
    assert (
        float(kernel(torch.zeros((), dtype=torch.float64), 1))
        == 0
        == float(kernel(torch.zeros((), dtype=torch.float64), 3))
    )


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_autograd_reaches_every_parameter_through_a_derivative(kind: str, order: int):
    kernel = small(kind, trend=2.0)
    d = torch.tensor([0.0, 0.3], dtype=torch.float64)
    names = [name for name, _ in kernel.named_parameters()]

    def by_parameters(*values):
        return torch.func.functional_call(kernel, dict(zip(names, values, strict=True)), (d, order))

    assert torch.autograd.gradcheck(by_parameters, [p.detach().clone().requires_grad_() for p in kernel.parameters()])


@pytest.mark.parametrize("trend", [None, 2.0])
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_the_spectrum_integrates_to_the_variance_and_is_the_fourier_transform_of_the_kernel(kind: str, trend):
    kernel = small(kind, trend=trend)
    with torch.no_grad():
        # The Student tail falls as s^-6: beyond 400 lies less than 1e-9 of it.
        s = torch.linspace(-400, 400, 800_001, dtype=torch.float64)
        total = torch.trapezoid(kernel.spectrum(s), s)
        torch.testing.assert_close(total, kernel(torch.zeros((), dtype=torch.float64)), rtol=1e-7, atol=0)
        # k has died out at |d| = 40; the transform of its samples at 1/64 repeats every 64, where S is below 1e-7.
        n, h = 5120, 1 / 64
        d = (torch.arange(n, dtype=torch.float64) - n // 2) * h
        transform = torch.fft.fftshift(torch.fft.fft(torch.fft.ifftshift(kernel(d)))).real * h
        grid = torch.fft.fftshift(torch.fft.fftfreq(n, h)).double()
        near = grid.abs() < 4
        torch.testing.assert_close(transform[near], kernel.spectrum(grid)[near], rtol=0, atol=1e-6)


def test_equal_weights_count_as_all_components_and_one_weight_as_one():
    kernel = SpectralMixture1D(n_components=8, max_frequency=4.0)
    assert kernel.effective_components() == pytest.approx(8)
    with torch.no_grad():
        kernel.raw_weight[1:] = -800.0
    assert kernel.effective_components() == pytest.approx(1)
    assert kernel.components()[0].frequency == 0


@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_bumps_set_by_their_spacing_answer_the_same_in_any_unit_of_length(kind: str):
    meters, millimeters = (SpectralMixture1D(kind, 5, 8.0 / unit, log_scale=None) for unit in (1.0, 1000.0))
    d = torch.linspace(0, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(meters(d), millimeters(1000 * d), rtol=1e-12, atol=1e-14)


def test_clamped_linear_weights_are_there_for_comparison():
    kernel = SpectralMixture1D(n_components=2, max_frequency=1.0, log_weights=False)
    with torch.no_grad():
        kernel.raw_weight.copy_(torch.tensor([-0.2, 0.5]))
    assert kernel.weights().tolist() == [0.0, 0.5]


def test_what_a_kernel_does_not_have_is_refused():
    with pytest.raises(ValueError, match="at most 4 for a Matern-5/2 decay"):
        small("student")(torch.zeros(1), 5)
    with pytest.raises(ValueError, match="at most 4 for a Matern-5/2 decay"):
        small("gaussian", trend=1.0)(torch.zeros(1), 5)
    assert torch.isfinite(small("gaussian")(torch.zeros(1), 6)).all()
    with pytest.raises(ValueError, match="order must be >= 0, got -1"):
        small("gaussian")(torch.zeros(1), -1)
    with pytest.raises(ValueError, match=r"kind must be one of \['gaussian', 'student'\], got 'laplace'"):
        SpectralMixture1D("laplace")
    with pytest.raises(ValueError, match="n_components must be at least 1"):
        SpectralMixture1D(n_components=0)
    with pytest.raises(ValueError, match="max_frequency must be finite and >= 0"):
        SpectralMixture1D(max_frequency=math.inf)


def test_many_distances_are_worth_what_each_is_alone():
    kernel = small("gaussian")
    d = torch.linspace(-1, 1, 30_000, dtype=torch.float64).reshape(100, 300)
    many = kernel(d, 2)
    for i, j in ((0, 0), (27, 92), (99, 299)):
        torch.testing.assert_close(many[i, j], kernel(d[i, j], 2), rtol=1e-13, atol=1e-12)
    assert kernel(d[:0]).shape == (0, 300)
