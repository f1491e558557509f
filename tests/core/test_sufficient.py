"""Sufficient statistics against a double loop, and the mixture that maximises them."""

import numpy as np
import torch
from test_gaussian import each_kind, mixture, samples

from mixtura.core.sufficient import Statistics, maximise, statistics


@each_kind
def test_statistics_equal_a_double_loop(covariance):
    x = samples(20)
    r = torch.from_numpy(np.random.default_rng(2).dirichlet(np.ones(3), size=20))
    w = torch.linspace(0, 2, 20, dtype=torch.float64)
    found = statistics(x, r, covariance, weights=w, log_likelihood=torch.ones(20))
    weight, first, outer = torch.zeros(3).double(), torch.zeros(3, 4).double(), torch.zeros(3, 4, 4).double()
    for n in range(20):
        for c in range(3):
            weight[c] += w[n] * r[n, c]
            first[c] += w[n] * r[n, c] * x[n]
            outer[c] += w[n] * r[n, c] * torch.outer(x[n], x[n])
    second = {
        "full": outer,
        "tied": outer.sum(0),
        "diag": outer.diagonal(dim1=1, dim2=2),
        "spherical": outer.diagonal(dim1=1, dim2=2).sum(1),
    }[covariance]
    for got, want in zip(
        (found.weight, found.first, found.second, found.log_likelihood), (weight, first, second, w.sum()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@each_kind
def test_one_component_is_the_sample_mean_and_covariance(covariance):
    x = samples(200)
    found = maximise(statistics(x, torch.ones(200, 1), covariance), covariance)
    cov = np.cov(x.T.numpy(), bias=True)
    want = {
        "full": cov[None],
        "tied": cov,
        "diag": np.diag(cov)[None],
        "spherical": np.array([np.diag(cov).mean()]),
    }[covariance]
    np.testing.assert_allclose(found.means[0], x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariances, want, rtol=1e-10, atol=1e-14)


@each_kind
def test_statistics_of_two_blocks_add_and_travel_as_one_vector(covariance):
    x, r = samples(30), mixture(covariance).responsibilities(samples(30))
    whole = statistics(x, r, covariance)
    parts = statistics(x[:11], r[:11], covariance) + statistics(x[11:], r[11:], covariance)
    back = parts.from_vector(parts.as_vector())
    for name in ("weight", "first", "second", "log_likelihood"):
        torch.testing.assert_close(getattr(back, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


@each_kind
def test_statistics_of_moved_samples_are_the_moved_statistics(covariance):
    x, r = samples(30), mixture(covariance).responsibilities(samples(30))
    scale = torch.tensor([2.0, 0.5, 3.0, 1.0] if covariance != "spherical" else [2.0] * 4, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0, 5.0], dtype=torch.float64)
    want = statistics(x * scale + shift, r, covariance)
    got = statistics(x, r, covariance).mapped(scale, shift, covariance)
    for name in ("weight", "first", "second"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-11, atol=1e-11)


def test_a_variance_made_negative_by_rounding_counts_as_zero():
    found = Statistics(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[3.0]], [[9.0 - 1e-12]], 0.0)))
    assert maximise(found, "diag", 0.5).covariances.item() == 0.5
