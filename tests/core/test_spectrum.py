"""Spectra, the logarithmic axis and masks, against torch, against sampling of grids, and in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from mixtura.core.spectrum import band_positions, from_bands, istft, loudness_weight, mask_targets, stft, to_bands


@pytest.mark.parametrize("length", [1, 50, 1000, 1001])
@pytest.mark.parametrize("hop", [16, 32])
def test_the_inverse_gives_back_any_length(length: int, hop: int):
    wave = torch.randn(2, 3, length, dtype=torch.float64)
    torch.testing.assert_close(istft(stft(wave, 64, hop), hop, length), wave, rtol=0, atol=1e-10)


def test_a_tone_stands_in_its_bin_with_half_the_windows_sum():
    n = torch.arange(4096, dtype=torch.float64)
    spectrum = stft(torch.cos(2 * math.pi * 10 / 64 * n), 64, 16)
    assert int(spectrum[:, 20].abs().argmax()) == 10
    assert float(spectrum[10, 20].abs()) == pytest.approx(64 / 2 / 2, rel=1e-9)  # a Hann window sums to half its length


def test_bands_equal_bilinear_sampling_of_a_grid_with_aligned_corners():
    x = torch.rand(2, 1, 65, 7, dtype=torch.float64)
    # The reference's own expression, on [-1, 1].
    y = (21 ** torch.linspace(0, 1, 24, dtype=torch.float64) - 11) / 10
    grid = torch.stack(torch.meshgrid(y, torch.linspace(-1, 1, 7, dtype=torch.float64), indexing="ij")[::-1], -1)
    want = F.grid_sample(x, grid.expand(2, -1, -1, -1), mode="bilinear", align_corners=True)
    torch.testing.assert_close(to_bands(x, 24), want, rtol=0, atol=1e-12)
    back = torch.log(torch.linspace(-1, 1, 65, dtype=torch.float64) * 10 + 11) / math.log(21) * 2 - 1
    grid = torch.stack(torch.meshgrid(back, torch.linspace(-1, 1, 7, dtype=torch.float64), indexing="ij")[::-1], -1)
    want = F.grid_sample(to_bands(x, 24), grid.expand(2, -1, -1, -1), mode="bilinear", align_corners=True)
    torch.testing.assert_close(from_bands(to_bands(x, 24), 65), want, rtol=0, atol=1e-12)


def test_a_smooth_mask_survives_the_way_there_and_back():
    place = torch.linspace(0, 1, 513)[:, None]
    mask = 0.5 + 0.5 * torch.sin(2 * math.pi * 2 * place + torch.linspace(0, 6, 40))
    assert float((from_bands(to_bands(mask, 96), 513) - mask).abs().max()) < 0.02


def test_a_mask_of_ones_gives_back_the_mixture():
    wave = torch.randn(2, 5000, dtype=torch.float64)
    spectrum = stft(wave, 512, 128)
    mask = from_bands(torch.ones(64, spectrum.shape[-1], dtype=torch.float64), 257)
    assert float((istft(spectrum * mask, 128, 5000) - wave).abs().max()) < 1e-5


def test_bands_of_another_rate_stand_at_the_same_frequencies():
    # A magnitude that is a linear function of the frequency in Hz, at 16 kHz and at 44.1 kHz.
    model, other = torch.linspace(0, 8000, 513)[:, None], torch.linspace(0, 22050, 1411)[:, None]
    torch.testing.assert_close(to_bands(other, 32, top=16000 / 44100), to_bands(model, 32), rtol=1e-4, atol=1e-2)
    low = to_bands(torch.ones(257, 1), 32, top=2.0)
    assert bool((low[:, 0] == (2 * band_positions(32) <= 1)).all()), "bands above half the sample rate are silent"
    assert float(from_bands(torch.arange(32.0)[:, None], 100, top=0.5)[-1]) == 31, (
        "above the last band its value goes on"
    )


def test_targets_are_the_majority_and_the_share():
    sources = torch.tensor([[[[3.0, 0.2]], [[1.0, 0.8]]]])
    mixture = torch.tensor([[[3.5, 0.7]]])
    assert mask_targets(sources, mixture).flatten().tolist() == [1, 0, 0, 1]
    torch.testing.assert_close(mask_targets(sources, mixture, "ratio").flatten(), torch.tensor([0.75, 0.2, 0.25, 0.8]))
    torch.testing.assert_close(loudness_weight(torch.tensor([0.0, 1.0, 1e9])), torch.tensor([1e-3, math.log(2), 10.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stft(torch.zeros(0), 64, 16), "no samples"),
        (lambda: stft(torch.zeros(9), 64, 40), "hop between 1 and n_fft / 2"),
        (lambda: stft(torch.zeros(9), 63, 16), "n_fft must be even"),
        (lambda: to_bands(torch.zeros(1, 4), 8), "at least 2"),
        (lambda: to_bands(torch.zeros(9, 4), 8, top=0), "top must be > 0"),
        (lambda: mask_targets(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2)), "at least 2 sources"),
        (lambda: mask_targets(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 3)), "got .1, 2, 2, 2. and .1, 2, 3."),
        (lambda: mask_targets(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2), "soft"), "'binary' or 'ratio'"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
