"""Folders of images, read in batches: class folders or flat ones, and files that nobody prepared.

``image_folder`` lists (names only, nothing is opened), ``read_image`` opens one, ``batches`` streams, ``unpack`` puts a folder
once into an array on disk, from which many epochs are read. What can not be used is left out with one line that says why, and
the rest goes on; what had to be converted in a way that loses something is said as well.

Shapes: N images, B a batch, (channels, side, side), uint8.
"""

import logging
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixtura.core.checkpoint import atomic_directory
from mixtura.core.progress import bar

__all__ = [
    "BadImage",
    "Batch",
    "ImageFolder",
    "Problem",
    "batches",
    "image_folder",
    "image_list",
    "read_image",
    "unpack",
]

log = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
LEAST_SIDE = 2  # pixels; below that an image is one colour
Fit = Literal["crop", "stretch"]
Pixels = NDArray[np.uint8]


class BadImage(ValueError):
    """A file that can not be used as an image; the message says why, without the file's name."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file.

    Attributes:
        path: the file.
        what: why, in words.
        used: whether it was used all the same, converted.
    """

    path: Path
    what: str
    used: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" + ("" if self.used else "; left out")


OnProblem = Callable[[Problem], None]


@dataclass(frozen=True)
class ImageFolder:
    """Files of a folder and their classes; nothing of them is in memory.

    Attributes:
        root: the folder.
        files: paths of the images, sorted.
        labels: class of each, shape (N,), int64; -1 throughout in a flat folder.
        classes: names of the classes, sorted; empty for a flat folder.
    """

    root: Path
    files: tuple[Path, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: NDArray[np.int64]) -> "ImageFolder":
        """The images of those numbers, in that order."""
        return replace(self, files=tuple(self.files[i] for i in rows), labels=self.labels[rows])


@dataclass(frozen=True)
class Batch:
    """Images that could be read.

    Attributes:
        images: shape (B, channels, side, side), uint8.
        rows: their numbers in the folder, shape (B,).
    """

    images: Pixels
    rows: NDArray[np.int64]


def warn_problem(problem: Problem) -> None:
    """Log a problem as one line."""
    log.warning("%s", problem)


def image_folder(
    root: str | Path,
    *,
    classes: Literal["auto", "folders", "none"] = "auto",
    exclude: Sequence[str] = (),
    on_problem: OnProblem = warn_problem,
) -> ImageFolder:
    """List the images below a folder.

    Args:
        root: holds a folder for each class, in which images may lie at any depth, or images without classes.
        classes: ``"folders"`` makes each folder of ``root`` a class, ``"none"`` ignores folders, ``"auto"`` takes classes where
            all images lie in folders. Images beside class folders belong to none and are left out (``"folders"``).
        exclude: names of folders of ``root`` to pass over; each must be there.
        on_problem: called for every file that is no image by its name, and for links that lead nowhere or back to where they
            are. Links to folders are followed. Hidden files are passed over in silence.
    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is a file, it holds no image, ``"folders"`` finds none, or ``exclude`` names what is not there.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds the images")
    if absent := [name for name in exclude if not (root / name).exists()]:
        raise ValueError(f"exclude names {absent[0]!r}, and {root} holds no such folder")
    files: list[Path] = []
    for path in sorted(_files_below(root, exclude, (root.resolve(),), on_problem)):
        if path.suffix.lower() not in SUFFIXES:
            on_problem(Problem(path, f"is no image by its name ({path.suffix or 'no suffix'})"))
        elif path.is_file():
            files.append(path)
        else:
            on_problem(Problem(path, "is a link to nothing" if path.is_symlink() else "is no file"))
    if not files:
        but = f" beside {', '.join(exclude)}" if exclude else ""
        raise ValueError(f"{root} holds no image{but}; images end in {', '.join(SUFFIXES)}")
    loose = [path for path in files if path.parent == root]
    if classes == "none" or (classes == "auto" and loose):
        return ImageFolder(root, tuple(files), np.full(len(files), -1))
    for path in loose:
        on_problem(Problem(path, "lies beside the class folders and so has no class"))
    files = [path for path in files if path.parent != root]
    if not files:
        raise ValueError(
            f"{root} has no class folder with images; put the images of each class into a folder of its own"
        )
    of = [path.relative_to(root).parts[0] for path in files]
    names = tuple(sorted(set(of)))
    number = {name: i for i, name in enumerate(names)}
    return ImageFolder(root, tuple(files), np.array([number[name] for name in of]), names)


def _files_below(
    folder: Path, exclude: Sequence[str], above: tuple[Path, ...], on_problem: OnProblem
) -> Iterator[Path]:
    """All that is no folder, hidden things aside; ``above`` are the folders that hold this one, and itself, without links."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        on_problem(Problem(folder, f"can not be read ({error.strerror})"))
        return
    for name in names:
        path = folder / name
        if name.startswith(".") or name in exclude:
            continue
        if not path.is_dir():
            yield path
        elif (real := path.resolve()) in above:
            on_problem(Problem(path, "is a link to a folder that holds it"))
        else:
            yield from _files_below(path, (), (*above, real), on_problem)


def image_list(path: str | Path, root: str | Path | None = None) -> ImageFolder:
    """Images named in a text file, one ``path label`` a line, the form in which benchmarks give their splits.

    Args:
        path: the list; labels are integers, and a line without one has no class.
        root: what the paths start from; the list's own folder by default.
    Raises:
        FileNotFoundError: no such list.
        ValueError: it names no image, or a label is no integer (its line is named).
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    files, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        head, _, tail = line.strip().rpartition(" ")
        if not head:
            head, tail = tail, "-1"
        if not tail.lstrip("-").isdecimal():
            raise ValueError(f"{path} line {number} must be 'path label' with an integer label, got {line.strip()!r}")
        files.append(root / head)
        labels.append(int(tail))
    if not files:
        raise ValueError(f"{path} names no image")
    known = sorted({label for label in labels if label >= 0})
    number_of = {label: i for i, label in enumerate(known)}
    return ImageFolder(
        root, tuple(files), np.array([number_of.get(label, -1) for label in labels]), tuple(map(str, known))
    )


def read_image(
    path: str | Path, side: int, *, channels: int = 3, fit: Fit = "crop", on_problem: OnProblem = warn_problem
) -> Pixels:
    """One image as a square of a given size.

    Args:
        path: any format that Pillow reads; of several frames the first; turned as its camera noted.
        side: height and width of the result, pixels.
        channels: 3 (red, green, blue) or 1 (grey).
        fit: ``"crop"`` keeps proportions and cuts the middle out, ``"stretch"`` keeps everything.
        on_problem: told what was lost in a conversion (inks to colours, 16 bits to 8).
    Returns:
        Shape (channels, side, side), uint8. Transparent pixels are laid on white.
    Raises:
        BadImage: no image, broken off, or less than 2 pixels high or wide.
        FileNotFoundError: no such file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colours), got {channels}")
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags and the like, without the file's name
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if min(opened.size) < LEAST_SIDE:
                    raise BadImage(
                        f"is {opened.width} x {opened.height} pixels, and {LEAST_SIDE} x {LEAST_SIDE} are needed"
                    )
                if opened.format == "JPEG":  # decodes at half or a quarter of the size where that is enough
                    opened.draft(None, (2 * side, 2 * side))
                image: Any = ImageOps.exif_transpose(opened)
                image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"is too large to be opened safely ({error})") from error
    except UnidentifiedImageError as error:
        size = path.stat().st_size
        raise BadImage("is empty (0 bytes)" if size == 0 else "is no image, whatever its name says") from error
    except (FileNotFoundError, PermissionError, BadImage):
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error) as error:
        # Pillow raises any of these for a file that breaks off or lies about itself.
        raise BadImage(f"is damaged or breaks off ({str(error) or type(error).__name__})") from error
    image = _eight_bits(image, Problem(path, "", used=True), on_problem)
    image = image.convert("L" if channels == 1 else "RGB")
    if fit == "crop":
        image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    elif fit == "stretch":
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    else:
        raise ValueError(f"fit must be 'crop' or 'stretch', got {fit!r}")
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def batches(
    folder: ImageFolder,
    side: int,
    *,
    channels: int = 3,
    batch_size: int = 64,
    fit: Fit = "crop",
    on_problem: OnProblem = warn_problem,
) -> Iterator[Batch]:
    """The images of a folder in their order, a batch at a time; memory does not grow with the folder.

    Args:
        folder: what :func:`image_folder` listed.
        side, channels, fit: as in :func:`read_image`.
        batch_size: images a batch; the last may be smaller, and every batch has at least one.
        on_problem: called once for every file that is left out or converted.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    images: list[Pixels] = []
    rows: list[int] = []
    for row, path in enumerate(folder.files):
        try:
            images.append(read_image(path, side, channels=channels, fit=fit, on_problem=on_problem))
        except BadImage as error:
            on_problem(Problem(path, str(error)))
        except OSError as error:  # removed meanwhile, or not to be read by this user
            on_problem(Problem(path, f"can not be read ({error.strerror or error})"))
        else:
            rows.append(row)
        if len(images) == batch_size:
            yield Batch(np.stack(images), np.array(rows))
            images, rows = [], []
    if images:
        yield Batch(np.stack(images), np.array(rows))


def unpack(
    folder: ImageFolder,
    side: int,
    path: str | Path,
    *,
    channels: int = 3,
    fit: Fit = "crop",
    label: str = "images",
    on_problem: OnProblem = warn_problem,
) -> tuple[Pixels, NDArray[np.int64]]:
    """Decode a folder once into an array on disk, to train from over many epochs without holding it in memory.

    Args:
        folder, side, channels, fit, on_problem: as in :func:`batches`.
        path: directory to write, whole or not at all.
        label: name on the progress bar.
    Returns:
        The images, (M, channels, side, side) uint8, read from disk as they are indexed, and their numbers in the folder, (M,).
    Raises:
        ValueError: not one image could be read.
    """
    path = Path(path)
    with atomic_directory(path) as beside:
        file = beside / "images.npy"
        shape = (len(folder), channels, side, side)
        array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
        done, rows = 0, []
        with bar(desc=label, unit="image", total=len(folder)) as shown:
            for batch in batches(folder, side, channels=channels, fit=fit, on_problem=on_problem):
                array[done : done + len(batch.rows)] = batch.images
                done += len(batch.rows)
                rows.append(batch.rows)
                shown.update(int(batch.rows[-1]) + 1 - shown.n)
        array.flush()
        if not done:
            raise ValueError(f"{folder.root}: none of {len(folder)} files could be read as an image")
    return np.load(path / "images.npy", mmap_mode="r", allow_pickle=False)[:done], np.concatenate(rows)


def _eight_bits(image: Any, problem: Problem, on_problem: OnProblem) -> Any:
    """The image in 8 bits a channel, without inks and without transparency."""
    from PIL import Image

    if image.mode == "CMYK":
        on_problem(replace(problem, what="is CMYK; its inks are converted to colours without a profile"))
        return image.convert("RGB")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        # Pillow opens 16-bit files as I;16 or as 32-bit I; scanners' 32-bit files and floats have no fixed white.
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and values.min() >= 0 and values.max() <= 65535)
        low, high = (0.0, 65535.0) if sixteen else (float(values.min()), float(values.max()))
        if not np.isfinite([low, high]).all():
            raise BadImage("holds NaN or infinite pixels")
        scale = "" if sixteen else ", from its least value as black to its largest as white"
        on_problem(replace(problem, what=f"has {16 if sixteen else 32} bits a pixel; rounded to 8{scale}"))
        return Image.fromarray(np.round((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
