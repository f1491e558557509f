"""Data sets of sounds that are published as lists of videos: MUSIC, VGGSound and the lists of CLIPSep.

What is published says which videos, what they hold and from which second. The sound has to lie on the user's disk; nothing
here downloads any. A list is read, its clips are looked up by name in a folder, and videos are split for training and testing.

Lists that are known by their form:

- MUSIC and MUSIC-21 (Zhao et al., 1804.03160 and 1904.05979): JSON, ``{"videos": {label: [id, ...]}}``.
- VGGSound (Chen et al., 2004.14368): CSV without a header, ``id,start second,label,split``; a clip has ten seconds.
- CLIPSep (2212.07065) and others after it: CSV without a header, ``sound file,frames folder,frames[,label]``; only the file's
  name counts, and without a label the name of its folder.
"""

import csv
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtura.data.texts import MissingData

__all__ = ["FoundSounds", "ListedClip", "Sound", "find_sounds", "names_of", "read_list", "split_videos"]

log = logging.getLogger(__name__)

SUFFIXES = (".flac", ".mp3", ".ogg", ".wav")
CLIP_SECONDS = 10.0  # of VGGSound, and of AudioSet before it
WHOLE = 1.5  # what lasts that many times as long as its clip holds the whole video
SPLITS = ("train", "val", "valid", "validation", "test")
FORMS = (
    '{"videos": {label: [id, ...]}} in a .json file (MUSIC), or a .csv file without a header with "id,start second,label,split" '
    '(VGGSound) or "sound file,frames folder,frames[,label]" (CLIPSep)'
)


@dataclass(frozen=True)
class ListedClip:
    """A line of a list.

    Attributes:
        video: id of the video.
        text: what is heard.
        start: second in the video at which the clip begins; None for the whole video.
        split: the list's own, "" where it has none.
    """

    video: str
    text: str
    start: int | None = None
    split: str = ""


@dataclass(frozen=True)
class Sound:
    """A sound on disk, or a part of one.

    Attributes:
        path: the file.
        text: what is heard.
        start: second at which the clip begins, should the file hold the whole video; None for the whole file.
        seconds: length of that clip.
    """

    path: Path
    text: str
    start: float | None = None
    seconds: float = CLIP_SECONDS


@dataclass(frozen=True)
class FoundSounds:
    """Clips of a list that are on disk.

    Attributes:
        clips: those found, in the list's order.
        sounds: where each lies.
        missing: names of the files that would be those not found.
    """

    clips: tuple[ListedClip, ...]
    sounds: tuple[Sound, ...]
    missing: tuple[str, ...]


def read_list(path: str | Path) -> list[ListedClip]:
    """Clips of a published list, each once; videos under two labels are left out, for they hold more than one sound.

    Raises:
        FileNotFoundError: no such list.
        ValueError: it has none of the known forms, or a line breaks its form (it is named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    clips = list(dict.fromkeys(_music(path) if path.suffix.lower() == ".json" else _rows(path)))
    if not clips:
        raise ValueError(f"{path} lists no clip")
    texts: dict[str, set[str]] = {}
    for clip in clips:
        texts.setdefault(clip.video, set()).add(clip.text)
    kept = [clip for clip in clips if len(texts[clip.video]) == 1]
    if several := sum(len(names) > 1 for names in texts.values()):
        log.warning("%s: %d videos stand under more than one label; left out", path, several)
    return kept


def find_sounds(clips: Sequence[ListedClip], folder: str | Path) -> FoundSounds:
    """Where clips lie in a folder, at any depth.

    A clip is found by its file's name: ``ID_START`` with six digits (``ID_000030.wav``), ``ID_START`` without leading zeros, or
    ``ID``. A file that is called ``ID`` may hold the clip or the whole video; its length tells (:attr:`Sound.start`).

    Raises:
        FileNotFoundError: no such folder.
        MissingData: not one clip is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory; name the one that holds the sounds")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            files.setdefault(path.stem, path)
    found, sounds, missing = [], [], []
    for clip in clips:
        names = names_of(clip)
        name = next((stem for stem in names if stem in files), None)
        if name is None:
            missing.append(f"{names[0]}.wav")
            continue
        sounds.append(Sound(files[name], clip.text, clip.start if name == clip.video else None))
        found.append(clip)
    if not found:
        raise MissingData(
            f"none of {len(clips):,} listed clips is in {folder}, which holds {len(files):,} sound files; get the sound of the "
            f"videos by yourself and name the files as in {missing[0]} (WAV, FLAC, OGG or MP3, in any folder below)"
        )
    return FoundSounds(tuple(found), tuple(sounds), tuple(missing))


def names_of(clip: ListedClip) -> list[str]:
    """Names under which a clip may lie on disk, without a suffix; the last is that of the whole video."""
    cut = [] if clip.start is None else [f"{clip.video}_{clip.start:06d}", f"{clip.video}_{clip.start}"]
    return [*cut, clip.video]


def split_videos(clips: Sequence[ListedClip], *, held_out: float = 0.1, seed: int = 0) -> list[str]:
    """For each clip ``"train"`` or ``"test"``: the list's own split, else by video.

    Without a split of the list, each label gives that share of its videos, at least one where it has two. Which ones follows
    from their ids, so it stays the same for the videos of a list however many of them are on disk, if the whole list is given.

    Args:
        clips: of one list; a split that is not called train (val, test) is a test.
        held_out: share of the videos, in [0, 1).
        seed: of the choice.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
    if any(clip.split for clip in clips):
        return ["train" if clip.split == "train" else "test" for clip in clips]
    of: dict[str, set[str]] = {}
    for clip in clips:
        of.setdefault(clip.text, set()).add(clip.video)
    tests: set[str] = set()
    for videos in of.values():
        count = max(round(held_out * len(videos)), int(held_out > 0 and len(videos) > 1))
        tests |= set(sorted(videos, key=lambda video: hashlib.sha256(f"{seed}:{video}".encode()).digest())[:count])
    return ["test" if clip.video in tests else "train" for clip in clips]


def _music(path: Path) -> Iterator[ListedClip]:
    try:
        videos = json.loads(path.read_text(encoding="utf-8"))["videos"]
        rows = [(label, video) for label, ids in videos.items() for video in ids]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no list of videos; a list has {FORMS}") from error
    for label, video in rows:
        if not isinstance(video, str) or not video.strip() or not _words(label):
            raise ValueError(f"{path}: under {label!r} an id is {video!r}; ids and labels are texts that are not empty")
        yield ListedClip(video.strip(), _words(label))


def _rows(path: Path) -> Iterator[ListedClip]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row:
                continue
            cells = [cell.strip() for cell in row]
            if len(cells) == 4 and cells[1].isdecimal() and cells[3].lower() in SPLITS:
                clip = ListedClip(cells[0], _words(cells[2]), int(cells[1]), cells[3].lower())
            elif len(cells) in (3, 4) and Path(cells[0]).suffix.lower() in SUFFIXES and cells[2].isdecimal():
                sound = Path(cells[0])
                clip = ListedClip(sound.stem, _words(cells[3] if len(cells) == 4 else sound.parent.name))
            else:
                raise ValueError(f"{path}, line {number}: got {','.join(row)[:80]!r}; a list has {FORMS}")
            if not clip.video or not clip.text:
                raise ValueError(f"{path}, line {number}: the id or the label is empty")
            yield clip


def _words(label: str) -> str:
    """A label as a text: the lists of MUSIC write acoustic_guitar."""
    return " ".join(label.replace("_", " ").split())
