"""Noise laws: densities that integrate to one, draws that follow them, and what can not be one."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mixtura.density.noise_laws import (
    DistributionNoise,
    FlowNoise,
    GaussianNoise,
    KernelNoise,
    MixtureNoise,
    StudentNoise,
    UniformNoise,
    check_support,
    noise_law,
)

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.tensor(
    [[1.0, 0.0], [0.8, 0.5]], dtype=torch.float64
) + torch.tensor([3.0, -1.0], dtype=torch.float64)


class Affine(nn.Module):
    """The smallest flow: a shifted and stretched normal."""

    def sample(self, n: int) -> Tensor:
        return 2 * torch.randn(n, 2) + 1

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * ((x - 1) / 2).square().sum(-1) - 2 * math.log(2) - math.log(2 * math.pi)


LAWS = {
    "gaussian, diagonal": lambda: GaussianNoise.fit(X),
    "gaussian, full": lambda: GaussianNoise.fit(X, scale=1.0, diagonal=False),
    "student": lambda: StudentNoise.fit(X, df=5.0),
    "student, full": lambda: StudentNoise.fit(X, df=3.5, diagonal=False),
    "uniform": lambda: UniformNoise.fit(X),
    "kernel": lambda: KernelNoise.fit(X[:8]),
    "mixture": lambda: MixtureNoise.fit(X, 2),
    "torch": lambda: noise_law(torch.distributions.MultivariateNormal(torch.zeros(2), 2 * torch.eye(2))),
    "flow": lambda: noise_law(Affine()),
}
each = pytest.mark.parametrize("name", sorted(LAWS))


@each
def test_a_density_integrates_to_one(name: str):
    # The t of 3.5 degrees leaves about 40^-3.5 outside a box of 80 widths; the grid is finer than every law.
    axis = torch.linspace(-80, 80, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    law = LAWS[name]()
    mass = sum(float(law.log_prob(block).exp().sum()) for block in grid.split(100_000)) * float(axis[1] - axis[0]) ** 2
    assert mass == pytest.approx(1, abs=0.06 if name == "uniform" else 2e-3)


@each
def test_draws_follow_the_density(name: str):
    law = LAWS[name]()
    z = law.sample(20_000, torch.Generator().manual_seed(1)).double()
    assert z.shape == (20_000, 2)
    # E_q[r / q] = 1 for any density r; r is a normal inside the law, so that the weights are bounded.
    centre, width = z.mean(0), 0.5 * z.std(0)
    log_r = (-0.5 * ((z - centre) / width).square() - width.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    weights = (log_r - law.log_prob(z)).exp()
    # Five standard errors: a false alarm in one of a million seeds.
    lost = 0.001 if name == "uniform" else 0.0  # of r outside the box
    assert abs(float(weights.mean()) - 1) < 5 * float(weights.std()) / math.sqrt(20_000) + lost


@each
def test_the_same_generator_gives_the_same_draws_and_leaves_global_chance_alone(name: str):
    law = LAWS[name]()
    torch.manual_seed(11)
    want = torch.rand(3)
    torch.manual_seed(11)
    first, second = (law.sample(5, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.rand(3), want)


def test_the_fitted_gaussian_has_the_moments_of_the_data_scaled():
    law = GaussianNoise.fit(X, scale=2.0)
    torch.testing.assert_close(law.gaussians.means[0], X.mean(0))
    torch.testing.assert_close(law.gaussians.covariances[0], 4 * X.var(0, correction=0))
    full = GaussianNoise.fit(X, scale=1.5, diagonal=False)
    torch.testing.assert_close(full.gaussians.covariances[0], 2.25 * torch.cov(X.T, correction=0))


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_student_density_is_scipys(diagonal: bool):
    law = StudentNoise.fit(X, df=4.0, scale=1.3, diagonal=diagonal)
    sigma = law.gaussians.full_covariances()[0]
    want = stats.multivariate_t(law.gaussians.means[0].numpy(), sigma.numpy(), df=4.0).logpdf(X.numpy())
    torch.testing.assert_close(law.log_prob(X), torch.from_numpy(want), rtol=1e-10, atol=1e-12)


def test_the_kernel_density_is_the_mean_of_bumps():
    law = KernelNoise.fit(X, bandwidth=0.4)
    width = 0.4 * X.std(0, correction=0)
    bumps = torch.distributions.Normal(X[:, None], width).log_prob(X[None, :5]).sum(-1)
    torch.testing.assert_close(law.log_prob(X[:5]), bumps.logsumexp(0) - math.log(len(X)), rtol=1e-10, atol=1e-12)


def test_a_mixture_is_as_wide_as_asked():
    narrow, wide = (MixtureNoise.fit(X, 2, scale=scale) for scale in (1.0, 1.5))
    torch.testing.assert_close(wide.gaussians.covariances, 2.25 * narrow.gaussians.covariances)


def test_outside_a_box_the_density_is_zero_and_the_row_is_named():
    law = UniformNoise(torch.zeros(2), torch.ones(2))
    assert law.log_prob(torch.tensor([[0.5, 0.5], [0.5, 2.0]])).tolist() == [0.0, -math.inf]
    with pytest.raises(ValueError, match="log density -inf at row 1 of the data: it must be positive wherever"):
        check_support(law, torch.tensor([[0.5, 0.5], [0.5, 2.0]]))
    bounded = noise_law(torch.distributions.Independent(torch.distributions.Uniform(torch.zeros(2), torch.ones(2)), 1))
    assert bounded.log_prob(torch.tensor([[0.5, 0.5], [0.5, 2.0]])).tolist() == [0.0, -math.inf]


def test_draws_from_a_box_stay_inside_when_they_are_rounded():
    # 0.1 is no float32: the nearest lies above it, and so do the draws just below.
    law = UniformNoise(torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.1, dtype=torch.float64))
    edge = torch.tensor([[0.1 - 1e-12]], dtype=torch.float64)
    assert float(edge.float().double()) > 0.1
    assert torch.equal(law.log_prob(edge.float()), law.log_prob(edge))


class Sampler:
    def sample(self, n: int) -> Tensor:
        return torch.zeros(n, 2)


CONSTANT = torch.stack([torch.arange(5.0), torch.ones(5)], 1)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: noise_law(Sampler()), TypeError, r"noise must have sample.*Sampler has no log_prob"),
        (lambda: FlowNoise(nn.Linear(2, 2)), TypeError, "Linear has no sample and no log_prob"),
        (lambda: DistributionNoise(torch.distributions.Normal(torch.zeros(2), 1.0)), ValueError, r"batch shape \(2,\)"),
        (lambda: GaussianNoise.fit(X[:1]), ValueError, r"at least 2 points, shape \(N, F\), got \(1, 2\)"),
        (lambda: GaussianNoise.fit(CONSTANT), ValueError, "feature 1 is constant, so it has no density"),
        (lambda: GaussianNoise.fit(X, scale=0.0), ValueError, "scale must be > 0, got 0.0"),
        (lambda: KernelNoise.fit(X, bandwidth=-1.0), ValueError, "bandwidth must be > 0, got -1.0"),
        (lambda: StudentNoise.fit(X, df=0.0), ValueError, "df must be > 0"),
        (lambda: UniformNoise.fit(X, margin=-0.1), ValueError, "margin must be >= 0"),
        (lambda: UniformNoise(torch.ones(1), torch.zeros(1)), ValueError, "vectors of one length with low < high"),
    ],
)
def test_what_is_no_noise_law_says_why(build, error, message: str):
    with pytest.raises(error, match=message):
        build()
