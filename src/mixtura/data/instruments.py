"""Recordings of instruments whose true stems are known: phrases rendered from a General MIDI sound font.

A sound font holds recorded notes of real instruments. Phrases are made up here (scale, tempo, chords and loudness by chance),
written as Standard MIDI Files and rendered by fluidsynth without reverb or chorus, so that a mixture is the sum of its
stems and nothing else.

Shapes: n clips, N samples.
Source: the file format is that of the MIDI Manufacturers Association, "Standard MIDI Files 1.0" (RP-001), sec. 2-3; programs
are General MIDI level 1, counted from 0.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtura.core.cache import cache_directory
from mixtura.core.checkpoint import atomic_file
from mixtura.core.progress import progress
from mixtura.data.texts import MissingData

__all__ = ["FAMILIES", "INSTRUMENTS", "Clips", "Note", "find_font", "midi_file", "phrases", "render", "render_clips"]

FONTS = Path("/usr/share/sounds/sf2")
FONT = "MIXTURA_SOUNDFONT"
TICKS = 480  # a quarter note
LOUDNESS = 0.05  # root mean square of a clip
SILENT = 1e-4  # a clip quieter than that has no note in it

# Families of General MIDI with programs that sound alike, lowest and highest note.
FAMILIES: Mapping[str, tuple[tuple[int, ...], int, int]] = {
    "piano": ((0, 1, 2), 36, 84),
    "bells": ((9, 11, 14), 60, 90),
    "organ": ((16, 17, 19), 40, 80),
    "guitar": ((24, 25, 26), 40, 76),
    "bass": ((32, 33, 34), 28, 50),
    "strings": ((48, 49, 44), 45, 84),
    "trumpet": ((56, 57, 59), 52, 80),
    "saxophone": ((64, 65, 66), 46, 78),
    "flute": ((73, 74, 75), 60, 92),
    "drums": ((-1, -9, -26), 35, 51),
}
# Single instruments by name, for models that are asked for one.
INSTRUMENTS: Mapping[str, tuple[tuple[int, ...], int, int]] = {
    "piano": ((0, 1), 36, 90),
    "organ": ((16, 19), 40, 84),
    "guitar": ((24, 25), 40, 80),
    "electric guitar": ((29, 30), 40, 80),
    "bass": ((32, 33), 28, 52),
    "violin": ((40, 48), 55, 96),
    "cello": ((42, 43), 36, 70),
    "trumpet": ((56, 59), 54, 82),
    "saxophone": ((65, 66), 46, 80),
    "clarinet": ((71, 68), 50, 86),
    "flute": ((73, 75), 60, 94),
    "bells": ((9, 14), 60, 94),
    "voice": ((52, 53), 48, 80),
    "drums": ((-1, -9), 35, 51),
}


@dataclass(frozen=True)
class Note:
    """One note: when it begins and how long it sounds, in ticks, its pitch and its velocity, both 0 to 127."""

    start: int
    length: int
    pitch: int
    velocity: int


@dataclass(frozen=True)
class Clips:
    """Rendered clips.

    Attributes:
        waves: shape (n, N), float32, each with a root mean square of 0.05.
        labels: index of each clip's class, shape (n,).
        presets: program of each clip, shape (n,); drum kits are negative.
        names: of the classes.
        rate: samples a second.
    """

    waves: NDArray[np.float32]
    labels: NDArray[np.int64]
    presets: NDArray[np.int64]
    names: tuple[str, ...]
    rate: int


def find_font(name: str = "TimGM6mb.sf2") -> Path:
    """The sound font: the file that ``$MIXTURA_SOUNDFONT`` names, else the one of this name from Debian's packages.

    Raises:
        MissingData: neither is there.
    """
    if named := os.environ.get(FONT):
        if not Path(named).is_file():
            raise MissingData(f"{FONT} names {named}, which is no file")
        return Path(named)
    if (FONTS / name).is_file():
        return FONTS / name
    raise MissingData(
        f"no sound font {name} in {FONTS}; install one with: apt-get install fluidsynth timgm6mb-soundfont, or name an .sf2 "
        f"file in {FONT}"
    )


def midi_file(notes: Sequence[Note], program: int, *, tempo: float = 120.0) -> bytes:
    """A Standard MIDI File of one track.

    Args:
        notes: in any order.
        program: General MIDI program, 0 to 127; -1 - k is drum kit k on the channel of percussion.
        tempo: quarter notes a minute.
    Raises:
        ValueError: a program, pitch or velocity out of range.
    """
    if not -128 <= program <= 127:
        raise ValueError(f"program must lie between -128 and 127, got {program}")
    channel, number = (9, -1 - program) if program < 0 else (0, program)
    events: list[tuple[int, int, bytes]] = []
    for note in notes:
        if not (0 <= note.pitch <= 127 and 1 <= note.velocity <= 127 and note.start >= 0 and note.length > 0):
            raise ValueError(f"a note needs pitch 0..127, velocity 1..127, start >= 0 and length > 0, got {note}")
        events.append((note.start, 1, bytes([0x90 | channel, note.pitch, note.velocity])))
        # Ends sort before starts of the same moment, or a repeated pitch would be cut at once.
        events.append((note.start + note.length, 0, bytes([0x80 | channel, note.pitch, 0])))
    track = b"\x00\xff\x51\x03" + round(60e6 / tempo).to_bytes(3, "big") + b"\x00" + bytes([0xC0 | channel, number])
    now = 0
    for when, _, message in sorted(events):
        track += _variable_length(when - now) + message
        now = when
    track += b"\x00\xff\x2f\x00"
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS) + b"MTrk" + struct.pack(">I", len(track)) + track


def _variable_length(value: int) -> bytes:
    """A number in groups of seven bits, the highest bit set on all but the last."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(0x80 | (value & 0x7F))
    return bytes(reversed(groups))


def render(midi: bytes, rate: int, font: Path | None = None) -> NDArray[np.float32]:
    """The sound of a MIDI file, mono, shape (N,), in [-1, 1].

    Raises:
        MissingData: fluidsynth or the sound font is not installed.
        RuntimeError: fluidsynth fails; what it said is quoted.
    """
    import soundfile

    font = font or find_font()
    program = shutil.which("fluidsynth")
    if program is None:
        raise MissingData(
            "fluidsynth renders instruments; install it with: apt-get install fluidsynth timgm6mb-soundfont"
        )
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.mid", Path(folder) / "out.wav"
        source.write_bytes(midi)
        command = [
            program,
            "-ni",
            "-q",
            "-r",
            str(rate),
            "-g",
            "0.6",
            "-R",
            "0",
            "-C",
            "0",
            "-F",
            str(out),
            str(font),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise RuntimeError(f"fluidsynth failed: {(done.stderr or done.stdout).strip()[-300:]}")
        stereo, _ = soundfile.read(out, dtype="float32", always_2d=True)
    return stereo.mean(1)


def phrases(
    count: int, seconds: float, low: int, high: int, *, drums: bool, rng: np.random.Generator, gap: float = 1.0
) -> list[Note]:
    """Notes of ``count`` phrases that begin every ``seconds + gap`` seconds, at 120 quarter notes a minute."""
    scales = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9))
    notes: list[Note] = []
    ticks = round(2 * TICKS * seconds)
    for i in range(count):
        start = round(2 * TICKS * i * (seconds + gap))
        step = int(
            rng.choice([TICKS // 2, TICKS // 3, TICKS, TICKS // 4 if drums else TICKS // 2]) * rng.uniform(0.8, 1.25)
        )
        scale, root = scales[rng.integers(len(scales))], int(rng.integers(12))
        allowed = [p for p in range(low, high + 1) if drums or (p - root) % 12 in scale]
        place = int(rng.integers(len(allowed)))
        chord, when = float(rng.choice([0.0, 0.3, 0.8])), int(rng.integers(0, max(1, step // 2)))
        loud = rng.integers(60, 115)
        while when < ticks - TICKS // 8:
            length = min(int(step * rng.choice([1, 1, 2, 3]) * rng.uniform(0.7, 1.0)), ticks - when)
            place = int(np.clip(place + rng.integers(-3, 4), 0, len(allowed) - 1))
            chosen = {place} | ({min(place + d, len(allowed) - 1) for d in (2, 4)} if rng.random() < chord else set())
            if drums:
                chosen = {int(rng.integers(len(allowed))) for _ in range(1 + int(rng.random() < 0.5))}
            for p in sorted(chosen):
                velocity = int(np.clip(loud + rng.integers(-10, 11), 30, 127))
                notes.append(Note(start + when, max(length, TICKS // 8), allowed[p], velocity))
            when += step * int(rng.choice([1, 1, 1, 2]))
    return notes


def render_clips(
    classes: Mapping[str, tuple[tuple[int, ...], int, int]],
    per_preset: int,
    *,
    presets: Sequence[int] | None = None,
    seconds: float = 2.0,
    rate: int = 8000,
    seed: int = 0,
    font: Path | None = None,
) -> Clips:
    """Clips of every class, kept in the cache under what they were made from.

    Args:
        classes: name -> (programs, lowest note, highest note).
        per_preset: phrases of each program; those in which nothing sounds are dropped.
        presets: which of a class's programs; all by default.
        seconds, rate: length of a clip and samples a second.
        seed: of the phrases.
        font: sound font.
    Raises:
        MissingData: fluidsynth or the sound font is not installed.
    """
    if per_preset < 1 or seconds <= 0 or rate < 1:
        raise ValueError(f"per_preset, seconds and rate must be positive, got {per_preset}, {seconds} and {rate}")
    font = font or find_font()
    chosen = {
        name: (tuple(p for i, p in enumerate(programs) if presets is None or i in presets), low, high)
        for name, (programs, low, high) in classes.items()
    }
    facts = [chosen, per_preset, seconds, rate, seed, font.name, font.stat().st_size, 1]
    kept = cache_directory() / "instruments" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.npz"
    names = tuple(chosen)
    if kept.exists():
        with np.load(kept, allow_pickle=False) as found:
            return Clips(found["waves"].astype(np.float32) / 32767, found["labels"], found["presets"], names, rate)
    waves, labels, programs_of = [], [], []
    work = [(label, program) for label, (programs, _, _) in enumerate(chosen.values()) for program in programs]
    for label, program in progress(work, desc="render", unit="preset"):
        _, low, high = chosen[names[label]]
        rng = np.random.default_rng([seed, label, program + 128])
        notes = phrases(per_preset, seconds, low, high, drums=program < 0, rng=rng)
        sound = render(midi_file(notes, program), rate, font)
        size = round(seconds * rate)
        for i in range(per_preset):
            at = round(i * (seconds + 1.0) * rate)
            clip = np.zeros(size, np.float32)
            part = sound[at : at + size]
            clip[: len(part)] = part
            level = float(np.sqrt(np.mean(clip**2)))
            if level >= SILENT:
                waves.append(np.clip(clip * np.float32(LOUDNESS / level), -1, 1))
                labels.append(label)
                programs_of.append(program)
    stored = np.round(np.stack(waves) * 32767).astype(np.int16)
    made = Clips(stored.astype(np.float32) / np.float32(32767), np.array(labels), np.array(programs_of), names, rate)
    with atomic_file(kept) as beside, beside.open("wb") as file:
        np.savez(file, waves=stored, labels=made.labels, presets=made.presets)
    return made
