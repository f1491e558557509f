"""The sparse variational classifier: its divergence and moments against dense algebra, its limits, its errors."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.gaussian_process.kernels import RBF

from mixtura.density import BurrXII, FixedScale, InverseGamma, ScaleMixtureClassifier, WideNetworkKernel
from mixtura.density import scale_mixture_classifier as module

rng = np.random.default_rng(0)
X = np.concatenate([rng.normal(-1.5, 1, size=(30, 2)), rng.normal(1.5, 1, size=(30, 2))])
Y = np.repeat([0, 1], 30)


def small(**options) -> ScaleMixtureClassifier:
    return ScaleMixtureClassifier(**{"n_inducing": 20, "epochs": 40, "n_draws": 30, "batch_size": 30} | options)


def test_the_divergence_of_inducing_values_is_that_of_two_gaussians_averaged_over_the_scale():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    gram = root @ root.T + torch.eye(4)
    lower = torch.linalg.cholesky(gram)
    means, log_spread = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    scales = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    want = 0.0
    for s in scales:
        for c in range(3):
            q = torch.distributions.MultivariateNormal(means[:, c], s * torch.diag(log_spread[:, c].exp()))
            p = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), s * gram)
            want += float(torch.distributions.kl_divergence(q, p)) / len(scales)
    found = module.divergence(
        torch.linalg.solve_triangular(lower, means, upper=False),
        log_spread,
        gram.inverse().diagonal(),
        gram.logdet(),
        (1 / scales).mean(),
    )
    assert abs(float(found) - want) < 1e-10


def test_the_divergence_of_the_scale_is_its_integral():
    q, p = InverseGamma(3.5, 2.0), InverseGamma(2.0, 1.2)
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (q.a, q.b))

    def integrand(s: float) -> float:
        log_q = stats.invgamma.logpdf(s, q.a, scale=q.b)
        return math.exp(log_q) * (log_q - stats.invgamma.logpdf(s, p.a, scale=p.b))

    want = integrate.quad(integrand, 0, 200, limit=200)[0]
    assert abs(float(module._scale_divergence(a, b, p)) - want) < 1e-6  # the tail beyond 200 holds 1e-7


def test_moments_are_those_of_dense_algebra_and_the_scale_leaves_the_centre():
    model = small(epochs=2).fit(X, Y)
    kernel, Z = model.kernel_, model.inducing_
    nugget = module.NUGGET * np.trace(kernel(Z)) / 20
    A = kernel(X, Z) @ np.linalg.inv(kernel(Z) + nugget * np.eye(20))
    lower = np.linalg.cholesky(kernel(Z) + nugget * np.eye(20))
    seen = model._seen(X)
    np.testing.assert_allclose(seen.white.numpy() @ model.centre_, A @ lower @ model.centre_, atol=1e-8)
    variance = np.stack([np.diag(A @ np.diag(model.spread_[:, c]) @ A.T) for c in range(2)], 1)
    rest = np.diag(kernel(X) - A @ kernel(Z, X))
    np.testing.assert_allclose(
        (seen.squares @ torch.from_numpy(model.spread_)).numpy() + seen.rest.numpy()[:, None],
        variance + rest[:, None],
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("prior", ["inverse-gamma", "burr", "fixed", FixedScale(1.0), InverseGamma(1e6, 1e6)])
def test_every_prior_learns_two_clouds(prior):
    model = small(scale_prior=prior).fit(X, Y)
    assert model.score(X, Y) > 0.9
    assert np.mean(model.losses_[-10:]) < np.mean(model.losses_[:10])
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1.0)
    np.testing.assert_array_equal(model.predict_log_proba(X), model.log_proba(X))


def test_a_sharp_prior_predicts_what_a_fixed_scale_predicts():
    sharp, fixed = (small(scale_prior=p).fit(X, Y) for p in (InverseGamma(1e8, 1e8), FixedScale(1.0)))
    # The draws differ, so both carry the error of 1000 of them and of the training's noise.
    np.testing.assert_allclose(sharp.predict_proba(X), fixed.predict_proba(X), atol=0.05)


def test_a_row_alone_gives_what_it_gives_in_a_batch():
    model = small(epochs=3).fit(X, Y)
    np.testing.assert_allclose(model.predict_proba(X[:1]), model.predict_proba(X)[:1], rtol=1e-9)


def test_labels_may_be_words_and_kernels_callables():
    words = np.array(["no", "yes"])[Y]
    model = small(kernel=RBF(2.0), epochs=20).fit(X, words)
    assert set(model.predict(X)) <= {"no", "yes"} and model.score(X, words) > 0.9


def test_networks_on_images_classify():
    images = np.random.default_rng(0).normal(size=(20, 4, 4, 1)) + np.repeat([0.0, 3.0], 10)[:, None, None, None]
    model = small(kernel=WideNetworkKernel(1, architecture="cnn"), epochs=20).fit(images, np.repeat([0, 1], 10))
    assert model.score(images, np.repeat([0, 1], 10)) > 0.9


def test_inducing_inputs_are_even_over_classes_as_far_as_these_go():
    codes = np.repeat([0, 1, 2], [50, 3, 20])
    chosen = module.balanced(codes, 20, np.random.default_rng(0))
    assert len(set(chosen)) == 20
    assert np.bincount(codes[chosen]).tolist() == [9, 3, 8]


def test_the_scale_learns_through_its_draws():
    lower = torch.eye(3, dtype=torch.float64)
    model = module._Posterior(BurrXII(), lower, 2)
    torch.manual_seed(0)
    model.draw_log_scale(100_000).exp().log().mean().backward()
    # E[log s] = log a + log(b/a) - digamma(a), so its derivative in log a is 1 - a trigamma(a) and in log(b/a) is 1.
    a = float(model.log_a.detach().exp())
    assert (
        abs(float(model.log_a.grad) - 1 + a * float(torch.polygamma(1, torch.tensor(a)))) < 0.02
    )  # five standard errors
    assert abs(float(model.log_ratio.grad) - 1.0) < 1e-9


@pytest.mark.parametrize(
    ("options", "X_", "y", "message"),
    [
        ({}, X[:4], [1, 1, 1, 1], "got one class"),
        ({}, X[:4], [0, 1, 0], "as many rows, got 4 and 3"),
        ({}, [[np.inf, 0.0], [1, 1]], [0, 1], "X contains 1 infinite"),
        ({"n_inducing": 0}, X, Y, "n_inducing must be >= 1"),
        ({"epochs": 0}, X, Y, "epochs must be >= 1"),
        ({"scale_prior": "gamma"}, X, Y, "scale_prior must be one of"),
    ],
)
def test_bad_input_is_named(options, X_, y, message):
    with pytest.raises(ValueError, match=message):
        small(**options).fit(X_, y)
