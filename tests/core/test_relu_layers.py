"""Covariances through ReLU layers in one pass, against many digits, against PyTorch, and at the ends of the interval."""

import math

import mpmath
import pytest
import torch

from mixtura.core import native


@pytest.fixture(autouse=True)
def built():
    if (reason := native.why_not_relu_layers(torch.ones(1, 1, dtype=torch.float64))) is not None:
        pytest.skip(reason)


def test_the_dual_is_right_to_the_last_digits_from_minus_one_to_one():
    near = 10.0 ** -torch.arange(1, 17, dtype=torch.float64)
    r = torch.cat([torch.linspace(-1, 1, 401, dtype=torch.float64), 1 - near, near - 1])
    found = native.relu_layers(r[None], torch.ones(1, 1).double(), torch.ones(1, len(r)).double())[0]
    with mpmath.workdps(40):
        exact = [
            (mpmath.sqrt(1 - mpmath.mpf(v) ** 2) + mpmath.mpf(v) * (mpmath.pi / 2 + mpmath.asin(v))) / (2 * mpmath.pi)
            for v in r.tolist()
        ]
    want = torch.tensor([float(v) for v in exact], dtype=torch.float64)
    # Relative: close to -1 the plain formula cancels, this one does not.
    torch.testing.assert_close(found, want, rtol=1e-15, atol=1e-300)


@pytest.mark.parametrize("positions", [(), (3, 5)])
@pytest.mark.parametrize("layers", [1, 3])
def test_layers_match_a_loop_in_pytorch(positions: tuple, layers: int):
    generator = torch.Generator().manual_seed(0)
    n, m, weight, bias = 4, 7, 1.3, 0.2
    x, y = (torch.randn(k, *positions, 6, generator=generator, dtype=torch.float64) for k in (n, m))
    c = torch.einsum("n...f,m...f->nm...", x, y)
    k, q = x.square().sum(-1), y.square().sum(-1)
    start, lefts, rights = c, [], []
    for _ in range(layers):
        c, k, q = (weight * v + bias for v in (c, k, q))
        lefts.append(k.sqrt())
        rights.append(q.sqrt())
        norm = lefts[-1][:, None] * rights[-1][None]
        r = (c / norm).clamp(-1, 1)
        c = norm * ((1 - r**2).sqrt() + r * (math.pi - r.acos())) / (2 * math.pi)
        k, q = k / 2, q / 2
    found = native.relu_layers(start, torch.stack(lefts), torch.stack(rights), weight, bias)
    torch.testing.assert_close(found, c, rtol=1e-13, atol=1e-15)


def test_a_zero_input_and_an_empty_block_are_no_special_case():
    zero, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    assert native.relu_layers(zero, zero, one).tolist() == [[0.0]]
    assert native.relu_layers(torch.zeros(0, 1).double(), torch.zeros(1, 0).double(), one).shape == (0, 1)


def test_the_input_is_left_as_it_was_whatever_its_strides():
    c = torch.tensor([[0.1, 0.5], [0.2, -0.3]], dtype=torch.float64)
    ones = torch.ones(1, 2).double()
    before = c.clone()
    torch.testing.assert_close(native.relu_layers(c.T, ones, ones), native.relu_layers(c, ones, ones).T)
    assert torch.equal(c, before)


def test_what_it_cannot_do_is_named():
    assert "float64 on the CPU" in (native.why_not_relu_layers(torch.ones(1, 1)) or "")
