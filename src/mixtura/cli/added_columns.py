"""What ``cluster`` and ``regress`` share: where their files go, and the table written again with columns beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import pandas as pd

__all__ = ["check_places", "write_beside"]


def check_places(table: Path, out: Path, plot: Path | None) -> None:
    """Raise a ValueError where a table or a picture cannot be written under its name, or would replace what is read."""
    from mixtura.core.page import check_picture

    if out.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        raise ValueError(f"--out must end in .csv, .tsv or .parquet, got {out.name!r}")
    if plot is not None:
        check_picture(plot, "--plot")
    if out.exists() and table.exists() and out.resolve() == table.resolve():
        raise ValueError(f"{out} is also the table that is read; write to another file")


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
