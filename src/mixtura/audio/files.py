"""Recordings on disk: opened with one clear error, looked through once, read and written in blocks.

Shapes: R channels, N samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtura.core.checkpoint import atomic_file

__all__ = ["FORMATS", "Recording", "Survey", "open_recording", "survey", "write_together"]

FORMATS = (".wav", ".flac")
FULL_SCALE = 0.9999  # a sample of that size or more stands at the end of its range
FLAC_CHANNELS = 8
RUN = 3  # so many in a row are a clipped peak, fewer may be a peak that just reaches full scale


@dataclass(frozen=True)
class Recording:
    """A sound file that can be read.

    Attributes:
        path: where it is.
        rate: samples a second.
        channels: R.
        samples: N of each channel.
        subtype: how samples are stored, in libsndfile's words.
    """

    path: Path
    rate: int
    channels: int
    samples: int
    subtype: str

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def blocks(self, seconds: float = 10.0, *, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Consecutive parts, each of shape (R, at most ``seconds`` times the rate), float32.

        Args:
            seconds: of a part.
            start, stop: samples between which to read; the whole by default.
        Raises:
            ValueError: the file ends before its header says, or is damaged inside.
        """
        import soundfile

        read, end = start, self.samples if stop is None else min(stop, self.samples)
        size = max(1, round(seconds * self.rate))
        try:
            with soundfile.SoundFile(self.path) as file:
                if start:
                    file.seek(start)
                while len(block := file.read(min(size, end - read), dtype="float32", always_2d=True)):
                    read += len(block)
                    yield torch.from_numpy(np.ascontiguousarray(block.T))
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{self.path} is damaged after {read / self.rate:.1f} seconds ({error.error_string})"
            ) from error
        if read < end:
            raise ValueError(
                f"{self.path} is cut short: its header says {self.samples:,} samples a channel, it holds {read:,}; copy it again"
            )


@dataclass(frozen=True)
class Survey:
    """What one look through a recording found: its peak, root mean square, and the share of samples in clipped peaks."""

    peak: float
    level: float
    clipped: float


def open_recording(path: str | Path) -> Recording:
    """Look at a sound file's header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a directory, no audio, or no samples.
        ImportError: the package soundfile is not installed.
    """
    import soundfile

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name sound files")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: it has no bytes")
    try:
        found = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        # What libsndfile says of a foreign file depends on which format it took it for, and misleads.
        raise ValueError(f"{path} is no sound file that can be read; WAV, FLAC, OGG and MP3 can") from error
    if found.frames < 1:
        raise ValueError(f"{path} is empty: it has a header and no samples")
    return Recording(path, int(found.samplerate), int(found.channels), int(found.frames), str(found.subtype))


def survey(recording: Recording) -> Survey:
    """Look through a recording once, in blocks.

    Raises:
        ValueError: it is silent, or holds NaN or infinity.
    """
    peak, power, clipped = 0.0, 0.0, 0
    for block_RN in recording.blocks():
        if not bool(block_RN.isfinite().all()):
            raise ValueError(f"{recording.path} holds samples that are NaN or infinite")
        size_RN = block_RN.abs()
        peak = max(peak, float(size_RN.max()))
        power += float((block_RN.double() ** 2).sum())
        full_RN = (size_RN >= FULL_SCALE).float()
        if bool(full_RN.any()) and full_RN.shape[1] >= RUN:
            clipped += RUN * int((torch.nn.functional.avg_pool1d(full_RN, RUN, RUN) > 0.99).sum())
    if peak == 0:
        raise ValueError(f"{recording.path} is silent: every sample is 0")
    total = recording.samples * recording.channels
    return Survey(peak, (power / total) ** 0.5, clipped / total)


@contextmanager
def write_together(paths: Sequence[Path], recording: Recording) -> Iterator[list[Any]]:
    """Sound files to write block by block; they appear under their names together, when the block ends without an error.

    Args:
        paths: .wav or .flac.
        recording: whose rate, channels and kind of samples they get.
    Yields:
        For each path a function that takes blocks of shape (R, any).
    """
    import soundfile

    with ExitStack() as stack:
        writers = []
        for path in paths:
            kind = path.suffix.lower().lstrip(".").upper()
            if kind == "FLAC" and recording.channels > FLAC_CHANNELS:
                raise ValueError(
                    f"{recording.path} has {recording.channels} channels and FLAC holds at most {FLAC_CHANNELS}; write WAV"
                )
            # Samples as they came, where this format has them and they lose nothing; else 24 bits, which lose nothing that can
            # be heard. What is compressed (MP3, ADPCM, mu-law) would come out worse a second time, and MP3 in WAV not at all.
            exact = recording.subtype.startswith("PCM_") or recording.subtype in ("FLOAT", "DOUBLE")
            subtype = recording.subtype if exact and soundfile.check_format(kind, recording.subtype) else "PCM_24"
            beside = stack.enter_context(atomic_file(path))
            file = stack.enter_context(
                soundfile.SoundFile(
                    beside, "w", samplerate=recording.rate, channels=recording.channels, format=kind, subtype=subtype
                )
            )
            writers.append(lambda block, file=file: file.write(block.T.cpu().numpy()))
        yield writers
