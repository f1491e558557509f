"""What ``outliers`` does: read, train, keep, score. Imported when a command runs and not for its help."""

from __future__ import annotations

import csv
import hashlib
import heapq
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixtura.cli.checks import check_device, check_writable
from mixtura.cli.outliers_picture import draw_fit, draw_scores
from mixtura.core.checkpoint import atomic_directory, atomic_file, read_json, write_json
from mixtura.core.page import check_picture
from mixtura.core.progress import bar
from mixtura.data.images import ImageFolder, Problem, batches, image_folder, unpack
from mixtura.robust.ood import OODMetrics, ood_metrics
from mixtura.robust.outlier_classifier import OutlierExposedClassifier

__all__ = ["Fitted", "Scored", "device_named", "fit", "score"]

Say = Callable[[str], None]
KEPT, MODEL, PICTURE = "images.json", "classifier", "scores.png"
ASIDE, LEAST_OUTLIERS = 10, 20  # every tenth outlier is set aside, where there are that many
SHOWN = 24  # images in the picture of those that look least known
SMALLEST_SIDE, SMALLEST_CLASS = 8, 2
SHIFT = 0.1
PAIRS = 256  # mixtures at each share of the picture
SHARES = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class ClassRow:
    """One class after training: its images, those set aside, and how they fare."""

    name: str
    images: int
    aside: int
    right: float
    score: float


@dataclass(frozen=True)
class Fitted:
    """What was learned and how well; ``tested`` images were set aside, or, where there are few, trained on as well."""

    classes: list[ClassRow]
    accuracy: float
    tested: int
    set_aside: bool
    threshold: float
    rejected: float | None
    outliers_aside: int
    picture: Path


@dataclass(frozen=True)
class FolderRow:
    """One folder that was scored."""

    name: str
    images: int
    rejected: int
    score: float
    called: str


@dataclass(frozen=True)
class Scored:
    """What was scored: by folder, the images that look least known as (class, score, path), and the measure of both sets."""

    folders: list[FolderRow]
    least: list[tuple[str, float, Path]]
    metrics: OODMetrics | None
    n_bad: int
    picture: Path


def device_named(device: str) -> str:
    """The device that ``--device`` names; ``auto`` is a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def fit(
    folder: Path,
    outliers: Path,
    out: Path,
    options: Mapping[str, Any],
    *,
    exclude: Sequence[str],
    side: int,
    grey: bool,
    plot: Path | None,
    dry_run: bool,
    say: Say,
) -> Fitted | None:
    """Train a model of a folder into ``out``; None after a dry run. An unfinished one's state stands in ``out.state`` beside."""
    if plot is not None:
        check_picture(plot, "--plot")
    OutlierExposedClassifier(**options).check_parameters()
    if side < SMALLEST_SIDE:
        raise ValueError(f"--side must be at least {SMALLEST_SIDE} pixels, got {side}")
    for name, read in (("images", folder), ("outliers", outliers)):
        if read.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out} holds the {name}; write to another directory")
    check_writable(out, (), mark=KEPT)

    def told(problem: Problem) -> None:
        say(f"note: {problem}")

    known = image_folder(folder, classes="folders", on_problem=told)
    if len(known.classes) < 2:
        raise ValueError(
            f"{folder} has one class folder ({known.classes[0]}); at least two are needed, each with its images"
        )
    others = image_folder(outliers, classes="none", exclude=exclude, on_problem=told)
    shared = {path.resolve() for path in known.files} & {path.resolve() for path in others.files}
    if shared:
        raise ValueError(
            f"{len(shared)} of the outliers are images of the classes, {min(shared)} among them; "
            "--outliers must hold none of them"
        )
    say(f"{folder}: {len(known):,} images of {len(known.classes)} classes; {outliers}: {len(others):,} outliers")
    if dry_run:
        say(
            f"would train on {side} x {side} pixels for {options['base_epochs']} + {options['epochs']} epochs and write {out}"
        )
        return None
    channels = 1 if grey else 3
    state = out.with_name(f"{out.name}.state")
    images, rows = _unpacked(known, side, channels, state / "known", told)
    shown, _ = _unpacked(others, side, channels, state / "outliers", told)
    labels = known.labels[rows]
    _check_counts(known, labels)
    kept, aside = np.arange(len(shown)), np.arange(0)
    if len(shown) >= LEAST_OUTLIERS:
        aside = np.random.default_rng(options["seed"]).permutation(len(shown))[: len(shown) // ASIDE]
        kept = np.setdiff1d(kept, aside)
    model = OutlierExposedClassifier(**options, shift=SHIFT)
    # A slice of an array on disk would be read whole; those set aside are few, and the rest are given by number.
    try:
        model.fit(images, labels, outliers=shown, outlier_rows=kept, state=state / "training")
    except ValueError as error:
        if "holds a run with" not in str(error):
            raise
        raise ValueError(f"{error}; or remove {state} to begin anew") from error
    held = model.held_out_
    scores, found = model.score_samples(np.asarray(images[held])), model.predict(np.asarray(images[held]))
    away = model.score_samples(np.asarray(shown[aside])) if len(aside) else np.empty(0)
    picture = out / PICTURE if plot is None else plot
    with atomic_directory(out) as beside:
        model.save(beside / MODEL)
        write_json(beside / KEPT, {"classes": list(known.classes), "side": side, "channels": channels})
        curve = _confidence(
            model, images[held[:PAIRS]], shown[np.resize(aside if len(aside) else kept, min(PAIRS, len(held)))]
        )
        target = beside / PICTURE if plot is None else plot
        draw_fit(target, scores, away, model.threshold_, SHARES, curve, len(known.classes))
    shutil.rmtree(state, ignore_errors=True)
    right = found == labels[held]
    table = [
        ClassRow(
            name,
            int((labels == c).sum()),
            int((mine := labels[held] == c).sum()),
            float(right[mine].mean()) if mine.any() else 0.0,
            float(np.median(scores[mine])) if mine.any() else 0.0,
        )
        for c, name in enumerate(known.classes)
    ]
    rejected = float((away < model.threshold_).mean()) if len(away) else None
    set_aside = len(held) < len(labels)
    return Fitted(table, float(right.mean()), len(held), set_aside, model.threshold_, rejected, len(away), picture)


def score(
    folder: Path,
    model: Path,
    outliers: Path | None,
    out: Path,
    *,
    plot: Path | None,
    threshold: float | None,
    device: str,
    dry_run: bool,
    say: Say,
) -> Scored | None:
    """Score the images of one folder, or of two; None after a dry run."""
    if out.suffix.lower() != ".csv":
        raise ValueError(f"--out must end in .csv, got {out.name!r}")
    picture = out.with_suffix(".png") if plot is None else plot
    check_picture(picture, "--plot")
    settings = _settings(model)
    judge = OutlierExposedClassifier.load(model / MODEL).set_params(device=device)
    limit = judge.threshold_ if threshold is None else threshold

    def told(problem: Problem) -> None:
        say(f"note: {problem}")

    places = [image_folder(folder, on_problem=told)]
    if outliers is not None:
        places.append(image_folder(outliers, on_problem=told))
    say(f"{model}: {len(settings['classes'])} classes; " + "; ".join(f"{p.root}: {len(p):,} images" for p in places))
    if dry_run:
        say(f"would write {out} and {picture}")
        return None
    tally = _Tally(settings["classes"], limit)
    with atomic_file(out) as beside, beside.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["file", "class", "probability", "score", "known", "problem"])
        for i, place in enumerate(places):
            _score_folder(place, judge, settings, tally, table, told, show=i == 0)
        if not tally.scores:
            raise ValueError(f"none of the images could be read, so {out} is not written")
    draw_scores(picture, tally.by_set, limit, tally.least())
    metrics = None
    if outliers is not None and all(len(values) for values in tally.by_set.values()) and len(tally.by_set) == 2:
        ours, theirs = tally.by_set.values()
        metrics = ood_metrics(ours, theirs)
    least = [(name, value, path) for value, path, name, _ in tally.least()]
    return Scored(tally.rows(), least, metrics, tally.n_bad, picture)


class _Tally:
    """What is kept of the images that went by: numbers of each, and pictures of the few that look least known."""

    def __init__(self, classes: Sequence[str], limit: float) -> None:
        self.classes, self.limit = classes, limit
        self.by_set: dict[str, list[float]] = {}
        self.scores: dict[str, list[float]] = {}
        self.called: dict[str, Counter[str]] = {}
        self.n_bad = 0
        self._heap: list[tuple[float, int, Path, str, NDArray[np.uint8]]] = []
        self._count = 0

    def add(self, place: str, folder: str, value: float, name: str) -> None:
        """Count an image."""
        self.by_set.setdefault(place, []).append(value)
        self.scores.setdefault(folder, []).append(value)
        self.called.setdefault(folder, Counter())[name] += 1

    def show(self, path: Path, name: str, value: float, image: NDArray[np.uint8]) -> None:
        """Keep an image if it is among those that look least known."""
        self._count += 1
        item = (-value, self._count, path, name, image.copy())
        if len(self._heap) < SHOWN:
            heapq.heappush(self._heap, item)
        elif item[0] > self._heap[0][0]:
            heapq.heapreplace(self._heap, item)

    def least(self) -> list[tuple[float, Path, str, NDArray[np.uint8]]]:
        ordered = sorted(self._heap, key=lambda item: (-item[0], item[1]))
        return [(-negative, path, name, image) for negative, _, path, name, image in ordered]

    def rows(self) -> list[FolderRow]:
        made = []
        for name, values in self.scores.items():
            array = np.array(values)
            rejected = int((array < self.limit).sum())
            called, n = self.called[name].most_common(1)[0]
            made.append(
                FolderRow(name, len(array), rejected, float(np.median(array)), f"{called} ({n / len(array):.0%})")
            )
        return made


def _score_folder(
    place: ImageFolder,
    judge: OutlierExposedClassifier,
    settings: Mapping[str, Any],
    tally: _Tally,
    table: Any,
    told: Callable[[Problem], None],
    *,
    show: bool,
) -> None:
    def noted(problem: Problem) -> None:
        told(problem)
        if not problem.used:
            tally.n_bad += 1
            table.writerow([problem.path, "", "", "", "", problem.what])

    classes = settings["classes"]
    with bar(desc=place.root.name or "images", unit="image", total=len(place)) as shown:
        for batch in batches(place, settings["side"], channels=settings["channels"], on_problem=noted):
            proba = judge.predict_proba(batch.images)
            scores = judge.score_samples(batch.images)
            for image, row, p, value in zip(batch.images, batch.rows, proba, scores, strict=True):
                path, best = place.files[row], int(p.argmax())
                inside = place.classes[place.labels[row]] if place.classes else ""
                name = classes[best]
                tally.add(str(place.root), str(place.root / inside), float(value), name)
                if show:
                    tally.show(path, name, float(value), image)
                known = "yes" if value >= tally.limit else "no"
                table.writerow([path, name, f"{p[best]:.6f}", f"{value:.6g}", known, ""])
            shown.update(int(batch.rows[-1]) + 1 - shown.n)


def _confidence(model: OutlierExposedClassifier, known: NDArray[np.uint8], others: NDArray[np.uint8]) -> list[float]:
    """Mean of the largest probability at each share of known image, on images that were not trained on."""
    first, second = np.asarray(known, np.float32) / 255, np.asarray(others, np.float32) / 255
    mixtures = (lam * first + (1 - lam) * second for lam in map(np.float32, SHARES))
    return [float(model.predict_proba(mixture).max(1).mean()) for mixture in mixtures]


def _settings(model: Path) -> dict[str, Any]:
    if not model.exists():
        raise FileNotFoundError(
            f"{model} does not exist; make it with: mixtura outliers fit DIR --outliers DIR --out {model}"
        )
    if not (model / KEPT).exists():
        raise ValueError(f"{model} is no model of `mixtura outliers fit`: {KEPT} is missing")
    found = read_json(model / KEPT)
    if missing := {"classes", "side", "channels"} - found.keys():
        raise ValueError(f"{model / KEPT} lacks {', '.join(sorted(missing))}; fit the model again")
    return found


def _check_counts(known: ImageFolder, labels: NDArray[np.int64]) -> None:
    counts = np.bincount(labels, minlength=len(known.classes))
    few = [f"{name} ({n})" for name, n in zip(known.classes, counts, strict=True) if n < SMALLEST_CLASS]
    if few:
        raise ValueError(
            f"every class needs at least {SMALLEST_CLASS} images that can be read; too few have {', '.join(few)}"
        )


def _unpacked(
    folder: ImageFolder, side: int, channels: int, path: Path, told: Callable[[Problem], None]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images as an array on disk; one that an interrupted run made of the same files is used again."""
    digest = hashlib.blake2b(digest_size=16)
    for file in folder.files:
        stat = file.stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    facts = {"files": digest.hexdigest(), "side": side, "channels": channels}
    note = path.with_suffix(".json")
    if note.exists() and (path / "images.npy").exists():
        before = read_json(note)
        if {key: before.get(key) for key in facts} == facts:
            rows = np.array(before["rows"], dtype=np.int64)
            return np.load(path / "images.npy", mmap_mode="r", allow_pickle=False)[: len(rows)], rows
        shutil.rmtree(path.parent / "training", ignore_errors=True)  # of other images
    images, rows = unpack(folder, side, path, channels=channels, label=folder.root.name, on_problem=told)
    write_json(note, facts | {"rows": rows.tolist()})
    return images, rows
