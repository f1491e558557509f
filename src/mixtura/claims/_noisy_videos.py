"""A world of noisy videos without words: instruments that are each seen with one kind of clothes, and sound off screen.

The pairing is arbitrary, so it can be learned from what occurs together and from nothing else. Clothes are named in the
captions that the towers of pictures and texts were trained on; no caption ever named a sound.

Shapes: C clips, N samples, 28 x 28 pictures.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtura.audio import SmallClip
from mixtura.claims.framework import Scale
from mixtura.data.digits import GARMENTS, fashion_mnist
from mixtura.data.instruments import FAMILIES, LOUDNESS, render_clips
from mixtura.data.noises import TEST_VOICES, bursts, speech

__all__ = ["RATE", "WORDINGS", "Cases", "World", "make_world"]

RATE = 8000
SECONDS = 2.0
NOISY = 0.75  # share of the clips with sound off screen
SPREAD = 4.0  # decibels that it is above or below what is seen, at most
PRESETS = (0,)  # one instrument of each family
FRAMES = 3  # pictures of a clip
WORDINGS = ("a photo of a {}", "a picture of a {}", "the {}", "one {} on a white table")
FOR_TOWERS = 10_000  # pictures that the towers are trained on; videos show others


@dataclass(frozen=True)
class Cases:
    """Mixtures to test on, each a clean target with something else.

    Attributes:
        target, other: recordings, shape (n, N).
        labels: classes of the targets, for the labelled rival alone, shape (n,).
        right, wrong: captions of what is seen with the target, and of something else.
        pictures: of what is seen with the target, shape (n, 28, 28).
    """

    target: Tensor
    other: Tensor
    labels: Tensor
    right: list[str]
    wrong: list[str]
    pictures: Tensor


@dataclass(frozen=True)
class World:
    """What one seed trains and tests on.

    Attributes:
        waves: noisy clips, shape (C, N).
        frames: pictures of each, shape (C, frames, 28, 28).
        labels: which instrument each holds, for the labelled rival alone, shape (C,).
        tower: towers of pictures and texts, frozen.
        accuracy: share of unseen pictures whose caption the towers find among all.
        noise, instruments: tests with sound off screen, and with another instrument.
        three: two clean targets and sound off screen, shape (n, 3, N), and the captions of the two.
    """

    waves: Tensor
    frames: Tensor
    labels: Tensor
    tower: SmallClip
    accuracy: float
    noise: Cases
    instruments: Cases
    three: Tensor
    captions: list[tuple[str, str]]


@dataclass(frozen=True)
class Sounds:
    """Clean clips with the number of their class, and sound off screen."""

    waves: NDArray[np.float32]
    labels: NDArray[np.int64]
    noise: NDArray[np.float32]


def make_world(scale: Scale, seed: int, *, phrases: int, cases: int, tower_steps: int) -> World:
    """The clips, pictures and tests of one seed.

    Args:
        scale: at ``smoke`` sounds and pictures are made up, so that no package is needed.
        seed: of everything that chance enters.
        phrases: of each of ten instruments.
        cases: tests of each kind.
        tower_steps: length of the towers' training.
    """
    rng = np.random.default_rng(seed)
    made_up = scale == "smoke"
    train, test = (_made_up_sounds if made_up else _sounds)(phrases, cases, seed)
    pictures, kinds, new_pictures, new_kinds = _made_up_pictures(rng) if made_up else _pictures()
    shown_with = rng.permutation(len(GARMENTS))  # the clothes that each class of sound is seen with
    cut = min(FOR_TOWERS, len(pictures) // 2)
    captions = [[wording.format(name) for wording in WORDINGS] for name in GARMENTS]
    tower = SmallClip.train_on(pictures[:cut], torch.from_numpy(kinds[:cut]), captions, steps=tower_steps, seed=seed)
    pool = [cut + np.nonzero(kinds[cut:] == kind)[0] for kind in range(len(GARMENTS))]
    frames = torch.stack([pictures[rng.choice(pool[shown_with[label]], FRAMES)] for label in train.labels])
    with torch.inference_mode():
        texts = tower.embed_text([row[0] for row in captions])
        found = (tower.embed_image(new_pictures[:2000]) @ texts.mT).argmax(1).numpy()
    accuracy = float((found == new_kinds[:2000]).mean())

    def named(label: int) -> str:
        return captions[shown_with[label]][0]

    def tests(other_is_noise: bool) -> Cases:
        at = rng.integers(len(test.waves), size=cases)
        labels = test.labels[at]
        if other_is_noise:
            other = test.noise[rng.permutation(len(test.noise))[np.arange(cases) % len(test.noise)]]
        else:
            other = test.waves[[rng.choice(np.nonzero(test.labels != label)[0]) for label in labels]]
        wrong = (labels + rng.integers(1, len(GARMENTS), size=cases)) % len(GARMENTS)
        seen = [rng.choice(np.nonzero(new_kinds == shown_with[label])[0]) for label in labels]
        return Cases(
            torch.from_numpy(test.waves[at]),
            torch.from_numpy(other),
            torch.from_numpy(labels),
            [named(label) for label in labels],
            [named(label) for label in wrong],
            new_pictures[seen],
        )

    noise, instruments = tests(True), tests(False)
    first = rng.integers(len(test.waves), size=cases)
    second = np.array([rng.choice(np.nonzero(test.labels != test.labels[i])[0]) for i in first])
    off = test.noise[rng.integers(len(test.noise), size=cases)]
    three = torch.from_numpy(np.stack([test.waves[first], test.waves[second], off], 1))
    return World(
        _with_noise(train, rng),
        frames,
        torch.from_numpy(train.labels),
        tower,
        accuracy,
        noise,
        instruments,
        three,
        [(named(test.labels[i]), named(test.labels[j])) for i, j in zip(first, second, strict=True)],
    )


def _with_noise(sounds: Sounds, rng: np.random.Generator) -> Tensor:
    """Clips with sound off screen, all as loud as before."""
    count = len(sounds.waves)
    off = sounds.noise[rng.integers(len(sounds.noise), size=count)]
    level = np.where(rng.random(count) < NOISY, 10 ** (rng.uniform(-SPREAD, SPREAD, count) / 20), 0.0)
    waves = sounds.waves + level[:, None].astype(np.float32) * off
    return torch.from_numpy(waves * (LOUDNESS / np.sqrt((waves**2).mean(1, keepdims=True)))).float()


def _sounds(phrases: int, cases: int, seed: int) -> tuple[Sounds, Sounds]:
    """Rendered instruments; tests have phrases, voices, texts and bursts that no training clip has."""
    size = round(SECONDS * RATE)
    train = render_clips(FAMILIES, phrases, presets=PRESETS, seconds=SECONDS, rate=RATE, seed=seed)
    test = render_clips(FAMILIES, max(4, phrases // 3), presets=PRESETS, seconds=SECONDS, rate=RATE, seed=1000 + seed)
    half = 10 * phrases
    noise = [speech(half, size, RATE, seed=seed), bursts(half, size, RATE, seed=seed)]
    new = [speech(cases // 2, size, RATE, voices=TEST_VOICES, held_out=True, seed=seed)]
    new.append(bursts(cases - cases // 2, size, RATE, seed=1000 + seed))
    return (
        Sounds(train.waves, train.labels, np.concatenate(noise)),
        Sounds(test.waves, test.labels, np.concatenate(new)),
    )


def _made_up_sounds(phrases: int, cases: int, seed: int) -> tuple[Sounds, Sounds]:
    """Ten kinds of harmonic tones, and bursts."""
    size = round(SECONDS * RATE)
    t = np.arange(size) / RATE

    def some(count: int, seed: int) -> Sounds:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % 10
        waves = np.zeros((count, size), np.float32)
        for row, label in zip(waves, labels, strict=True):
            pitch = rng.uniform(100, 200) * 1.2**label
            for harmonic in range(1, 2 + label % 4):
                row += np.sin(2 * np.pi * pitch * harmonic * t + rng.uniform(0, 6)).astype(np.float32)
        waves *= LOUDNESS / np.sqrt((waves**2).mean(1, keepdims=True))
        return Sounds(waves, labels, bursts(max(4, count // 4), size, RATE, seed=seed))

    return some(10 * phrases, seed), some(max(20, cases), 1000 + seed)


def _pictures() -> tuple[Tensor, NDArray[np.int64], Tensor, NDArray[np.int64]]:
    """Pictures of clothes, for training and new ones."""
    images, kinds = fashion_mnist("train")
    new_images, new_kinds = fashion_mnist("t10k")
    cut = 2 * FOR_TOWERS
    return torch.from_numpy(images[:cut]).float(), kinds[:cut], torch.from_numpy(new_images).float(), new_kinds


def _made_up_pictures(rng: np.random.Generator) -> tuple[Tensor, NDArray[np.int64], Tensor, NDArray[np.int64]]:
    """Ten blurred patterns under noise."""
    patterns = rng.random((10, 7, 7)).repeat(4, 1).repeat(4, 2)

    def some(count: int) -> tuple[Tensor, NDArray[np.int64]]:
        kinds = np.arange(count) % 10
        return torch.from_numpy(
            np.clip(patterns[kinds] + 0.3 * rng.standard_normal((count, 28, 28)), 0, 1)
        ).float(), kinds

    images, kinds = some(400)
    new_images, new_kinds = some(100)
    return images, kinds, new_images, new_kinds
