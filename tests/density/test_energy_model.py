"""The estimator: closed forms, error bars, draws, images, and bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixtura.core.training import NonFiniteLoss
from mixtura.density import EnergyDensity, ood_score
from mixtura.density.energies import langevin
from mixtura.density.noise_laws import GaussianNoise, UniformNoise
from mixtura.density.unnormalized import NoiseCoverageWarning


class Quadratic(nn.Module):
    """Log p0 = -|root' (x - mean)|² / 2 + offset: a Gaussian without its constant."""

    def __init__(self, d: int, offset: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(d))
        self.root = nn.Parameter(torch.eye(d))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.offset - 0.5 * ((x - self.mean) @ self.root.tril()).square().sum(-1)


def gaussian_data(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ (np.eye(d) + 0.3 * rng.normal(size=(d, d))) + rng.normal(size=d)


def small(**how) -> EnergyDensity:
    return EnergyDensity(**{"max_iter": 20, "width": 8, "depth": 1, "batch_size": 16, "noise_batch_size": 16, **how})


@pytest.fixture(scope="module")
def fitted() -> tuple[EnergyDensity, np.ndarray]:
    X = gaussian_data(500, 5)
    return EnergyDensity(Quadratic(5), max_iter=600, lr=0.05).fit(X), X


def test_the_log_partition_of_a_gaussian_is_its_closed_form(fitted):
    model, _ = fitted
    root = np.tril(model.weights_["root"].astype(np.float64))
    want = 2.5 * math.log(2 * math.pi) - math.log(abs(np.linalg.det(root)))
    # Three standard errors: a false alarm in 0.3 % of seeds, and the seed is fixed.
    assert abs(model.log_partition_ - want) < min(3 * model.log_partition_se_, 0.02)
    assert 0 < model.log_partition_se_ < 0.02


def test_the_fit_comes_close_to_the_maximum_of_the_likelihood(fitted):
    model, X = fitted
    sigma = np.cov(X.T, bias=True)
    best = -0.5 * (5 * math.log(2 * math.pi) + np.linalg.slogdet(sigma)[1] + 5)
    # The mean log likelihood of the data can pass the best only by the error of log Z.
    assert best - 0.03 < model.score(X) < best + 4 * model.log_partition_se_


def test_a_constant_in_the_energy_changes_log_z_by_itself_and_the_density_not_at_all():
    X = gaussian_data(60, 2)
    plain, moved = (
        EnergyDensity(Quadratic(2, offset).double(), max_iter=30, batch_size=16, noise_batch_size=16).fit(X + 5000.0)
        for offset in (0.0, 40.0)  # data far from the origin are trained on in float64
    )
    assert moved.log_partition_ - plain.log_partition_ == pytest.approx(40, abs=1e-5)
    np.testing.assert_allclose(moved.score_samples(X + 5000.0), plain.score_samples(X + 5000.0), atol=1e-5)


def test_a_density_integrates_to_one():
    X = gaussian_data(300, 2)
    model = small(max_iter=300, width=32, depth=2, batch_size=128, noise_batch_size=128).fit(X)
    low, high = X.min(0) - 6, X.max(0) + 6
    axes = [np.linspace(a, b, 400) for a, b in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    mass = np.exp(model.score_samples(grid)).sum() * cell
    assert abs(math.log(mass)) < 4 * model.log_partition_se_ + 1e-3


def test_a_change_of_units_changes_the_density_by_its_volume():
    X = gaussian_data(80, 2)
    scale = np.array([1e-3, 50.0])
    plain, scaled = small().fit(X), small().fit(X * scale)
    difference = plain.score_samples(X) - scaled.score_samples(X * scale)
    # Twenty steps in float32 part the two by some thousandths.
    np.testing.assert_allclose(difference, np.log(scale).sum(), atol=0.01)


@pytest.mark.parametrize("method", ["compositional", "batch", "nce"])
@pytest.mark.parametrize("noise", ["gaussian", "student", "uniform", "kernel", "mixture"])
def test_every_method_runs_with_every_law_and_repeats_with_its_seed(method: str, noise: str):
    X = gaussian_data(50, 2)
    scores = [small(method=method, noise=noise, max_iter=5).fit(X).score_samples(X) for _ in range(2)]
    assert np.isfinite(scores[0]).all()
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("inner", ["storm", "learned"])
def test_the_other_ways_to_follow_the_constant_are_a_switch(inner: str):
    model = small(inner=inner).fit(gaussian_data(50, 2))
    assert set(model.history_) == {"loss", "log_partition", "ess"}
    assert all(len(values) == 20 for values in model.history_.values())


def test_a_refreshed_noise_law_is_a_mixture_that_covers_the_data():
    X = gaussian_data(200, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = small(refresh_noise_every=10).fit(X)
    assert type(model.noise_).__name__ == "MixtureNoise"
    assert np.isfinite(model.score_samples(X)).all()


def test_draws_have_the_moments_of_the_fitted_gaussian(fitted):
    model, _ = fitted
    draws = model.sample(4000, langevin_steps=5)
    P = np.tril(model.weights_["root"]).astype(np.float64)
    sigma = np.linalg.inv(P @ P.T)
    spread = np.sqrt(np.diag(sigma))
    # Resampled from 80,000 points at an effective size of some percent: four standard errors of 1500 independent draws.
    assert np.all(np.abs(draws.mean(0) - model.weights_["mean"]) < 4 * spread / math.sqrt(1500))
    np.testing.assert_allclose(draws.std(0), spread, rtol=0.1)


def test_langevin_chains_keep_a_normal_law_at_any_step():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    for step in (0.3, 1.5):
        moved = langevin(lambda at: -0.5 * at[:, 0].square(), x, torch.tensor([step]).double(), 10, generator)
        assert float((moved != x).double().mean()) > 0.9
        # Five standard errors of mean and variance: 5 / sqrt(20000), 5 sqrt(2 / 20000).
        assert abs(float(moved.mean())) < 0.036
        assert abs(float(moved.var()) - 1) < 0.05


def test_draws_that_rest_on_few_points_warn():
    X = 1e-3 * gaussian_data(100, 1)
    law = UniformNoise(torch.tensor([-300.0]), torch.tensor([300.0]))
    with pytest.warns(NoiseCoverageWarning, match="log_partition_ rests on .* its error bar .* can not be trusted"):
        model = small(noise=law, max_iter=2).fit(X)
    with pytest.warns(NoiseCoverageWarning, match="the 500 draws rest on .* so they repeat; move them apart"):
        model.sample(500)


def test_the_stranger_a_sample_the_higher_its_score(fitted):
    model, X = fitted
    near, far = X[:1], X[:1] + 30
    assert ood_score(model, far) > ood_score(model, near)
    np.testing.assert_array_equal(ood_score(model, X), -model.score_samples(X))


def test_a_row_scores_alone_as_it_does_among_others(fitted):
    model, X = fitted
    together = model.score_samples(X[:20])
    alone = np.concatenate([model.score_samples(X[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(alone, together, rtol=1e-12)


def test_images_go_through_a_convolutional_energy():
    X = np.random.default_rng(0).normal(size=(40, 1, 6, 7))
    model = small(energy="conv", depth=2, max_iter=5).fit(X)
    assert model.score_samples(X[:3]).shape == (3,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseCoverageWarning)
        assert model.sample(2).shape == (2, 1, 6, 7)
    with pytest.raises(ValueError, match=r"samples of shape \(1, 6, 7\) as in fit, got \(1, 7, 6\)"):
        model.score_samples(X.transpose(0, 1, 3, 2))


def test_the_module_that_was_given_is_not_trained_and_a_builder_gets_the_shape():
    given = Quadratic(2)
    small(energy=given).fit(gaussian_data(40, 2))
    assert torch.equal(given.mean.detach(), torch.zeros(2))
    model = small(energy=lambda shape: Quadratic(*shape)).fit(gaussian_data(40, 3))
    assert model.weights_["mean"].shape == (3,)


def test_a_model_with_a_law_of_this_package_is_saved_and_one_with_a_module_refuses(tmp_path):
    X = gaussian_data(40, 2)
    model = small(noise=GaussianNoise.fit(torch.from_numpy(X), scale=3.0)).fit(X)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(EnergyDensity.load(tmp_path / "model").score_samples(X), model.score_samples(X))
    with pytest.raises(TypeError, match="parameter energy is a Quadratic, which cannot be saved without pickle"):
        small(energy=Quadratic(2)).fit(X).save(tmp_path / "other")


class Broken(Quadratic):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (self.mean.detach().abs().sum() == 0)


@pytest.mark.parametrize(
    ("how", "X", "error", "message"),
    [
        ({}, np.zeros((1, 2)), ValueError, "1 sample"),
        ({}, np.array([[0.0, 1.0], [1.0, 1.0]]), ValueError, "feature 1 is constant"),
        ({}, np.array([[0.0, np.nan], [1.0, 1.0]]), ValueError, "NaN"),
        ({"device": "warp"}, None, ValueError, "device must be 'auto', 'cpu', 'cuda' or the like, got 'warp'"),
        ({"method": "mcmc"}, None, ValueError, "method must be one of"),
        ({"noise": "laplace"}, None, ValueError, "noise must be one of"),
        ({"noise": object()}, None, TypeError, "object has no sample and no log_prob"),
        ({"energy": "transformer"}, None, ValueError, "energy must be one of"),
        ({"energy": "conv"}, None, ValueError, "energy='conv' needs images"),
        ({"gamma": 2.0}, None, ValueError, r"gamma must be in \(0, 1\]"),
        ({"max_iter": 0}, None, ValueError, "max_iter must be >= 1, got 0"),
        ({"noise_batch_size": 0}, None, ValueError, "noise_batch_size must be >= 1, got 0"),
        ({"method": "nce", "inner": "storm"}, None, ValueError, "inner='storm' has no effect with method='nce'"),
        ({"refresh_noise_every": -1}, None, ValueError, "refresh_noise_every must be >= 0"),
        (
            {"noise": UniformNoise(torch.zeros(2), torch.ones(2))},
            None,
            ValueError,
            "log density -inf at row 0 of the data",
        ),
        ({"energy": Broken(2)}, None, NonFiniteLoss, "not finite at step 1"),
    ],
)
def test_bad_input_says_what_is_wrong(how, X, error, message: str):
    with pytest.raises(error, match=message):
        small(**how).fit(gaussian_data(30, 2) + 9 if X is None else X)


def test_a_fit_among_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"fits in one process, but torch\.distributed runs several"):
        small().fit(gaussian_data(30, 2))


def test_draws_need_a_positive_number(fitted):
    with pytest.raises(ValueError, match="n_samples must be >= 1, got 0"):
        fitted[0].sample(0)
