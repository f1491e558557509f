"""What the claim computes by itself agrees with the library, and its parts are honest."""

import numpy as np

from mixtura.claims import scale_mixture_gp as claim
from mixtura.density import InverseGamma, ScaleMixtureRegressor, WideNetworkKernel


def test_the_spectrum_gives_the_evidence_that_a_fit_gives():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(9, 2)), rng.normal(size=9)
    kernel, prior = WideNetworkKernel(2, "erf", 2.0, 0.1), InverseGamma(2.0, 2.0)
    model = ScaleMixtureRegressor(kernel, scale_prior=prior, noise=0.03, optimize=False, normalize_y=False).fit(*train)
    assert abs(claim.Spectrum.of(kernel, train).log_evidence(prior, 0.03) - model.log_evidence_) < 1e-9


def test_every_seed_has_the_same_test_part_and_no_row_twice():
    x, y = claim.synthetic("A")
    parts = [claim.paper_parts(x, y, seed) for seed in (0, 1)]
    assert [len(part[1]) for part in parts[0]] == [80, 10, 10]

    def raw(p):  # undo the scaling by the training part through the known rows
        return np.concatenate([part[0] for part in p])[:, 0]

    for p in parts:
        assert len(np.unique(np.round(raw(p), 9))) == 100
    tests = [np.argsort(p[2][0][:, 0]).tolist() for p in parts]
    assert tests[0] == tests[1]
    assert not np.array_equal(parts[0][0][1], parts[1][0][1])


def test_training_parts_are_standardised_and_constant_columns_survive():
    train, test = claim.standardised(
        (np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([0.0, 2.0])), (np.ones((1, 2)), np.ones(1))
    )
    np.testing.assert_array_equal(train[0], [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(test[0], [[-1, -4]])


def test_every_table_has_enough_rows_for_the_largest_training_part():
    for name in claim.TABLES:
        X, y = claim.table(name)
        assert len(X) == len(y) >= max(claim.SIZES) + 30
    assert claim.table("breast_cancer")[0].shape[1] == 6
