"""The objectives: closed forms at both ends, the minimiser, gradients by finite differences, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixtura.core.blend import soft_cross_entropy, soft_targets
from mixtura.robust.exposure_training import ExposureConfig, Rows, expose, logits_of, shared_rows, shifted
from mixtura.robust.outlier_exposure import (
    EnergyExposure,
    HardOutlierExposure,
    MixtureOutlierExposure,
    OutlierExposure,
    Plain,
)

K, B = 4, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(*shape: int, dtype=torch.float64):
    g = generator(1)
    x, z = torch.randn(B, *shape, generator=g, dtype=dtype), torch.randn(2 * B, *shape, generator=g, dtype=dtype)
    return x, torch.randint(K, (B,), generator=g), z


def linear(n: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(n, K)).double()


def weighted(parts: dict, beta: float) -> torch.Tensor:
    return parts["id_loss"] + beta * parts["outlier_loss"]


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_all_share_on_the_known_side_is_plain_cross_entropy_twice(mix):
    x, y, z = batch(1, 2, 4)
    model, objective = linear(8), MixtureOutlierExposure(K, mix, beta=2.5)
    got = weighted(objective.parts(model, x, y, z, generator=generator(), lam=1.0), 2.5)
    assert got.item() == pytest.approx(3.5 * F.cross_entropy(model(x), y).item(), abs=1e-6)


def test_no_share_on_the_known_side_is_outlier_exposure_by_its_closed_form():
    x, y, z = batch(5)
    model = linear()
    got = weighted(MixtureOutlierExposure(K, beta=0.7).parts(model, x, y, z, lam=0.0), 0.7)
    f = model(z[:B])
    closed = (torch.logsumexp(f, 1) - f.mean(1)).mean()
    assert got.item() == pytest.approx(float(F.cross_entropy(model(x), y) + 0.7 * closed), abs=1e-6)
    parts = OutlierExposure(K, 0.7)(model, x, y, z[:B])
    assert got.item() == pytest.approx(float(parts), abs=1e-6)
    uniform = -torch.log_softmax(f, 1).mean()  # the cross entropy to the uniform law is the same thing
    assert float(closed) == pytest.approx(float(uniform), abs=1e-12)


def test_the_target_falls_in_proportion_and_not_to_uniform_at_once():
    x, y, z = batch(5)
    model, objective = linear(), MixtureOutlierExposure(K)
    for lam in (0.25, 0.5, 0.75):
        parts = objective.parts(model, x, y, z, lam=lam)
        target = lam * F.one_hot(y, K) + (1 - lam) / K
        want = F.cross_entropy(model(lam * x + (1 - lam) * z[:B]), target)
        assert float(parts["mixed_loss"]) == pytest.approx(float(want), abs=1e-6)


def test_free_logits_end_at_the_targets_so_confidence_is_the_known_share():
    y, lam = torch.arange(K), torch.tensor([0.0, 0.3, 0.6, 0.9])
    target = soft_targets(y, lam, K)
    logits = torch.zeros(K, K, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        loss = soft_cross_entropy(logits, target)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach().softmax(1)
    assert (found - target).abs().max() < 1e-4
    assert (found.amax(1) - (lam + (1 - lam) / K)).abs().max() < 1e-4


OBJECTIVES = {
    "mixup": lambda: MixtureOutlierExposure(K, alpha=1.0, beta=2.0),
    "mixup, a share a row": lambda: MixtureOutlierExposure(K, beta=2.0, per_sample=True),
    "cutmix": lambda: MixtureOutlierExposure(K, "cutmix", alpha=2.0),
    "both": lambda: MixtureOutlierExposure(K, "both"),
    "oe": lambda: OutlierExposure(K),
    "oe-m": lambda: HardOutlierExposure(K),
    "energy": lambda: EnergyExposure(K, m_in=-1.0, m_out=-0.5),
    "plain": lambda: Plain(K),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name):
    x, y, z = batch(1, 2, 3)
    objective = OBJECTIVES[name]()
    weight = torch.randn(6, K, dtype=torch.float64, generator=generator(2), requires_grad=True)

    def loss(w):
        return objective(lambda v: torch.tanh(v.flatten(1) @ w), x, y, z, generator=generator(3))

    assert torch.autograd.gradcheck(loss, (weight,))


def test_energy_margins_are_squared_hinges_on_either_side():
    x, y, z = batch(5)
    model, objective = linear(), EnergyExposure(K, beta=1.0, m_in=-2.0, m_out=-1.0)
    e_in, e_out = -torch.logsumexp(model(x), 1), -torch.logsumexp(model(z), 1)
    want = (e_in + 2).clamp(min=0).square().mean() + (-1 - e_out).clamp(min=0).square().mean()
    assert float(objective.parts(model, x, y, z)["outlier_loss"]) == pytest.approx(float(want), abs=1e-12)


def test_known_rows_and_mixtures_pass_apart_and_outliers_pass_with_known_rows():
    x, y, z = batch(5)
    sizes = []

    def model(v):
        sizes.append(len(v))
        return v[:, :K]

    MixtureOutlierExposure(K)(model, x, y, z)
    assert sizes == [B, B]
    sizes.clear()
    OutlierExposure(K)(model, x, y, z)
    assert sizes == [3 * B]


def test_the_same_generator_gives_the_same_loss_and_the_global_one_is_left_alone():
    x, y, z = batch(1, 4, 4)
    model = linear(16)
    for mix in ("mixup", "cutmix", "both"):
        objective = MixtureOutlierExposure(K, mix, per_sample=True)
        state = torch.get_rng_state()
        a, b = (objective(model, x, y, z, generator=generator(5)) for _ in range(2))
        assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())
        assert not torch.equal(a, objective(model, x, y, z, generator=generator(6)))


def test_the_coin_of_both_lands_on_both_sides():
    x, y, z = batch(1, 4, 4)
    objective = MixtureOutlierExposure(K, "both")
    seen = []
    g = generator(0)
    for _ in range(40):
        mixed = []
        objective(lambda v, mixed=mixed: mixed.append(v) or v.flatten(1)[:, :K], x, y, z, generator=g)
        cut = ((mixed[1] == x) | (mixed[1] == z[:B])).all()
        seen.append(bool(cut))
    assert 5 < sum(seen) < 35  # a fair coin leaves this once in a million


def test_the_hardest_outliers_are_those_the_model_is_surest_about():
    logits = torch.tensor([[0.0, 0.0], [5.0, 0.0], [2.0, 0.0], [0.0, 9.0]])
    chosen = HardOutlierExposure(2).choose(lambda rows: logits[rows], 4, 2, generator=generator())
    assert chosen.tolist() == [3, 1]
    few = HardOutlierExposure(2, candidates=2).choose(lambda rows: logits[rows], 4, 3, generator=generator())
    assert len(few) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outliers": torch.zeros(3, 5)}, ValueError, "got 3 outliers for 6 rows of x"),
        ({"outliers": torch.zeros(6, 7)}, ValueError, r"got \(7,\) and \(5,\)"),
        ({"y": torch.full((6,), 4)}, ValueError, r"y must lie in \[0, 4\), got 4 to 4"),
        ({"y": torch.zeros(6)}, TypeError, "y must hold integers, got torch.float32"),
        ({"y": torch.zeros(5, dtype=torch.long)}, ValueError, r"y must have shape \(6,\)"),
        ({"x": torch.full((6, 5), float("nan"))}, ValueError, "x must be finite"),
        ({"outliers": torch.full((6, 5), float("inf"))}, ValueError, "outliers must be finite"),
        ({"x": torch.zeros(0, 5), "y": torch.zeros(0, dtype=torch.long)}, ValueError, "at least one row"),
        ({"model": lambda v: v}, ValueError, r"logits of shape \(6, num_classes=4\), got \(6, 5\)"),
    ],
)
def test_a_bad_batch_is_named(change, error, message):
    given = {"model": lambda v: v[:, :K], "x": torch.zeros(6, 5), "y": torch.zeros(6, dtype=torch.long)}
    given |= {"outliers": torch.zeros(6, 5)} | change
    with pytest.raises(error, match=message):
        MixtureOutlierExposure(K)(given["model"], given["x"], given["y"], given["outliers"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureOutlierExposure(1), "num_classes must be at least 2, got 1"),
        (lambda: MixtureOutlierExposure(3, alpha=0), "alpha must be > 0, got 0"),
        (lambda: MixtureOutlierExposure(3, beta=-1), "beta must be >= 0 and finite, got -1"),
        (lambda: MixtureOutlierExposure(3, "paste"), "mix must be one of"),
        (lambda: EnergyExposure(3, m_in=-1, m_out=-2), "m_in must be below m_out, got -1 and -2"),
        (lambda: HardOutlierExposure(3, candidates=0), "candidates must be at least 1, got 0"),
    ],
)
def test_a_bad_setting_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cutmix_of_rows_that_are_no_images_is_refused():
    x, y, z = batch(5)
    with pytest.raises(ValueError, match="cutmix needs images"):
        MixtureOutlierExposure(K, "cutmix")(linear(), x, y, z)


def seen_by(objective, n: int, m: int, epochs: int, batch_size: int) -> tuple[list, list]:
    """Numbers of known rows and of outliers that reach the objective, batch by batch."""
    known, others = [], []

    class Watch(type(objective)):
        def parts(self, model, x, y, outliers, **options):
            known.append(x[:, 0].tolist())
            others.append(outliers[:, 0].tolist())
            return super().parts(model, x, y, outliers, **options)

    objective.__class__ = Watch
    model = nn.Linear(2, 3)
    x, z = torch.zeros(n, 2), torch.zeros(m, 2)
    x[:, 0], z[:, 0] = torch.arange(n), torch.arange(m)
    y = (torch.arange(n) % 3).numpy()
    config = ExposureConfig(epochs=epochs, batch_size=batch_size, lr=1e-9)
    expose(model, objective, Rows(x), y, Rows(z), config)
    return known, others


def test_every_known_row_is_seen_once_an_epoch_and_few_outliers_are_cycled():
    known, others = seen_by(MixtureOutlierExposure(3), 13, 5, 2, 4)
    assert len(known) == 8 and all(len(k) <= len(z) for k, z in zip(known, others, strict=True))
    for epoch in (known[:4], known[4:]):
        assert sorted(row for part in epoch for row in part) == list(range(13))
    flat = [row for part in others for row in part]
    counts = [flat.count(row) for row in range(5)]
    assert max(counts) - min(counts) <= 2 and len(flat) == 26
    _, double = seen_by(OutlierExposure(3), 12, 100, 1, 4)
    assert [len(part) for part in double] == [8, 8, 8]


def test_an_interrupted_fine_tuning_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    x, z = torch.randn(20, 3, generator=generator()), torch.randn(9, 3, generator=generator(1))
    y = (torch.arange(20) % 2).numpy()
    config = ExposureConfig(epochs=4, batch_size=5, lr=0.1)

    def start() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    class Stops(MixtureOutlierExposure):
        calls = 0

        def parts(self, *given, **options):
            Stops.calls += 1
            if Stops.calls == 10:
                raise KeyboardInterrupt
            return super().parts(*given, **options)

    whole = start()
    expose(whole, MixtureOutlierExposure(2), Rows(x), y, Rows(z), config)
    broken = start()
    Stops.__name__ = "MixtureOutlierExposure"  # so that the checkpoint names the same objective
    with pytest.raises(KeyboardInterrupt):
        expose(broken, Stops(2), Rows(x), y, Rows(z), config, out=tmp_path / "s", checkpoint_every=4)
    resumed = start()
    history = expose(
        resumed, MixtureOutlierExposure(2), Rows(x), y, Rows(z), config, out=tmp_path / "s", checkpoint_every=4
    )
    assert history.resumed_at == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_mixtures_teach_a_confidence_that_falls_in_proportion():
    # Two clouds known, outliers far out: along the way confidence follows lam + (1 - lam) / K, and with OE it does not.
    g = generator(4)
    y = torch.arange(200) % 2
    x = torch.randn(200, 2, generator=g) * 0.1 + torch.stack([4.0 * y - 2, torch.zeros(200)], 1)
    z = torch.randn(400, 2, generator=g) * 0.1 + torch.tensor([0.0, 6.0])
    gaps = {}
    for objective in (MixtureOutlierExposure(2), OutlierExposure(2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))
        expose(model, objective, Rows(x), y.numpy(), Rows(z), ExposureConfig(epochs=40, lr=0.05))
        shares = torch.linspace(0, 1, 11)
        means = [
            float(logits_of(model, Rows(lam * x + (1 - lam) * z[:200])).softmax(1).amax(1).mean()) for lam in shares
        ]
        gaps[type(objective).__name__] = float((torch.tensor(means) - (shares + (1 - shares) / 2)).abs().mean())
    assert gaps["MixtureOutlierExposure"] < 0.05
    assert gaps["OutlierExposure"] > 2 * gaps["MixtureOutlierExposure"]


def test_shifted_images_are_windows_of_the_padded_one():
    x = torch.rand(8, 2, 8, 6)
    moved = shifted(0.25)(x, generator(0))
    assert moved.shape == x.shape and not torch.equal(moved, x)
    padded = F.pad(x, (1, 1, 2, 2), mode="replicate")
    for i in range(8):
        windows = [padded[i, :, r : r + 8, c : c + 6] for r in range(5) for c in range(3)]
        assert any(torch.equal(moved[i], window) for window in windows)


def test_bytes_become_shares_and_shared_rows_are_counted():
    import numpy as np

    x = np.array([[0, 255], [51, 102]], dtype=np.uint8)
    torch.testing.assert_close(Rows(x)(np.array([1])), torch.tensor([[0.2, 0.4]]))
    assert shared_rows(x, np.array([[51, 102], [1, 1], [0, 255]], dtype=np.uint8)) == 2


def test_training_without_outliers_is_for_plain_alone():
    with pytest.raises(ValueError, match="OutlierExposure needs outliers, got none"):
        expose(
            nn.Linear(2, 2),
            OutlierExposure(2),
            Rows(torch.zeros(2, 2)),
            torch.zeros(2).long().numpy(),
            None,
            ExposureConfig(),
        )
    with pytest.raises(ValueError, match="outliers must hold at least one row"):
        expose(
            nn.Linear(2, 2),
            Plain(2),
            Rows(torch.zeros(2, 2)),
            torch.zeros(2).long().numpy(),
            Rows(torch.zeros(0, 2)),
            ExposureConfig(),
        )
