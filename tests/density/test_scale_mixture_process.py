"""The regressor: against multivariate Student-t, scikit-learn's process, finite networks, and its own limits."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel

from mixtura.density import BurrXII, FixedScale, InverseGamma, ScaleMixtureRegressor, WideNetworkKernel
from mixtura.density.scale_evidence import NotPositiveDefinite, factor, maximise
from mixtura.density.scale_predictive import ScaleMixture, StudentT

PRIOR = InverseGamma(2.0, 3.0)
KERNEL = WideNetworkKernel(2, "relu", 1.4, 0.2)


def data(
    n: int = 12, m: int = 5, n_outputs: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n + m, 3))
    y = X @ rng.normal(size=(3, n_outputs or 1)) + 0.3 * rng.normal(size=(n + m, n_outputs or 1))
    y = y if n_outputs else y[:, 0]
    return X[:n], y[:n], X[n:], y[n:]


def fitted(prior=PRIOR, noise: float = 0.1, n_outputs: int | None = None, **options):
    X, y, X2, y2 = data(n_outputs=n_outputs)
    options = {"normalize_y": False, "kernel": KERNEL} | options
    model = ScaleMixtureRegressor(scale_prior=prior, noise=noise, optimize=False, **options).fit(X, y)
    return model, X, y, X2, y2


def test_joint_density_and_prediction_are_those_of_a_conditioned_multivariate_student_t():
    model, X, y, X2, y2 = fitted()
    gram = KERNEL(np.concatenate([X, X2])) + 0.1 * np.eye(17)
    joint = stats.multivariate_t(shape=3.0 / 2.0 * gram, df=4.0)
    first = stats.multivariate_t(shape=3.0 / 2.0 * gram[:12, :12], df=4.0).logpdf(y)
    assert abs(model.log_evidence_ - first) < 1e-9
    assert abs(model.log_prob(X2, y2) - (joint.logpdf(np.concatenate([y, y2])) - first)) < 1e-8
    # Kotz and Nadarajah 2004: conditioned on n values, df grows by n and the scale by (df + q) / (df + n).
    inverse = np.linalg.inv(gram[:12, :12])
    location = gram[12:, :12] @ inverse @ y
    shape = gram[12:, 12:] - gram[12:, :12] @ inverse @ gram[:12, 12:]
    q = 2.0 / 3.0 * y @ inverse @ y
    scale = np.sqrt(np.diag(1.5 * shape) * (4 + q) / (4 + 12))
    found = model.predict_distribution(X2)
    assert isinstance(found, StudentT) and found.df == model.df_ == 16.0
    np.testing.assert_allclose(found.location, location, rtol=1e-9)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-9)
    np.testing.assert_allclose(model.score_samples(X2, y2), stats.t.logpdf(y2, 16, location, scale), atol=1e-9)


@pytest.mark.parametrize("n_outputs", [None, 3])
@pytest.mark.parametrize("prior", [InverseGamma(1.5, 2.0), BurrXII(2.0, 1.0), FixedScale(0.7)])
def test_the_chain_rule_holds(prior, n_outputs):
    model, X, y, X2, y2 = fitted(prior, n_outputs=n_outputs)
    whole = ScaleMixtureRegressor(KERNEL, scale_prior=prior, noise=0.1, optimize=False, normalize_y=False)
    whole.fit(np.concatenate([X, X2]), np.concatenate([y, y2]))
    assert abs(model.log_evidence_ + model.log_prob(X2, y2) - whole.log_evidence_) < 1e-8


def test_the_quadrature_path_predicts_what_the_closed_form_predicts():
    closed, _, _, X2, y2 = fitted()
    mixed = fitted(integration="quadrature")[0]
    exact, found = closed.predict_distribution(X2), mixed.predict_distribution(X2)
    assert isinstance(found, ScaleMixture)
    np.testing.assert_allclose(found.log_prob(y2), exact.log_prob(y2), atol=1e-8)
    for p in (0.01, 0.5, 0.9):
        np.testing.assert_allclose(found.quantile(p), exact.quantile(p), rtol=1e-8)
    np.testing.assert_allclose(found.std, exact.std, rtol=1e-8)
    assert abs(closed.log_prob(X2, y2) - mixed.log_prob(X2, y2)) < 1e-8


def test_a_sharp_prior_is_the_plain_process():
    plain, _, _, X2, y2 = fitted(FixedScale(1.0))
    sharp = fitted(InverseGamma(1e8, 1e8))[0]
    np.testing.assert_allclose(sharp.score_samples(X2, y2), plain.score_samples(X2, y2), atol=1e-6)
    assert abs(sharp.log_evidence_ - plain.log_evidence_) < 1e-6


def test_a_fixed_scale_with_an_rbf_kernel_is_scikit_learns_process():
    X, y, X2, _ = data()
    peer = GaussianProcessRegressor(RBF(1.3) + WhiteKernel(0.1), optimizer=None).fit(X, y)
    model = ScaleMixtureRegressor(
        RBF(1.3), scale_prior=FixedScale(1.0), noise=0.1, optimize=False, normalize_y=False
    ).fit(X, y)
    mean, std = peer.predict(X2, return_std=True)
    found = model.predict_distribution(X2)
    np.testing.assert_allclose(found.location, mean, rtol=1e-9)
    np.testing.assert_allclose(found.std, std, rtol=1e-9)  # scikit-learn's WhiteKernel counts the noise of new targets
    assert abs(model.log_evidence_ - peer.log_marginal_likelihood_value_) < 1e-9


def test_noise_lives_inside_the_scale():
    model, _, _, X2, _ = fitted(noise=0.5)
    observed, function = model.predict_distribution(X2), model.predict_distribution(X2, observed=False)
    scale = model.scale_posterior_.b / model.scale_posterior_.a
    np.testing.assert_allclose(observed.scale**2 - function.scale**2, 0.5 * scale, rtol=1e-9)


def test_outputs_share_one_scale():
    model, X, y, X2, y2 = fitted(n_outputs=3)
    inverse = np.linalg.inv(KERNEL(X) + 0.1 * np.eye(12))
    q = sum(float(y[:, c] @ inverse @ y[:, c]) for c in range(3))
    assert model.scale_posterior_.a == 2.0 + 36 / 2
    assert abs(model.scale_posterior_.b - (3.0 + q / 2)) < 1e-9
    # A row's outputs are not independent given the targets: their joint density is a 3-variate Student-t.
    one = model.predict_distribution(X2)
    want = [
        stats.multivariate_t(loc, w[0] ** 2 * np.eye(3), df=one.df).logpdf(v)
        for loc, w, v in zip(one.location, one.scale, y2, strict=True)
    ]
    np.testing.assert_allclose(model.score_samples(X2, y2), want, atol=1e-9)


def test_normalising_targets_changes_no_density_but_through_the_prior():
    X, y, X2, y2 = data()
    shift, width = y.mean(), y.std()
    inner = fitted()[0].set_params(normalize_y=False).fit(X, (y - shift) / width)
    outer = fitted(normalize_y=True)[0]
    np.testing.assert_allclose(
        outer.score_samples(X2, y2), inner.score_samples(X2, (y2 - shift) / width) - math.log(width), atol=1e-10
    )
    assert abs(outer.log_prob(X2, y2) - inner.log_prob(X2, (y2 - shift) / width) + 5 * math.log(width)) < 1e-9
    np.testing.assert_allclose(outer.predict(X2), inner.predict(X2) * width + shift, rtol=1e-12)


@pytest.mark.parametrize("prior", [InverseGamma(4.0, 1.0), BurrXII(), FixedScale("evidence")])
def test_another_prior_on_the_same_fit_is_a_fit_with_that_prior(prior):
    model, _, _, X2, y2 = fitted()
    again = fitted(prior)[0]
    swapped = model.with_prior(prior)
    np.testing.assert_allclose(swapped.score_samples(X2, y2), again.score_samples(X2, y2), atol=1e-12)
    assert abs(swapped.log_evidence_ - again.log_evidence_) < 1e-10
    assert model.scale_prior == InverseGamma(2.0, 3.0)


@pytest.mark.parametrize("prior", [InverseGamma(2.0, 3.0), FixedScale("evidence"), BurrXII()])
def test_the_gradient_of_the_evidence_leads_to_a_top(prior):
    X, y, _, _ = data()
    x, Y = KERNEL.inputs(X), torch.from_numpy(y[:, None])
    start = {"weight_variance": 1.0, "bias_variance": 0.1, "noise": 0.05}
    best = maximise(lambda **v: KERNEL.gram(x, **v), start, Y, prior, "auto", n_restarts=0, seed=0)

    def at(**change: float) -> float:
        v = best | change
        kernel = WideNetworkKernel(2, "relu", v["weight_variance"], v["bias_variance"])
        return (
            ScaleMixtureRegressor(kernel, scale_prior=prior, noise=v["noise"], optimize=False, normalize_y=False)
            .fit(X, y)
            .log_evidence_
        )

    top = at()
    assert top > at(**start)
    for name, value in best.items():
        if 2e-4 < value < 50:  # inside the bounds, a top is flat: a step of 1 % costs order 1e-4 and gains nothing
            assert at(**{name: value * 1.01}) < top + 1e-6
            assert at(**{name: value / 1.01}) < top + 1e-6


def test_optimising_raises_the_evidence_and_zero_bias_stays_zero():
    X, y, _, _ = data()
    kernel = WideNetworkKernel(1, bias_variance=0.0)
    fixed = ScaleMixtureRegressor(kernel, optimize=False).fit(X, y)
    learned = ScaleMixtureRegressor(kernel).fit(X, y)
    assert learned.log_evidence_ > fixed.log_evidence_
    assert learned.kernel_.bias_variance == 0.0 and kernel.weight_variance == 1.0


def test_networks_on_images_learn_the_noise_alone():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(8, 4, 4, 1))
    y = X.mean((1, 2, 3)) + rng.normal(size=8)
    kernel = WideNetworkKernel(1, architecture="cnn")
    model = ScaleMixtureRegressor(kernel).fit(X, y)
    assert model.kernel_ == kernel and model.noise_ != model.noise
    assert model.predict(X[:2]).shape == (2,)


def test_finite_networks_with_fresh_scales_have_the_tails_of_the_student_t():
    # Given its features, a network's read-out is exactly Gaussian, so width 4096 takes no weight matrix. Scales are the
    # midpoints of 50,000 equally likely slices: with a = 3 a plain sample's fourth moment never settles.
    a, b, n, width = 3.0, 2.0, 50_000, 4096
    x = np.array([[0.6, -1.1]])
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n // 100, width, generator=generator) * math.sqrt(float((x**2).mean()))
    moment = h.relu().square().mean(1).double().numpy()
    scale = rng.permutation(stats.invgamma.ppf((np.arange(n) + 0.5) / n, a, scale=b))
    variance = scale * np.tile(moment, 100)
    kurtosis = 3 * (variance**2).mean() / variance.mean() ** 2  # of a Gaussian with these variances
    nu = 2 * a
    assert abs(kurtosis / (3 * (nu - 2) / (nu - 4)) - 1) < 0.1
    K = float(WideNetworkKernel(1)(x)[0, 0])
    draws = np.sqrt(variance) * rng.normal(size=n)
    assert stats.kstest(draws, stats.t(nu, scale=math.sqrt(b / a * K)).cdf).pvalue > 0.01  # the seed is fixed


def test_networks_whose_readout_was_trained_are_the_ensemble_limit():
    n_nets, width, prior = 2000, 4096, InverseGamma(2.0, 2.0)
    X, y = np.array([[1.0, 0.2], [-0.5, 1.0], [0.3, -1.2]]), np.array([1.0, -2.0, 0.5])
    new = np.array([[0.8, 0.9]])
    kernel = WideNetworkKernel(1, bias_variance=0.3)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.from_numpy(np.concatenate([X, new])).float()
    root = torch.cat([inputs / math.sqrt(2), torch.full((4, 1), math.sqrt(0.3))], 1)
    values = (root @ torch.randn(n_nets, 3, width, generator=generator)).relu().double()
    moment = values @ values.mT / width
    scale = prior.draw(n_nets, generator).exp()
    start = scale.sqrt()[:, None, None] * (
        torch.linalg.cholesky(moment) @ torch.randn(n_nets, 4, 1, generator=generator).double()
    )
    # Gradient descent to the end on the read-out: the residual is carried over by the empirical kernel.
    pull = torch.linalg.solve(moment[:, :3, :3], torch.from_numpy(y)[None, :, None] - start[:, :3])
    end = (start[:, 3:] + moment[:, 3:, :3] @ pull).flatten().numpy()
    model = ScaleMixtureRegressor(kernel, scale_prior=prior, noise=0.3, optimize=False, normalize_y=False).fit(X, y)
    limit = model.ensemble_limit(new)
    assert limit.df == 4.0
    assert stats.kstest(end, lambda v: limit.cdf(v[:, None])[:, 0]).pvalue > 0.01  # the seed is fixed
    # The posterior is another law: narrower here, and with other degrees of freedom.
    posterior = model.predict_distribution(new, observed=False)
    assert stats.kstest(end, lambda v: posterior.cdf(v[:, None])[:, 0]).pvalue < 1e-6


@pytest.mark.parametrize("prior", [InverseGamma(2.0, 3.0), BurrXII(), FixedScale(2.0)])
def test_training_all_layers_follows_the_tangent_kernel(prior):
    model, X, y, X2, _ = fitted(prior)
    K, K_s, K_2 = KERNEL(X), KERNEL(X, X2), KERNEL(X2)
    weights = np.linalg.solve(KERNEL.ntk(X), KERNEL.ntk(X, X2))
    limit = model.ensemble_limit(X2, layers="all")
    np.testing.assert_allclose(limit.location, weights.T @ y, rtol=1e-8)
    variance = np.diag(K_2 + weights.T @ K @ weights - weights.T @ K_s - K_s.T @ weights)
    unit = limit.unit if isinstance(limit, ScaleMixture) else limit.scale / math.sqrt(1.5)
    np.testing.assert_allclose(unit**2, variance, rtol=1e-8)
    # Trained to the end; the arccosine of an input with itself carries 1e-8 into the tangent kernel.
    np.testing.assert_allclose(model.ensemble_limit(X, "all").location, y, rtol=1e-6)


def test_samples_have_the_predicted_quantiles_and_share_a_scale_within_a_draw():
    model, _, _, X2, _ = fitted(InverseGamma(1.0, 1.0))
    draws = model.sample(X2, 4000, seed=1)
    law = model.predict_distribution(X2, observed=False)
    for m in range(5):
        p = stats.kstest(draws[:, m], lambda v, m=m: stats.t.cdf(v, law.df, law.location[m], law.scale[m])).pvalue
        assert p > 0.002  # five tests, 1 % in all; the seed is fixed
    prior = model.sample(X2, 4000, posterior=False, seed=2)
    sizes = np.log(np.abs(prior / np.sqrt(KERNEL.diag(X2))))
    assert np.corrcoef(sizes[:, 0], sizes[:, 1])[0, 1] > 0.1
    assert model.sample(X2, 2, seed=3).tolist() == model.sample(X2, 2, seed=3).tolist()
    assert fitted(n_outputs=2)[0].sample(X2, 3, observed=True).shape == (3, 5, 2)


def test_error_bars_answer_to_the_targets_only_where_the_scale_may_move():
    X, y, X2, _ = data()
    widths = {}
    for prior in (InverseGamma(2.0, 2.0), FixedScale(1.0)):
        for factor_ in (1.0, 10.0):
            model = ScaleMixtureRegressor(KERNEL, scale_prior=prior, noise=0.1, optimize=False, normalize_y=False)
            low, high = model.fit(X, factor_ * y).predict_distribution(X2).interval()
            widths[type(prior).__name__, factor_] = float((high - low).mean())
    assert math.isclose(widths["FixedScale", 10.0], widths["FixedScale", 1.0], rel_tol=1e-12)
    assert widths["InverseGamma", 10.0] > 2 * widths["InverseGamma", 1.0]


def test_a_constant_target_is_fitted_with_a_warning():
    X, _, X2, _ = data()
    for prior in ("inverse-gamma", "burr", "fixed"):
        with pytest.warns(UserWarning, match="y is constant"):
            model = ScaleMixtureRegressor(scale_prior=prior).fit(X, np.full(12, 4.0))
        np.testing.assert_allclose(model.predict(X2), 4.0)
        assert np.isfinite(model.predict_distribution(X2).log_prob(np.full(5, 4.0))).all()


def test_repeated_inputs_without_noise_take_a_jitter_and_say_so(caplog):
    X, y, _, _ = data()
    model = ScaleMixtureRegressor(KERNEL, noise=0.0, optimize=False).fit(np.repeat(X, 2, 0), np.repeat(y, 2))
    assert "not positive definite to rounding" in caplog.text
    np.testing.assert_allclose(model.predict(X), y, atol=1e-2)


def test_what_is_no_covariance_is_refused_and_the_jitter_named():
    with pytest.raises(NotPositiveDefinite, match=r"1e-10 to 1e-4 of its mean diagonal \(1\) added"):
        factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), 0.0)


X0, Y0 = np.eye(3), np.arange(3.0)


@pytest.mark.parametrize(
    ("options", "X", "y", "message"),
    [
        ({}, [[1.0, np.nan], [0, 0], [0, 1]], Y0, r"X contains 1 missing \(NaN\) values, the first in row 0, column 1"),
        ({}, X0, [0.0, np.inf, 1.0], r"y contains 1 infinite \(inf\) values, the first in row 1"),
        ({}, X0[:1], Y0[:1], "minimum of 2 is required"),
        ({}, X0, Y0[:2], "X and y must have as many rows, got 3 and 2"),
        ({}, X0, np.zeros((3, 1, 1)), "y must have 1 or 2 dimensions"),
        ({"noise": -1.0}, X0, Y0, "noise must be a number >= 0 and finite, got -1.0"),
        ({"noise": "some"}, X0, Y0, "noise must be a number >= 0 and finite, got 'some'"),
        ({"n_restarts": 1.5}, X0, Y0, "n_restarts must be a whole number >= 0, got 1.5"),
        ({}, X0, ["ant"] * len(X0), "y must hold numbers .*'ant'.*ScaleMixtureClassifier"),
        ({"noise": 0.0}, X0, Y0, "noise=0 cannot be optimized"),
        ({"n_restarts": -1}, X0, Y0, "n_restarts must be a whole number >= 0, got -1"),
        ({"integration": "none"}, X0, Y0, "integration must be one of"),
        ({"integration": "closed", "scale_prior": "burr"}, X0, Y0, "integration='closed' needs"),
        ({"kernel": "tanh"}, X0, Y0, "kernel must be one of"),
        ({"kernel": lambda X, Y=None: np.zeros((1, 1)), "optimize": False}, X0, Y0, r"shape \(3, 3\), got \(1, 1\)"),
        ({"kernel": WideNetworkKernel(1, architecture="cnn")}, X0, Y0, "give image_shape"),
    ],
)
def test_bad_input_is_named(options: dict, X, y, message: str):
    with pytest.raises(ValueError, match=message):
        ScaleMixtureRegressor(**options).fit(X, y)


def test_bad_questions_are_named():
    model, X, y, X2, y2 = fitted(InverseGamma(0.2, 1.0))
    assert model.predict(X2, return_std=True)[1].shape == (5,)
    few = ScaleMixtureRegressor(KERNEL, scale_prior=InverseGamma(1e-9, 1.0), optimize=False).fit(X[:2], y[:2])
    few.scale_posterior_ = InverseGamma(1.0, 1.0)
    with pytest.raises(ValueError, match="df=2 has no finite variance"):
        few.predict(X2, return_std=True)
    with pytest.raises(ValueError, match="no finite variance"):
        _ = model.ensemble_limit(X2).std
    with pytest.raises(ValueError, match="layers must be 'last' or 'all'"):
        model.ensemble_limit(X2, layers="first")
    with pytest.raises(ValueError, match="only a network has a tangent kernel"):
        fitted(kernel=RBF())[0].ensemble_limit(X2, layers="all")
    with pytest.raises(ValueError, match="n_samples must be >= 1"):
        model.sample(X2, 0)
    with pytest.raises(ValueError, match="y must hold 5 rows of 1"):
        model.score_samples(X2, y2[:3])
    with pytest.raises(TypeError, match="kernel must be a name"):
        ScaleMixtureRegressor(kernel=3).fit(X, y)
