import math

import numpy as np
import pytest
import torch
from scipy import stats

from mixtura.density.set_evidence import ClusterPrior, log_evidence, map_mixture, set_statistics


def a_prior(d, seed=0, kappa=0.3, covariance="full"):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    scale = root @ root.T + np.eye(d)
    return ClusterPrior(
        torch.from_numpy(rng.normal(size=d)),
        kappa,
        d + 2.5,
        torch.from_numpy(scale if covariance == "full" else np.diag(scale)),
    )


def evidence_by_chain_rule(x, prior):
    """Sum of the log predictive densities of one sample after another: multivariate t, parameters updated one by one."""
    mean, kappa, nu, scale = prior.mean.numpy(), prior.kappa, prior.nu, prior.scale.numpy()
    d, total = len(mean), 0.0
    for row in x:
        free = nu - d + 1
        total += stats.multivariate_t.logpdf(row, mean, scale * (kappa + 1) / (kappa * free), df=free)
        apart = row - mean
        scale = scale + kappa / (kappa + 1) * np.outer(apart, apart)
        mean, kappa, nu = (kappa * mean + row) / (kappa + 1), kappa + 1, nu + 1
    return total


@pytest.mark.parametrize("d", [1, 3, 8])
def test_the_evidence_is_the_chain_of_predictive_t_densities(d):
    prior = a_prior(d)
    for n in (1, 2, 17):
        x = np.random.default_rng(n).normal(size=(n, d)) * 2 + 1
        found = set_statistics(torch.from_numpy(x), torch.zeros(n).long(), 1, "full")
        assert float(log_evidence(found, prior)[0]) == pytest.approx(evidence_by_chain_rule(x, prior), abs=1e-8)


def test_the_diagonal_evidence_is_the_sum_over_features():
    prior = a_prior(4, covariance="diag")
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(9, 4)))
    found = set_statistics(x, torch.zeros(9).long(), 1, "diag")
    want = sum(
        evidence_by_chain_rule(
            x[:, [f]].numpy(), ClusterPrior(prior.mean[[f]], prior.kappa, prior.nu, prior.scale[[f]][:, None])
        )
        for f in range(4)
    )
    assert float(log_evidence(found, prior)[0]) == pytest.approx(want, abs=1e-8)


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_statistics_of_sets_are_those_of_each_set_alone_in_any_order(covariance):
    g = torch.Generator().manual_seed(0)
    x, sets = torch.randn(60, 3, generator=g, dtype=torch.float64), torch.randint(-1, 5, (60,), generator=g)
    sets[sets == 3] = 2  # set 3 is empty
    prior = a_prior(3, covariance=covariance)
    found = set_statistics(x, sets, 5, covariance)
    order = torch.randperm(60, generator=g)
    shuffled = set_statistics(x[order], sets[order], 5, covariance)
    for c in range(5):
        mine = x[sets == c]
        alone = set_statistics(mine, torch.zeros(len(mine)).long(), 1, covariance)
        torch.testing.assert_close(log_evidence(found, prior)[c], log_evidence(alone, prior)[0])
    torch.testing.assert_close(log_evidence(shuffled, prior), log_evidence(found, prior))
    assert float(log_evidence(found, prior)[3]) == pytest.approx(0, abs=1e-12)


def test_far_from_the_origin_the_evidence_stays():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prior = a_prior(3)
    moved = ClusterPrior(prior.mean + 1000, prior.kappa, prior.nu, prior.scale)
    one = torch.zeros(40).long()
    near = log_evidence(set_statistics(x, one, 1, "full"), prior)
    # Squares of 1e3 leave 1e-10 of 1; the evidence has some 40 / 2 times its relative error.
    torch.testing.assert_close(log_evidence(set_statistics(x + 1000, one, 1, "full"), moved), near, atol=1e-6, rtol=0)


def test_modes_maximise_the_posterior_density():
    prior = a_prior(2)
    x = torch.from_numpy(np.random.default_rng(5).normal(size=(12, 2)))
    found = set_statistics(x, torch.zeros(12).long(), 1, "full")
    mode = map_mixture(found, prior)

    def log_posterior(mean, sigma):
        """Likelihood times inverse Wishart times normal, by SciPy."""
        like = stats.multivariate_normal.logpdf(x.numpy(), mean, sigma).sum()
        wide = stats.invwishart.logpdf(sigma, df=prior.nu, scale=prior.scale.numpy())
        return like + wide + stats.multivariate_normal.logpdf(mean, prior.mean.numpy(), sigma / prior.kappa)

    mean, sigma = mode.means[0].numpy(), mode.covariances[0].numpy()
    best = log_posterior(mean, sigma)
    rng = np.random.default_rng(6)
    for size in (1e-2, 1e-1):
        for _ in range(20):
            turn = np.eye(2) + size * rng.normal(size=(2, 2))
            assert log_posterior(mean + size * rng.normal(size=2), turn @ sigma @ turn.T) < best


def test_an_empty_component_has_the_mode_of_the_prior_and_weights_sum_to_one():
    for covariance in ("full", "diag"):
        prior = a_prior(3, covariance=covariance)
        x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mode = map_mixture(set_statistics(x, torch.zeros(10).long(), 2, covariance), prior)
        torch.testing.assert_close(mode.means[1], prior.mean)
        torch.testing.assert_close(mode.covariances[1], prior.scale / (prior.nu + prior.wide + 2))
        torch.testing.assert_close(mode.weights, torch.tensor([10.1, 0.1], dtype=torch.float64) / 10.2)


def test_bad_priors_are_named():
    mean, eye = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"scale must have shape \(3, 3\) or \(3,\), got \(2, 2\)"):
        ClusterPrior(mean, 1.0, 5.0, torch.eye(2))
    with pytest.raises(ValueError, match="kappa must be > 0, got 0"):
        ClusterPrior(mean, 0.0, 5.0, eye)
    with pytest.raises(ValueError, match=r"nu must be > 2, got 2\.0"):
        ClusterPrior(mean, 1.0, 2.0, eye)
    assert math.isfinite(ClusterPrior(mean, 1.0, 0.5, torch.ones(3)).nu)  # diag: any nu > 0
