"""Robust sparse unmixing: descent, gradients, the methods that it contains, and what it promises about inputs."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.base import clone
from sklearn.decomposition import NMF
from sklearn.utils.estimator_checks import check_estimator

from mixtura.data.spectra import made_up_library, synthesize_scene
from mixtura.vision.unmixing import SpectralUnmixing, fcls, match_endmembers, sad
from mixtura.vision.unmixing import objective as parts


def random_problem(seed: int, pixels: int = 40, channels: int = 12, k: int = 3):
    rng = np.random.default_rng(seed)
    X = rng.random((pixels, k)) @ rng.random((k, channels)) + 0.1 * rng.random((pixels, channels))
    X[:, 0] = rng.random(pixels) * 5  # a channel that fits nothing
    return X, rng.uniform(0.1, 1, (k, channels)), rng.dirichlet(np.ones(k), pixels)


def by_hand(y, a, h, m, c, lam, delta, robust=True):
    """J as it is written, from whole matrices."""
    r = torch.linalg.vector_norm(y - a @ m, dim=0)
    data = c * r.sum() if robust else r.square().sum() / 2
    return data + lam * a.pow((1 - h)[:, None]).sum() + delta**2 / 2 * (1 - a.sum(1)).square().sum()


@pytest.mark.parametrize("seed", range(20))
def test_the_objective_never_rises_while_the_guidance_stands(seed: int):
    X, m, a = random_problem(seed)
    options = [{"guidance": "fixed", "p": 0.3}, {"guidance": None}, {"guidance": "fixed", "robust": False}][seed % 3]
    model = SpectralUnmixing(3, lam=0.2, delta=1.0, max_iter=400, tol=0, **options).fit(X, M_init=m, A_init=a)
    rises = np.diff(model.objective_) / np.abs(model.objective_[:-1])
    assert len(rises) == 399 and rises.max() < 1e-6


def test_a_learned_run_ends_on_a_descent():
    X, m, a = random_problem(0)
    model = SpectralUnmixing(3, lam=0.2, delta=1.0, max_iter=200, tol=0).fit(X, M_init=m, A_init=a)
    assert np.diff(model.objective_[160:]).max() < 1e-9 and model.n_iter_ == 200


@pytest.mark.parametrize("robust", [True, False])
def test_the_updates_ratio_holds_the_gradient_of_the_objective(robust: bool):
    X, m, a = (torch.from_numpy(part) for part in random_problem(1))
    h = torch.from_numpy(np.random.default_rng(2).uniform(0, 0.9, len(X)))
    c, of = 0.7, parts.Terms(0.3, 1.2, robust)
    r = torch.linalg.vector_norm(X - a @ m, dim=0)
    weights = parts.channel_weights(r, c, of)
    over, under = parts.terms(X, a, h, m, weights, of)
    rng, step = np.random.default_rng(3), 1e-6
    for _ in range(20):
        i, k = rng.integers(len(a)), rng.integers(3)
        ahead, behind = a.clone(), a.clone()
        ahead[i, k] += step
        behind[i, k] -= step
        slope = (by_hand(X, ahead, h, m, c, 0.3, 1.2, robust) - by_hand(X, behind, h, m, c, 0.3, 1.2, robust)) / (
            2 * step
        )
        assert float((under - over)[i, k]) == pytest.approx(float(slope), rel=1e-6, abs=1e-6)


def test_one_pass_over_blocks_gives_the_objective_of_whole_matrices(monkeypatch):
    monkeypatch.setattr(parts, "BLOCK", 7)
    X, m, a = (torch.from_numpy(part) for part in random_problem(4))
    h = torch.linspace(0, 0.9, len(X)).double()
    of = parts.Terms(0.3, 1.2, True)
    pixels = parts.Pixels(X.numpy(), scale=2.0)
    sums = parts.sweep(pixels, a, h, m, None, of)
    want = by_hand(X / 2, a, h, m, 0.7, 0.3, 1.2)
    assert sums.objective(m, pixels.power(), 0.7, of) == pytest.approx(float(want), rel=1e-10)


def test_without_its_terms_it_is_nmf_step_by_step():
    X, m, a = random_problem(5)
    model = SpectralUnmixing(3, robust=False, lam=0, delta=0, max_iter=50, tol=0).fit(X, M_init=m, A_init=a)
    # J is of pixels over scale_; NMF factorises X itself, so its shares match and its spectra have the units of X.
    nmf = NMF(3, solver="mu", init="custom", max_iter=50, tol=0)
    W = nmf.fit_transform(X, W=a.copy(), H=m.copy())
    np.testing.assert_allclose(model.endmembers_, nmf.components_, rtol=1e-5)
    np.testing.assert_allclose(
        model.abundances_, W / W.sum(1, keepdims=True), rtol=1e-5, atol=1e-8
    )  # ours has a floor of 1e-9


def test_with_one_exponent_and_squares_it_is_half_norm_nmf():
    X, m, a = random_problem(6)
    lam = 0.2
    model = SpectralUnmixing(3, robust=False, lam=lam, delta=0, guidance="fixed", p=0.5, max_iter=30, tol=0)
    model.fit(X, M_init=m, A_init=a)
    y, e = X / model.scale_, m / model.scale_
    for _ in range(30):
        a = a * (y @ e.T) / (a @ e @ e.T + lam / 2 * np.maximum(a, 1e-6) ** -0.5)  # Qian et al. 2011, eq. 17
        e = e * (a.T @ y) / (a.T @ a @ e)
    np.testing.assert_allclose(model.endmembers_, e * model.scale_, rtol=1e-8)


def test_transform_without_sparsity_is_constrained_least_squares():
    rng = np.random.default_rng(7)
    spectra = rng.uniform(0.1, 1, (3, 25))
    truth = rng.dirichlet(np.ones(3), 200)
    X = truth @ spectra
    model = SpectralUnmixing(3, lam=0, max_iter=100).fit(X)
    got = model.transform(X)
    heavy = 1e5
    w = np.sqrt(model.channel_weight_)
    matrix = np.vstack([(model.endmembers_ * w).T, np.full(3, heavy)])
    want = np.array([nnls(matrix, np.append(x * w, heavy))[0] for x in X])
    assert np.sqrt(((got - want) ** 2).mean()) < 1e-4


def test_a_strong_sum_to_one_leads_to_constrained_least_squares_of_given_spectra():
    X, m, _ = random_problem(8)
    want = fcls(X, m)
    error = {}
    for delta in (1.0, 10.0):
        a = torch.full((len(X), 3), 1 / 3).double()
        h, weights, of = torch.zeros(len(X)).double(), torch.ones(X.shape[1]).double(), parts.Terms(0, delta, False)
        parts.sweep(parts.Pixels(X), a, h, torch.from_numpy(m), weights, of, steps=3000)
        error[delta] = np.sqrt(((a.numpy() - want) ** 2).mean())
    # The soft sum misses one by residual / delta^2, here 1 to 5 %; beyond, a larger delta freezes the updates.
    assert error[10.0] < 0.02 and error[10.0] < 0.1 * error[1.0]


@pytest.fixture(scope="module")
def scene():
    return synthesize_scene(made_up_library(), 4, 32, snr_db=25, outlier_channels=18, seed=3)


def pixels_of(scene):
    return scene.cube.reshape(-1, scene.cube.shape[-1])


def test_spoiled_channels_get_no_weight_and_spectra_are_closer_than_with_squares(scene):
    X, good = pixels_of(scene), ~scene.outliers
    model = SpectralUnmixing(4, max_iter=200).fit(X)
    squares = SpectralUnmixing(4, max_iter=200, robust=False, lam=0).fit(X)
    seen = scene.outliers & ~scene.blank
    assert model.channel_weight_[seen].max() < 0.5 * model.channel_weight_[good].min()
    assert (model.channel_weight_[scene.blank] == 0).all() and (model.blank_channels_ == scene.blank).all()
    ours, theirs = (sad(m.endmembers_, scene.endmembers, bands=good) for m in (model, squares))
    assert ours < 0.7 * theirs
    np.testing.assert_allclose(model.abundances_.sum(1), 1, atol=1e-5)


def test_the_guidance_map_follows_how_pure_pixels_are(scene):
    model = SpectralUnmixing(4, max_iter=200).fit(pixels_of(scene))
    true = parts.hoyer(torch.from_numpy(scene.abundances.reshape(-1, 4))).numpy()
    assert np.corrcoef(model.guidance_, true)[0, 1] > 0.75
    assert model.guidance_.min() >= 0 and model.guidance_.max() <= 0.9 + 1e-6


def test_units_change_the_units_of_the_spectra_and_nothing_else(scene):
    X = pixels_of(scene)
    one, counts = (SpectralUnmixing(4, max_iter=40).fit(x) for x in (X, 10_000 * X))
    np.testing.assert_allclose(counts.endmembers_, 10_000 * one.endmembers_, rtol=1e-2, atol=20)
    assert np.abs(one.abundances_ - counts.abundances_).mean() < 1e-3


def test_the_order_of_pixels_does_not_matter(scene):
    X = pixels_of(scene).astype(np.float64)
    order = np.random.default_rng(0).permutation(len(X))
    start = X[[5, 300, 600, 900]]
    one = SpectralUnmixing(4, max_iter=30).fit(X, M_init=start)
    two = SpectralUnmixing(4, max_iter=30).fit(X[order], M_init=start)
    np.testing.assert_allclose(one.abundances_[order], two.abundances_, atol=1e-9)
    got = two.transform(X[:50])
    np.testing.assert_allclose(got[[17]], two.transform(X[[17]]), atol=1e-12)


def test_a_memory_map_is_read_in_place_and_gives_the_same(scene, tmp_path):
    X = np.ascontiguousarray(pixels_of(scene))
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    one, two = (SpectralUnmixing(4, max_iter=10).fit(x) for x in (X, mapped))
    np.testing.assert_array_equal(one.abundances_, two.abundances_)


def test_hoyer_and_gini_are_zero_for_even_and_one_for_single_shares():
    even, single = torch.full((1, 5), 0.2), torch.eye(5)[:1]
    for measure in (parts.hoyer, parts.gini):
        assert float(measure(even)) == pytest.approx(0, abs=1e-6) and float(measure(single)) == pytest.approx(
            1, abs=1e-6
        )
    a = torch.tensor([[0.7, 0.2, 0.1]])
    # Mean absolute difference of all pairs over twice the mean, times m / (m - 1).
    pairs = (a[0][:, None] - a[0][None]).abs().mean() / (2 * a.mean()) * 3 / 2
    assert float(parts.gini(a)) == pytest.approx(float(pairs), abs=1e-6)


def test_random_starts_and_the_other_options_run_and_the_seed_decides(scene):
    X = pixels_of(scene)
    fits = [SpectralUnmixing(4, init="nmf-random", sparseness="gini", max_iter=5, seed=s).fit(X) for s in (0, 0, 1)]
    np.testing.assert_array_equal(fits[0].endmembers_, fits[1].endmembers_)
    assert np.abs(fits[0].endmembers_ - fits[2].endmembers_).max() > 1e-3
    assert len(SpectralUnmixing(4, init="vca", max_iter=2).fit(X).objective_) == 2


def test_matched_pixels_come_back_through_inverse_transform(scene):
    model = SpectralUnmixing(4, max_iter=100).fit(pixels_of(scene))
    back = model.inverse_transform(model.abundances_)
    good = ~scene.outliers
    error = np.sqrt(((back - pixels_of(scene)) ** 2)[:, good].mean())
    assert error < 0.1 * pixels_of(scene)[:, good].mean()
    order = match_endmembers(model.endmembers_, scene.endmembers, bands=good)
    assert sorted(order) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"A must have shape \(pixels, 4\)"):
        model.inverse_transform(np.ones((3, 2)))


def test_what_was_saved_answers_the_same_to_the_bit(scene, tmp_path):
    X = pixels_of(scene)
    model = SpectralUnmixing(4, max_iter=10).fit(X)
    model.save(tmp_path / "kept")
    np.testing.assert_array_equal(SpectralUnmixing.load(tmp_path / "kept").transform(X), model.transform(X))


JOINT = "fit_transform gives the shares that were found together with the spectra, transform those for fixed spectra"
FAILURES = {"check_transformer_data_not_an_array": JOINT, "check_transformer_general": JOINT}


@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_checks_pass_where_they_apply():
    made = SpectralUnmixing(2, max_iter=20)
    results = check_estimator(made, expected_failed_checks=FAILURES, on_fail=None, on_skip=None)
    failed = {r["check_name"]: str(r["exception"])[:300] for r in results if r["status"] == "failed"}
    assert not failed
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == set(FAILURES)
    assert repr(clone(SpectralUnmixing(2, lam=0.2))) == repr(SpectralUnmixing(2, lam=0.2))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda X: X[:3], {}, "3 endmembers need at least 4 pixels, got n_samples = 3"),
        (lambda X: X[:, :2], {}, "n_endmembers must be between 2 and the channels, n_features = 2, got 3"),
        (lambda X: np.where(np.arange(12) == 4, np.nan, X), {}, r"NaN or infinity 40 times, in 1 channel \(4\)"),
        (lambda X: X - 0.5, {}, "X must be >= 0, its least value is -0"),
        (lambda X: np.ones_like(X), {}, "all 12 channels are constant"),
        (lambda X: X, {"lam": -1}, "lam must be a number >= 0, got -1"),
        (lambda X: X, {"p": 1.5}, "p must be above 0 and at most 1, got 1.5"),
        (lambda X: X, {"guidance": "map"}, r"guidance must be one of \['learn', 'fixed', None\], got 'map'"),
        (lambda X: X, {"n_endmembers": 1}, "n_endmembers must be a whole number of at least 2, got 1"),
        (lambda X: X, {"max_iter": 0}, "max_iter must be at least 1"),
    ],
)
def test_bad_input_is_named(change, options, message: str):
    X, _, _ = random_problem(9)
    with pytest.raises(ValueError, match=message):
        SpectralUnmixing(**{"n_endmembers": 3, **options}).fit(change(X))


def test_negative_values_can_be_clipped_and_starts_are_checked():
    X, m, _ = random_problem(10)
    model = SpectralUnmixing(3, clip_negative=True, max_iter=3).fit(X - 0.1)
    assert model.endmembers_.min() >= 0
    with pytest.raises(ValueError, match=r"M_init must be finite, >= 0 and of shape \(3, 12\), got shape \(3, 11\)"):
        SpectralUnmixing(3).fit(X, M_init=m[:, 1:])
