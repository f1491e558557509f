"""``outliers``: a classifier of image folders that says which images are of none of its classes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixtura.cli.plain import plain_console

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    from mixtura.cli.outliers_work import Fitted, Scored

__all__ = ["add_to"]


class ObjectiveName(StrEnum):
    """What the outliers are used for."""

    mixoe = "mixoe"
    oe = "oe"
    oe_m = "oe-m"
    energy = "energy"


class MixName(StrEnum):
    """How a known image and an outlier are mixed."""

    mixup = "mixup"
    cutmix = "cutmix"
    both = "both"


Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, auto.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="markdown",
        help="Learn image classes, and which images are of none of them: `fit`, then `score`.",
    )
    group.command()(fit)
    group.command()(score)
    app.add_typer(group, name="outliers")


def fit(
    folder: Annotated[Path, typer.Argument(help="Folder with a folder of images for each class.")],
    outliers: Annotated[Path, typer.Option(help="Folder of images that are of none of the classes, at any depth.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory to write the model to. Default: FOLDER-outliers, here.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Folder of the outliers to leave out, such as a related class; repeat for more."),
    ] = None,
    objective: Annotated[
        ObjectiveName,
        typer.Option(help="mixoe mixes known images with outliers; the others are what it is compared with."),
    ] = ObjectiveName.mixoe,
    mix: Annotated[
        MixName, typer.Option(help="Blend two images, or paste a box of the outlier into the known one.")
    ] = MixName.mixup,
    alpha: Annotated[float, typer.Option(help="Shares are drawn from Beta(alpha, alpha); 1 is uniform.")] = 1.0,
    beta: Annotated[
        float, typer.Option(help="Weight of the outliers; larger rejects more and may cost accuracy.")
    ] = 1.0,
    side: Annotated[int, typer.Option(help="Pixels to which images are scaled, their middle cut out.")] = 32,
    grey: Annotated[bool, typer.Option("--grey", help="Look at brightness only.")] = False,
    width: Annotated[int, typer.Option(help="Channels of the network's first layer, a multiple of 4.")] = 16,
    base_epochs: Annotated[int, typer.Option(help="Passes over the known images before the outliers are shown.")] = 30,
    epochs: Annotated[int, typer.Option(help="Passes with outliers.")] = 10,
    level: Annotated[float, typer.Option(help="Share of known images that the threshold keeps.")] = 0.95,
    plot: Annotated[Path | None, typer.Option(help="Picture, .png, .svg or .pdf. Default: scores.png in OUT.")] = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Learn the classes of an image folder, and to be unsure of everything else.

    Each known image is mixed with an outlier, and the network is asked to be as sure as the known share is large. It is then
    less sure of whatever it does not know, also of things that look like its classes. The outliers can be any other images;
    what matters is that nothing related to the classes is among them.

    A tenth of the images is set aside: they give the accuracy and the threshold, and a tenth of the outliers shows how many of
    them are rejected. Files that are no images are named and left out. Interrupt it, and the same command goes on.

    Examples:

        mixtura outliers fit birds/ --outliers holiday-photos/

        mixtura outliers fit cars/ --outliers webvision/ --exclude trucks --side 64 --mix cutmix --alpha 2 --out cars-model

        mixtura outliers score incoming/ --model cars-model
    """
    from mixtura.cli import outliers_work as work

    console, say = _speakers()
    options = {
        "objective": objective.value,
        "mix": mix.value,
        "alpha": alpha,
        "beta": beta,
        "epochs": epochs,
        "base_epochs": base_epochs,
        "width": width,
        "level": level,
        "device": work.device_named(device),
        "seed": seed,
    }
    out = out or Path(f"{folder.resolve().name}-outliers")
    found = work.fit(
        folder, outliers, out, options, exclude=exclude or [], side=side, grey=grey, plot=plot, dry_run=dry_run, say=say
    )
    if found is None:
        return
    console.print(_classes(found))
    if found.set_aside:
        say(f"{found.accuracy:.1%} of {found.tested} images set aside are classified right")
    else:
        say(
            f"note: {found.tested} images are too few to set any aside; figures and threshold are of those it was trained on, "
            "and flatter it"
        )
    say(f"threshold {found.threshold:.4g} keeps {level:.0%} of them" + _rejected(found))
    say(f"{out} and {found.picture} are written; next: mixtura outliers score DIR --model {out}")


def score(
    folder: Annotated[Path, typer.Argument(help="Images to judge: a folder, with or without class folders.")],
    model: Annotated[Path, typer.Option(help="Directory that `outliers fit` wrote.")],
    outliers: Annotated[
        Path | None, typer.Option(help="Images that should be rejected: measures how well the two are told apart.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Table to write, .csv. Default: FOLDER-scores.csv, here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture, .png, .svg or .pdf. Default: beside the table.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Score below which an image is rejected; else the model's.", show_default=False)
    ] = None,
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Score images: of which class they are, how sure that is, and which would be rejected.

    Writes a line for every file: its class, the probability, the score (higher looks more like the known classes), whether it
    is known, and what is wrong with a file that could not be read. The picture shows all scores and the images that look
    least like any class. Images are read a batch at a time, however many there are.

    Examples:

        mixtura outliers score incoming/ --model cars-model

        mixtura outliers score cars-test/ --model cars-model --outliers trucks/ --plot cars.png

        mixtura outliers score incoming/ --model cars-model --threshold 0.8 --out judged.csv
    """
    from mixtura.cli import outliers_work as work

    console, say = _speakers()
    out = out or Path(f"{folder.resolve().name}-scores.csv")
    found = work.score(
        folder,
        model,
        outliers,
        out,
        plot=plot,
        threshold=threshold,
        device=work.device_named(device),
        dry_run=dry_run,
        say=say,
    )
    if found is None:
        return
    console.print(_folders(found))
    for name, value, path in found.least[:5]:
        say(f"least known: {path} ({name}, score {value:.3g})")
    if found.metrics is not None:
        m = found.metrics
        say(
            f"known against outliers: AUROC {m.auroc:.3f}; at 95 % of known images kept, {m.tnr:.1%} of outliers are rejected"
        )
    if found.n_bad:
        say(f"{found.n_bad} {'file' if found.n_bad == 1 else 'files'} could not be used; the table says why")
    say(f"{out} and {found.picture} are written")


def _speakers() -> tuple[Console, Any]:
    console = plain_console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    return console, say


def _rejected(found: Fitted) -> str:
    if found.rejected is None:
        return ""
    return f" and rejects {found.rejected:.1%} of {found.outliers_aside} outliers that were not shown"


def _classes(found: Fitted) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    for name in ("images", "set aside" if found.set_aside else "trained on", "right", "median score"):
        table.add_column(name, justify="right")
    for row in found.classes:
        right = f"{row.right:.1%}" if row.aside else "-"
        table.add_row(row.name, f"{row.images:,}", str(row.aside), right, f"{row.score:.3f}" if row.aside else "-")
    return table


def _folders(found: Scored) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("folder")
    for name in ("images", "rejected", "share", "median score", "most often called"):
        table.add_column(name, justify="right" if name != "most often called" else "left")
    for row in found.folders:
        share = f"{row.rejected / row.images:.1%}"
        table.add_row(row.name, f"{row.images:,}", f"{row.rejected:,}", share, f"{row.score:.3f}", row.called)
    return table
