"""The form in two products: the same numbers as the slow forms, also where it has to switch."""

import numpy as np
import pytest
import torch

from mixtura.core import natural_form
from mixtura.core.gaussian import COVARIANCES, Gaussians
from mixtura.core.natural_form import Frame, Pass, block_rows, too_narrow
from mixtura.core.sufficient import maximise, statistics

each_kind = pytest.mark.parametrize("covariance", COVARIANCES)
NAMES = ("weight", "first", "second", "log_likelihood")


def population(covariance, *, n=400, f=4, c=3, narrow=1.0, seed=0):
    """Samples off the origin, the mixture that was fitted to them by their origin, and a frame."""
    rng = np.random.default_rng(seed)
    true = torch.from_numpy(rng.integers(c, size=n))
    means = torch.from_numpy(rng.normal(scale=3, size=(c, f)))
    spread = torch.from_numpy(rng.uniform(0.5, 1.5, size=(c, f)))
    spread[0] *= narrow
    x = means[true] + spread[true] * torch.from_numpy(rng.normal(size=(n, f))) + 100.0
    frame = Frame(x.mean(0), x.std(0) if covariance != "spherical" else x.std().expand(f).clone())
    return x, maximise(statistics(x - 100.0, torch.nn.functional.one_hot(true), covariance), covariance, 1e-12), frame


def run(x, mixture, frame, *, blocks=(150, 300), **more):
    """One pass in uneven blocks; what it said of every sample, and the statistics in units of x."""
    mixture = mixture.mapped(torch.ones_like(frame.centre), torch.full_like(frame.centre, 100.0))
    weights, allowed = more.pop("weights", None), more.pop("allowed", None)
    found = Pass(frame.enter(mixture), frame, **more)
    logs, shares = [], []
    for rows in torch.arange(len(x)).tensor_split(blocks):
        logs.append(
            found.add(
                x[rows],
                weights=None if weights is None else weights[rows],
                allowed=None if allowed is None else allowed[rows],
            )
        )
        shares.append(found.responsibilities.mT.clone())
    return torch.cat(logs), torch.cat(shares), found.statistics(), mixture


@each_kind
@pytest.mark.parametrize("form", ["products", "factors"])
def test_a_pass_equals_the_slow_forms(covariance, form, monkeypatch):
    if form == "factors":
        monkeypatch.setitem(natural_form.ALLOWED_ERROR, torch.float64, 0.0)
    x, mixture, frame = population(covariance)
    w = torch.linspace(0, 2, len(x), dtype=torch.float64)
    logs, shares, found, mixture = run(x, mixture, frame, weights=w)
    torch.testing.assert_close(logs, mixture.score_samples(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shares, mixture.responsibilities(x) * w[:, None], rtol=1e-8, atol=1e-9)
    z = (x - frame.centre) / frame.scale
    want = statistics(z, mixture.responsibilities(x), covariance, weights=w, log_likelihood=mixture.score_samples(x))
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=1e-8, atol=1e-8)


@each_kind
def test_what_a_sample_may_come_from_is_a_constraint(covariance):
    x, mixture, frame = population(covariance)
    allowed = torch.ones(len(x), 3, dtype=torch.bool)
    allowed[:50] = torch.tensor([False, True, False])
    allowed[50:90] = torch.tensor([True, False, True])
    logs, shares, _, mixture = run(x, mixture, frame, allowed=allowed)
    joint = mixture.log_joint(x).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(shares, joint.softmax(1), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(logs, joint.logsumexp(1), rtol=1e-9, atol=1e-9)
    assert (shares[:50] == torch.tensor([0.0, 1.0, 0.0])).all()


@each_kind
def test_blocks_do_not_matter(covariance):
    x, mixture, frame = population(covariance)
    _, _, whole, _ = run(x, mixture, frame, blocks=())
    _, _, parts, _ = run(x, mixture, frame, blocks=(1, 2, 399))
    for name in NAMES:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-11, atol=1e-11)


@each_kind
@pytest.mark.parametrize("narrow", [1e-1, 1e-2, 1e-3])
def test_a_narrow_component_is_right_in_float32_on_either_side_of_the_switch(covariance, narrow):
    x, mixture, frame = population(covariance, narrow=narrow, n=2000)
    logs, _, found, mixture = run(x, mixture, frame, dtype=torch.float32, blocks=(512, 1024, 1536))
    want, _, exact, _ = run(x, mixture.mapped(torch.ones(4).double(), torch.full((4,), -100.0).double()), frame)
    assert (logs - want).abs().mean() < 1e-3
    got, true = maximise(found, covariance, 1e-8), maximise(exact, covariance, 1e-8)
    torch.testing.assert_close(got.means, true.means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.covariances, true.covariances, rtol=3e-3, atol=1e-6)


def test_the_guard_lets_the_usual_through_and_stops_what_the_type_cannot_carry():
    _, mixture, frame = population("full")
    inside = Frame(frame.centre - 100.0, frame.scale).enter(mixture)
    assert not too_narrow(inside, torch.float64).any() and not too_narrow(inside, torch.float32).any()
    _, mixture, frame = population("full", narrow=1e-3)
    inside = Frame(frame.centre - 100.0, frame.scale).enter(mixture)
    assert too_narrow(inside, torch.float32).tolist() == [True, False, False]
    _, mixture, frame = population("full", narrow=1e-6)
    inside = Frame(frame.centre - 100.0, frame.scale).enter(mixture)
    assert too_narrow(inside, torch.float64).tolist() == [True, False, False]


def test_without_the_guard_float32_would_be_wrong(monkeypatch):
    x, mixture, frame = population("full", narrow=1e-3, n=2000)
    want, *_ = run(x, mixture, frame)
    monkeypatch.setitem(natural_form.ALLOWED_ERROR, torch.float32, torch.inf)
    logs, *_ = run(x, mixture, frame, dtype=torch.float32)
    assert (logs - want).abs().mean() > 0.01


@pytest.mark.parametrize("f", [1, 2, 3, 4, 7, 8, 33])
def test_every_pair_of_features_stands_once(f):
    rows, columns = natural_form._pairs(f)
    assert len(rows) == f * (f + 1) // 2
    assert {tuple(sorted(pair)) for pair in zip(rows.tolist(), columns.tolist(), strict=True)} == {
        (i, j) for i in range(f) for j in range(i, f)
    }


@pytest.mark.parametrize(("f", "c", "products"), [(130, 1, False), (32, 2, False), (32, 16, True), (8, 1, True)])
def test_many_features_of_few_components_go_by_factor(f, c, products):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(300, f)))
    shares = torch.from_numpy(rng.dirichlet(np.full(c, 9.0), size=300))
    mixture = maximise(statistics(x, shares, "full"), "full", 0.1)
    frame = Frame(x.mean(0), x.std(0))
    found = Pass(frame.enter(mixture), frame)
    torch.testing.assert_close(found.add(x), mixture.score_samples(x), rtol=1e-9, atol=1e-9)
    assert (found._n_products > 1 + f) == products


def test_a_sample_out_of_this_world_makes_no_nan():
    mixture = Gaussians.build([0.5, 0.5], [[0.0], [4.0]], [1.0, 1.0], "spherical")
    for dtype in (torch.float64, torch.float32):
        found = Pass(mixture, Frame(torch.zeros(1).double(), torch.ones(1).double()), dtype=dtype)
        logs = found.add(torch.tensor([[1e300], [-1e300]], dtype=torch.float64))
        assert logs.isfinite().all() and (logs < -1e20).all()
        assert found.responsibilities.isfinite().all()


def test_float32_samples_at_a_million_are_centred_before_they_are_squared():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(1000, 3)) + 1e6).float()
    mixture = maximise(statistics(x.double() - 1e6, torch.ones(1000, 1), "full"), "full")
    mixture = mixture.mapped(torch.ones(3).double(), torch.full((3,), 1e6).double())
    frame = Frame(x.double().mean(0), x.double().std(0))
    logs = Pass(frame.enter(mixture), frame, dtype=torch.float32).add(x)
    assert (logs - mixture.score_samples(x.double())).abs().max() < 1e-4


@each_kind
def test_a_frame_of_a_mixture_has_its_centre_and_spread(covariance):
    _, mixture, _ = population(covariance)
    frame = Frame.of(mixture)
    mean, cov = frame.enter(mixture).moments()
    assert mean.abs().max() < 1e-12 and abs(cov.trace() / 4 - 1) < 1e-12
    back = frame.leave(frame.enter(mixture))
    torch.testing.assert_close(back.covariances, mixture.covariances)


@pytest.mark.parametrize(
    ("f", "c", "covariance"), [(32, 32, "full"), (8, 64, "diag"), (500, 10, "spherical"), (1, 1, "tied")]
)
def test_a_block_is_bounded(f, c, covariance):
    rows = block_rows(f, c, covariance, torch.float64, "cpu")
    assert 512 <= rows <= 4096
    assert block_rows(f, c, covariance, torch.float64, "cuda") == 65536
