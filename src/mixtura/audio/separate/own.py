"""Train a separator on somebody's own clips, cut into pieces of one length: by what their texts or their pictures say.

Shapes: C pieces, N samples.
"""

import csv
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mixtura.audio.embed import ClipEmbedding, NamedSounds, Prompted, SmallClip
from mixtura.audio.separate.frames import embed_frames, piece_queries
from mixtura.audio.separate.metrics import si_sdr
from mixtura.audio.separate.noise_invariant import NoiseInvariantLoss
from mixtura.audio.separate.pieces import Pieces, unpack
from mixtura.audio.separate.query import QuerySeparator
from mixtura.audio.separate.ready import RATE, RECIPE, new_separator
from mixtura.audio.separate.training import Mixing, fit_from_text, fit_separator
from mixtura.core.training import History, TrainConfig
from mixtura.data.video_frames import Frames
from mixtura.data.video_sounds import Sound

__all__ = ["HeldOut", "Trained", "read_captions", "score_held_out", "train_by_pictures", "train_own"]

log = logging.getLogger(__name__)

SECONDS = 2.0
TESTS = 500  # sounds held out that are decoded, at most
MIXTURES = 100  # of them that are scored


@dataclass(frozen=True)
class HeldOut:
    """How well sounds that training never heard are pulled out of mixtures of two.

    Attributes:
        mixtures: how many were made.
        before: scale-invariant signal-to-distortion ratio of the mixture itself, dB, mean.
        after: of what was pulled out, dB, mean.
    """

    mixtures: int
    before: float
    after: float


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        model: the separator.
        history: of its losses.
        pieces: trained on.
        left_out: sounds that could not be used.
        held_out: score on the sounds held out; None where there were not two of different texts.
    """

    model: QuerySeparator
    history: History
    pieces: int
    left_out: int
    held_out: HeldOut | None = None


def read_captions(path: Path, audio: Path) -> list[Sound]:
    """Sounds of a table.

    Args:
        path: CSV file, whose first line names the columns ``file`` and ``text``.
        audio: directory that the files are in.
    Raises:
        ValueError: a column, a text or a file is missing (named with its line), or there are fewer than two texts.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    rows: list[Sound] = []
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
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
            rows.append(Sound(clip, text))
    if (names := len({sound.text for sound in rows})) < 2:
        raise ValueError(f"{path} must name at least two different sounds, got {names}")
    return rows


def train_own(
    sounds: Sequence[Sound],
    state: Path | None = None,
    *,
    tests: Sequence[Sound] = (),
    steps: int = 1500,
    seed: int = 0,
    device: str = "cpu",
) -> Trained:
    """A separator that is asked by the texts of the sounds.

    Memory does not grow with the sounds: they are decoded once into a file (2 bytes a sample at 16 kHz, 115 MB an hour).

    Args:
        sounds: files of single sounds and their texts, cut into pieces of two seconds; the texts are the names that it will
            know.
        state: directory of an unfinished run, from which the same call goes on. The decoded sounds stand beside it, under its
            name and ``.pieces``; deleting both is the caller's. None keeps nothing.
        tests: sounds held out, on which the result is scored; a few hundred of them are taken.
        steps: of 16 mixtures.
        seed: of everything that chance enters.
        device: to train on.
    Raises:
        ValueError: fewer than two texts among the sounds that can be used.
    """
    with _pieces_beside(state) as folder:
        pieces = unpack(sounds, folder / "train", rate=RATE, seconds=SECONDS)
        tower = NamedSounds(dict.fromkeys(sorted(set(pieces.texts)), ()))
        model = new_separator(tower, seed=seed).to(device)
        config = TrainConfig(steps=steps, checkpoint_every=100, seed=seed, **RECIPE)
        mixing = Mixing(batch=16, gain=8.0, mask="ratio", seed=seed)
        history = fit_from_text(model, pieces.waves, pieces.texts, tower, config, mixing=mixing, out=state)
        model.cpu().eval()
        known = [sound for sound in tests if sound.text in tower.names]
        return Trained(model, history, len(pieces.texts), pieces.left_out, _scored(model, known, folder, seed))


def train_by_pictures(
    sounds: Sequence[Sound],
    frames: Sequence[Frames],
    tower: ClipEmbedding | SmallClip,
    state: Path | None = None,
    *,
    rate: float = 1.0,
    noise_heads: bool = True,
    tests: Sequence[Sound] = (),
    steps: int = 1500,
    seed: int = 0,
    device: str = "cpu",
) -> Trained:
    """A separator that learns from what clips show, and is asked in words: the paper's setting (2212.07065).

    No text of ``sounds`` is read. Pieces of two seconds of different clips are mixed, each up to 4.8 dB louder or softer,
    and the mean embedding of three frames of a piece asks for it (:func:`piece_queries`). Targets are binary masks. Queries in
    words are read as "a photo of" them.

    Args:
        sounds: of the clips.
        frames: pictures of the same clips.
        tower: frozen; it reads pictures in training and words afterwards.
        state: as for :func:`train_own`; what the tower made of the pictures stands beside the pieces.
        rate: pictures a second.
        noise_heads: with them noise-invariant training, of which they rest for the first third; else the queries' loss alone.
        tests: sounds held out, of which the result is scored on a few hundred, asked by their texts (zero-shot).
        steps, seed, device: as for :func:`train_own`.
    Raises:
        ValueError: fewer than two clips have both a picture and a sound that can be used.
    """
    if len(sounds) != len(frames):
        raise ValueError(f"sounds and frames must be of the same clips, got {len(sounds)} and {len(frames)}")
    with _pieces_beside(state) as folder:
        seen = embed_frames(frames, tower.to(device), folder / "frames", rate=rate)
        text = Prompted(tower.to("cpu"))
        pieces = unpack([sounds[i] for i in seen.kept], folder / "train", rate=RATE, seconds=SECONDS)
        query_CD = piece_queries(pieces, seen, folder / "queries.npy", seconds=SECONDS)
        known = _readable(text, tests)
        model = new_separator(text, seed=seed).to(device)
        config = TrainConfig(steps=steps, checkpoint_every=100, seed=seed, **RECIPE)
        history = fit_separator(
            model,
            pieces.waves,
            query_CD,
            config,
            # The released code scales each clip by 0.5 to 1.5, a range of 9.5 dB.
            mixing=Mixing(batch=16, gain=4.8, seed=seed),
            objective=NoiseInvariantLoss() if noise_heads else None,
            groups=pieces.owners,
            out=state,
            describe={"frames": seen.key, "noise_heads": noise_heads},
        )
        model.cpu().eval()
        left_out = len(sounds) - pieces.sounds
        return Trained(model, history, len(pieces.texts), left_out, _scored(model, known, folder, seed))


def score_held_out(model: QuerySeparator, pieces: Pieces, mixtures: int, *, seed: int = 0) -> HeldOut:
    """Pull pieces out of mixtures with a piece of another text, equally loud, asked by their text.

    Args:
        model: the separator.
        pieces: of sounds that it was not trained on, of two texts at least.
        mixtures: to make.
        seed: of the pieces drawn.
    """
    names = sorted(set(pieces.texts))
    members = [torch.tensor([i for i, text in enumerate(pieces.texts) if text == name]) for name in names]
    rng = torch.Generator().manual_seed(seed)
    before, after = [], []
    for _ in range(mixtures):
        kinds = torch.randperm(len(names), generator=rng)[:2].tolist()
        rows = [int(members[k][torch.randint(len(members[k]), (), generator=rng)]) for k in kinds]
        sources = pieces.waves[rows].float()
        mixture = sources.sum(0)
        before.append(float(si_sdr(mixture, sources[0])))
        after.append(float(si_sdr(model.separate(mixture, [names[kinds[0]]])[0, 0], sources[0])))
    return HeldOut(mixtures, sum(before) / mixtures, sum(after) / mixtures)


@contextmanager
def _pieces_beside(state: Path | None) -> Iterator[Path]:
    """Where to decode to: beside the state of a run, or for the time being."""
    if state is not None:
        yield state.with_name(f"{state.name}.pieces")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _readable(tower: Prompted, sounds: Sequence[Sound]) -> list[Sound]:
    """Sounds whose text the tower can read: a small one knows the words of its captions alone."""
    known: dict[str, bool] = {}
    for text in sorted({sound.text for sound in sounds}):
        try:
            tower.embed_text([text])
            known[text] = True
        except ValueError as error:
            log.warning("%s; sounds held out of that name are not scored", error)
            known[text] = False
    return [sound for sound in sounds if known[sound.text]]


def _scored(model: QuerySeparator, tests: Sequence[Sound], folder: Path, seed: int) -> HeldOut | None:
    """Score on some of the sounds held out; None where there are not two of different texts."""
    if len({sound.text for sound in tests}) < 2:
        return None
    rng = torch.Generator().manual_seed(seed)
    chosen = [tests[i] for i in torch.randperm(len(tests), generator=rng)[:TESTS].tolist()]
    try:
        new = unpack(chosen, folder / "test", rate=RATE, seconds=SECONDS)
    except ValueError as error:  # no reason to lose what was trained
        log.warning("not scored on sounds held out: %s", error)
        return None
    return score_held_out(model, new, MIXTURES, seed=seed) if len(set(new.texts)) > 1 else None
