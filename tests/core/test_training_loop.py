"""The training loop: exact resumption, the schedule, and stops that leave the weights alone."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mixtura.core.training import META, NonFiniteLoss, TrainConfig, fit, learning_rate


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def losses_of(model: nn.Module, stop_at: int | None = None):
    def loss_at(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.sum(1, keepdim=True)).pow(2).mean()

    return loss_at


def test_an_interrupted_run_resumes_to_the_same_weights_as_an_unbroken_one(tmp_path: Path):
    config = TrainConfig(steps=20, checkpoint_every=3)
    unbroken = small_model()
    whole = fit(unbroken, losses_of(unbroken), config)
    broken = small_model()
    with pytest.raises(KeyboardInterrupt):
        fit(broken, losses_of(broken, stop_at=11), config, out=tmp_path / "state")
    resumed = small_model()
    history = fit(resumed, losses_of(resumed), config, out=tmp_path / "state")
    assert history.resumed_at == 9
    assert history.losses == whole.losses
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulating_two_halves_equals_one_whole_batch():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for accumulate, parts in ((1, [x]), (2, [x[:4], x[4:]])):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)

        def loss_at(i: int, model=model, parts=parts) -> torch.Tensor:
            return model(parts[i % len(parts)]).pow(2).mean()

        fit(model, loss_at, TrainConfig(steps=3, accumulate=accumulate))
        results.append(model.weight.detach().clone())
    # Adam divides by the root of squared gradients, which lifts rounding of 1e-7 a little.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_weight_decay_spares_vectors():
    model = nn.Linear(3, 3)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)

    def loss_at(step: int) -> torch.Tensor:
        return 0.0 * (model.weight.sum() + model.bias.sum())

    fit(model, loss_at, TrainConfig(steps=1, lr=0.1, warmup=0.0, weight_decay=0.5))
    torch.testing.assert_close(model.weight, torch.full((3, 3), 0.95))
    torch.testing.assert_close(model.bias, torch.ones(3))


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves():
    model = small_model()
    before = [p.clone() for p in model.parameters()]

    def loss_at(step: int) -> torch.Tensor:
        return model(torch.full((2, 4), float("nan"))).mean()

    with pytest.raises(NonFiniteLoss, match="at step 0; lower lr"):
        fit(model, loss_at, TrainConfig(steps=3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_named():
    model = small_model()

    def loss_at(step: int) -> torch.Tensor:
        return torch.sqrt((model[0].weight * 0).sum())  # the value is 0, the slope infinite times 0

    with pytest.raises(NonFiniteLoss, match=r"gradient of 0\.weight is not finite"):
        fit(model, loss_at, TrainConfig(steps=1))


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(tmp_path: Path):
    model = small_model()
    fit(model, losses_of(model), TrainConfig(steps=4, checkpoint_every=2), out=tmp_path / "s")
    with pytest.raises(ValueError, match=r"lr=0\.001, this one has 0\.5"):
        fit(model, losses_of(model), TrainConfig(steps=4, lr=0.5), out=tmp_path / "s")
    other = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.2), nn.Linear(9, 1))
    with pytest.raises(ValueError, match=r"0\.weight is \(9, 4\) here and \(8, 4\) there"):
        fit(other, losses_of(other), TrainConfig(steps=4, checkpoint_every=2), out=tmp_path / "s")


def test_a_run_that_trained_more_is_not_gone_on_with_less(tmp_path: Path):
    """What is frozen now would silently be that of the beginning again."""
    config, model = TrainConfig(steps=4, checkpoint_every=2), small_model()
    fit(model, losses_of(model), config, out=tmp_path / "state")
    fewer = small_model()
    frozen, parameter = next(iter(fewer.named_parameters()))
    parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=f"holds a run that also trains {frozen}; train the same parameters"):
        fit(fewer, losses_of(fewer), config, out=tmp_path / "state")


def test_the_mode_and_the_callers_generator_are_left_as_they_were():
    model = small_model().eval()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    fit(model, losses_of(model), TrainConfig(steps=2))
    assert not model.training
    assert torch.equal(torch.rand(3), want)


def test_a_model_without_gradients_is_refused():
    model = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model, losses_of(model), TrainConfig(steps=1))


@pytest.mark.parametrize("field", ["steps", "lr", "warmup", "accumulate", "clip"])
def test_a_value_out_of_range_is_named(field: str):
    values = {"steps": 1, field: -1}
    with pytest.raises(ValueError, match=field):
        TrainConfig(**values)


def test_the_rate_rises_to_its_peak_and_ends_at_its_floor():
    config = TrainConfig(steps=50, lr=2.0, warmup=0.2, final=0.25)
    rates = [learning_rate(step, config) for step in range(50)]
    assert rates[9] == max(rates) == 2.0
    assert rates[-1] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_no_checkpoint_is_written_where_none_was_asked_for(tmp_path: Path):
    model = small_model()
    fit(model, losses_of(model), TrainConfig(steps=3), out=tmp_path / "s")
    assert not (tmp_path / "s" / META).exists()


def test_running_statistics_are_resumed_and_branches_go_on_from_one_beginning(tmp_path: Path):
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def losses(model):
        return lambda step: model(torch.randn(16, 3, generator=torch.Generator().manual_seed(step)) + 1).square().mean()

    config = TrainConfig(steps=12, lr=1e-2)
    unbroken, begun, branch = model(), model(), model()
    fit(unbroken, losses(unbroken), config)
    assert len(fit(begun, losses(begun), config, out=tmp_path / "begun", stop=5).losses) == 5
    shutil.copytree(tmp_path / "begun", tmp_path / "branch")
    assert fit(branch, losses(branch), config, out=tmp_path / "branch").resumed_at == 5
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, branch.state_dict()[name]), name
    with pytest.raises(ValueError, match="stop must be at least 1 and needs out"):
        fit(branch, losses(branch), config, stop=5)


def test_sgd_takes_the_steps_of_torchs_with_nesterov_momentum_on_the_cosine():
    config = TrainConfig(steps=6, lr=0.1, warmup=0.0, final=0.0, weight_decay=0.01, clip=0.0, optimizer="sgd")
    ours, theirs = small_model().eval(), small_model().eval()

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return model.get_submodule("2")(model.get_submodule("0")(x)).pow(2).mean()

    fit(ours, lambda step: loss_of(ours, step), config)
    decayed = [{"params": [p for p in theirs.parameters() if (p.dim() > 1) == matrix]} for matrix in (True, False)]
    decayed[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    optimizer = torch.optim.SGD(decayed, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(theirs, step).backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'sgd', got 'lion'"):
        TrainConfig(steps=1, optimizer="lion")  # type: ignore[arg-type]
