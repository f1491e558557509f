"""Pictures of listed videos on disk: where those of a clip lie, and which of them shows which second.

The form is what ``ffmpeg -i ID.mp4 -r 1 ID/%06d.jpg`` leaves, as CLIPSep (2212.07065) prepares its data: a folder a clip, in it
numbered pictures, number k of those at r a second shows the time from (k - 1) / r to k / r.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtura.data.texts import MissingData
from mixtura.data.video_sounds import CLIP_SECONDS, WHOLE, ListedClip, names_of

__all__ = ["Frames", "find_frames", "frames_by_second"]

SUFFIXES = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class Frames:
    """Pictures of a clip.

    Attributes:
        path: folder of numbered pictures, or a single picture.
        start: second at which the clip begins, should the folder hold the whole video; None for all of the folder.
        seconds: length of that clip.
    """

    path: Path
    start: int | None = None
    seconds: float = CLIP_SECONDS


def find_frames(clips: Sequence[ListedClip], folder: str | Path) -> list[Frames | None]:
    """Where the pictures of clips lie below a folder, at any depth; None for a clip that has none there.

    Names are those of sounds (:func:`mixtura.data.video_sounds.find_sounds`): a folder ``ID_000030``, ``ID_30`` or ``ID``, or a
    single picture of such a name. A folder that is called ``ID`` may hold the clip or the whole video; its number of pictures
    tells. What lies in a clip's folder is not looked at here.

    Raises:
        FileNotFoundError: no such folder.
        MissingData: not one clip has pictures there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory; name the one that holds the pictures of the videos")
    wanted = {name for clip in clips for name in names_of(clip)}
    places: dict[str, Path] = {}
    for root, folders, files in os.walk(folder):
        for name in sorted(wanted.intersection(folders)):
            places.setdefault(name, Path(root, name))
        folders[:] = sorted(set(folders) - wanted)
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if stem in wanted and suffix.lower() in SUFFIXES:
                places.setdefault(stem, Path(root, file))
    found: list[Frames | None] = []
    for clip in clips:
        known = next((name for name in names_of(clip) if name in places), None)
        if known is None:
            found.append(None)
        else:
            found.append(Frames(places[known], clip.start if known == clip.video else None))
    if clips and not any(found):
        raise MissingData(
            f"none of {len(clips):,} clips has pictures in {folder}; make them by: ffmpeg -i {clips[0].video}.mp4 -r 1 "
            f"{folder}/{names_of(clips[0])[0]}/%06d.jpg"
        )
    return found


def frames_by_second(frames: Frames, rate: float = 1.0) -> list[tuple[int, Path]]:
    """For each second of a clip the frame that is nearest to its middle, as pairs of second and file, in order.

    A picture's number is what its name ends with; numbers count from 1, or from 0 where there is a 0. A single picture stands at
    second 0.

    Args:
        frames: of the clip.
        rate: pictures a second.
    """
    if frames.path.is_file():
        return [(0, frames.path)]
    numbered: dict[int, str] = {}
    for name in sorted(os.listdir(frames.path)):
        stem, suffix = os.path.splitext(name)
        digits = re.search(r"[0-9]+$", stem)
        if digits and suffix.lower() in SUFFIXES and not name.startswith("."):
            numbered.setdefault(int(digits[0]), name)
    if not numbered:
        return []
    first = 0 if 0 in numbered else 1
    begin, end = 0, math.inf
    if frames.start is not None and (max(numbered) + 1 - first) / rate > WHOLE * frames.seconds:
        begin, end = frames.start, frames.start + frames.seconds
    nearest: dict[int, tuple[float, str]] = {}
    for number, name in sorted(numbered.items()):
        middle = (number - first + 0.5) / rate
        second = int(middle)
        nearest[second] = min(nearest.get(second, (math.inf, "")), (abs(middle - second - 0.5), name))
    return [(s - begin, frames.path / name) for s, (_, name) in sorted(nearest.items()) if begin <= s < end]
