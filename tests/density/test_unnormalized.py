"""Objectives for unnormalised models: exact gradients on a finite set, biases, the running constant, and processes."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import spawn

from mixtura.core.training import NonFiniteLoss
from mixtura.density.noise_laws import UniformNoise
from mixtura.density.unnormalized import INNER, CompositionalLikelihood, NoiseContrastive, NoiseCoverageWarning

STATES = 64


class EvenStates:
    """All states of a finite set are equally likely; a point is (number of the state,)."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(STATES, (n, 1), generator=generator).double()

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), -math.log(STATES), dtype=torch.float64)


class Family(nn.Module):
    """Exponential family on the finite set: log p0 = natural · T(state) + offset."""

    def __init__(self, features: int = 3, spread: float = 0.6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("T", torch.randn(STATES, features, generator=generator, dtype=torch.float64))
        self.natural = nn.Parameter(spread * torch.randn(features, generator=generator, dtype=torch.float64))
        self.offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.T[x[:, 0].long()] @ self.natural + self.offset


ALL_STATES = torch.arange(STATES, dtype=torch.float64)[:, None]


def gradient(objective: nn.Module, model: Family, x: Tensor, **how) -> Tensor:
    (found,) = torch.autograd.grad(objective(model, x, **how), [model.natural])
    return found


@pytest.mark.parametrize("inner", INNER)
def test_with_all_states_as_noise_the_gradient_is_that_of_the_exact_likelihood(inner: str):
    model, objective = Family(), CompositionalLikelihood(EvenStates(), inner=inner)
    x = torch.randint(STATES, (30, 1), generator=torch.Generator().manual_seed(0)).double()
    nll = torch.log_softmax(model(ALL_STATES), 0)[x[:, 0].long()].neg().mean()
    (want,) = torch.autograd.grad(nll, [model.natural])
    for _ in range(3):  # u stays where it is, since every step sees the whole set
        value = objective(model, x, noise_batch=ALL_STATES)
        torch.testing.assert_close(value, nll.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient(objective, model, x, noise_batch=ALL_STATES), want, rtol=1e-9, atol=1e-10)
    assert objective.log_partition == pytest.approx(float(model(ALL_STATES).detach().logsumexp(0)), abs=1e-12)


def test_three_steps_match_a_loop_over_points_in_plain_numbers():
    model, objective = Family(), CompositionalLikelihood(EvenStates(), gamma=0.3)
    generator, u = torch.Generator().manual_seed(1), None
    for step in range(3):
        x, z = EvenStates().sample(4, generator), EvenStates().sample(5, generator)
        weights = [STATES * math.exp(model(p[None]).item()) for p in z]
        mean = sum(weights) / 5
        u = mean if u is None else 0.7 * u + 0.3 * mean
        want = (
            -sum(model.T[int(p)] for p in x) / 4
            + sum(w / u * model.T[int(p)] for w, p in zip(weights, z, strict=True)) / 5
        )
        found = gradient(objective, model, x, noise_batch=z)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
        assert objective.log_partition == pytest.approx(math.log(u), abs=1e-12)
        with torch.no_grad():
            model.natural += 0.1 * (step + 1)


def time_average(inner: str, gamma: float, n_noise: int, steps: int) -> tuple[Tensor, Tensor]:
    """Mean error of the gradient at fixed weights once u has settled, and its standard error by means of blocks.

    What the same noise would give with the exact constant has no bias; taking it off takes most of the variance off.
    """
    model = Family()
    objective = CompositionalLikelihood(EvenStates(), gamma=gamma, inner=inner)
    generator, x = torch.Generator().manual_seed(2), ALL_STATES[:1]
    exact_Z = float(model(ALL_STATES).detach().exp().sum())
    rows = []
    for _ in range(steps):
        z = EvenStates().sample(n_noise, generator)
        weights = STATES * model(z).detach().exp() / exact_Z
        with_exact_constant = weights @ model.T[z[:, 0].long()] / n_noise - model.T[0]
        rows.append(gradient(objective, model, x, noise_batch=z) - with_exact_constant)
    kept = torch.stack(rows)[steps // 10 :]
    blocks = kept[: len(kept) // 30 * 30].reshape(30, -1, kept.shape[1]).mean(1)
    return kept.mean(0), blocks.std(0) / math.sqrt(30)


def batch_bias(n_noise: int) -> Tensor:
    """Bias of a ratio of means by the delta method: (-Cov(wT, w) / g² + E[wT] Var(w) / g³) / J."""
    model = Family()
    w = STATES * model(ALL_STATES).exp().detach()
    wT = w[:, None] * model.T
    g, numerator = w.mean(), wT.mean(0)
    covariance = (wT * w[:, None]).mean(0) - numerator * g
    return (-covariance / g**2 + numerator * w.var(correction=0) / g**3) / n_noise


def test_the_running_estimate_is_unbiased_where_a_batch_alone_is_not():
    n_noise, steps = 16, 3000
    bias = batch_bias(n_noise)
    largest = int(bias.abs().argmax())
    found, error = time_average("batch", 0.1, n_noise, steps)
    # Sign and size of the delta method, whose next order is another 1 / J; the standard error is a few percent.
    assert abs(float(error[largest])) < 0.07 * abs(float(bias[largest]))
    assert float(found[largest]) == pytest.approx(float(bias[largest]), rel=0.2)
    ours, error = time_average("ema", 0.02, n_noise, steps)
    # Three standard errors in three coordinates: a false alarm in less than 1 % of seeds, and the seed is fixed.
    assert bool((ours.abs() < 3 * error).all())
    assert abs(float(ours[largest])) < 0.2 * abs(float(bias[largest]))


def test_a_constant_added_to_log_p0_moves_the_log_partition_by_itself_and_nothing_else():
    def trained(offset: float) -> tuple[Tensor, float]:
        model, objective = Family(), CompositionalLikelihood(EvenStates())
        model.offset = offset
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(3)
        for _ in range(100):
            optimizer.zero_grad()
            objective(model, EvenStates().sample(8, generator), generator=generator).backward()
            optimizer.step()
        return model.natural.detach(), objective.log_partition

    plain, log_z = trained(0.0)
    # 2000 nats overflow any float outside the logarithm.
    for offset in (3.0, 2000.0, -2000.0):
        moved, moved_log_z = trained(offset)
        torch.testing.assert_close(moved, plain, rtol=0, atol=1e-9)
        assert moved_log_z - offset == pytest.approx(log_z, abs=1e-9)


def test_the_drift_corrected_estimate_follows_a_moving_constant_without_lag():
    class Drifting(Family):
        def __init__(self) -> None:
            super().__init__()
            self.free = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.free

    lag = {}
    for inner in ("ema", "storm"):
        model, objective = Drifting(), CompositionalLikelihood(EvenStates(), inner=inner)
        still, fixed = Drifting(), CompositionalLikelihood(EvenStates())
        generator = torch.Generator().manual_seed(4)
        for _ in range(40):
            z = EvenStates().sample(16, generator)
            objective(model, z, noise_batch=z)
            fixed(still, z, noise_batch=z)
            lag[inner] = objective.log_partition - float(model.free.detach()) - fixed.log_partition
            with torch.no_grad():
                model.free += 0.3
    assert abs(lag["storm"]) < 1e-12
    assert lag["ema"] < -0.5


def test_the_learned_constant_has_the_gradient_of_the_linear_bound():
    model, objective = Family(), CompositionalLikelihood(EvenStates(), inner="learned")
    objective(model, ALL_STATES, noise_batch=ALL_STATES)  # starts at log Z, where the bound is tight
    log_z = objective.log_partition
    with torch.no_grad():
        objective.log_z += 0.7
    (slope,) = torch.autograd.grad(objective(model, ALL_STATES, noise_batch=ALL_STATES), [objective.log_z])
    assert float(slope) == pytest.approx(1 - math.exp(log_z - (log_z + 0.7)), abs=1e-12)


@pytest.mark.parametrize("inner", INNER)
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(inner: str, tmp_path: Path):
    def step(model: Family, objective: nn.Module, n: int) -> None:
        for i in range(n):
            generator = torch.Generator().manual_seed(100 + i)
            x = EvenStates().sample(6, generator)
            found = gradient(objective, model, x, generator=generator)
            with torch.no_grad():
                model.natural.sub_(0.1 * found)

    model, objective = Family(), CompositionalLikelihood(EvenStates(), inner=inner)
    step(model, objective, 5)
    again, resumed = Family(), CompositionalLikelihood(EvenStates(), inner=inner)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(objective.state_dict())
    step(model, objective, 5)
    step(again, resumed, 5)
    assert torch.equal(again.natural, model.natural)
    assert resumed.log_partition == objective.log_partition


@pytest.mark.parametrize("strict", [True, False])
def test_a_saved_state_without_the_running_estimate_is_refused(strict: bool):
    state = CompositionalLikelihood(EvenStates()).state_dict()
    del state["log_u"]
    with pytest.raises(RuntimeError, match="no log_u, the running estimate of the normalising constant"):
        CompositionalLikelihood(EvenStates()).load_state_dict(state, strict=strict)


def test_noise_contrast_matches_a_loop_over_points_in_plain_numbers():
    model = Family()
    generator = torch.Generator().manual_seed(6)
    x, z = EvenStates().sample(4, generator), EvenStates().sample(8, generator)
    c = 0.4
    for form in ("logistic", "exponential"):
        objective = NoiseContrastive(EvenStates(), ratio=2, form=form)
        objective(model, x, noise_batch=z)
        with torch.no_grad():
            objective.log_z.fill_(c)

        def ratio(point: Tensor) -> float:
            return STATES * math.exp(model(point[None]).item() - c)

        if form == "logistic":
            # The posterior that a point is noise, with two noise points a data point.
            want = -sum(math.log(ratio(p) / (ratio(p) + 2)) for p in x) / 4
            want -= 2 * sum(math.log(2 / (ratio(p) + 2)) for p in z) / 8
        else:
            want = sum(ratio(p) ** -0.5 for p in x) / 4 + sum(ratio(p) ** 0.5 for p in z) / 8
        assert objective(model, x, noise_batch=z).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("form", ["logistic", "exponential"])
def test_the_gradient_of_noise_contrast_vanishes_at_the_truth(form: str):
    # Data in exact proportion to the model: 2 : 1 over two halves of the states.
    model = Family()
    with torch.no_grad():
        model.T.zero_()
        model.T[: STATES // 2, 0] = 1
        model.natural[0] = math.log(2)
    x = torch.cat([ALL_STATES[: STATES // 2], ALL_STATES])
    objective = NoiseContrastive(EvenStates(), form=form)
    loss = objective(model, x, noise_batch=ALL_STATES)  # c starts at the importance estimate, exact here
    for found in torch.autograd.grad(loss, [model.natural, objective.log_z]):
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_a_normalised_gradient_has_length_one_and_the_same_direction():
    model, x = Family(), ALL_STATES[:5]
    plain, unit = (NoiseContrastive(EvenStates(), normalized_gradient=flag) for flag in (False, True))
    loss, same = plain(model, x, noise_batch=ALL_STATES), unit(model, x, noise_batch=ALL_STATES)
    assert float(loss) == float(same)
    raw = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [model.natural, plain.log_z])])
    found = torch.cat([g.reshape(-1) for g in torch.autograd.grad(same, [model.natural, unit.log_z])])
    torch.testing.assert_close(found, raw / raw.norm(), rtol=1e-9, atol=1e-12)


def test_noise_outside_the_support_of_the_model_has_no_weight_and_no_gradient():
    class Half(Family):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0] < STATES / 2, super().forward(x), -math.inf)

    model, objective, x = Half(), CompositionalLikelihood(EvenStates()), ALL_STATES[:5]
    (want,) = torch.autograd.grad(
        torch.log_softmax(model(ALL_STATES[: STATES // 2]), 0)[:5].neg().mean(), [model.natural]
    )
    value = objective(model, x, noise_batch=ALL_STATES)
    assert math.isfinite(value.item())
    torch.testing.assert_close(torch.autograd.grad(value, [model.natural])[0], want, rtol=1e-9, atol=1e-12)


def test_the_effective_sample_size_is_that_of_the_weights():
    model, objective = Family(), CompositionalLikelihood(EvenStates())
    z = ALL_STATES[:10]
    objective(model, z, noise_batch=z)
    w = model(z).exp().detach()
    assert objective.ess_fraction == pytest.approx(float(w.sum() ** 2 / w.square().sum() / 10), rel=1e-12)


def test_a_noise_law_that_misses_the_model_warns_once_with_the_number():
    law = UniformNoise(torch.zeros(1), torch.ones(1))
    objective = CompositionalLikelihood(law, noise_batch_size=256)
    narrow = lambda x: -0.5 * ((x[:, 0] - 0.5) / 1e-4).square()  # noqa: E731
    generator = torch.Generator().manual_seed(0)

    def some_steps() -> None:
        for _ in range(100):
            objective(narrow, torch.full((4, 1), 0.5), generator=generator)

    with pytest.warns(NoiseCoverageWarning, match=r"to \d\.\d+% of 256 points at step \d+ .*heavier tails") as caught:
        some_steps()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some_steps()


def test_noise_is_drawn_anew_at_every_call_and_repeats_with_its_generator():
    model, objective = Family(), CompositionalLikelihood(EvenStates(), inner="batch", noise_batch_size=8)
    generator = torch.Generator().manual_seed(0)
    first, second = (objective(model, ALL_STATES, generator=generator).item() for _ in range(2))
    assert first != second
    assert objective(model, ALL_STATES, generator=torch.Generator().manual_seed(0)).item() == first


class NoDensity:
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(n, 1)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: CompositionalLikelihood(NoDensity()), TypeError, "NoDensity has no log_prob"),
        (lambda: CompositionalLikelihood(EvenStates(), gamma=0.0), ValueError, r"gamma must be in \(0, 1\], got 0.0"),
        (lambda: CompositionalLikelihood(EvenStates(), gamma=1.5), ValueError, r"gamma must be in \(0, 1\], got 1.5"),
        (
            lambda: CompositionalLikelihood(EvenStates(), inner="mean"),
            ValueError,
            "inner must be one of .*'storm'.*'mean'",
        ),
        (
            lambda: CompositionalLikelihood(EvenStates(), noise_batch_size=-1),
            ValueError,
            "noise_batch_size must be >= 0",
        ),
        (lambda: CompositionalLikelihood(EvenStates(), ess_floor=1), ValueError, "ess_floor is a share"),
        (lambda: NoiseContrastive(EvenStates(), ratio=0), ValueError, "ratio is noise points per data point"),
        (lambda: NoiseContrastive(EvenStates(), form="cubic"), ValueError, "form must be one of"),
    ],
)
def test_what_can_not_be_built_says_why(build, error, message: str):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("kind", [CompositionalLikelihood, NoiseContrastive])
def test_what_can_not_be_computed_says_why(kind: type):
    objective, model = kind(EvenStates()), Family()
    with pytest.raises(ValueError, match=r"log_p0 must give one value a point, shape \(8,\), got \(8, 1\)"):
        objective(lambda x: model(x)[:, None], ALL_STATES[:4], noise_batch=ALL_STATES[:4])
    with pytest.raises(ValueError, match=r"x must have shape \(points, features...\), got \(64,\)"):
        objective(model, ALL_STATES[:, 0])
    with pytest.raises(ValueError, match=r"noise_batch must have points of shape \(1,\) as x has, got \(2,\)"):
        objective(model, ALL_STATES, noise_batch=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="noise_batch must hold at least one point"):
        objective(model, ALL_STATES, noise_batch=torch.zeros(0, 1))
    objective(model, ALL_STATES, noise_batch=ALL_STATES)
    before = objective.log_partition
    broken = lambda x: torch.where(x[:, 0] == 3, math.nan, model(x))  # noqa: E731
    with pytest.raises(NonFiniteLoss, match="not finite at step 1: 1 of 64 data points and 1 of 64 noise points"):
        objective(broken, ALL_STATES, noise_batch=ALL_STATES)
    assert objective.log_partition == before


def test_the_two_that_read_the_weights_need_a_module():
    plain = lambda x: -x[:, 0]  # noqa: E731
    for objective in (
        CompositionalLikelihood(EvenStates(), inner="storm"),
        NoiseContrastive(EvenStates(), normalized_gradient=True),
    ):
        with pytest.raises(TypeError, match=r"needs log_p0 to be an nn\.Module, whose weights it can read"):
            objective(plain, ALL_STATES)


def test_a_data_point_without_noise_density_is_named_by_its_row():
    objective = NoiseContrastive(UniformNoise(torch.zeros(1), torch.ones(1)))
    with pytest.raises(ValueError, match="log density -inf at row 2 of the data"):
        objective(lambda x: -x[:, 0], torch.tensor([[0.5], [0.1], [1.5], [2.0]]))


def _process(rank: int, world: int, address: str, shares: list[tuple[slice, slice]], inner: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    model, objective = Family(), CompositionalLikelihood(EvenStates(), inner=inner)
    data, noise = shares[rank]
    generator, rows = torch.Generator().manual_seed(7), []
    for _ in range(3):
        x, z = EvenStates().sample(12, generator), EvenStates().sample(12, generator)
        loss = objective(model, x[data], noise_batch=z[noise])
        (g,) = torch.autograd.grad(loss, [model.natural])
        torch.distributed.all_reduce(g)
        g /= world  # as distributed training does
        with torch.no_grad():
            model.natural.sub_(0.1 * g)
        rows.append(torch.cat([g, loss.detach()[None], objective.log_u[None]]))
    if rank == 0:
        torch.save(torch.stack(rows), out)
    torch.distributed.destroy_process_group()


def test_processes_with_uneven_and_empty_shares_give_the_answer_of_one(tmp_path: Path):
    # Three processes: the second has one data point, the third none.
    shares = [(slice(0, 11), slice(0, 7)), (slice(11, 12), slice(7, 11)), (slice(12, 12), slice(11, 12))]
    spawn(_process, (3, str(tmp_path / "meet"), shares, "storm", str(tmp_path / "rows.pt")), nprocs=3)
    found = torch.load(tmp_path / "rows.pt", weights_only=True)
    model, objective = Family(), CompositionalLikelihood(EvenStates(), inner="storm")
    generator = torch.Generator().manual_seed(7)
    for row in found:
        x, z = EvenStates().sample(12, generator), EvenStates().sample(12, generator)
        loss = objective(model, x, noise_batch=z)
        (g,) = torch.autograd.grad(loss, [model.natural])
        torch.testing.assert_close(
            row, torch.cat([g, loss.detach()[None], objective.log_u[None]]), rtol=1e-10, atol=1e-12
        )
        with torch.no_grad():
            model.natural.sub_(0.1 * g)
