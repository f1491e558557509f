"""What the commands on tables share: where their files go, and the table written again with columns beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import pandas as pd

__all__ = ["check_places", "write_beside"]


def check_places(table: Path, out: Path, plot: Path | None, save: Path | None = None) -> None:
    """Raise a ValueError where a table, a picture or a model cannot be written in its place, or would replace what is there.

    Before any work is done for them: a table and a picture may replace older ones, a model only another model.
    """
    from mixtura.core.page import check_picture

    if out.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        raise ValueError(f"--out must end in .csv, .tsv or .parquet, got {out.name!r}")
    if plot is not None:
        check_picture(plot, "--plot")
    if out.exists() and table.exists() and out.resolve() == table.resolve():
        raise ValueError(f"{out} is also the table that is read; write to another file")
    for option, path in (("--out", out), ("--plot", plot), ("--save", save)):
        if path is not None:
            _check_parent(option, path)
            if option != "--save" and path.is_dir():
                raise ValueError(f"{option} {path} is a directory; name a file")
    if save is not None:
        from mixtura.core.keeping import check_place

        if save.resolve() in (out.resolve(), table.resolve()):
            raise ValueError(f"--save {save} is also a table; name a directory for the model")
        check_place(save)


def _check_parent(option: str, path: Path) -> None:
    place = path.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{option} {path} cannot be written: {place} is a file, not a directory")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: {place} may not be written to; name another place")


def write_beside(out: Path, table: pd.DataFrame, added: Mapping[str, Any]) -> None:
    """Write ``table`` with more columns, whole or not at all; a name that is taken gets an underscore."""
    from mixtura.core.checkpoint import atomic_file

    result = table.copy()
    for name, values in added.items():
        while name in result.columns:
            name += "_"
        result[name] = values
    with atomic_file(out) as beside:
        if out.suffix.lower() == ".parquet":
            result.to_parquet(beside, index=False)
        else:
            result.to_csv(beside, index=False, sep="\t" if out.suffix.lower() == ".tsv" else ",")
