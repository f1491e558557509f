"""Spectra from a stream of blocks: the step is that of whole matrices, and the stream ends near the fit of everything."""

import numpy as np
import pytest
import torch

from mixtura.data.spectra import made_up_library, synthesize_scene
from mixtura.vision.unmixing import SpectralUnmixing, sad
from mixtura.vision.unmixing import objective as parts
from mixtura.vision.unmixing.stream import STEPS, Stream


def test_a_step_over_blocks_is_that_of_the_whole_matrices():
    rng = np.random.default_rng(0)
    blocks = [(rng.random((n, 9)), rng.dirichlet(np.ones(3), n)) for n in (20, 35, 11)]
    of = parts.Terms(0.0, 0.0, True)
    spectra = torch.from_numpy(rng.uniform(0.1, 1, (3, 9)))
    c, stream = 0.7, None
    for Y, A in blocks:
        pixels = parts.Pixels(Y)
        sums = parts.sweep(pixels, torch.from_numpy(A.copy()), torch.zeros(len(Y)).double(), spectra, None, of)
        stream = (
            Stream.of(sums, pixels.power(), 20, c) if stream is None else stream.joined(sums, pixels.power(), len(Y))
        )
    got, weights = stream.better(spectra, of)
    Y, A = (np.concatenate([block[i] for block in blocks]) for i in (0, 1))
    E = spectra.numpy()
    for _ in range(STEPS):
        E = E * (A.T @ Y) / (A.T @ A @ E)
    np.testing.assert_allclose(got, E, rtol=1e-10)
    # c was of 20 pixels; the norm of as good a residual grows with the root of their number.
    np.testing.assert_allclose(weights, c * np.sqrt(66 / 20) / np.linalg.norm(Y - A @ E, axis=0), rtol=1e-9)


@pytest.fixture(scope="module")
def scene():
    return synthesize_scene(made_up_library(channels=60), 4, 48, snr_db=20, outlier_channels=6, seed=4)


@pytest.fixture(scope="module")
def blocks(scene):
    """Eight blocks, each from all over the scene."""
    X = scene.cube.reshape(-1, 60)
    return [X[i::8] for i in range(8)]


def test_the_first_block_is_a_fit_and_later_ones_bring_the_spectra_to_those_of_everything(scene, blocks):
    good = ~scene.outliers
    first = SpectralUnmixing(4).fit(blocks[0])
    model = SpectralUnmixing(4).partial_fit(blocks[0])
    np.testing.assert_array_equal(model.endmembers_, first.endmembers_)
    np.testing.assert_array_equal(model.channel_weight_, first.channel_weight_)
    for block in blocks[1:]:
        model.partial_fit(block)
    assert model.stream_.n_blocks == 8 and model.abundances_.shape == (len(blocks[7]), 4)
    np.testing.assert_allclose(model.abundances_.sum(1), 1, atol=1e-5)
    whole = SpectralUnmixing(4).fit(scene.cube.reshape(-1, 60))
    angle = {
        name: sad(m.endmembers_, scene.endmembers, bands=good) for name, m in (("first", first), ("stream", model))
    }
    assert angle["stream"] < 0.8 * angle["first"]
    assert sad(model.endmembers_, whole.endmembers_, bands=good) < sad(first.endmembers_, whole.endmembers_, bands=good)
    seen = scene.outliers & ~scene.blank
    assert model.channel_weight_[seen].max() < 0.5 * model.channel_weight_[good].min()


def test_a_stream_goes_on_after_a_fit_and_from_disk_to_the_bit(blocks, tmp_path):
    model = SpectralUnmixing(4, max_iter=20).fit(blocks[0])
    model.save(tmp_path / "kept")
    other = SpectralUnmixing.load(tmp_path / "kept")
    for part in (model, other):
        part.partial_fit(blocks[1]).partial_fit(blocks[2])
    np.testing.assert_array_equal(model.endmembers_, other.endmembers_)
    assert model.stream_.n_blocks == 3
    # A fit forgets the stream.
    again = model.fit(blocks[0])
    assert again.stream_.n_blocks == 1


def test_a_channel_that_was_blank_at_first_is_learned_once_it_shows_something(scene, blocks):
    channel = int(np.flatnonzero(~scene.outliers)[10])
    first = blocks[0].copy()
    first[:, channel] = 0
    model = SpectralUnmixing(4, max_iter=100).fit(first)
    assert model.blank_channels_[channel] and model.channel_weight_[channel] == 0
    for block in blocks[1:]:
        model.partial_fit(block)
    assert not model.blank_channels_[channel] and model.channel_weight_[channel] > 0
    plain = SpectralUnmixing(4, max_iter=100).fit(blocks[0])
    for block in blocks[1:]:
        plain.partial_fit(block)
    # An eighth of its pixels are zeros, as they would be in one fit; other spectra hardly notice.
    level = plain.endmembers_[:, channel]
    np.testing.assert_allclose(model.endmembers_[:, channel], 7 / 8 * level, atol=0.1 * level.mean())


def test_blocks_that_do_not_fit_are_named(blocks):
    model = SpectralUnmixing(4, max_iter=5)
    with pytest.raises(ValueError, match="4 endmembers need at least 5 pixels"):
        model.partial_fit(blocks[0][:3])
    model.partial_fit(blocks[0])
    with pytest.raises(ValueError, match="59 features"):
        model.partial_fit(blocks[1][:, 1:])
    with pytest.raises(ValueError, match="X must be finite"):
        model.partial_fit(np.where(np.arange(60) == 3, np.nan, blocks[1]))
    model.partial_fit(blocks[1][:1])  # one pixel is a block
    assert model.stream_.n_blocks == 2
