"""The Gaussian mean example by quadrature: what is flat, what is not, and one coincidence."""

import numpy as np
import pytest

from mixtura.density.landscape import (
    LOG_Z,
    contrast_gradient,
    contrast_hessian,
    contrast_steps,
    fewest_contrast_steps,
    likelihood_gradient,
)

# Computed once with another program and another rule of quadrature.
SMALLEST = {1: 0.213, 2: 0.0569, 4: 0.00206, 6: 3.8e-5, 8: 3.5e-7}
CONDITION = {1: 2.9, 2: 9.2, 4: 88.0, 6: 553.0, 8: 2420.0, 16: 1.2e5}


@pytest.mark.parametrize("distance", [1, 2, 4, 6, 8, 16])
def test_the_likelihood_has_curvature_one_and_one_step_of_size_one_lands(distance: int):
    for theta in (0.0, distance / 2, distance):
        slope = (likelihood_gradient(distance, theta + 1e-3) - likelihood_gradient(distance, theta - 1e-3)) / 2e-3
        assert slope == pytest.approx(1, abs=1e-6)
    assert 0.0 - likelihood_gradient(distance, 0.0) == pytest.approx(distance, abs=1e-9)


def test_the_hessian_of_noise_contrast_flattens_as_recorded():
    for distance, smallest in SMALLEST.items():
        # Two or three digits were recorded.
        found = np.linalg.eigvalsh(contrast_hessian(distance))
        assert found[0] == pytest.approx(smallest, rel=0.015)
        assert found[1] / found[0] == pytest.approx(CONDITION[distance], rel=0.02)
    far = np.linalg.eigvalsh(contrast_hessian(16))
    assert 5.4e-19 / 1.5 < far[0] < 5.4e-19 * 1.5
    assert far[1] / far[0] == pytest.approx(CONDITION[16], rel=0.02)


def test_the_hessian_is_the_slope_of_the_gradient():
    for distance in (1.0, 3.0):
        shift = 1e-4
        columns = [
            (
                contrast_gradient(distance, distance + dt, LOG_Z + dc)
                - contrast_gradient(distance, distance - dt, LOG_Z - dc)
            )
            / (2 * shift)
            for dt, dc in ((shift, 0.0), (0.0, shift))
        ]
        np.testing.assert_allclose(np.array(columns).T, contrast_hessian(distance), rtol=1e-6, atol=1e-9)


def test_noise_contrast_takes_more_steps_the_farther_the_data():
    counts = [fewest_contrast_steps(distance, most=400, tries=20) for distance in (1, 2, 3)]
    assert counts[0] < counts[1] < counts[2]
    # Six and more standard deviations: no step size gets there in a thousand steps.
    assert contrast_steps(6, 4.0, log_z=LOG_Z - 1) > 1000


@pytest.mark.parametrize("distance", [1, 4, 8])
def test_from_the_noise_law_itself_a_step_of_two_lands_by_coincidence(distance: int):
    np.testing.assert_allclose(contrast_gradient(distance, 0.0, LOG_Z), [-distance / 2, 0], atol=1e-9)
    assert contrast_steps(distance, 2.0, log_z=LOG_Z) == 1
