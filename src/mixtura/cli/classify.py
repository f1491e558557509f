"""``classify``: a folder of images in, a classifier and a picture of its errors out; then answers for any folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixtura.cli.plain import plain_console

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np

    from mixtura.vision.image_classifier import ImageClassifier, Trained

__all__ = ["add_to"]

SHOWN = 10  # files of a kind of problem that are named on the screen


class Arch(StrEnum):
    """Networks that can be trained."""

    wavelet_mixer = "wavelet-mixer"
    residual = "residual"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="markdown",
        help="Learn the classes of an image folder, and tell the classes of other images.",
    )
    group.command()(train)
    group.command()(predict)
    app.add_typer(group, name="classify")


def train(
    folder: Annotated[Path, typer.Argument(help="Folder that holds a folder of images for each class.")],
    out: Annotated[Path, typer.Option(help="Directory to write the classifier to.")] = Path("classifier"),
    arch: Annotated[
        Arch, typer.Option(help="Network: wavelet mixing, or a residual one to compare with.")
    ] = Arch.wavelet_mixer,
    side: Annotated[int, typer.Option(help="Images are brought to so many pixels a side.")] = 64,
    grey: Annotated[bool, typer.Option("--grey", help="Without colours.")] = False,
    stretch: Annotated[
        bool, typer.Option("--stretch", help="Squeeze whole images into the square instead of cutting its middle out.")
    ] = False,
    width: Annotated[
        int | None, typer.Option(help="Channels of a block; 64, or 16 for residual.", show_default=False)
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks; 6, or 2 a stage for residual.", show_default=False)] = None,
    levels: Annotated[int, typer.Option(help="Levels of the wavelet transform, 1 to 4: how far a block sees.")] = 1,
    stride: Annotated[
        int,
        typer.Option(
            help="Of both convolutions before the wavelet blocks: 1 for small images, 2 is 4 times as fast twice."
        ),
    ] = 2,
    epochs: Annotated[int, typer.Option(help="Times that every image is seen.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    held_out: Annotated[float, typer.Option(help="Share of each class to test on.")] = 0.2,
    no_flip: Annotated[
        bool, typer.Option("--no-flip", help="Never mirror: for letters, digits, traffic signs.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Picture to write, .png, .svg or .pdf. Default: confusion.png within --out.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:0, mps.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Train a classifier on a folder of class folders.

    A share of each class is held out; how often each class of it was taken for which other is drawn and printed. Files that
    are no images are named and left out. An interrupted run goes on where it was when the same command is given again.

    Examples:

        mixtura classify train flowers/ --out flowers-model

        mixtura classify train digits/ --grey --side 28 --stride 1 --no-flip --epochs 20

        mixtura classify train flowers/ --arch residual --out flowers-residual
    """
    from mixtura.cli.checks import check_device, check_writable
    from mixtura.core.page import check_picture
    from mixtura.data.images import image_folder
    from mixtura.vision.image_classifier import Recipe, train_classifier

    console, problems = plain_console(), _Problems()
    check_device(device)
    check_writable(out, [str(folder)])
    picture = plot or out / "confusion.png"
    check_picture(picture, "--plot")
    options = (
        {"width": width, "depth": depth} if arch is Arch.wavelet_mixer else {"width": width or 16, "depth": depth or 2}
    )
    recipe = Recipe(
        arch=arch.value,
        side=side,
        channels=1 if grey else 3,
        crop="stretch" if stretch else "crop",
        levels=levels,
        stride=stride,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        held_out=held_out,
        flip=not no_flip,
        seed=seed,
        **{name: value for name, value in options.items() if value is not None},
    )
    images = image_folder(folder, classes="folders", on_problem=problems)
    parameters = sum(p.numel() for p in recipe.network(max(2, len(images.classes))).parameters())
    _say(
        console,
        f"{folder}: {len(images):,} images of {len(images.classes)} classes; {arch.value} of {parameters:,} parameters, "
        f"{epochs} epochs at {side} x {side}",
    )
    if dry_run:
        problems.tell(console)
        _say(console, f"would write {out} and {picture}")
        return
    state = out.parent / f"{out.name}.state"
    found = train_classifier(images, recipe, state, device=device, on_problem=problems)
    problems.tell(console)
    found.classifier.save_pretrained(out)
    _draw_confusion(
        picture, found.confusion, list(images.classes), f"{folder.name}: {found.accuracy:.1%} of held-out images right"
    )
    console.print(_table(found, list(images.classes)))
    _say(
        console,
        f"{found.accuracy:.1%} of {found.confusion.sum():,} held-out images told right, after {found.images:,} to learn from",
    )
    if found.history.resumed_at:
        _say(console, f"the run went on from step {found.history.resumed_at}")
    _say(console, f"{out} and {picture} are written; next: mixtura classify predict FOLDER --model {out}")


def predict(
    folder: Annotated[Path, typer.Argument(help="Folder of images, in class folders or not, or one image.")],
    model: Annotated[Path, typer.Option(help="Directory that `mixtura classify train` wrote.")] = Path("classifier"),
    out: Annotated[
        Path, typer.Option(help="Table to write: file, class, probability, and that of every class.")
    ] = Path("classes.csv"),
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture to write where the folder has class folders of the same names.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 64,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:0, mps.")] = "cpu",
) -> None:
    """Tell the classes of images.

    Files that are no images are named and left out. Where the folder has class folders with the names that the model knows,
    the share that is right is told, and --plot draws which were taken for which.

    Examples:

        mixtura classify predict new-photos/ --model flowers-model --out new-photos.csv

        mixtura classify predict test/ --model flowers-model --plot confusion.png
    """
    import csv

    import numpy as np

    from mixtura.cli.checks import check_device
    from mixtura.core.checkpoint import atomic_file
    from mixtura.core.page import check_picture
    from mixtura.core.progress import bar
    from mixtura.data.images import ImageFolder, image_folder
    from mixtura.vision.image_classifier import ImageClassifier

    console, problems = plain_console(), _Problems()
    check_device(device)
    if plot is not None:
        check_picture(plot, "--plot")
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    classifier = ImageClassifier.from_pretrained(model, device=device)
    if folder.is_file():
        images = ImageFolder(folder.parent, (folder,), np.array([-1]))
    else:
        images = image_folder(folder, on_problem=problems)
    true = _true_classes(images, classifier)
    confusion = np.zeros((len(classifier.labels),) * 2, dtype=np.int64)
    done = 0
    with atomic_file(out) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "class", "probability", *classifier.labels])
        with bar(desc="classify", unit="image", total=len(images)) as shown:
            for answer in classifier.classify_folder(images, batch_size=batch_size, on_problem=problems):
                best = answer.probabilities.argmax(1)
                for row, number, chances in zip(
                    answer.rows.tolist(), best.tolist(), answer.probabilities.tolist(), strict=True
                ):
                    cells = [f"{chance:.4f}" for chance in chances]
                    writer.writerow([images.files[row], classifier.labels[number], cells[number], *cells])
                named = true[answer.rows] >= 0
                np.add.at(confusion, (true[answer.rows][named], best[named]), 1)
                done += len(best)
                shown.update(int(answer.rows[-1]) + 1 - shown.n)
        if not done:
            problems.tell(console)
            raise ValueError(f"{folder}: none of {len(images)} files could be read as an image")
    problems.tell(console)
    _say(console, f"{out}: {done:,} images")
    if confusion.any():
        right = np.trace(confusion) / confusion.sum()
        _say(console, f"{right:.1%} of the {confusion.sum():,} images in folders of known classes told right")
        if plot is not None:
            _draw_confusion(plot, confusion, list(classifier.labels), f"{folder.name}: {right:.1%} right")
            _say(console, f"{plot} is written")
    elif plot is not None:
        _say(
            console,
            f"no picture: {folder} has no class folders named as the model's classes ({', '.join(classifier.labels)})",
        )


class _Problems:
    """Files that could not be used, told together."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def __call__(self, problem: Any) -> None:
        self.found.setdefault(str(problem), problem)

    def tell(self, console: Console) -> None:
        for line in list(self.found)[:SHOWN]:
            _say(console, f"note: {line}")
        if len(self.found) > SHOWN:
            _say(console, f"note: and {len(self.found) - SHOWN:,} more")


def _true_classes(images: Any, classifier: ImageClassifier) -> np.ndarray:
    """Number of each image's folder among the model's classes, -1 where it is none."""
    import numpy as np

    number = {name: i for i, name in enumerate(classifier.labels)}
    of_folder = np.array([number.get(name, -1) for name in images.classes] or [-1])
    return np.where(images.labels >= 0, of_folder[images.labels], -1)


def _table(found: Trained, labels: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    for name in ("held out", "right", "taken for"):
        table.add_column(name, justify="left" if name == "taken for" else "right")
    for i, label in enumerate(labels):
        row = found.confusion[i]
        wrong = sorted(((int(n), labels[j]) for j, n in enumerate(row) if j != i and n), reverse=True)[:3]
        taken = ", ".join(f"{name} {n}" for n, name in wrong)
        table.add_row(label, f"{row.sum():,}", f"{row[i] / max(1, row.sum()):.1%}", taken)
    return table


def _draw_confusion(path: Path, confusion: np.ndarray, labels: list[str], title: str) -> None:
    """Write the picture: share of each true class (rows) that was taken for each class (columns)."""
    import numpy as np

    from mixtura.core.page import as_written, new_figure, save_figure

    labels = [as_written(label) for label in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    k = len(labels)
    figure = new_figure(min(14.0, 3.5 + 0.45 * k), min(13.0, 2.5 + 0.42 * k))
    axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if k <= 25:
        for i in range(k):
            for j in range(k):
                if confusion[i, j]:
                    colour = "white" if share[i, j] > 0.5 else "black"
                    axes.text(j, i, f"{confusion[i, j]:,}", ha="center", va="center", fontsize=8, color=colour)
    step = max(1, k // 60)
    axes.set_xticks(range(0, k, step), labels[::step], rotation=90 if k > 6 else 0, fontsize=8)
    axes.set_yticks(range(0, k, step), labels[::step], fontsize=8)
    axes.set_xlabel("told")
    axes.set_ylabel("true")
    axes.set_title(as_written(title), fontsize=10)
    figure.colorbar(shown, ax=axes, label="share of the true class", shrink=0.8)
    save_figure(figure, path)


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)
