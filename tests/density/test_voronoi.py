"""Losses over Voronoi cells: by hand, zero only at the truth, blind to order and gauge, an exponent for each cell."""

import numpy as np
import pytest

from mixtura.density.gated_regression import GatedRegression
from mixtura.density.voronoi import (
    RBAR,
    MixingMeasure,
    region_probabilities,
    required_active,
    voronoi_cells,
    voronoi_loss,
)

TWO = MixingMeasure.of([2.0, 1.0], [[3.0], [0.0]], 0.5, [[2.0], [-1.0]], [1.0, -1.0], [0.2, 0.3])
THREE = MixingMeasure.of(
    [0.6, 1.3, 1.0], [[4.0], [-4.0], [0.0]], 1.0, [[2.0], [-2.0], [0.5]], [1.5, -1.5, -3.0], [0.3] * 3
)
REGIONS = {frozenset({0, 2}): 0.5, frozenset({1, 2}): 0.5}


def test_a_split_atom_by_hand():
    fit = MixingMeasure.of(
        [1.5, 0.7, 1.0],
        [[3.1], [2.8], [0.0]],
        0.6,
        [[2.2], [1.9], [-1.0]],
        [1.1, 1.0, -1.0],
        [0.2, 0.25, 0.31],
    )
    assert voronoi_cells(fit, TWO) == [[0, 1], [2]]
    tau = 0.1
    by_hand = abs(2.2 - 2.0)
    by_hand += 1.5 * (0.1**2 + tau + 0.2**2 + 0.1**4 + 0.0) + 0.7 * (0.2**2 + tau + 0.1**2 + 0.0 + 0.05**2)
    by_hand += 1.0 * (tau + 0.01)
    assert voronoi_loss(fit, TWO, "over") == pytest.approx(by_hand, rel=1e-12)
    exact = 0.2 + 1.5 * (0.1 + tau + 0.2 + 0.1) + 0.7 * (0.2 + tau + 0.1 + 0.05) + 1.0 * (tau + 0.01)
    assert voronoi_loss(fit, TWO) == pytest.approx(exact, rel=1e-12)
    cubic = 0.2 + 1.5 * (0.001 + 0.001 + 0.008 + 0.001) + 0.7 * (0.008 + 0.001 + 0.001 + 0.000125) + 0.001 + 1e-6
    assert voronoi_loss(fit, TWO, "linear-gate", 3.0, slopes_shift=False) == pytest.approx(cubic, rel=1e-12)


def test_exponents_follow_the_size_of_the_cell():
    assert dict(RBAR) == {1: 1, 2: 4, 3: 6}
    for m in (1, 2, 3):
        fit = TWO.pick([0] * m + [1])
        fit = fit._replace(
            weight=np.array([2.0 / m] * m + [1.0]), intercept=fit.intercept + np.array([0.1] * m + [0.0])
        )
        assert voronoi_loss(fit, TWO, "over") == pytest.approx(2.0 * 0.1 ** RBAR[m])


def test_the_worst_set_of_active_experts_counts_and_an_empty_region_does_not():
    off = THREE._replace(intercept=THREE.intercept + np.array([0.5, 0.1, 0.0]))
    terms = [0.6 * 0.5, 1.3 * 0.1, 0.0]
    assert voronoi_loss(off, THREE, "top-k", active=2) == pytest.approx(terms[0] + terms[1])
    assert voronoi_loss(off, THREE, "top-k", active=2, regions=REGIONS) == pytest.approx(terms[0])
    only = {frozenset({1, 2}): 1.0}
    assert voronoi_loss(off, THREE, "top-k", active=2, regions=only) == pytest.approx(terms[1])


def test_with_one_active_expert_weights_and_slopes_do_not_count():
    off = THREE._replace(weight=THREE.weight * [3.0, 1.0, 1.0], slope=THREE.slope * 1.5)
    assert voronoi_loss(off, THREE, "top-k", active=1) == 0.0
    assert voronoi_loss(off._replace(variance=THREE.variance + 0.1), THREE, "top-k", active=1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("kind", "more"), [("linear-gate", {}), ("top-k", {"active": 2}), ("top-k-over", {"active": 2, "regions": REGIONS})]
)
def test_a_loss_is_zero_only_at_the_truth_and_blind_to_order_and_gauge(kind, more):
    moved = THREE._replace(slope=THREE.slope + 7.0, weight=THREE.weight * 5.0).pick([2, 0, 1])
    assert voronoi_loss(moved, THREE, kind, **more) < 1e-12
    off = THREE._replace(coef=THREE.coef + np.array([[0.0], [0.0], [0.2]]))
    again = off._replace(slope=off.slope - 2.0, weight=off.weight / 3.0).pick([1, 2, 0])
    loss = voronoi_loss(off, THREE, kind, **more)
    assert loss > 0.1 and voronoi_loss(again, THREE, kind, **more) == pytest.approx(loss, rel=1e-9)


def test_under_an_activation_weights_may_be_scaled_and_slopes_may_not_be_shifted():
    assert voronoi_loss(TWO._replace(weight=TWO.weight * 4), TWO) == 0.0
    assert voronoi_loss(TWO._replace(slope=TWO.slope + 1.0), TWO) > 1.0
    assert voronoi_loss(TWO.pick([1, 0]), TWO) == 0.0


def test_a_split_reference_is_gauged_by_its_weighted_mean_slope():
    rows = [0, 1, 2, 2]
    split = MixingMeasure.of(
        [0.6, 1.3, 0.25, 0.75], [[4], [-4], [-0.3], [0.1]], 1, THREE.coef[rows], THREE.intercept[rows], [0.3] * 4
    )
    gauged = split._replace(slope=split.slope + 2.0, weight=split.weight * 3.0).gauge([2, 3])
    np.testing.assert_allclose(gauged.slope, split.slope, atol=1e-12)
    np.testing.assert_allclose(gauged.weight, split.weight)
    want = 1.3 * 0 + 0.25 * 0.3**4 + 0.75 * 0.1**4
    assert voronoi_loss(split, THREE, "top-k-over", active=2) == pytest.approx(want)


def test_regions_of_the_inputs_and_the_experts_that_a_fit_must_activate():
    x = np.linspace(-1, 1, 1000)[:, None]
    assert region_probabilities(THREE, x, 2) == REGIONS
    assert required_active([[0], [1], [2, 3]], REGIONS) == 3
    assert required_active([[0, 3], [1], [2]], [(0, 2), (1, 2)]) == 3
    assert required_active([[0, 3], [1, 4], [2]], [(0, 1)]) == 4


def test_a_fitted_estimator_is_a_mixing_measure_in_the_users_units():
    rng = np.random.default_rng(0)
    X = rng.uniform(10, 12, (300, 1))
    y = np.where(X[:, 0] > 11, 3 * X[:, 0], -X[:, 0]) + 0.1 * rng.normal(size=300)
    model = GatedRegression(2, gate="top-k", top_k=1).fit(X, y)
    found = MixingMeasure.from_estimator(model)
    np.testing.assert_allclose(found.intercept, model.coef_ @ model.origin_ + model.intercept_)
    assert found.temperature == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: voronoi_loss(TWO, TWO, "worst"), "kind must be one of"),
        (lambda: voronoi_loss(TWO, TWO, "linear-gate", 0.5), "order must be >= 1"),
        (lambda: voronoi_loss(TWO, TWO, "top-k"), "active must be between 1 and the 2"),
        (lambda: voronoi_loss(TWO, TWO, "exact", active=1), "belong to the top-k losses"),
        (lambda: voronoi_loss(TWO, TWO.pick([0, 0])), "two equal atoms"),
        (lambda: voronoi_loss(THREE, THREE, "top-k", active=2, regions={}), "no set of 2 true experts has a region"),
        (lambda: MixingMeasure.of([1, -1], [[1], [0]], 1, [[1], [0]], [0, 0], [1, 1]), "weight must be > 0"),
        (lambda: MixingMeasure.of([1, 1], [[1], [0]], 0, [[1], [0]], [0, 0], [1, 1]), "temperature must be > 0"),
        (lambda: MixingMeasure.of([1, 1], [[1], [0]], 1, [[1], [0]], [0], [1, 1]), "intercept must have shape"),
        (lambda: MixingMeasure.of([1, 1], [[1], [np.nan]], 1, [[1], [0]], [0, 0], [1, 1]), "slope must be finite"),
        (lambda: region_probabilities(TWO, [[0.0]], 3), "k must be between 1 and n_experts=2"),
        (lambda: voronoi_loss(TWO, MixingMeasure.of([1], [[1, 0]], 1, [[1, 0]], [0], [1])), "both need the same"),
    ],
)
def test_what_cannot_be_measured_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()
