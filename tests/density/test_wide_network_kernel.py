"""Kernels of wide networks: against pair-by-pair loops, random finite networks, neural-tangents, and their own symmetries."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtura.core import native
from mixtura.density import WideNetworkKernel, wide_network_kernel
from mixtura.density.network_covariance import dual, dual_own

DENSE, IMAGES = ("mlp", "resnet"), ("cnn", "wide_resnet")


def phi_pair(activation: str, c: float, k: float, q: float) -> tuple[float, float]:
    """E[phi phi'] and E[phi' phi'] of one pair, as the papers print them."""
    if activation == "erf":
        root = math.sqrt((1 + 2 * k) * (1 + 2 * q))
        return 2 / math.pi * math.asin(2 * c / root), 4 / math.pi / math.sqrt(root**2 - 4 * c**2)
    angle = math.acos(min(1.0, max(-1.0, c / math.sqrt(k * q))))
    value = math.sqrt(k * q) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    return value, (math.pi - angle) / (2 * math.pi)


def dense_by_hand(architecture: str, depth: int, activation: str, w: float, b: float, x: np.ndarray, y: np.ndarray):
    """Kernel and tangent kernel of one pair: (c, k, q) through the layers by hand, tangent beside them."""
    c, k, q = (w * u @ v / len(x) + b for u, v in ((x, y), (x, x), (y, y)))
    t = c
    for layer in range(depth):
        if architecture == "mlp" and layer == depth - 1:
            break
        (c2, slope), (k2, _), (q2, _) = (phi_pair(activation, *v) for v in ((c, k, q), (k, k, k), (q, q, q)))
        if architecture == "mlp":
            c, k, q, t = w * c2 + b, w * k2 + b, w * q2 + b, w * t * slope + w * c2 + b
        else:
            t = t + w * t * slope + w * c2 + b
            c, k, q = c + w * c2 + b, k + w * k2 + b, q + w * q2 + b
    value, slope = phi_pair(activation, c, k, q)
    return value, value + t * slope


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("depth", [1, 3])
def test_dense_kernels_match_a_loop_over_pairs(architecture: str, activation: str, depth: int):
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    kernel = WideNetworkKernel(depth, activation, 1.7, 0.3, architecture)
    loop = [[dense_by_hand(architecture, depth, activation, 1.7, 0.3, x, y) for y in Y] for x in X]
    np.testing.assert_allclose(kernel(X, Y), [[v for v, _ in row] for row in loop], rtol=1e-12)
    np.testing.assert_allclose(kernel.ntk(X, Y, 1.3), [[1.3 * t for _, t in row] for row in loop], rtol=1e-12)


def test_the_convolutional_kernel_matches_a_loop_over_positions():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, 4, 2))

    def conv(maps: dict, w: float, b: float) -> dict:
        return {
            pair: {
                (i, j): b + w / 9 * sum(m.get((i + u, j + v), 0.0) for u in (-1, 0, 1) for v in (-1, 0, 1))
                for i, j in m
            }
            for pair, m in maps.items()
        }

    maps = {
        (a, e): {(i, j): images[a, i, j] @ images[e, i, j] / 2 for i in range(3) for j in range(4)}
        for a in range(2)
        for e in range(2)
    }
    for _ in range(2):
        maps = conv(maps, 1.5, 0.2)
        maps = {
            (a, e): {p: phi_pair("relu", c, maps[a, a][p], maps[e, e][p])[0] for p, c in m.items()}
            for (a, e), m in maps.items()
        }
    want = [[np.mean(list(maps[a, e].values())) for e in range(2)] for a in range(2)]
    np.testing.assert_allclose(WideNetworkKernel(2, "relu", 1.5, 0.2, "cnn")(images), want, rtol=1e-7)


@pytest.mark.parametrize(
    ("architecture", "activation"),
    # Tracing costs neural-tangents seconds a network; the benchmark compares all eight.
    [("mlp", "relu"), ("mlp", "erf"), ("resnet", "relu"), ("cnn", "relu"), ("cnn", "erf"), ("wide_resnet", "relu")],
)
@pytest.mark.filterwarnings("ignore:`FanIn`")
def test_kernels_equal_those_of_neural_tangents(architecture: str, activation: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("jax")
    if importlib.util.find_spec("neural_tangents") is None:
        pytest.skip("neural-tangents is not installed; the loops above stand in for it")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from _tangents import kernel_function

    rng = np.random.default_rng(0)
    shape = (3,) if architecture in DENSE else (9, 6, 2)
    # One of Y is one of X, so that a diagonal is in it as well.
    X = rng.normal(size=(3, *shape))
    Y = np.concatenate([X[:1], rng.normal(size=(1, *shape))])
    depth = 1 if architecture == "wide_resnet" else 2
    kernel = WideNetworkKernel(depth, activation, 1.7, 0.3, architecture)
    peer = kernel_function(architecture, depth, activation, 1.7, 0.3, 1.3)
    theirs = peer(X, Y, ("nngp", "ntk"))
    np.testing.assert_allclose(1.3 * kernel(X, Y), theirs.nngp, rtol=1e-10)
    # Where an input meets itself they take the arccosine of almost 1, which carries 1e-8 into the tangent kernel.
    np.testing.assert_allclose(kernel.ntk(X, Y, 1.3)[1:], theirs.ntk[1:], rtol=1e-10)


def test_random_networks_of_width_2048_have_this_covariance():
    # Given the layer below, the units of a layer are independent Gaussians with that layer's empirical covariance, so they
    # are drawn from it without ever making a weight matrix.
    n_nets, width, n, w, b = 4000, 2048, 3, 1.6, 0.2
    X = np.random.default_rng(0).normal(size=(n, 4))
    generator = torch.Generator().manual_seed(0)
    k = torch.from_numpy(w * X @ X.T / 4 + b).float().expand(n_nets, n, n)
    for layer in range(2):
        lower = torch.linalg.cholesky(k + 1e-6 * torch.eye(n))
        values = (lower @ torch.randn(n_nets, n, width, generator=generator)).relu()
        moment = values @ values.mT / width
        k = w * moment + b if layer == 0 else moment
    f = torch.linalg.cholesky(k + 1e-6 * torch.eye(n)) @ torch.randn(n_nets, n, 1, generator=generator)
    products = (f @ f.mT).double().numpy()
    error = products.std(0) / math.sqrt(n_nets)
    z = (products.mean(0) - WideNetworkKernel(2, "relu", w, b)(X)) / error
    assert np.abs(z).max() < 3  # six numbers at three standard errors: false alarm 1.6 %, and the seed is fixed


@pytest.mark.parametrize("architecture", [*DENSE, *IMAGES])
@pytest.mark.parametrize("chunk", [1, 50, 2**22])
def test_blocks_symmetry_and_diagonal_do_not_depend_on_the_chunk(architecture: str, chunk: int):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(7, *((3,) if architecture in DENSE else (4, 5, 1))))
    whole = WideNetworkKernel(1, architecture=architecture, bias_variance=0.1)
    parts = WideNetworkKernel(1, architecture=architecture, bias_variance=0.1, chunk=chunk)
    for name in ("__call__", "ntk"):
        gram = getattr(parts, name)(X)
        np.testing.assert_allclose(gram, getattr(whole, name)(X), rtol=1e-13)
        np.testing.assert_array_equal(gram, gram.T)
        np.testing.assert_allclose(getattr(parts, name)(X, X[2:4]), gram[:, 2:4], rtol=3e-8)  # arccos where inputs meet
    np.testing.assert_array_equal(parts.diag(X), np.diag(parts(X)))


def test_no_block_of_covariance_maps_is_larger_than_the_chunk(monkeypatch: pytest.MonkeyPatch):
    sizes = []
    inner = wide_network_kernel.propagate

    def spy(layers, k, *rest):
        sizes.append(k.cross.numel())
        return inner(layers, k, *rest)

    monkeypatch.setattr(wide_network_kernel, "propagate", spy)
    WideNetworkKernel(1, architecture="cnn", chunk=5000)(np.random.default_rng(0).normal(size=(30, 8, 8, 1)))
    assert max(sizes) <= 5000 and len(sizes) > 1


def test_many_inputs_are_mirrored_across_blocks():
    X = np.random.default_rng(0).normal(size=(1100, 2))
    kernel = WideNetworkKernel(1)
    gram = kernel(X)
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(gram[:3], kernel(X[:3], X), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_gradients_in_the_variances_match_finite_differences_also_where_inputs_repeat(architecture, activation):
    X = np.random.default_rng(0).normal(size=(4, 2))
    X = np.concatenate([X, X[:1], 2 * X[1:2]])
    kernel = WideNetworkKernel(3, activation, architecture=architecture)
    x = kernel.inputs(X)
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 6)))

    def loss(w, b):
        return (weights * kernel.gram(x, weight_variance=w, bias_variance=b)).sum()

    w, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.4, 0.3))
    loss(w, b).backward()
    step = 1e-5
    by_w = (loss(1.4 + step, 0.3) - loss(1.4 - step, 0.3)) / (2 * step)
    by_b = (loss(1.4, 0.3 + step) - loss(1.4, 0.3 - step)) / (2 * step)
    # Central differences: error of order step^2 and rounding over step.
    torch.testing.assert_close(torch.stack([w.grad, b.grad]), torch.stack([by_w, by_b]), rtol=1e-7, atol=1e-7)


def test_a_zero_input_has_no_direction_and_no_nan():
    kernel = WideNetworkKernel(2, "relu", 1.0, 0.0)
    gram = kernel(np.array([[0.0, 0.0], [1.0, 2.0]]))
    assert np.isfinite(gram).all() and gram[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("architecture", [*DENSE, *IMAGES])
def test_without_a_compiler_the_kernel_is_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    shape = (3,) if architecture in DENSE else (4, 5, 1)
    X, Y = rng.normal(size=(6, *shape)), rng.normal(size=(4, *shape))
    kernel = WideNetworkKernel(2, "relu", 1.3, 0.2, architecture)
    one_pass = kernel(X), kernel(X, Y)
    monkeypatch.setattr(native, "why_not_relu_layers", lambda cross: "switched off")
    for fast, slow in zip(one_pass, (kernel(X), kernel(X, Y)), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-13)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_an_input_with_itself_takes_the_own_recursion(activation: str):
    k = torch.tensor([[0.7]], dtype=torch.float64)
    for pair, own in zip(dual(activation, k, k, k), dual_own(activation, k), strict=True):
        torch.testing.assert_close(pair, own, rtol=1e-7, atol=0)


def test_flat_images_are_read_in_their_shape():
    X = np.random.default_rng(0).normal(size=(3, 4, 5, 2))
    flat = WideNetworkKernel(1, architecture="cnn", image_shape=(4, 5, 2))
    np.testing.assert_array_equal(flat(X.reshape(3, -1)), WideNetworkKernel(1, architecture="cnn")(X))


def test_float32_agrees_with_float64_to_its_precision():
    X = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(WideNetworkKernel(4, dtype="float32")(X), WideNetworkKernel(4)(X), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"activation": "tanh"}, r"activation must be one of \['relu', 'erf'\], got 'tanh'"),
        ({"weight_variance": 0.0}, "weight_variance must be > 0"),
        ({"bias_variance": -0.1}, "bias_variance must be >= 0"),
        ({"architecture": "vit"}, "architecture must be one of"),
        ({"image_shape": (2, 2, 1)}, "image_shape has no effect"),
        ({"architecture": "cnn", "image_shape": (2, 2)}, r"image_shape must be \(rows, columns, channels\)"),
        ({"chunk": 0}, "chunk must be >= 1"),
        ({"dtype": "float16"}, "dtype must be"),
    ],
)
def test_bad_settings_are_named(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        WideNetworkKernel(**arguments)


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({}, (3,), "2 dimensions"),
        ({"architecture": "cnn"}, (3, 4), "give image_shape"),
        ({"architecture": "cnn"}, (3, 4, 4), "4 dimensions"),
        ({"architecture": "cnn", "image_shape": (2, 3, 1)}, (3, 5), "has 6 numbers, X has 5 a row"),
        ({"architecture": "cnn", "image_shape": (2, 3, 1)}, (3, 3, 2, 1), r"image_shape is \(2, 3, 1\)"),
    ],
)
def test_bad_shapes_are_named(arguments: dict, shape: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        WideNetworkKernel(**arguments)(np.zeros(shape))


def test_inputs_of_two_sizes_and_a_bad_readout_are_named():
    with pytest.raises(ValueError, match="X and Y must agree"):
        WideNetworkKernel()(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="readout_variance must be > 0"):
        WideNetworkKernel().ntk(np.zeros((2, 3)), readout_variance=0.0)
