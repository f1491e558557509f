"""The separator that comes with the package, and the recipe that made it.

Its queries are names of instruments: it was trained by :func:`fit_from_text` on labelled phrases rendered from a General
MIDI sound font, and on synthetic speech. What it has not heard, it does not know.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mixtura.audio.embed import NamedSounds, TextTower
from mixtura.audio.separate.query import QuerySeparator
from mixtura.audio.separate.training import Mixing, fit_from_text
from mixtura.core.training import History, TrainConfig

__all__ = ["RATE", "RECIPE", "SOUNDS", "default_separator", "labelled_sounds", "new_separator", "train_default"]

# What it knows, with other names for the same.
SOUNDS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "piano": ("grand piano", "keyboard"),
        "organ": ("church organ", "pipe organ"),
        "guitar": ("acoustic guitar", "classical guitar"),
        "electric guitar": ("distorted guitar", "rock guitar"),
        "bass": ("bass guitar", "double bass", "electric bass"),
        "violin": ("fiddle", "strings", "string section"),
        "cello": ("violoncello", "contrabass"),
        "trumpet": ("brass", "muted trumpet"),
        "saxophone": ("sax", "tenor saxophone", "alto saxophone"),
        "clarinet": ("oboe", "reed"),
        "flute": ("recorder", "pan flute", "piccolo"),
        "bells": ("glockenspiel", "tubular bell", "chime"),
        "voice": ("choir", "singing", "vocals", "singer"),
        "drums": ("percussion", "drum kit", "drum set"),
        "speech": ("speaker", "talking", "spoken word", "voice over", "man speaking", "woman speaking"),
    }
)
RATE = 16_000  # samples a second
SECONDS = 2.0
# Adam without decay, as in the paper; the rate is three times its own, for a fiftieth of its steps.
RECIPE: dict[str, Any] = {"lr": 3e-3, "warmup": 0.05, "weight_decay": 0.0, "betas": (0.9, 0.999)}


def default_separator() -> QuerySeparator:
    """The separator that comes with the package.

    Raises:
        ValueError: this copy of the package lacks its weights.
    """
    folder = resources.files("mixtura.audio") / "weights" / "instruments"
    with resources.as_file(folder) as path:
        return QuerySeparator.from_pretrained(path)


def labelled_sounds(phrases: int, *, rate: int = RATE, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Clips of two seconds, shape (C, N), and the name of what each holds.

    Args:
        phrases: of each program of an instrument; there are two programs an instrument, and twice as many clips of speech.
        rate: samples a second.
        seed: of the phrases.
    Raises:
        MissingData: fluidsynth, its sound font, flite or espeak-ng is not installed.
    """
    from mixtura.data.instruments import INSTRUMENTS, render_clips
    from mixtura.data.noises import TRAIN_VOICES, speech

    clips = render_clips(INSTRUMENTS, phrases, seconds=SECONDS, rate=rate, seed=seed)
    spoken = speech(2 * phrases, clips.waves.shape[1], rate, voices=TRAIN_VOICES, seed=seed)
    waves = torch.cat([torch.from_numpy(clips.waves), torch.from_numpy(spoken)])
    return waves, [clips.names[label] for label in clips.labels] + ["speech"] * len(spoken)


def train_default(
    out: Path | None = None, *, steps: int = 1500, phrases: int = 60, seed: int = 0, device: str = "cpu"
) -> tuple[QuerySeparator, History]:
    """The recipe of the separator that comes with the package.

    Args:
        out: directory of the state of an unfinished run, from which the same call goes on.
        steps: of 16 mixtures of two clips, at -8 to 8 dB each.
        phrases: rendered of each program.
        seed: of everything that chance enters.
        device: to train on.
    """
    waves, texts = labelled_sounds(phrases, seed=seed)
    tower = NamedSounds(SOUNDS)
    model = new_separator(tower, seed=seed).to(device)
    config = TrainConfig(steps=steps, checkpoint_every=100, seed=seed, **RECIPE)
    mixing = Mixing(batch=16, gain=8.0, mask="ratio", seed=seed)
    history = fit_from_text(model, waves, texts, tower, config, mixing=mixing, out=out)
    return model.cpu().eval(), history


def new_separator(tower: TextTower, *, seed: int = 0) -> QuerySeparator:
    """An untrained separator of the size that comes with the package."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return QuerySeparator(
            tower.dim,
            maps=16,
            depth=5,
            width=16,
            bands=128,
            sample_rate=RATE,
            n_fft=1024,
            hop=512,
            spread=3.0,
            text=tower,
        )
