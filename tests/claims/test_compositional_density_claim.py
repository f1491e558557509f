"""What the claim measures."""

import torch
from torch.distributions import MultivariateNormal, kl_divergence

from mixtura.claims.compositional_density import excess, gaussian_data


def test_the_excess_is_the_divergence_from_the_fitted_gaussian():
    X = gaussian_data(3, 200, 0)
    root = torch.tensor(
        [[1.2, 9.0, 9.0], [0.3, 0.9, 9.0], [-0.5, 0.2, 1.1]], dtype=torch.float64
    )  # above the diagonal: unused
    mean = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    fitted = MultivariateNormal(X.mean(0), torch.cov(X.T, correction=0))
    model = MultivariateNormal(mean, precision_matrix=root.tril() @ root.tril().T)
    assert abs(excess(X, mean, root) - float(kl_divergence(fitted, model))) < 1e-10


def test_the_excess_of_the_fitted_gaussian_itself_is_zero():
    X = gaussian_data(4, 100, 1)
    root = torch.linalg.cholesky(torch.cov(X.T, correction=0).inverse())
    assert abs(excess(X, X.mean(0), root)) < 1e-10


def test_data_have_unit_variances_and_another_correlation_each_time():
    first, second = (torch.corrcoef(gaussian_data(5, 20_000, seed).T) for seed in (0, 1))
    torch.testing.assert_close(
        gaussian_data(5, 20_000, 0).std(0), torch.ones(5, dtype=torch.float64), rtol=0.03, atol=0
    )
    assert float((first - second).abs().max()) > 0.2
