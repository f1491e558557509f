"""Train a separator on somebody's own clips: a table of files and texts, clips of one length, a tower of their names.

Shapes: C clips, N samples.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.signal import resample_poly
from torch import Tensor

from mixtura.audio.embed import NamedSounds
from mixtura.audio.files import open_recording
from mixtura.audio.separate.query import QuerySeparator
from mixtura.audio.separate.ready import RECIPE, new_separator
from mixtura.audio.separate.training import Mixing, fit_from_text
from mixtura.core.progress import progress
from mixtura.core.training import History, TrainConfig

__all__ = ["read_captions", "train_own"]

SECONDS = 2.0
QUIET = 0.05  # pieces below this share of their file's level hold nothing to learn from
LEVEL = 0.05  # root mean square that pieces are brought to


def read_captions(path: Path, audio: Path) -> list[tuple[Path, str]]:
    """Files and texts of a table.

    Args:
        path: CSV file, whose first line names the columns ``file`` and ``text``.
        audio: directory that the files are in.
    Raises:
        ValueError: a column, a text or a file is missing (named with its line), or there are fewer than two texts.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    rows: list[tuple[Path, str]] = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"file", "text"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{path} must have the columns file and text, got {', '.join(reader.fieldnames or ['nothing'])}"
            )
        for line, row in enumerate(reader, start=2):
            text, clip = (row["text"] or "").strip(), audio / (row["file"] or "")
            if not text:
                raise ValueError(f"{path}, line {line}: the text is empty")
            if not clip.is_file():
                raise ValueError(f"{path}, line {line}: {clip} does not exist")
            rows.append((clip, text))
    if len({text for _, text in rows}) < 2:
        raise ValueError(f"{path} must name at least two different sounds, got {len({t for _, t in rows})}")
    return rows


def train_own(
    clips: Sequence[tuple[Path, str]],
    state: Path | None = None,
    *,
    steps: int = 1500,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[QuerySeparator, History]:
    """A separator that is asked by the texts of the clips.

    Args:
        clips: files of single sounds and their texts. Files are cut into pieces of two seconds; the texts are the names that
            it will know.
        state: directory of an unfinished run, from which the same call goes on.
        steps: of 16 mixtures.
        seed: of everything that chance enters.
        device: to train on.
    """
    tower = NamedSounds({text: () for _, text in clips})
    model = new_separator(tower, seed=seed).to(device)
    waves: list[Tensor] = []
    texts: list[str] = []
    for path, text in progress(list(clips), desc="read", unit="clip"):
        for piece in _pieces(path, model.sample_rate):
            waves.append(piece)
            texts.append(text)
    if not waves:
        raise ValueError("no clip holds any sound")
    config = TrainConfig(steps=steps, checkpoint_every=100, seed=seed, **RECIPE)
    mixing = Mixing(batch=16, gain=8.0, mask="ratio", seed=seed)
    history = fit_from_text(model, torch.stack(waves), texts, tower, config, mixing=mixing, out=state)
    return model.cpu().eval(), history


def _pieces(path: Path, rate: int) -> list[Tensor]:
    found = open_recording(path)
    wave = torch.cat(list(found.blocks()), -1).mean(0)
    if found.rate != rate:
        wave = torch.from_numpy(resample_poly(wave.numpy(), rate, found.rate)).float()
    size = round(SECONDS * rate)
    rows = torch.nn.functional.pad(wave, (0, -len(wave) % size)).reshape(-1, size)
    level = (rows**2).mean(1).sqrt()
    return [row * (LEVEL / power) for row, power in zip(rows, level, strict=True) if power > QUIET * level.max() > 0]
