"""``separate``: recordings in, what was asked for out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mixtura.cli.default_command import DefaultGroup
from mixtura.cli.plain import plain_console
from mixtura.cli.separate_train import train

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    from mixtura.audio.files import Recording
    from mixtura.audio.separate import QuerySeparator
    from mixtura.audio.separate.files import FileStems

__all__ = ["add_to"]

DONE = "separated.json"


class MaskName(StrEnum):
    """How a mask is used."""

    soft = "soft"
    binary = "binary"


class FormatName(StrEnum):
    """Kinds of files written."""

    wav = "wav"
    flac = "flac"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    group = typer.Typer(cls=DefaultGroup, help="Pull the sounds that you name out of recordings.")
    group.command("run")(separate)
    group.command("train")(train)
    app.add_typer(group, name="separate")


def separate(
    recordings: Annotated[
        list[Path] | None, typer.Argument(help="WAV, FLAC, OGG or MP3 files.", show_default=False)
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option("--query", "-q", help="Name of a sound; repeat for more.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory to write to.")] = Path("stems"),
    model: Annotated[
        Path | None, typer.Option(help="Directory of a separator of your own; else the one that comes with mixtura.")
    ] = None,
    mask: Annotated[
        MaskName,
        typer.Option(help="soft: turned down by degrees. binary: kept or silenced, less of others but rougher."),
    ] = MaskName.soft,
    threshold: Annotated[float, typer.Option(help="Of binary masks, between 0 and 1.")] = 0.5,
    format: Annotated[FormatName, typer.Option(help="Of the stems.")] = FormatName.wav,
    picture: Annotated[bool, typer.Option(help="Write a picture of the spectrograms too.")] = True,
    seconds: Annotated[
        float, typer.Option(help="Seconds that are separated at a time; memory grows with them.")
    ] = 20.0,
    known: Annotated[bool, typer.Option("--list", help="List the sounds that the model knows, and stop.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Separate what an earlier run finished once more.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Nothing here is drawn by chance; accepted for scripts.", hidden=True)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Pull the sounds that you name out of recordings.

    Of mix.wav and --query violin it writes stems/mix-violin.wav, stems/mix-rest.wav (all that no query took: the files add up
    to the recording) and stems/mix.png, a picture of the spectrograms. Any length, sample rate and number of channels; stems
    have those of the recording. The model that comes with mixtura knows instruments by name (--list) and was taught on a
    synthesizer's: expect traces of the others.

    A bad file is named and the others go on; what an earlier run finished is not done again.

    Examples:

        mixtura separate mix.wav --query violin

        mixtura separate mix.wav --query violin --query piano --out stems/

        mixtura separate live/*.flac -q drums --mask binary --format flac

        mixtura separate --list

    To teach a separator your own sounds: mixtura separate train --help
    """
    console = plain_console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    from mixtura.audio.files import open_recording
    from mixtura.cli.checks import check_device

    check_device(device)
    separator = _model(model)
    if known:
        say(_known(separator))
        return
    if not recordings:
        raise ValueError("name a recording: mixtura separate mix.wav --query violin")
    if not query:
        raise ValueError(
            "name a sound with --query, such as --query violin (mixtura separate --list shows what is known)"
        )
    queries = list(dict.fromkeys(text.strip() for text in query))
    separator.embed(queries)  # an unknown name ends it here, before any work
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} exists and is not a directory")
    _check_settings(threshold, seconds)
    _check_names(recordings, queries)
    _check_kept(recordings, queries, out, format.value, picture)
    settings = {
        "queries": queries,
        "mask": mask.value,
        "threshold": threshold,
        "format": format.value,
        "picture": picture,
    }
    settings |= {"seconds": seconds, "model": str(model or "")}
    separator.to(device)
    failed = 0
    for path in recordings:
        try:
            found = open_recording(path)
            if not again and _is_done(out, found, settings):
                say(f"{path}: done before; --again separates it once more")
                continue
            say(_line(found, separator))
            if dry_run:
                say("  would write " + ", ".join(str(p) for p in _places(out, path, queries, format.value, picture)))
                continue
            written = _one(separator, found, queries, out, settings)
            console.print(_summary(queries, written))
            if written.clipped > 1e-4:
                say(f"  note: {written.clipped:.1%} of its samples are clipped; stems inherit that distortion")
            _note_done(out, found, settings)
            say(
                f"  {', '.join(p.name for p in _places(out, path, queries, format.value, picture))} in {out} are written"
            )
        except (ValueError, OSError) as error:
            if len(recordings) == 1:
                raise
            failed += 1
            plain_console(stderr=True).print(f"error {error}", soft_wrap=True, markup=False)
    if failed:
        raise ValueError(f"{failed} of {len(recordings)} recordings could not be separated; the others are written")


def _model(path: Path | None) -> QuerySeparator:
    from mixtura.audio.separate import QuerySeparator, default_separator

    return default_separator() if path is None else QuerySeparator.from_pretrained(path)


def _known(separator: QuerySeparator) -> str:
    names = getattr(separator.text, "names", None)
    if names is None:
        return "this separator has no list of names; ask it in words"
    return "\n".join(name + (f" (also: {', '.join(others)})" if others else "") for name, others in names.items())


def _line(found: Recording, separator: QuerySeparator) -> str:
    minutes, seconds = divmod(found.seconds, 60)
    length = f"{int(minutes)} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
    line = f"{found.path}: {length}, {found.channels} channel{'s' if found.channels > 1 else ''} at {found.rate:,} Hz"
    if found.rate < separator.sample_rate:
        line += f"; the model listens up to {separator.sample_rate // 2:,} Hz, of which this has the lower {found.rate // 2:,}"
    return line


def _one(
    separator: QuerySeparator, found: Recording, queries: list[str], out: Path, settings: dict[str, Any]
) -> FileStems:
    from mixtura.audio.separate.files import separate_file

    places = _places(out, found.path, queries, settings["format"], settings["picture"])
    written = separate_file(
        separator,
        found,
        queries,
        places[: len(queries)],
        places[len(queries)],
        mask=settings["mask"],
        threshold=settings["threshold"],
        seconds=settings["seconds"],
        overlap=min(2.0, settings["seconds"] / 4),
    )
    if settings["picture"]:
        from mixtura.cli.separate_picture import draw

        draw(places[-1], written.sketches, [found.path.name, *queries, "rest"], found, separator)
    return written


def _summary(queries: list[str], written: FileStems) -> Table:
    import math

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("  stem")
    table.add_column("level", justify="right")
    for name, level in zip([*queries, "rest"], written.levels, strict=True):
        decibels = 20 * math.log10(max(level / written.mixture, 1e-9))
        quiet = "  (hardly any of it was found)" if decibels < -30 and name != "rest" else ""
        table.add_row(f"  {name}", f"{decibels:+.1f} dB{quiet}")
    return table


def _places(out: Path, path: Path, queries: list[str], kind: str, picture: bool) -> list[Path]:
    names = [f"{path.stem}-{_slug(text)}.{kind}" for text in (*queries, "rest")]
    return [out / name for name in names] + ([out / f"{path.stem}.png"] if picture else [])


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) or "query"


def _check_settings(threshold: float, seconds: float) -> None:
    if not 0 < threshold < 1:
        raise ValueError(f"--threshold must lie between 0 and 1, got {threshold}")
    if not 1 <= seconds <= 600:
        raise ValueError(f"--seconds must lie between 1 and 600, got {seconds}")


def _check_names(recordings: list[Path], queries: list[str]) -> None:
    """No two files may be written to one name."""
    stems: dict[str, Path] = {}
    for path in recordings:
        if (other := stems.setdefault(path.stem, path)) is not path:
            raise ValueError(
                f"{other} and {path} would write the same files; separate them into different --out directories"
            )
    slugs: dict[str, str] = {}
    for text in (*queries, "rest"):
        if (same := slugs.setdefault(_slug(text), text)) != text or (text == "rest" and "rest" in queries):
            raise ValueError(f"the queries {same!r} and {text!r} would write the same file")


def _check_kept(recordings: list[Path], queries: list[str], out: Path, kind: str, picture: bool) -> None:
    """No recording may be written over by the stems of another."""
    given = {path.resolve(): path for path in recordings}
    for path in recordings:
        for place in _places(out, path, queries, kind, picture):
            if (lost := given.get(place.resolve())) is not None:
                raise ValueError(f"a stem of {path} would be written over {lost}; give another --out directory")


def _facts(found: Recording, settings: dict[str, Any]) -> dict[str, Any]:
    about = found.path.stat()
    return {"bytes": about.st_size, "modified": about.st_mtime_ns, "settings": settings}


def _is_done(out: Path, found: Recording, settings: dict[str, Any]) -> bool:
    from mixtura.core.checkpoint import read_json

    if not (out / DONE).exists():
        return False
    row = read_json(out / DONE).get(str(found.path.resolve()))
    places = _places(out, found.path, settings["queries"], settings["format"], settings["picture"])
    return row == _facts(found, settings) and all(path.exists() for path in places)


def _note_done(out: Path, found: Recording, settings: dict[str, Any]) -> None:
    from mixtura.core.checkpoint import read_json, write_json

    rows = read_json(out / DONE) if (out / DONE).exists() else {}
    write_json(out / DONE, rows | {str(found.path.resolve()): _facts(found, settings)})
