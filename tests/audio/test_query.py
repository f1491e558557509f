"""The separator asked by queries: the network's parts, what it writes back, streams, disk, errors."""

import shutil

import numpy as np
import pytest
import torch

from mixtura.audio import NamedSounds, QuerySeparator, separate
from mixtura.audio.separate import SpectrumUNet, apply_masks, bss_eval
from mixtura.core.spectrum import mask_targets, stft
from mixtura.data import instruments

SMALL = {"maps": 4, "depth": 2, "width": 4, "bands": 16, "sample_rate": 8000, "n_fft": 128, "hop": 32}


def small(fusion: str = "late", text=None, **changes) -> QuerySeparator:
    torch.manual_seed(0)
    model = QuerySeparator(5, fusion=fusion, text=text, spread=2.0, **(SMALL | changes))
    # Larger than trainings start with, so that masks differ from 1/2.
    for weight in model.unet.parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
    return model.eval()


def tones(seconds: float = 1.0, channels: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    t = torch.arange(round(8000 * seconds)) / 8000
    wave = sum(torch.sin(2 * torch.pi * f * t + f) * (1 + torch.sin(t * f / 60)) for f in (220, 600, 1500))
    return 0.1 * wave + 0.02 * torch.randn(channels, len(t), generator=rng)


def test_late_fusion_is_a_weighted_sum_of_gated_maps():
    model, mix, query = small(), tones(), torch.randn(1, 3, 5)
    x = (model.magnitude_bands(model.spectrum(mix)) + 1e-10).log()
    maps = model.unet(x)[0]
    with torch.no_grad():
        model.map_weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.3]))
        model.shift.fill_(0.25)
    found = model(mix, query)[0]
    for u in range(3):
        gate = torch.sigmoid(model.query.weight @ query[0, u] + model.query.bias)
        want = sum(model.map_weight[c] * gate[c] * maps[c] for c in range(4)) + 0.25
        torch.testing.assert_close(found[u], want, rtol=1e-4, atol=1e-5)


def test_noise_heads_read_the_mean_of_the_queries_and_share_maps():
    model, mix, query = small(), tones(), torch.randn(1, 2, 5)
    asked, noise = model(mix, query, noise=True)
    torch.testing.assert_close(asked, model(mix, query))
    mean = model.query(query).mean(1)
    gate = torch.stack([head(mean) for head in model.noise], 1).sigmoid()
    maps = model.unet((model.magnitude_bands(model.spectrum(mix)) + 1e-10).log())
    want = torch.einsum("bnk,bkml->bnml", gate * model.map_weight, maps) + model.shift
    torch.testing.assert_close(noise, want, rtol=1e-4, atol=1e-5)
    swapped = model(mix, query.flip(1), noise=True)[1]
    torch.testing.assert_close(swapped, noise, rtol=1e-4, atol=1e-5)


def test_masks_start_at_one_half_whatever_is_asked():
    torch.manual_seed(0)
    # Only the tiny start of the last convolution stands between the maps and 0.
    masks = QuerySeparator(5, **SMALL)(tones(), torch.randn(1, 3, 5)).detach().sigmoid()
    assert float((masks - 0.5).abs().max()) < 0.05


@pytest.mark.parametrize("fusion", ["late", "middle", "early"])
def test_the_order_of_queries_is_the_order_of_answers(fusion: str):
    model, wave = small(fusion), tones()
    query = torch.randn(3, 5)
    order = torch.tensor([2, 0, 1])
    one, other = model.separate(wave, query), model.separate(wave, query[order])
    # Products of matrices round a row by where it stands in them.
    torch.testing.assert_close(other, one[order], rtol=0, atol=1e-6)
    assert float((one[0] - one[1]).abs().max()) > 1e-4, "different queries are answered differently"


@pytest.mark.parametrize("frames", [1, 7, 16, 33])
def test_maps_have_the_size_of_the_spectrum_at_any_length(frames: int):
    assert SpectrumUNet(3, depth=3, width=4)(torch.randn(2, 18, frames)).shape == (2, 3, 18, frames)


def test_a_place_sees_its_neighbours_only():
    net = SpectrumUNet(3, depth=2, width=4).eval().requires_grad_(False)
    x = torch.randn(1, 16, 256)
    changed = x.clone()
    changed[..., :8] += 1
    difference = (net(x) - net(changed)).abs().amax((0, 1, 2))
    assert float(difference[:8].max()) > 0 and float(difference[64:].max()) == 0


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("samples", [1, 100, 5001])
def test_what_comes_out_is_as_long_and_has_as_many_channels_as_what_came(channels: int, samples: int):
    wave = torch.randn(channels, samples)
    assert small().separate(wave, torch.randn(2, 5)).shape == (2, channels, samples)


def test_in_windows_and_at_once_agree_away_from_the_seams():
    model, wave = small(), tones(6.0, channels=2)
    query = torch.randn(2, 5)
    whole = model.separate(wave, query, seconds=None)
    for blocks in ([wave], wave.split(777, -1)):
        parts = torch.cat(list(model.stream(blocks, query, seconds=2.0, overlap=0.9)), -1)
        assert parts.shape == whole.shape
        # The first window's own part lasts 1.1 s; the network of two levels sees some 20 frames of 4 ms to either side.
        assert float((parts - whole)[..., :8000].abs().max()) < 1e-4
        assert float((parts - whole).abs().max()) < 0.1 * float(whole.abs().max())


def test_windows_longer_than_a_seam_agree_in_their_middles():
    model, wave = small(), tones(9.0)
    query = torch.randn(1, 5)
    whole = model.separate(wave, query, seconds=None)
    parts = model.separate(wave, query, seconds=3.0, overlap=0.5)
    advance = -(-int(2.5 * 8000) // 128) * 128
    for window in range(1, 3):
        middle = slice(window * advance + 6000, window * advance + 14000)
        assert float((parts - whole)[..., middle].abs().max()) < 1e-4


def test_stereo_shares_one_mask_from_the_mean():
    model, mono = small(), tones()
    stereo = torch.cat([1.5 * mono, 0.5 * mono])
    query = torch.randn(1, 5)
    left, right = model.separate(stereo, query)[0]
    torch.testing.assert_close(left, 3 * right, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(left, 1.5 * model.separate(mono, query)[0, 0], rtol=1e-3, atol=1e-5)


def test_a_true_mask_through_the_whole_chain_recovers_the_source():
    t = torch.arange(16000) / 8000
    low = torch.sin(2 * torch.pi * 300 * t) * (torch.sin(9 * t) > 0)
    high = torch.sin(2 * torch.pi * 1700 * t)
    model = small(bands=64, n_fft=512, hop=128)
    mix = low + high
    magnitude = model.magnitude_bands(model.spectrum(torch.stack([low, high, mix])))
    masks = mask_targets(magnitude[None, :2], magnitude[None, 2], "ratio")[0]
    found = apply_masks(stft(mix[None], 512, 128), masks, 128, 16000)[:, 0]
    for estimate, source in zip(found, (low, high), strict=True):
        assert float(10 * torch.log10((source**2).sum() / ((estimate - source) ** 2).sum())) > 13


@pytest.mark.skipif(
    shutil.which("fluidsynth") is None or not (instruments.FONTS / "TimGM6mb.sf2").exists(),
    reason="needs fluidsynth and timgm6mb-soundfont",
)
def test_ideal_masks_through_the_whole_chain_reach_what_masks_can_on_rendered_pairs(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    clips = instruments.render_clips(instruments.FAMILIES, 3, presets=[0], seed=5)
    model, rng = small(bands=96, n_fft=512, hop=128), np.random.default_rng(0)
    scores: dict[str, list[float]] = {"binary": [], "ratio": []}
    while len(scores["ratio"]) < 16:
        i, j = rng.integers(len(clips.waves), size=2)
        if clips.labels[i] == clips.labels[j]:
            continue
        sources = torch.from_numpy(clips.waves[[i, j]])
        mix = sources.sum(0, keepdim=True)
        magnitude = model.magnitude_bands(model.spectrum(torch.cat([sources, mix])))
        for kind, found in scores.items():
            mask = mask_targets(magnitude[None, :2], magnitude[None, 2], kind)[0, :1]
            estimate = apply_masks(model.spectrum(mix), mask, 128, mix.shape[-1])[0, 0]
            found.append(float(bss_eval(estimate, sources).sdr))
    assert np.mean(scores["binary"]) >= 9 and np.mean(scores["ratio"]) >= 13


def test_another_sample_rate_keeps_its_own_and_hears_the_same():
    from scipy.signal import resample_poly

    model, wave = small(bands=32), tones(2.0)
    query = torch.randn(1, 5)
    twice = torch.from_numpy(resample_poly(wave.numpy(), 2, 1, axis=1)).float()
    found = model.separate(twice, query, sample_rate=16000, resample=True)
    assert found.shape == (1, 1, 32000)
    back = torch.from_numpy(resample_poly(found.numpy(), 1, 2, axis=2)).float()
    want = model.separate(wave, query)
    assert float((back - want).norm() / want.norm()) < 0.15
    with pytest.raises(ValueError, match="16000 samples a second and this separator works at 8000; pass resample=True"):
        model.separate(twice, query, sample_rate=16000)


def test_a_binary_mask_keeps_or_silences():
    model, wave = small(), tones()
    query = torch.randn(1, 5)
    masks = model(wave, query[None])[0].sigmoid()
    want = apply_masks(model.spectrum(wave), (masks > 0.4).float(), 32, wave.shape[-1])
    torch.testing.assert_close(model.separate(wave, query, mask="binary", threshold=0.4), want)


def test_saved_and_loaded_it_answers_the_same_to_the_bit(tmp_path):
    tower = NamedSounds(dict.fromkeys(("dog", "cat", "owl", "bee", "cow"), ()))
    model, wave = small(text=tower), tones()
    model.save_pretrained(tmp_path / "m", note={"recipe": "none"})
    again = QuerySeparator.from_pretrained(tmp_path / "m")
    assert torch.equal(again.separate(wave, ["a dog", "owls"]), model.separate(wave, ["a dog", "owls"]))
    model.save_pretrained(tmp_path / "half", half=True)
    half = QuerySeparator.from_pretrained(tmp_path / "half")
    want = model.separate(wave, ["cow"])
    # float16 keeps 11 bits of each weight.
    assert float((half.separate(wave, ["cow"]) - want).abs().max()) < 0.01 * float(want.abs().max())
    assert torch.equal(separate(wave, ["a dog"], model=tmp_path / "m"), model.separate(wave, ["dog"]))


def test_a_damaged_or_foreign_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no separator"):
        QuerySeparator.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="holds other files"):
        small().save_pretrained(tmp_path)
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        QuerySeparator.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, w: m.separate(w, torch.randn(2, 7)), "must have shape .queries, 5., got .2, 7."),
        (lambda m, w: m(w, torch.randn(1, 2, 7)), "width 7, this separator takes embeddings of 5"),
        (lambda m, w: m(w, torch.randn(1, 3, 5), noise=True), "has 2 noise heads, .* got 3"),
        (lambda m, w: m.separate(w, ["violin"]), "has no text tower"),
        (lambda m, w: m.separate(w, "violin"), "give \\['violin'\\]"),
        (lambda m, w: m.separate(w, ["violin", " "]), "none may be empty"),
        (lambda m, w: m.separate(w, []), "at least one sound"),
        (lambda m, w: m.separate(torch.zeros(1, 9), torch.randn(1, 5)), "silent"),
        (lambda m, w: m.separate(w * torch.nan, torch.randn(1, 5)), "NaN or infinity"),
        (lambda m, w: m.separate(w[:, :0], torch.randn(1, 5)), "got .1, 0."),
        (lambda m, w: m.separate(w, torch.randn(1, 5), mask="hard"), "'binary' or 'soft', got 'hard'"),
        (lambda m, w: m.separate(w, torch.randn(1, 5), threshold=1.0), "threshold must lie between 0 and 1"),
        (lambda m, w: m.separate(w, torch.randn(1, 5), seconds=1.0, overlap=0.6), "less than half of seconds=1.0"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(small(), tones())


def test_an_unknown_fusion_and_towers_of_another_width_are_named():
    with pytest.raises(ValueError, match=r"fusion must be one of .* got 'attention'"):
        QuerySeparator(5, fusion="attention")
    with pytest.raises(ValueError, match="text gives vectors of width 2, and embed_dim is 5"):
        QuerySeparator(5, text=NamedSounds({"a b": (), "c": ()}))
