"""Sounds that no picture and no caption explains: synthetic speech, and bursts of coloured noise.

Shapes: n clips, N samples.
Source: speech by flite and espeak-ng, which read texts of the Python language reference (:mod:`mixtura.data.texts`).
"""

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from mixtura.core.cache import cache_directory
from mixtura.core.checkpoint import atomic_file
from mixtura.core.progress import progress
from mixtura.data.instruments import LOUDNESS
from mixtura.data.texts import MissingData, corpus

__all__ = ["TEST_VOICES", "TRAIN_VOICES", "bursts", "speech"]

TRAIN_VOICES = ("flite:rms", "flite:slt", "flite:kal16", "espeak-ng:en-us", "espeak-ng:en-us+f3")
TEST_VOICES = ("flite:awb", "espeak-ng:en-gb+m3")


def bursts(n: int, size: int, rate: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Clips with two to six bursts of noise of random colour, band and decay, shape (n, size), root mean square 0.05."""
    rng = np.random.default_rng(seed)
    out = np.zeros((n, size), np.float32)
    hertz = np.fft.rfftfreq(size, 1 / rate)
    for clip in out:
        for _ in range(rng.integers(2, 7)):
            slope, centre = rng.uniform(0, 1), np.exp(rng.uniform(np.log(150), np.log(0.45 * rate)))
            octaves = np.log2(np.maximum(hertz, 20) / centre)
            shape = np.maximum(hertz, 20) ** -slope * np.exp(-0.5 * (octaves / rng.uniform(0.3, 2)) ** 2)
            noise = np.fft.irfft(shape * np.fft.rfft(rng.standard_normal(size)), size)
            start, length = rng.integers(0, size), rng.uniform(0.05, 0.8) * rate
            along = np.arange(size) - start
            envelope = np.where(along >= 0, np.exp(-np.maximum(along, 0) / length), 0) * np.clip(
                along / (0.01 * rate), 0, 1
            )
            burst = noise * envelope
            clip += (burst / max(float(np.sqrt(np.mean(burst**2))), 1e-9) * rng.uniform(0.3, 1)).astype(np.float32)
        clip *= LOUDNESS / max(float(np.sqrt(np.mean(clip**2))), 1e-9)
    return out


def speech(
    n: int, size: int, rate: int, *, voices: Sequence[str] = TRAIN_VOICES, held_out: bool = False, seed: int = 0
) -> NDArray[np.float32]:
    """Clips of synthetic speech, shape (n, size), root mean square 0.05; kept in the cache.

    Args:
        n: clips, taken from the voices in turn.
        size, rate: samples a clip, and a second.
        voices: ``"flite:NAME"`` or ``"espeak-ng:NAME"``.
        held_out: read the held-out topics, which share no text with the others.
        seed: of the passages.
    Raises:
        MissingData: a program is not installed (named).
    """
    facts = [n, size, rate, list(voices), held_out, seed, 1]
    kept = cache_directory() / "speech" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.npz"
    if kept.exists():
        with np.load(kept, allow_pickle=False) as found:
            return np.asarray(found["waves"], np.float32) / np.float32(32767)
    topics = corpus("prose", characters=400_000)
    words = " ".join(topics.held_out if held_out else topics.train).split()
    words = [word for word in words if word.strip(".,;:()").isalpha()]
    rng = np.random.default_rng([seed, held_out])
    each = -(-n // len(voices))
    clips: list[NDArray[np.float32]] = []
    for voice in progress(list(voices), desc="speak", unit="voice"):
        spoken: list[NDArray[np.float32]] = []
        while len(spoken) < each:
            at = int(rng.integers(0, max(1, len(words) - 120)))
            wave = _spoken(voice, " ".join(words[at : at + 120]), rate)
            for part in wave[: len(wave) // size * size].reshape(-1, size):
                level = float(np.sqrt(np.mean(part**2)))
                if level > 1e-3:
                    spoken.append(np.clip(part * np.float32(LOUDNESS / level), -1, 1))
        clips += spoken[:each]
    order = rng.permutation(len(clips))[:n]
    waves = np.round(np.stack(clips)[order] * 32767).astype(np.int16)
    with atomic_file(kept) as beside, beside.open("wb") as file:
        np.savez(file, waves=waves)
    return np.asarray(waves, np.float32) / np.float32(32767)


def _spoken(voice: str, text: str, rate: int) -> NDArray[np.float32]:
    import soundfile

    engine, _, name = voice.partition(":")
    program = shutil.which(engine)
    if program is None or engine not in ("flite", "espeak-ng"):
        raise MissingData(f"the voice {voice!r} needs {engine}; install both with: apt-get install flite espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.wav"
        arguments = (
            ["-voice", name, "-t", text, "-o", str(out)] if engine == "flite" else ["-v", name, "-w", str(out), text]
        )
        subprocess.run([program, *arguments], capture_output=True, check=True)
        wave, own = soundfile.read(out, dtype="float32")
    return resample_poly(wave, rate, own).astype(np.float32)
