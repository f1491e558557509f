"""``unmix``: a hyperspectral cube, and which materials it shows, with their share in every pixel."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixtura.cli.plain import plain_console
from mixtura.cli.unmix_report import Maps, listed, report_lines, spoiled_channels, write_tables

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np

    from mixtura.vision.unmixing.cubes import Cube
    from mixtura.vision.unmixing.robust_sparse import SpectralUnmixing
    from mixtura.vision.unmixing.whole_cube import Survey

__all__ = ["add_to"]

REPORT = "report.md"
# What a directory may hold and be replaced: all that is written here, and nothing else.
WRITTEN = re.compile(
    r"(abundances|guidance)\.(npy|tif(\.aux\.xml)?)|(endmembers|channels)\.csv|(material-\d+|guidance|unmixed)\.png|report\.md"
)
LARGEST_PICTURE = 1024  # pixels a side of a map


class GuidanceName(StrEnum):
    """Where the exponent of the sparsity comes from."""

    learn = "learn"
    fixed = "fixed"
    none = "none"


@dataclass(frozen=True)
class Choices:
    """What was asked for, beside the cube."""

    endmembers: int
    variable: str | None
    rows: int | None
    sample: int
    skip_bad: bool
    clip_negative: bool
    options: dict[str, Any]


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(unmix)


def unmix(
    cubes: Annotated[
        list[Path], typer.Argument(help="Cubes: ENVI header (.hdr), GeoTIFF (.tif), MATLAB (.mat) or NumPy (.npy).")
    ],
    endmembers: Annotated[int, typer.Option(help="How many materials to look for.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write; of several cubes each gets one in it. Default: CUBE-unmixed."),
    ] = None,
    variable: Annotated[str | None, typer.Option(help="Name of the cube within a .mat file.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of the image, where a .mat file does not say.")] = None,
    lam: Annotated[
        float | None, typer.Option(help="Sparsity: 0 for none, more for purer pixels. Default: 0.1 x channels / 180.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="How strictly shares sum to one. Default: 4 x sqrt(channels / 180).")
    ] = None,
    guidance: Annotated[
        GuidanceName, typer.Option(help="How sparse each pixel is: learned, 1/2 for all, or not more than a sum.")
    ] = GuidanceName.learn,
    steps: Annotated[int, typer.Option(help="Most iterations.")] = 500,
    sample: Annotated[
        int, typer.Option(help="Pixels that spectra are learned from where the cube has more; all get shares.")
    ] = 50_000,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out pixels with NaN; take channels that are never finite as blank."),
    ] = False,
    clip_negative: Annotated[bool, typer.Option("--clip-negative", help="Take negative values as 0.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Find the materials in a hyperspectral image and their share in every pixel; nobody names the materials.

    Blank, saturated or striped channels may stay in: each channel's weight is learned, and spoiled ones get next to none. The
    cube is read by rows, so it may be larger than memory.

    Writes a directory: abundances.npy (rows, columns, materials), guidance.npy (how pure each pixel is), endmembers.csv (the
    spectra), channels.csv (weight of each channel), a map of each material, unmixed.png (all of it in one picture), report.md.
    Where the cube says where it lies on the earth (GeoTIFF, or ENVI's map info), abundances.tif and guidance.tif say so as
    well; that needs rasterio: pip install 'mixtura[geotiff]'.

    Examples:

        mixtura unmix cube.hdr --endmembers 4 --out maps

        mixtura unmix valley.tif --endmembers 5 --out valley-maps

        mixtura unmix samson.mat --endmembers 3 --rows 95

        mixtura unmix flight/*.hdr --endmembers 6 --out flight-maps --skip-bad --clip-negative

        mixtura unmix reflectance.npy --endmembers 5 --lam 0.1 --sample 200000
    """
    console = plain_console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    choices = _choices(
        endmembers, variable, rows, lam, delta, guidance, steps, sample, skip_bad, clip_negative, device, seed
    )
    places = _places(cubes, out)
    failed = []
    for path, place in places.items():
        try:
            _one(path, place, choices, dry_run=dry_run, say=say, console=console)
        except (ValueError, TypeError, OSError) as error:
            if len(places) == 1:
                raise ValueError(_led(path, error)) from error
            failed.append(path)
            typer.echo(f"error {_led(path, error)}", err=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(places)} cubes were not unmixed: {', '.join(map(str, failed))}")


def _choices(
    endmembers: int,
    variable: str | None,
    rows: int | None,
    lam: float | None,
    delta: float | None,
    guidance: GuidanceName,
    steps: int,
    sample: int,
    skip_bad: bool,
    clip_negative: bool,
    device: str,
    seed: int,
) -> Choices:
    from mixtura.cli.work import check_device

    for name, value, least in (
        ("--endmembers", endmembers, 2),
        ("--lam", lam or 0, 0),
        ("--delta", delta or 0, 0),
        ("--steps", steps, 1),
        ("--sample", sample, 1000),
    ):
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    check_device(device)
    options = {
        "lam": "auto" if lam is None else lam,
        "delta": "auto" if delta is None else delta,
        "guidance": None if guidance is GuidanceName.none else guidance.value,
        "max_iter": steps,
        "device": device,
        "seed": seed,
    }
    return Choices(endmembers, variable, rows, sample, skip_bad, clip_negative, options)


def _places(cubes: list[Path], out: Path | None) -> dict[Path, Path]:
    """Where each cube's directory goes; one that holds something else is not replaced."""
    several = len(cubes) > 1
    places: dict[Path, Path] = {}
    for path in cubes:
        place = Path(f"{path.stem}-unmixed") if out is None else out / path.stem if several else out
        if place in places.values():
            raise ValueError(f"two cubes are named {path.stem} and would share {place}; unmix them one by one")
        if place.is_file():
            raise ValueError(f"{place} is a file; give a directory to write")
        if place.is_dir() and any(not WRITTEN.fullmatch(entry.name) for entry in place.iterdir()):
            raise ValueError(f"{place} holds other files, which would be lost; name a new directory")
        places[path] = place
    return places


def _one(path: Path, place: Path, choices: Choices, *, dry_run: bool, say: Any, console: Console) -> None:
    from mixtura.core.checkpoint import atomic_directory
    from mixtura.vision.unmixing.cubes import read_cube
    from mixtura.vision.unmixing.robust_sparse import SpectralUnmixing
    from mixtura.vision.unmixing.whole_cube import learn_from

    cube = read_cube(path, variable=choices.variable, rows=choices.rows)
    h, w, channels = cube.shape
    size = h * w * channels * cube.data.dtype.itemsize
    say(f"{path}: {h} x {w} pixels, {channels} channels of {cube.data.dtype}, {size / 1e6:,.1f} MB")
    if choices.endmembers > channels:
        raise ValueError(f"--endmembers must be at most the number of channels, {channels}, got {choices.endmembers}")
    if dry_run:
        learned = min(choices.sample, h * w)
        say(
            f"would learn {choices.endmembers} spectra from {learned:,} pixels, read the cube by "
            f"{cube.rows_a_block()} rows, and write {place}"
        )
        return
    if "map info" in cube.meta and cube.place is None:
        say("where it lies (map info) is not carried over: that needs rasterio, pip install 'mixtura[geotiff]'")
    began = time.perf_counter()
    cube, seen = _surveyed(cube, choices, say)
    model = SpectralUnmixing(choices.endmembers, clip_negative=True, **choices.options)
    learn_from(cube, seen, model)
    with atomic_directory(place) as beside:
        maps = _write_maps(beside, cube, model)
        write_tables(beside, cube, model)
        _draw(beside, cube, model, maps)
        lines = report_lines(path, cube, seen, model, maps, time.perf_counter() - began)
        (beside / REPORT).write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(_summary(maps))
    spoiled = spoiled_channels(model)
    if spoiled.any():
        say(f"spoiled channels, which hardly count: {listed(spoiled)}")
    say(f"{place} is written: {REPORT} says what is in it, unmixed.png shows it")


def _surveyed(cube: Cube, choices: Choices, say: Any) -> tuple[Cube, Survey]:
    """One look at all pixels; what would spoil the rest is an error that says what would do."""
    from mixtura.vision.unmixing.whole_cube import survey

    seed = choices.options["seed"]
    seen = survey(cube, sample=choices.sample, seed=seed)
    held = seen.pixels + seen.broken
    never = seen.broken_channels >= held
    if held and never.any() and not never.all():
        if not choices.skip_bad:
            raise ValueError(
                f"{cube.name}: {_count(never.sum(), 'channel')} never finite ({listed(never)}); "
                "--skip-bad takes them as blank"
            )
        say(f"never finite, taken as blank: {listed(never)}")
        cube = dataclasses.replace(cube, dead=never)
        seen = survey(cube, sample=choices.sample, seed=seed)
    if seen.broken:
        if not choices.skip_bad:
            nothing = f" or {cube.ignore:g}, which stands for no data" if cube.ignore else ""
            where = _channels(seen.broken_channels > 0)
            raise ValueError(
                f"{cube.name}: {_count(seen.broken, 'pixel')} NaN or infinite{nothing}, in {where}; "
                "--skip-bad leaves them out"
            )
        say(f"{seen.broken:,} pixels with NaN or infinity are left out")
    if not seen.pixels:
        raise ValueError(f"{cube.name}: no pixel holds data")
    if seen.negative and not choices.clip_negative:
        raise ValueError(
            f"{cube.name}: {_count(seen.negative, 'value')} negative, the least {seen.low.min():.4g}; "
            "--clip-negative takes them as 0"
        )
    if seen.empty:
        say(f"{seen.empty:,} pixels hold no data (value {cube.ignore:g}) and are left out")
    if seen.blank.any():
        say(f"blank channels, kept without weight: {listed(seen.blank)}")
    if seen.constant.any():
        say(f"channels with a single value: {listed(seen.constant)}")
    return cube, seen


def _write_maps(folder: Path, cube: Cube, model: SpectralUnmixing) -> Maps:
    """Write abundances and guidance, block by block, and keep what the pictures need."""
    import numpy as np

    from mixtura.vision.unmixing.geotiff import PlacedMaps, write_maps
    from mixtura.vision.unmixing.whole_cube import unmix_blocks

    h, w, _ = cube.shape
    m = model.n_endmembers
    step = -(-max(h, w) // LARGEST_PICTURE)
    thin: list[tuple[np.ndarray, np.ndarray]] = []
    total, most, unmixed = np.zeros(m), np.zeros(m, dtype=np.int64), 0
    with contextlib.ExitStack() as files:
        shares_file, guide_file = (
            files.enter_context((folder / f"{name}.npy").open("wb")) for name in ("abundances", "guidance")
        )
        for file, shape in ((shares_file, (h, w, m)), (guide_file, (h, w))):
            form = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, form)
        placed: list[PlacedMaps] = []
        if cube.place is not None:
            for name, bands in (("abundances", [f"material {i + 1}" for i in range(m)]), ("guidance", ["guidance"])):
                placed.append(files.enter_context(write_maps(folder / f"{name}.tif", (h, w), bands, cube.place)))

        def keep(rows: slice, shares: np.ndarray, guide: np.ndarray) -> None:
            nonlocal unmixed
            shares.astype("<f4").tofile(shares_file)
            guide.astype("<f4").tofile(guide_file)
            for maps, values in zip(placed, (shares, guide[:, :, None]), strict=False):
                maps.write(rows, values)
            first = -rows.start % step
            thin.append((shares[first::step, ::step], guide[first::step, ::step]))
            known = np.isfinite(guide)
            unmixed += int(known.sum())
            total[:] += shares[known].sum(0)
            most[:] += (shares[known] > 0.5).sum(0)

        unmix_blocks(cube, model, keep)
    shares, guide = (np.concatenate([part[i] for part in thin]) for i in (0, 1))
    return Maps(shares, guide, total / max(unmixed, 1), most, unmixed)


def _draw(folder: Path, cube: Cube, model: SpectralUnmixing, maps: Maps) -> None:
    from mixtura.cli.unmix_picture import draw, draw_map

    for i in range(model.n_endmembers):
        draw_map(folder / f"material-{i + 1}.png", maps.shares[:, :, i])
    draw_map(folder / "guidance.png", maps.guide)
    draw(folder / "unmixed.png", cube, model, maps, spoiled_channels(model))


def _summary(maps: Maps) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("material")
    for name in ("mean share", "pixels with more than half"):
        table.add_column(name, justify="right")
    for i, (share, most) in enumerate(zip(maps.mean, maps.most, strict=True)):
        table.add_row(str(i + 1), f"{share:.1%}", f"{most:,}")
    return table


def _channels(mask: np.ndarray) -> str:
    return f"channel{'s' if mask.sum() > 1 else ''} {listed(mask)}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun} is" if n == 1 else f"{n:,} {noun}s are"


def _led(path: Path, error: Exception) -> str:
    """The message, begun with the cube's name where it does not name it."""
    text = str(error)
    return text if path.name in text else f"{path}: {text}"
