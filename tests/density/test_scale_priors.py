"""Priors and posteriors of the scale: closed forms, quadrature, draws."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from mixtura.density import BurrXII, FixedScale, InverseGamma
from mixtura.density.scale_predictive import ScaleMixture, StudentT
from mixtura.density.scale_priors import ScaleNodes, condition, log_marginal, named_prior

LOG_SCALES = torch.linspace(-4, 4, 9, dtype=torch.float64)


@pytest.mark.parametrize(
    ("prior", "peer"),
    [
        (InverseGamma(1.5, 0.7), stats.invgamma(1.5, scale=0.7)),
        (BurrXII(2.0, 1.5), stats.burr12(2.0, 1.5)),
    ],
)
def test_densities_and_draws_are_those_of_scipy(prior, peer):
    np.testing.assert_allclose(prior.log_density(LOG_SCALES), peer.logpdf(LOG_SCALES.exp().numpy()), rtol=1e-12)
    draws = prior.draw(20_000, torch.Generator().manual_seed(0)).exp().numpy()
    assert stats.kstest(draws, peer.cdf).pvalue > 0.01  # the seed is fixed


@pytest.mark.parametrize(("a", "b", "n"), [(2.0, 2.0, 7), (0.5, 8.0, 30), (3.0, 0.1, 2)])
def test_the_evidence_is_that_of_a_multivariate_student_t(a: float, b: float, n: int):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(n, n))
    gram, y = root @ root.T + np.eye(n), rng.normal(size=n)
    found = condition(InverseGamma(a, b), float(y @ np.linalg.solve(gram, y)), n)[1] - np.linalg.slogdet(gram)[1] / 2
    want = stats.multivariate_t(shape=b / a * gram, df=2 * a).logpdf(y)
    assert abs(found - want) < 1e-9


@pytest.mark.parametrize("prior", [InverseGamma(2.0, 2.0), InverseGamma(0.5, 8.0), InverseGamma(50.0, 1e-6)])
@pytest.mark.parametrize(("q", "n"), [(3.0, 2), (250.0, 100), (1e-6, 30), (1e6, 1000)])
def test_quadrature_equals_the_closed_form_in_evidence_density_and_quantiles(prior: InverseGamma, q: float, n: int):
    closed, exact = condition(prior, q, n)
    nodes, found = condition(prior, q, n, "quadrature")
    assert isinstance(closed, InverseGamma) and isinstance(nodes, ScaleNodes)
    assert abs(found - exact) < 1e-8 * max(1.0, abs(exact))
    zero, one = np.zeros(1), np.ones(1)
    t = StudentT(zero, one * math.sqrt(closed.b / closed.a), 2 * closed.a)
    mixture = ScaleMixture(zero, one, nodes.log_scale.numpy(), nodes.log_weight.numpy())
    for p in (0.001, 0.2, 0.5, 0.975):
        np.testing.assert_allclose(mixture.quantile(p), t.quantile(p), rtol=1e-8, atol=1e-300)
        at = t.quantile(p)
        np.testing.assert_allclose(mixture.log_prob(at), t.log_prob(at), atol=1e-8)
        np.testing.assert_allclose(mixture.cdf(at), p, atol=1e-9)
    if closed.a > 2:  # nearer to 1, the mean of s hangs on the tail beyond the last node
        np.testing.assert_allclose(mixture.std, t.std, rtol=1e-8)
    assert abs(closed.mean_precision / nodes.mean_precision - 1) < 1e-8


@pytest.mark.parametrize(("q", "n"), [(0.3, 2), (40.0, 10), (900.0, 50)])
def test_a_burr_prior_gives_what_brute_force_integration_gives(q: float, n: int):
    def integrand(u: float) -> float:
        s = math.exp(u)
        return math.exp(stats.burr12.logpdf(s, 2, 1) + u - n / 2 * math.log(2 * math.pi * s) - q / (2 * s) + n)

    want = math.log(integrate.quad(integrand, -12, 25, limit=400, epsabs=0, epsrel=1e-11)[0]) - n
    assert abs(condition(BurrXII(2.0, 1.0), q, n)[1] - want) < 1e-8


def test_a_burr_prior_survives_thousands_of_values():
    nodes, log_density = condition(BurrXII(), 5000.0, 5000)
    assert math.isfinite(log_density) and abs(nodes.mean_precision - 1.0) < 0.01


def test_importance_sampling_agrees_with_quadrature_to_its_error():
    _, by_nodes = condition(BurrXII(), 12.0, 10)
    found = [condition(BurrXII(), 12.0, 10, "importance", seed=seed)[1] for seed in range(20)]
    # 20 estimates from 1000 draws; five standard errors of their mean.
    assert abs(np.mean(found) - by_nodes) < 5 * np.std(found) / math.sqrt(20)


def test_a_sharp_prior_is_a_fixed_scale():
    fixed, exact = condition(FixedScale(1.0), 7.0, 5)
    for integration in ("closed", "quadrature"):
        assert abs(condition(InverseGamma(1e8, 1e8), 7.0, 5, integration)[1] - exact) < 1e-6
    assert fixed.mean_precision == 1.0


def test_the_scale_of_largest_evidence_is_q_over_n_and_no_other_is_likelier():
    best = condition(FixedScale("evidence"), 6.0, 4)[1]
    assert abs(best - condition(FixedScale(1.5), 6.0, 4)[1]) < 1e-12
    assert all(condition(FixedScale(s), 6.0, 4)[1] < best for s in (1.4, 1.6))


@pytest.mark.parametrize("integration", ["closed", "quadrature"])
def test_conditioning_twice_is_conditioning_once(integration):
    prior = InverseGamma(2.0, 3.0)
    whole = condition(prior, 5.0, 9, integration)[1]
    posterior, first = condition(prior, 2.0, 4, integration)
    second = log_marginal(posterior, torch.tensor([3.0], dtype=torch.float64), 5)
    assert abs(first + float(second) - whole) < 1e-10


def test_large_shapes_keep_their_digits():
    # Against the exact product for a whole number of halves: gamma(a + 3) / gamma(a) = a (a + 1) (a + 2).
    a = 1e8
    want = math.log(a) + math.log(a + 1) + math.log(a + 2) - 3 * (math.log(2 * math.pi) + math.log(a))
    assert abs(condition(InverseGamma(a, a), 0.0, 6)[1] - want) < 1e-12
    assert abs(special.gammaln(a + 3) - special.gammaln(a) - 3 * math.log(a)) > 1e-9  # what it would lose


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: InverseGamma(0.0, 1.0), ValueError, "a of InverseGamma must be > 0"),
        (lambda: InverseGamma(1.0, -1.0), ValueError, "b of InverseGamma must be > 0"),
        (lambda: BurrXII(c=0.0), ValueError, "c of BurrXII must be > 0"),
        (lambda: FixedScale(0.0), ValueError, "value of FixedScale must be > 0"),
        (lambda: FixedScale("best"), ValueError, "'evidence'"),
        (lambda: condition(BurrXII(), 1.0, 2, "closed"), ValueError, "closed.* needs InverseGamma"),
        (lambda: condition(BurrXII(), 1.0, 2, "magic"), ValueError, "integration must be one of"),
        (lambda: named_prior("cauchy"), ValueError, "scale_prior must be one of"),
        (lambda: named_prior(3.0), TypeError, "scale_prior must be a name"),
        (lambda: StudentT(np.zeros(1), np.ones(1), 2.0).std, ValueError, "no finite variance"),
        (lambda: StudentT(np.zeros(1), np.ones(1), 3.0).interval(1.0), ValueError, "share must be between"),
        (lambda: ScaleMixture(*np.zeros((2, 1)), np.zeros(1), np.zeros(1)).quantile(0.0), ValueError, "p must be"),
    ],
)
def test_bad_values_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_improper_posterior_is_named():
    class Flat:
        def log_density(self, log_scale):
            return torch.zeros_like(log_scale)

        def draw(self, n, generator=None):
            return torch.zeros(n, dtype=torch.float64)

    with pytest.raises(ValueError, match="improper"):
        condition(Flat(), 1.0, 1, "quadrature")
