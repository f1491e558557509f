"""Separate a file into files: block by block, all stems at their names together, with a sketch of the spectrograms.

Shapes: R channels, N samples, U queries, M bands, columns of a picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtura.audio.files import Recording, survey, write_together
from mixtura.audio.separate.query import MaskUse, QuerySeparator
from mixtura.core.progress import bar

__all__ = ["FileStems", "Sketch", "separate_file"]

COLUMNS = 900  # of a spectrogram's picture, however long the recording


@dataclass(frozen=True)
class FileStems:
    """What was written of one recording.

    Attributes:
        levels: root mean square of each stem, and of the rest last.
        mixture: root mean square of the recording.
        clipped: share of its samples in clipped peaks.
        sketches: mean power on the model's bands over time, of the mixture, each stem and the rest, each (M, columns).
    """

    levels: tuple[float, ...]
    mixture: float
    clipped: float
    sketches: tuple[NDArray[np.float32], ...]


class Sketch:
    """A spectrogram of bounded size, made while a recording goes by.

    Args:
        model: whose bands are taken.
        samples: of the recording.
        rate: samples a second.
    """

    def __init__(self, model: QuerySeparator, samples: int, rate: int) -> None:
        self.model, self.rate = model, rate
        self.hop = model.frames(rate)[1]
        frames = max(1, samples // self.hop)
        self.columns = min(COLUMNS, frames)
        self.frames = frames
        self.power = torch.zeros(model.bands, self.columns, dtype=torch.float64)
        self.count = torch.zeros(self.columns, dtype=torch.float64)
        self.at = 0

    def add(self, part_RN: Tensor) -> None:
        """Take the next part of the recording."""
        if part_RN.shape[-1] == 0:
            return
        bands_ML = self.model.magnitude_bands(self.model.spectrum(part_RN.mean(0), self.rate), self.rate).double() ** 2
        frame = self.at / self.hop + torch.arange(bands_ML.shape[-1])
        column = (frame * self.columns / self.frames).long().clamp(max=self.columns - 1)
        self.power.index_add_(1, column, bands_ML)
        self.count.index_add_(0, column, torch.ones(len(column), dtype=torch.float64))
        self.at += part_RN.shape[-1]

    def image(self) -> NDArray[np.float32]:
        """Mean power, shape (M, columns)."""
        return (self.power / self.count.clamp(min=1)).float().numpy()


def separate_file(
    model: QuerySeparator,
    recording: Recording,
    queries: Sequence[str] | Tensor,
    stems: Sequence[Path],
    rest: Path,
    *,
    mask: MaskUse = "soft",
    threshold: float = 0.5,
    seconds: float = 20.0,
    overlap: float = 2.0,
) -> FileStems:
    """Write one file a query, and what is left of the mixture; they add up to it.

    Memory does not grow with the recording. Files appear under their names when all are complete.

    Args:
        model: the separator.
        recording: any rate and number of channels.
        queries: U texts or vectors.
        stems: U files, .wav or .flac.
        rest: file for what no query took.
        mask, threshold, seconds, overlap: as for :meth:`QuerySeparator.separate`.
    Raises:
        ValueError: a recording that is silent, not finite or damaged, or a number of files other than that of the queries.
    """
    query = model.embed(queries)
    if len(query) != len(stems):
        raise ValueError(f"stems must name {len(query)} files, one a query, got {len(stems)}")
    found = survey(recording)
    sketches = [Sketch(model, recording.samples, recording.rate) for _ in range(len(stems) + 2)]
    power = torch.zeros(len(stems) + 1, dtype=torch.float64)
    held: list[Tensor] = []

    def read() -> Iterator[Tensor]:
        for block in recording.blocks():
            held.append(block)
            yield block

    with (
        write_together([*stems, rest], recording) as writers,
        bar(desc=recording.path.name, unit="s", total=round(recording.seconds)) as shown,
    ):
        parts = model.stream(
            read(), query, mask=mask, threshold=threshold, sample_rate=recording.rate, seconds=seconds, overlap=overlap
        )
        for part_URN in parts:
            mixture_RN = _taken(held, part_URN.shape[-1])
            part_URN = part_URN.to(mixture_RN)
            rest_RN = mixture_RN - part_URN.sum(0)
            for i, piece in enumerate((*part_URN, rest_RN)):
                writers[i](piece)
                power[i] += float((piece.double() ** 2).sum())
            for sketch, piece in zip(sketches, (mixture_RN, *part_URN, rest_RN), strict=True):
                sketch.add(piece)
            shown.update(round(part_URN.shape[-1] / recording.rate))
    levels = (power / (recording.samples * recording.channels)).sqrt()
    return FileStems(tuple(levels.tolist()), found.level, found.clipped, tuple(s.image() for s in sketches))


def _taken(held: list[Tensor], size: int) -> Tensor:
    """The next ``size`` samples of what was read, which are taken out of ``held``."""
    whole = torch.cat(held, -1)
    held[:] = [whole[:, size:]]
    return whole[:, :size]
