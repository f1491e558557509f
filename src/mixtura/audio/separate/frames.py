"""Pictures of clips made embeddings, once, in a file on disk, and the query that a piece of sound has by them.

Shapes: F frames, D width of an embedding, C pieces, P pieces of one clip.
Source: CLIPSep (2212.07065), sec. 3.1 and its released code: the mean over three frames, one a second.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.audio.embed import ClipEmbedding, SmallClip
from mixtura.audio.separate.pieces import Pieces, warn_of
from mixtura.core.checkpoint import atomic_directory, read_json, write_json
from mixtura.core.progress import progress
from mixtura.data.images import BadImage, read_image
from mixtura.data.video_frames import Frames, frames_by_second

__all__ = ["FrameEmbeddings", "embed_frames", "piece_queries"]

META, VECTORS, OWNERS, SECONDS = "frames.json", "vectors.f16", "owners.npy", "seconds.npy"
BATCH = 64  # pictures in memory at a time


@dataclass(frozen=True)
class FrameEmbeddings:
    """Embeddings of the frames of clips.

    Attributes:
        vectors: unit vectors, shape (F, D), float16, mapped from disk.
        seconds: of its clip that each shows, shape (F,), ascending within a clip.
        owners: number in ``kept`` of the clip that each is of, shape (F,), ascending.
        kept: numbers of the clips that have at least one.
        key: of the clips and the tower; equal keys stand for equal embeddings.
    """

    vectors: Tensor
    seconds: Tensor
    owners: Tensor
    kept: tuple[int, ...]
    key: str


def embed_frames(
    clips: Sequence[Frames], tower: ClipEmbedding | SmallClip, path: str | Path, *, rate: float = 1.0
) -> FrameEmbeddings:
    """Embed one frame a second of each clip, and keep that on disk; memory holds 64 pictures.

    Pictures are brought to the tower's size, the middle of longer ones. One that cannot be read is left out, a clip without any
    as well, and both are told in the log, the first ten of either. If ``path`` holds embeddings by the same tower (by its
    weights) of the same clips (by the times of change of their folders), those are taken.

    Args:
        clips: where their pictures lie.
        tower: frozen.
        path: directory to write, whole or not at all: 2 bytes a number.
        rate: pictures a second in the folders.
    Raises:
        ValueError: not one picture can be read, or a rate that is not above 0.
    """
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate must be a number of pictures a second above 0, got {rate}")
    path = Path(path)
    facts = [[str(clip.path), clip.path.stat().st_mtime_ns, clip.start, clip.seconds] for clip in clips]
    key = hashlib.sha256(json.dumps([_fingerprint(tower), rate, 1, facts]).encode()).hexdigest()
    if not (path / META).exists() or read_json(path / META)["of"] != key:
        _write(clips, tower, path, rate, key)
    clip_F, seconds_F = (torch.from_numpy(np.load(path / name, allow_pickle=False)) for name in (OWNERS, SECONDS))
    kept, owners_F = clip_F.unique(return_inverse=True)
    # Copy on write: torch wants memory that it may write to, and the file must stay what it is.
    mapped = np.memmap(path / VECTORS, dtype=np.float16, mode="c", shape=(len(clip_F), tower.dim))
    return FrameEmbeddings(torch.from_numpy(mapped), seconds_F, owners_F, tuple(kept.tolist()), key)


def piece_queries(pieces: Pieces, frames: FrameEmbeddings, path: str | Path, *, seconds: float) -> Tensor:
    """The query of each piece: the mean of three frames, those of the second in which its middle lies, of the one before and of
    the one after, made a unit vector.

    Of these three, those count that are there; where none is, the nearest one of the clip, so a single picture serves all of it.

    Args:
        pieces: of the sounds of the clips in ``frames.kept``, in that order.
        frames: of the clips.
        path: ``.npy`` file to write.
        seconds: length of a piece.
    Returns:
        Shape (C, D), float16, mapped from the file.
    """
    middle_C = ((pieces.places + 0.5) * seconds).floor()
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(len(middle_C), frames.vectors.shape[1]))
    owners, counts = pieces.owners.unique_consecutive(return_counts=True)
    begin = torch.searchsorted(frames.owners, owners)
    end = torch.searchsorted(frames.owners, owners, right=True)
    done = 0
    for first, last, count in zip(begin.tolist(), end.tolist(), counts.tolist(), strict=True):
        vectors_FD, second_F = frames.vectors[first:last].float(), frames.seconds[first:last]
        for middle_P in middle_C[done : done + count].split(256):
            away_PF = (middle_P[:, None] - second_F).abs()
            near_PF = away_PF <= away_PF.amin(1, keepdim=True).clamp(min=1)
            array[done : done + len(middle_P)] = F.normalize(near_PF.float() @ vectors_FD, dim=-1).half().numpy()
            done += len(middle_P)
    array.flush()
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def _write(clips: Sequence[Frames], tower: ClipEmbedding | SmallClip, path: Path, rate: float, key: str) -> None:
    owners: list[int] = []
    seconds: list[int] = []
    bad: list[str] = []
    without: list[str] = []
    with atomic_directory(path) as beside:
        with (beside / VECTORS).open("wb") as file:
            for i, clip in enumerate(progress(clips, desc="look", unit="clip")):
                shown = frames_by_second(clip, rate)
                before = len(owners)
                for start in range(0, len(shown), BATCH):
                    images, at = _read(shown[start : start + BATCH], tower, bad)
                    if at:
                        with torch.inference_mode():
                            file.write(tower.embed_image(images).half().cpu().numpy().tobytes())
                        owners += [i] * len(at)
                        seconds += at
                if len(owners) == before:
                    without.append(f"{clip.path} holds no numbered picture that can be read")
        warn_of(bad)
        warn_of(without)
        if not owners:
            raise ValueError(f"none of {len(clips)} clips has a picture that can be read; the first: {clips[0].path}")
        np.save(beside / OWNERS, np.array(owners, dtype=np.int64))
        np.save(beside / SECONDS, np.array(seconds, dtype=np.int64))
        write_json(beside / META, {"of": key})


def _read(
    shown: Sequence[tuple[int, Path]], tower: ClipEmbedding | SmallClip, bad: list[str]
) -> tuple[Tensor, list[int]]:
    """Pictures in [0, 1] as the tower takes them, and their seconds."""
    images, at = [], []
    for second, file in shown:
        try:
            images.append(read_image(file, tower.side, channels=tower.channels, on_problem=lambda problem: None))
        except BadImage as error:
            bad.append(f"{file} {error}")
        except OSError as error:
            bad.append(f"{file} cannot be read ({error.strerror or error})")
        else:
            at.append(second)
    if not at:
        return torch.empty(0), at
    found = torch.from_numpy(np.stack(images)).float() / 255
    return (found[:, 0] if tower.channels == 1 else found), at


def _fingerprint(tower: ClipEmbedding | SmallClip) -> str:
    """Of its weights, so that a tower which moved is known and another one in its place is not taken for it."""
    found = hashlib.sha256()
    module = tower.model if isinstance(tower, ClipEmbedding) else tower
    for name, t in module.state_dict().items():
        found.update(name.encode())
        found.update(t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return found.hexdigest()
