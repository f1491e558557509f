"""Sounds of any length made pieces of one length, once, in a file on disk that training reads row by row.

Shapes: C pieces, N samples.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from mixtura.audio.files import open_recording
from mixtura.core.checkpoint import atomic_directory, read_json, write_json
from mixtura.core.progress import progress
from mixtura.data.video_sounds import WHOLE, Sound

__all__ = ["Pieces", "unpack", "warn_of"]

log = logging.getLogger(__name__)

META, WAVES, OWNERS, PLACES = "pieces.json", "waves.f16", "owners.npy", "places.npy"
LEAST = 0.25  # seconds; a shorter sound, or rest of one, is left out
QUIET = 0.05  # pieces below this share of their sound's level hold nothing to learn from
LEVEL = 0.05  # root mean square that pieces are brought to
READ = 30  # pieces that are decoded at a time
FULL = (errno.ENOSPC, errno.EDQUOT)
NAMED = 10  # problems that are told line by line


@dataclass(frozen=True)
class Pieces:
    """Pieces of sounds.

    Attributes:
        waves: shape (C, N), float16, mapped from disk, each with a root mean square of 0.05.
        texts: what each holds.
        sounds: how many sounds gave at least one.
        left_out: how many gave none.
        owners: number of the sound that each is of, shape (C,), ascending.
        places: which piece of its sound each is, quiet ones counted, shape (C,).
    """

    waves: Tensor
    texts: tuple[str, ...]
    sounds: int
    left_out: int
    owners: Tensor
    places: Tensor


def unpack(sounds: Sequence[Sound], path: str | Path, *, rate: int, seconds: float = 2.0) -> Pieces:
    """Decode sounds once into pieces on disk; memory holds a minute of one of them, and ``path`` the rest.

    Channels are averaged and samples converted to ``rate``. A sound that cannot be read, is damaged, silent, not finite or
    too short is left out, and told in a line of the log (of many, the first ten). A last piece is filled up with zeros. If
    ``path`` holds pieces of the same files already, they are taken.

    Args:
        sounds: files with what they hold.
        path: directory to write, whole or not at all: 2 bytes a sample.
        rate: samples a second of the pieces.
        seconds: length of a piece.
    Raises:
        ValueError: not one sound gives a piece.
        OSError: the disk is full.
    """
    path, size = Path(path), round(seconds * rate)
    key = _key(sounds, rate, size)
    if not (path / META).exists() or read_json(path / META)["of"] != key:
        _write(sounds, path, rate, size, key)
    kept = read_json(path / META)
    owners, places = (np.load(path / name, allow_pickle=False) for name in (OWNERS, PLACES))
    # Copy on write: torch wants memory that it may write to, and the file must stay what it is.
    mapped = np.memmap(path / WAVES, dtype=np.float16, mode="c", shape=(len(owners), size))
    texts = tuple(sounds[i].text for i in owners)
    numbers = (torch.from_numpy(owners), torch.from_numpy(places))
    return Pieces(torch.from_numpy(mapped), texts, kept["sounds"], len(sounds) - kept["sounds"], *numbers)


def warn_of(problems: Sequence[str]) -> None:
    """Tell the first ten of many problems in a line each, and how many more there are."""
    for line in problems[:NAMED]:
        log.warning("%s; left out", line)
    if len(problems) > NAMED:
        log.warning("and %d more like these", len(problems) - NAMED)


def _key(sounds: Sequence[Sound], rate: int, size: int) -> str:
    facts: list[object] = [rate, size, 2]
    for sound in sounds:
        about = sound.path.stat()
        facts.append(
            [str(sound.path), about.st_size, about.st_mtime_ns, sound.text, sound.start, sound.seconds],
        )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _write(sounds: Sequence[Sound], path: Path, rate: int, size: int, key: str) -> None:
    owners: list[int] = []
    places: list[int] = []
    bad: list[str] = []
    with atomic_directory(path) as beside:
        with (beside / WAVES).open("w+b") as file:
            for i, sound in enumerate(progress(sounds, desc="read", unit="clip")):
                begin = file.tell()
                try:
                    levels = _append(file, sound, rate, size)
                    loud = _keep_loud(file, begin, levels, 2 * size)
                    owners += [i] * len(loud)
                    places += loud
                except (ValueError, OSError) as error:
                    if getattr(error, "errno", None) in FULL:
                        raise  # the sound is not to blame, and the next would fare no better
                    file.seek(begin)
                    file.truncate()
                    bad.append(str(error))
        if not owners:
            raise ValueError(f"none of {len(sounds)} sounds can be used; the first: {bad[0]}")
        np.save(beside / OWNERS, np.array(owners, dtype=np.int64))
        np.save(beside / PLACES, np.array(places, dtype=np.int64))
        write_json(beside / META, {"of": key, "sounds": len(set(owners))})
    warn_of(bad)


def _append(file: BinaryIO, sound: Sound, rate: int, size: int) -> list[float]:
    """Write a sound's pieces, and give the level that each had, those too short not counted."""
    found = open_recording(sound.path)
    start, stop = 0, found.samples
    if sound.start is not None and found.seconds > WHOLE * sound.seconds:
        start, stop = round(sound.start * found.rate), round((sound.start + sound.seconds) * found.rate)
        if start >= found.samples:
            raise ValueError(f"{sound.path} lasts {found.seconds:.1f} s, its clip begins after {sound.start:g} s")
    if (length := (min(stop, found.samples) - start) / found.rate) < LEAST:
        raise ValueError(f"{sound.path} lasts {length:.2f} s, at least {LEAST} are needed")
    levels: list[float] = []
    for block_RN in found.blocks(READ * size / rate, start=start, stop=stop):
        if not bool(block_RN.isfinite().all()):
            raise ValueError(f"{sound.path} holds samples that are NaN or infinite")
        wave_N = block_RN.mean(0).numpy()
        if found.rate != rate:
            wave_N = resample_poly(wave_N, rate, found.rate).astype(np.float32)
        rows, rest = divmod(len(wave_N), size)
        rows += rest >= LEAST * rate
        if not rows:
            continue
        rows_CN = np.pad(wave_N, (0, max(0, rows * size - len(wave_N))))[: rows * size].reshape(rows, size)
        level_C = np.sqrt((rows_CN.astype(np.float64) ** 2).mean(1))
        levels += level_C.tolist()
        file.write((rows_CN * (LEVEL / np.maximum(level_C, 1e-9))[:, None]).astype(np.float16).tobytes())
    if not levels or max(levels) == 0:
        raise ValueError(f"{sound.path} is silent: every sample is 0")
    return levels


def _keep_loud(file: BinaryIO, begin: int, levels: Sequence[float], stride: int) -> list[int]:
    """Close the gaps that quiet pieces leave in the file, and give the numbers of the others."""
    loud = [i for i, level in enumerate(levels) if level > QUIET * max(levels)]
    for to, at in enumerate(loud):
        if to != at:
            file.seek(begin + at * stride)
            piece = file.read(stride)
            file.seek(begin + to * stride)
            file.write(piece)
    file.seek(begin + len(loud) * stride)
    file.truncate()
    file.seek(0, os.SEEK_END)
    return loud
