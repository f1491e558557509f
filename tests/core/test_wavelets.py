"""Wavelet transforms against PyWavelets, their inverses, and what they must keep."""

import numpy as np
import pytest
import torch

from mixtura.core.wavelets import haar2d, ihaar2d, iwavelet2d, wavelet2d


def peer(x: torch.Tensor, wavelet: str, mode: str) -> np.ndarray:
    """One level by PyWavelets: LL, cH, cV, cD."""
    pywt = pytest.importorskip("pywt", reason="PyWavelets is an oracle: pip install PyWavelets")
    ll, details = pywt.dwt2(x.numpy(), wavelet, mode=mode)
    return np.stack([ll, *details], -3)


@pytest.mark.parametrize("size", [(32, 48), (17, 23)])
def test_haar_is_pywavelets_band_by_band(size: tuple[int, int]):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for bands in haar2d(x, 4):
        np.testing.assert_allclose(bands.numpy(), peer(x, "db1", "zero"), atol=1e-12)
        x = bands[..., 0, :, :]


def test_bands_of_a_square_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert haar2d(x)[0].flatten().tolist() == [5.5, -2.5, -1.5, 0.5]


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3", "sym4"])
@pytest.mark.parametrize("mode", ["zero", "periodization"])
def test_other_wavelets_are_pywavelets_and_invert(wavelet: str, mode: str):
    x = torch.randn(2, 32, 48, dtype=torch.float64)
    want = peer(x, wavelet, mode)
    bands = wavelet2d(x, wavelet, mode=mode)[0]
    np.testing.assert_allclose(bands.numpy(), want, atol=1e-12)
    # PyWavelets gives the taps of sym4 to eleven digits.
    torch.testing.assert_close(iwavelet2d(bands, wavelet, mode), x, atol=1e-10, rtol=0)


def test_odd_sides_under_zeros_are_pywavelets():
    x = torch.randn(17, 23, dtype=torch.float64)
    want = peer(x, "db2", "zero")
    np.testing.assert_allclose(wavelet2d(x, "db2", mode="zero")[0].numpy(), want, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 24), (17, 23)])
def test_haar_inverts_and_keeps_energy(size: tuple[int, int]):
    x = torch.randn(3, *size, dtype=torch.float64)
    bands = haar2d(x)[0]
    torch.testing.assert_close(ihaar2d(bands, size), x)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())


def test_pyramid_is_inverted_from_its_deepest_level():
    x = torch.randn(2, 32, 16, dtype=torch.float64)
    levels = haar2d(x, 3)
    ll = levels[-1][:, 0]
    for bands in reversed(levels):
        ll = ihaar2d(torch.cat((ll[:, None], bands[:, 1:]), 1))
    torch.testing.assert_close(ll, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: haar2d(torch.zeros(4)), r"shape \(..., H, W\), got \(4,\)"),
        (lambda: haar2d(torch.zeros(4, 4, dtype=torch.uint8)), r"floating, got torch.uint8"),
        (lambda: haar2d(torch.zeros(4, 4), 0), "levels must be at least 1, got 0"),
        (lambda: ihaar2d(torch.zeros(3, 4, 4)), r"\(..., 4, h, w\), got \(3, 4, 4\)"),
        (lambda: wavelet2d(torch.zeros(4, 4), mode="symmetric"), "mode must be one of"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("wavelet", "size", "message"),
    [("db99", 4, "'db99'"), ("bior2.2", 4, "orthogonal"), ("db2", 5, r"even sides only, got \(5, 5\)")],
)
def test_wavelets_that_cannot_be_had_are_named(wavelet: str, size: int, message: str):
    pytest.importorskip("pywt", reason="PyWavelets is an oracle: pip install PyWavelets")
    with pytest.raises(ValueError, match=message):
        wavelet2d(torch.zeros(size, size), wavelet)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_gradients_of_haar_and_its_inverse_are_those_of_finite_differences(size: tuple[int, int]):
    x = torch.randn(2, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: haar2d(x, 2)[1], (x,))
    assert torch.autograd.gradgradcheck(lambda x: haar2d(x)[0].pow(3), (x,))
    bands = haar2d(x.detach())[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda b: ihaar2d(b, size), (bands,))
