"""Tables from files: CSV, TSV and Parquet through pandas, with errors that name the line, the column and the value.

``read_table`` reads, ``column`` picks one by name, ``numbers`` makes a matrix of the numeric ones.
"""

from __future__ import annotations

import csv
import difflib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # pandas is heavy, and `--help` needs none of it
    import pandas as pd

__all__ = ["check_parquet_folder", "column", "non_finite", "numbers", "read_table", "text_problem"]

log = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
PARQUET = (".parquet", ".pq")
TAIL_BYTES = 1 << 20  # how much of the end of a text file is looked at for a line that breaks off
DECIMAL_COMMA = r"\s*[+-]?\d+(,\d+)?([eE][+-]?\d+)?\s*"


def read_table(path: str | Path) -> pd.DataFrame:
    """The table in a file: ``.csv``, ``.tsv`` (or ``.tab``), ``.parquet`` (or ``.pq``), or a folder of Parquet files.

    The first line of a text file names the columns. An empty field is a missing value. A ``.csv`` whose first line has
    semicolons (or tabs) and no comma is separated by those, and its numbers may have decimal commas.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, no rows, no header, lines with more fields than the first has names, a file that
            ends in the middle of a line, or a damaged Parquet file.
    """
    import pandas as pd

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in PARQUET:
        table = _read_parquet(path)
    elif suffix in SEPARATORS:
        separator = _separator(path, SEPARATORS[suffix])
        if path.stat().st_size < TAIL_BYTES and not path.read_bytes().strip():
            raise ValueError(f"{path} is empty; a table has a line of column names and then one line a row")
        try:
            table = pd.read_csv(path, sep=separator, skipinitialspace=True)
        except pd.errors.ParserError as error:
            raise ValueError(f"{path} {_in_words(error)}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from error
        _check_header(path, table)
        _check_last_line(path, separator, len(table.columns))
        if separator != ",":
            _read_decimal_commas(table)
    else:
        raise ValueError(f"{path} must end in {', '.join([*SEPARATORS, *PARQUET])} or be a folder of Parquet files")
    if table.empty:
        raise ValueError(f"{path} has {len(table.columns)} columns and no rows")
    table.columns = [str(name) for name in table.columns]
    return table


def column(table: pd.DataFrame, name: str) -> pd.Series:
    """The column of that name.

    Raises:
        ValueError: no such column; those with a similar name are listed, or all when there are few.
    """
    if name in table.columns:
        return table[name]
    names = list(table.columns)
    lower = {other.lower(): other for other in reversed(names)}
    close = [lower[found] for found in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    if close:
        raise ValueError(f"the table has no column {name!r}; close are {', '.join(map(repr, close))}")
    shown = ", ".join(map(repr, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    raise ValueError(f"the table has no column {name!r}; it has {shown}")


def numbers(
    table: pd.DataFrame, *, without: Sequence[str] = (), missing: Literal["error", "allow"] = "error"
) -> tuple[np.ndarray, list[str]]:
    """The columns of a table as one matrix.

    A column whose field in the first line is empty is left out, with a warning, where it only numbers the rows (as pandas
    and R write them) or has no value at all (a separator at the end of every line).

    Args:
        table: numbers and booleans; rows are samples.
        without: columns to leave out.
        missing: ``"allow"`` lets empty fields through as NaN; infinity is refused either way.
    Returns:
        A float64 matrix, shape (N, F), and the F names.
    Raises:
        ValueError: a column that holds text (named, with its first such value and row), a value that is missing or
            infinite (counted, first position named), or no column left.
    """
    import pandas as pd

    left_out = {column(table, name).name for name in without}
    names = [str(name) for name in table.columns if name not in left_out and not _is_no_measurement(table[name])]
    if not names:
        raise ValueError("no column is left to compute with")
    matrix_NF = np.empty((len(table), len(names)))
    for f, name in enumerate(names):
        values = table[name]
        if problem := text_problem(values):
            raise ValueError(f"{problem}; leave the column out or encode it")
        if pd.api.types.is_complex_dtype(values):
            raise ValueError(
                f"column {name!r} holds complex numbers; give their real and imaginary parts as two columns"
            )
        if values.dtype == object:
            values = pd.to_numeric(values)
        matrix_NF[:, f] = values.to_numpy(dtype=np.float64, na_value=np.nan)
    if problem := non_finite(matrix_NF, names, missing=missing):
        raise ValueError(problem)
    return matrix_NF, names


def text_problem(values: pd.Series) -> str | None:
    """Why a column is no column of numbers, in words; None where it is one."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return None
    bad = np.flatnonzero(pd.to_numeric(values, errors="coerce").isna() & values.notna())
    if values.dtype == object and not len(bad):
        return None  # numbers that pandas keeps as objects
    row = int(bad[0]) if len(bad) else 0
    if not len(bad):  # dates and the like, which pandas can turn into numbers that mean nothing here
        return f"column {values.name!r} is no column of numbers: it holds {values.dtype}, in row 0 {values.iloc[row]!s}"
    return (
        f"column {values.name!r} is no column of numbers: row {row} (counted from 0) holds {values.iloc[row]!r} "
        f"({len(bad)} of {len(values)} rows are no numbers)"
    )


def non_finite(
    matrix: np.ndarray,
    names: Sequence[str] | None = None,
    *,
    missing: Literal["error", "allow"] = "error",
    first_row: int = 0,
) -> str | None:
    """What is wrong with the values of a matrix, shape (N, F), in words; None where all are finite.

    Args:
        matrix: floating point.
        names: of the columns.
        missing: ``"allow"`` accepts NaN.
        first_row: number of the matrix's first row in the whole table.
    """
    # A sum is finite only when every term is (or the sum itself overflows, which the exact test below sorts out).
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(matrix.sum()):
            return None
    bad_NF = np.isinf(matrix) if missing == "allow" else ~np.isfinite(matrix)
    if not bad_NF.any():
        return None
    row, f = (int(v) for v in np.argwhere(bad_NF)[0])
    n_nan = int(np.isnan(matrix[bad_NF]).sum())
    n_inf = int(bad_NF.sum()) - n_nan
    counts = " and ".join(f"{n} {kind}" for n, kind in ((n_nan, "missing (NaN)"), (n_inf, "infinite (inf)")) if n)
    where = f"column {names[f]!r}" if names is not None else f"column {f}"
    return f"{counts} values, the first in row {first_row + row}, {where} (rows count from 0)"


def check_parquet_folder(path: Path) -> None:
    """Raise a ValueError where ``path`` is a folder and no file in it is Parquet by its name."""
    if path.is_dir() and not any(file.suffix in PARQUET for file in path.rglob("*")):
        raise ValueError(f"{path} is a folder without Parquet files ({', '.join(PARQUET)})")


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd
    import pyarrow

    check_parquet_folder(path)
    try:
        return pd.read_parquet(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}); copy or write it again") from error


def _separator(path: Path, usual: str) -> str:
    """What separates the fields: ``usual``, or for a ``.csv`` the semicolon or tab that its first line has instead."""
    if usual != ",":
        return usual
    with path.open("rb") as handle:
        names = re.sub(rb'"[^"]*"', b"", handle.readline(TAIL_BYTES))
    return next((mark for mark in (",", ";", "\t") if mark.encode() in names), usual)


def _read_decimal_commas(table: pd.DataFrame) -> None:
    """Make numbers of the text columns that hold nothing but numbers with decimal commas."""
    import pandas as pd

    for name in table.columns:
        text = table[name].dropna()
        if (
            not pd.api.types.is_numeric_dtype(text)
            and len(text)
            and text.astype(str).str.fullmatch(DECIMAL_COMMA).all()
        ):
            table[name] = pd.to_numeric(table[name].astype(object).str.replace(",", "."))


def _is_no_measurement(values: pd.Series) -> bool:
    """Whether a column that the file gives no name is empty, or counts the rows from 0 or 1."""
    import pandas as pd

    if not re.fullmatch(r"Unnamed: \d+", str(values.name)):
        return False
    if values.isna().all():
        log.warning("column %r has no name and no value; it is left out", values.name)
        return True
    first = values.iloc[0]
    if pd.api.types.is_integer_dtype(values) and first in (0, 1) and (values == np.arange(len(values)) + first).all():
        log.warning("column %r has no name and numbers the rows; it is left out", values.name)
        return True
    return False


def _check_header(path: Path, table: pd.DataFrame) -> None:
    import pandas as pd

    def number(text: object) -> bool:
        try:
            float(str(text))
        except ValueError:
            return False
        return True

    # pandas takes fields beyond the names for row labels, and moves every name to another column.
    beyond = 0 if table.index.equals(pd.RangeIndex(len(table))) else table.index.nlevels
    if beyond:
        raise ValueError(
            f"{path} has {len(table.columns) + beyond} fields a line and only {len(table.columns)} names in its first line "
            f"({', '.join(map(str, table.columns[:4]))}); the first line must name every column, and the rest must be "
            "separated as it is"
        )
    if len(table.columns) and all(number(name) for name in table.columns):
        raise ValueError(f"{path} has numbers only in its first line; the first line must name the columns")


def _check_last_line(path: Path, separator: str, n_columns: int) -> None:
    with path.open("rb") as handle:
        handle.seek(0, 2)
        handle.seek(max(0, handle.tell() - TAIL_BYTES))
        tail = handle.read()
    whole = tail.endswith((b"\n", b"\r"))
    lines = tail.rstrip(b"\r\n").splitlines()
    last = lines[-1].decode("utf-8", errors="replace")
    if last.count('"') % 2:
        return  # the end of a quoted field that began on an earlier line
    fields = next(csv.reader([last], delimiter=separator), [])
    if n_columns > 1 and (len(fields) < n_columns or (not whole and fields[-1] == "")):
        raise ValueError(
            f"{path} ends in the middle of a line: the last one holds {len([f for f in fields if f])} of {n_columns} "
            f"fields ({last[:60]!r}); the file was cut off, copy or write it again"
        )


def _in_words(error: Exception) -> str:
    text = str(error).strip()
    if "EOF inside string" in text:
        return (
            "ends in the middle of a line: a quoted field is never closed; the file was cut off, copy or write it again"
        )
    return f"is no regular table: {text.removeprefix('Error tokenizing data. C error: ')}"
