"""Wavelet blocks and models: against the authors' package, by counting, by gradients and by what a pixel reaches."""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mixtura.vision import ResidualNetwork
from mixtura.vision.wavelet import (
    WaveletClassifier,
    WaveletMixing,
    WaveletSegmenter,
    WaveletSuperResolution,
    convert_mixing,
    load_reference_checkpoint,
    wavelet_lite,
)
from mixtura.vision.wavelet.reference import renamed


@pytest.fixture
def wavemix(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The authors' package, which imports a module that NumPy 2 no longer has, and uses nothing of it."""
    stub = types.ModuleType("numpy.lib.function_base")
    stub.hamming = np.hamming  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "numpy.lib.function_base", stub)
    try:
        return importlib.import_module("wavemix")
    except ImportError as error:
        pytest.skip(f"the authors' package is a peer: pip install --no-deps wavemix==0.2.4 einops PyWavelets ({error})")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shaken(model: nn.Module) -> nn.Module:
    """Norms with statistics and scales of their own, so that an equality is not one of zeros and ones."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return model.eval()


@pytest.mark.parametrize(
    ("sizes", "options", "want"),
    [
        ((8, 5), {"in_channels": 1}, 7156),
        ((8, 10), {"in_channels": 1, "upsample": "nearest"}, 3566),
        ((32, 7), {"upsample": "nearest"}, 37058),
        ((64, 6), {}, 520106),
        ((12, 3), {"in_channels": 1}, 9823),
    ],
)
def test_parameters_are_those_of_the_papers_models(sizes: tuple[int, int], options: dict, want: int):
    assert count(wavelet_lite(*sizes, **options)) == want


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_block_is_the_authors(wavemix: types.ModuleType, levels: int):
    torch.manual_seed(levels)
    theirs = getattr(wavemix, f"Level{levels}Waveblock")(mult=2, ff_channel=24, final_dim=16, dropout=0.5)
    shaken(theirs)
    ours = WaveletMixing(16, levels=levels, inner=24).eval()
    state = renamed({f"layers.0.{name}": tensor for name, tensor in theirs.state_dict().items()})
    ours.load_state_dict({name.removeprefix("blocks.0."): tensor for name, tensor in state.items()})
    x = torch.randn(2, 16, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), x + theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stem", ["strided", "pachify"])
def test_classifier_is_the_authors_from_their_file(wavemix: types.ModuleType, stem: str, tmp_path: Path):
    theirs = importlib.import_module("wavemix.classification").WaveMix(
        num_classes=5, depth=2, ff_channel=24, final_dim=16, level=2, initial_conv=stem, patch_size=4, stride=2
    )
    shaken(theirs)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours = WaveletClassifier(
        3, 5, 16, 2, 2, stem="strided" if stem == "strided" else "patchify", stride=2, patch=4, inner=24
    ).eval()
    load_reference_checkpoint(ours, tmp_path / "theirs.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_channels_of_a_level_lie_as_the_authors_lay_them():
    block = WaveletMixing(8)
    seen = []
    block.mixing[0][1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    x = torch.randn(1, 8, 4, 4)
    block.eval()(x)
    r = block.reduction(x)
    a, b, c, d = r[..., ::2, ::2], r[..., ::2, 1::2], r[..., 1::2, ::2], r[..., 1::2, 1::2]
    bands = [(a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]
    want = [bands[0][:, 0], bands[0][:, 1]] + [bands[k][:, q] for q in (0, 1) for k in (1, 2, 3)]
    torch.testing.assert_close(seen[0], block.mixing[0][0](torch.stack(want, 1)))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_pixel_reaches_as_far_as_counted(levels: int):
    torch.manual_seed(0)
    block = WaveletMixing(4, levels=levels).double().eval()
    x = torch.randn(1, 4, 64, 64, dtype=torch.float64)
    cell, at = 2**levels, 32
    for offset in (0, cell - 1):
        moved = x.clone()
        moved[..., at + offset, at + offset] += 1
        changed = (block(moved) - block(x)).abs().amax((0, 1)) > 1e-12
        rows = changed.any(1).nonzero().flatten()
        # The deepest cell holds pixels at .. at + 2^L - 1, and comes back over 2^L - 1 more on either side.
        assert (rows.min().item(), rows.max().item()) == (at - (cell - 1), at + 2 * (cell - 1))
        assert rows.min() >= at + offset - block.reach()[0] and rows.max() <= at + offset + block.reach()[1]


def test_gradients_are_those_of_finite_differences():
    block = WaveletMixing(4, levels=2, dropout=0.0).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), atol=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("mixer", ["dwt", "average", "random", "none"])
def test_any_sides_keep_their_shape_and_mixers_their_size(levels: int, mixer: str):
    block = WaveletMixing(8, levels=levels, mixer=mixer)
    assert block(torch.randn(2, 8, 17, 23)).shape == (2, 8, 17, 23)
    assert count(block) == count(WaveletMixing(8, levels=levels))


def test_odd_sides_are_those_of_the_image_continued_by_its_last_pixels():
    block = WaveletMixing(8).eval()
    x = torch.randn(1, 8, 5, 6)
    want = block(torch.cat((x, x[..., -1:, :]), -2))[..., :5, :]
    torch.testing.assert_close(block(x), want)


def test_random_filters_lose_nothing_and_averages_do():
    lossless = WaveletMixing(8, mixer="random")
    torch.testing.assert_close(lossless.random @ lossless.random.T, torch.eye(4), atol=1e-5, rtol=0)
    r = torch.randn(1, 2, 6, 6)
    energy = {m: WaveletMixing(8, mixer=m)._bands(r).square().sum() for m in ("dwt", "random", "none")}
    for value in energy.values():
        torch.testing.assert_close(value, r.square().sum())
    checkered = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(3, 3)[None, None].expand(1, 2, 6, 6)
    assert not WaveletMixing(8, mixer="average")._bands(checkered).any()


def test_another_wavelet_keeps_shape_and_size():
    pytest.importorskip("pywt", reason="other wavelets take their filters from PyWavelets")
    block = WaveletMixing(8, levels=2, wavelet="db2")
    assert block(torch.randn(1, 8, 17, 23)).shape == (1, 8, 17, 23)
    assert count(block) == count(WaveletMixing(8, levels=2))


@pytest.mark.parametrize("stride", [1, 2])
def test_models_answer_at_their_size(stride: int, tmp_path: Path):
    image = torch.rand(2, 3, 18, 21)
    segmenter = WaveletSegmenter(3, 4, channels=8, depth=1, stride=stride)
    assert segmenter.segment(image).shape == (2, 18, 21) and segmenter(image).shape == (2, 4, 18, 21)
    assert WaveletSuperResolution(3, channels=8, depth=1).upscale(image).shape == (2, 3, 36, 42)
    model = WaveletClassifier(3, 2, channels=8, depth=1, labels=["cat", "dog"])
    assert set(model.predict(image)) <= {"cat", "dog"} and model.training
    model.save_pretrained(tmp_path / "model")
    again = WaveletClassifier.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.eval()(image), model.eval()(image))
    assert again.labels == ["cat", "dog"]
    assert not [file for file in (tmp_path / "model").iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


def test_conversion_leaves_the_model_and_replaces_its_pairs():
    model = ResidualNetwork(8, stages=2, blocks=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = convert_mixing(model)
    found = [name for name, m in made.named_modules() if isinstance(m, WaveletMixing)]
    assert found == ["blocks.0.first", "blocks.1.first", "blocks.3.first"]  # block 2 halves the sides
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    made(torch.randn(2, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    with pytest.raises(ValueError, match="Linear has no module with two 3 x 3 convolutions"):
        convert_mixing(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WaveletMixing(10), "channels must be divisible by 4, got 10"),
        (lambda: WaveletMixing(8, levels=5), "levels must be 1, 2, 3 or 4, got 5"),
        (lambda: WaveletMixing(8, mixer="max"), "mixer must be one of .*, got 'max'"),
        (lambda: WaveletMixing(8, upsample="nearest", inner=16), "inner at the channels, 8, got 16"),
        (lambda: WaveletMixing(8, levels=3)(torch.zeros(1, 8, 7, 9)), "at least 8 for 3 levels, got 7 x 9"),
        (lambda: WaveletMixing(8)(torch.zeros(8, 4, 4)), r"add the batch's axis: x\[None\]"),
        (lambda: WaveletMixing(8)(torch.zeros(1, 8, 4, 4, dtype=torch.uint8)), r"x.float\(\) / 255"),
        (lambda: WaveletMixing(8)(torch.zeros(1, 4, 4, 4)), "must have 8 channels, got 4"),
        (lambda: wavelet_lite(8, 1)(torch.zeros(1, 1, 8, 8)), r"\(B, 3, H, W\), got \(1, 1, 8, 8\)"),
        (lambda: WaveletClassifier(num_classes=3, labels=["a"]), "must name 3 classes, got 1"),
        (lambda: WaveletSegmenter(stride=3), "stride must be 1 or 2, got 3"),
        (lambda: load_reference_checkpoint(wavelet_lite(8, 1), "x.pth"), "pickled weights are not opened here"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_models_file_is_refused_by_its_first_tensor(tmp_path: Path):
    save_file({"conv.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"stem.0.weight is \(4, 3, 3, 3\) here and \(8, 3, 3, 3\) there"):
        load_reference_checkpoint(wavelet_lite(8, 1), tmp_path / "x.safetensors")


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = wavelet_lite(8, 1, in_channels=1, num_classes=2)
    x = torch.randn(64, 1, 8, 8)
    y = (x[:, 0, ::2, ::2].sum((1, 2)) > x[:, 0, 1::2, 1::2].sum((1, 2))).long()  # pooling could not tell
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
