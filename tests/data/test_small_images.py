"""IDX files: round trips through the bytes the format prescribes, and damaged ones."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from mixtura.data.digits import digits, fashion_mnist, halved, mnist_sample, patches, read_idx, read_mnist
from mixtura.data.glyphs import glyphs
from mixtura.data.planar import PLANAR, planar


def idx(array: np.ndarray, code: int) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_an_idx_file_gives_its_array_back(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    (tmp_path / "a").write_bytes(idx(images, 0x08))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(images, 0x08)))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), images)
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), images)
    wide = np.array([[1, -2], [300, 4]], dtype=">i4")
    (tmp_path / "b").write_bytes(idx(wide, 0x0C))
    np.testing.assert_array_equal(read_idx(tmp_path / "b"), wide)


def test_a_directory_as_mnist_is_distributed_is_read(tmp_path: Path):
    images, labels = np.full((2, 28, 28), 255, np.uint8), np.array([7, 1], np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images, 0x08)))
    with pytest.raises(ValueError, match=r"has neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        read_mnist(tmp_path, "t10k")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels, 0x08))
    found, digit = read_mnist(tmp_path, "t10k")
    assert found.shape == (2, 28, 28) and found.max() == 1.0 and digit.tolist() == [7, 1]
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:1], 0x08))
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        read_mnist(tmp_path, "t10k")
    with pytest.raises(ValueError, match="part must be 'train' or 't10k'"):
        read_mnist(tmp_path, "test")


def test_a_damaged_idx_file_is_named(tmp_path: Path):
    (tmp_path / "no").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="no is no IDX file: its first bytes are 504b0304"):
        read_idx(tmp_path / "no")
    (tmp_path / "short").write_bytes(idx(np.zeros((2, 4), np.uint8), 0x08)[:-3])
    with pytest.raises(ValueError, match=r"must hold 8 bytes after its header, for shape \(2, 4\), got 5"):
        read_idx(tmp_path / "short")


def test_digits_and_patches_are_images_between_zero_and_one():
    images, labels = digits()
    assert images.shape == (1797, 8, 8) and set(labels) == set(range(10))
    for found in (images, patches(20, seed=1)):
        assert found.min() >= 0 and found.max() <= 1
    np.testing.assert_array_equal(patches(5, seed=3), patches(5, seed=3))


@pytest.mark.parametrize("name", sorted(PLANAR))
def test_planar_sets_repeat_with_their_seed_and_stay_near_the_origin(name: str):
    points = planar(name, 500, seed=2)
    assert points.shape == (500, 2) and float(points.abs().max()) < 6
    assert points.equal(planar(name, 500, seed=2)) and not points.equal(planar(name, 500, seed=3))


def test_an_unknown_planar_set_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"name must be one of .*'pinwheel'.* got 'moons'"):
        planar("moons", 3)


def test_clothes_are_read_from_a_named_directory_or_said_to_be_missing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mixtura.data.digits.DEBIAN", tmp_path / "none")
    monkeypatch.delenv("MIXTURA_IMAGES", raising=False)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist()
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.full((2, 28, 28), 255, np.uint8), 0x08))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([7, 1], np.uint8), 0x08))
    monkeypatch.setenv("MIXTURA_IMAGES", str(tmp_path))
    images, kinds = fashion_mnist("t10k")
    assert images.shape == (2, 28, 28) and kinds.tolist() == [7, 1]


def test_halved_images_are_means_of_four_pixels():
    np.testing.assert_array_equal(halved(np.arange(16.0).reshape(1, 4, 4)), [[[2.5, 4.5], [10.5, 12.5]]])
    with pytest.raises(ValueError, match="must have even sides to be halved, got 3 x 4"):
        halved(np.zeros((1, 3, 4)))


def test_the_sample_of_mnist_has_500_of_each_digit():
    images, labels = mnist_sample()
    assert images.shape == (5000, 28, 28) and np.bincount(labels).tolist() == [500] * 10
    assert images.min() == 0 and images.max() == 1


def test_glyphs_repeat_with_their_seed_and_lie_in_the_middle():
    drawn = glyphs(40, 28, seed=1)
    np.testing.assert_array_equal(drawn, glyphs(40, 28, seed=1))
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert (drawn.max((1, 2)) > 0.5).all()  # every one shows a letter
    assert drawn[:, 0].max() == 0 and drawn[:, :, 0].max() == 0 and drawn[:, -1].max() == 0
    assert len(np.unique(drawn.reshape(40, -1), axis=0)) == 40
