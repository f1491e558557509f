"""Where samples come from: arrays, memory maps, tables, batches and Parquet files, all read block by block.

A source can be read again and again (EM reads it every step) and never holds more than a block beside what the caller
holds already. :func:`scan` reads it once and says what coordinates to compute in, or which column is unfit.

Shapes: N samples, F features, B samples of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mixtura.core.natural_form import Frame
from mixtura.data.tables import check_parquet_folder, non_finite

__all__ = [
    "Arrays",
    "Batches",
    "Parquet",
    "Source",
    "Summary",
    "is_batches",
    "merge",
    "open_source",
    "scan",
    "summarise",
]

SCAN_ROWS = 4096


class Source(Protocol):
    """Samples that can be read in blocks, in the same order every time."""

    names: list[str] | None

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Blocks of at most ``rows`` samples, shape (B, F), B >= 1."""
        ...


class Arrays:
    """Samples of one array or memory map, shape (N, F)."""

    def __init__(self, array: np.ndarray | Tensor, names: Sequence[str] | None = None) -> None:
        self.array = array
        self.names = list(names) if names is not None else None

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Slices; only what torch cannot take as it is (integers, reversed arrays) is copied."""
        for start in range(0, len(self.array), rows):
            yield _tensor(self.array[start : start + rows])


class Batches:
    """Samples of an iterable of arrays, each of shape (n, F), that can be iterated again.

    Raises:
        ValueError: while reading: a batch of another number of features, of another rank, or not of numbers; its number
            is named. A pass that brings another number of samples than the first one is noticed by the caller.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        if iter(iterable) is iterable:
            raise ValueError(
                "X is a generator or iterator, which can be read once, and EM reads the samples every step; give an object "
                "whose __iter__ starts anew (a list of arrays, a data loader), or use partial_fit for each batch"
            )
        self.iterable = iterable
        self.names: list[str] | None = None

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Slices of each batch; an empty batch is passed over."""
        n_features: int | None = None
        for number, batch in enumerate(self.iterable):
            array = batch.detach().cpu() if isinstance(batch, Tensor) else np.asarray(batch)
            if array.ndim != 2:
                raise ValueError(f"batch {number} must have shape (samples, features), got {tuple(array.shape)}")
            if not isinstance(array, Tensor) and array.dtype.kind not in "biuf":
                raise ValueError(f"batch {number} must hold numbers, got {array.dtype}")
            if len(array) == 0:
                continue
            n_features = n_features or array.shape[1]
            if array.shape[1] != n_features:
                raise ValueError(
                    f"batch {number} has {array.shape[1]} features, those before have {n_features}; all must have the same"
                )
            for start in range(0, len(array), rows):
                yield _tensor(array[start : start + rows])


class Parquet:
    """Samples of a Parquet file or of a folder of them, through pyarrow, every column a feature.

    But for the index of a DataFrame, which pandas writes as a column where it is more than the numbers of the rows.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow
        import pyarrow.dataset

        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        check_parquet_folder(path)
        try:
            self._dataset = pyarrow.dataset.dataset(path, format="parquet")
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is no whole Parquet file ({error}); copy or write it again") from error
        index = (self._dataset.schema.pandas_metadata or {}).get("index_columns", [])
        fields = [field for field in self._dataset.schema if field.name not in index]
        self._columns = [field.name for field in fields]
        self.names: list[str] | None = self._columns
        for field in fields:
            kinds = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
            if not any(kind(field.type) for kind in kinds):
                raise ValueError(f"column {field.name!r} of {path} holds {field.type}, not numbers; leave it out")

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Record batches, one read ahead at a time: pyarrow's own sixteen would fill the memory."""
        batches = self._dataset.to_batches(
            columns=self._columns, batch_size=rows, batch_readahead=1, fragment_readahead=1, use_threads=False
        )
        for batch in batches:
            if batch.num_rows:
                columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
                # Missing values of integers arrive as NaN, those of booleans as None.
                stacked_BF = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
                yield torch.from_numpy(stacked_BF)


class Checked:
    """A source whose values are looked at as they are read.

    Args:
        source: the samples.
        missing: whether NaN is a missing value rather than an error.
    Raises:
        ValueError: while reading, at the first value that is not finite: all of them are counted, to the end of the source,
            and the position of the first is named.
    """

    def __init__(self, source: Source, *, missing: bool) -> None:
        self._source, self._missing = source, missing
        self.names = source.names

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """The source's blocks."""
        n, first, n_nan, n_inf = 0, "", 0, 0
        for block in self._source.blocks(rows):
            x_BF = block.numpy()
            problem = None
            if x_BF.dtype.kind == "f":
                problem = non_finite(x_BF, self.names, missing="allow" if self._missing else "error", first_row=n)
            if problem:
                first = first or problem.split(", the first in ")[1]
                n_nan += 0 if self._missing else int(np.isnan(x_BF).sum())
                n_inf += int(np.isinf(x_BF).sum())
            elif not first:
                yield block
            n += len(x_BF)
        if first:
            kinds = [f"{count} {kind}" for count, kind in ((n_nan, "NaN"), (n_inf, "infinite (inf)")) if count]
            hint = "; missing='expect' takes NaN as missing values" if n_nan else ""
            raise ValueError(f"X contains {' and '.join(kinds)} values, the first in {first}{hint}")


@dataclass(frozen=True)
class Summary:
    """What one reading of the samples tells; summaries of two parts merge.

    Attributes:
        n: samples.
        weight: sum of their weights.
        seen: sum of the weights of the values that are not missing, shape (F,).
        mean, scatter: of the features, shape (F,), weighted; scatter is the sum of squares around the mean.
        low, high: smallest and largest values, shape (F,), samples of weight zero left out.
    """

    n: int
    weight: float
    seen: np.ndarray
    mean: np.ndarray
    scatter: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Variance of each feature, shape (F,); exactly zero for a constant one."""
        found: np.ndarray = self.scatter / np.where(self.seen > 0, self.seen, 1.0)
        return np.where(self.high > self.low, found, 0.0)

    def frame(self, covariance: str, names: Sequence[str] | None) -> Frame:
        """Coordinates centred on the mean, in units of each feature's spread (of their mean spread for spherical).

        A constant feature takes the mean spread of the others, so that a floor on its variance means something.

        Raises:
            ValueError: a feature whose spread cannot be squared in float64; it is named.
        """
        variance_F = self.variance
        moving_F = self.high > self.low
        bad_F = ~np.isfinite(variance_F) | (moving_F & (variance_F < np.finfo(np.float64).tiny))
        if bad_F.any():
            f = int(bad_F.argmax())
            span = f"from {self.low[f]:.3g} to {self.high[f]:.3g}"
            raise ValueError(
                f"{_called(f, names)} has values {span}: their squares do not fit float64; give the column in other units"
            )
        mean_variance = float(np.mean(variance_F[moving_F])) if moving_F.any() else 1.0
        if covariance == "spherical":
            scale_F = np.full(len(variance_F), np.sqrt(mean_variance))
        else:
            scale_F = np.sqrt(np.where(moving_F, variance_F, mean_variance))
        return Frame(torch.from_numpy(self.mean.copy()), torch.from_numpy(scale_F))


def is_batches(X: Any) -> bool:
    """Whether X is an iterable of batches rather than one array: no array-like, or a list of matrices."""
    if isinstance(X, (str, Path)) or hasattr(X, "__array__") or hasattr(X, "__array_interface__"):
        return False
    if isinstance(X, (list, tuple)):
        return len(X) > 0 and all(getattr(batch, "ndim", 0) == 2 for batch in X)
    return hasattr(X, "__iter__") and not hasattr(X, "shape")


def open_source(X: Any) -> Source | None:
    """The source behind a path or an iterable of batches; None where X is an array-like for scikit-learn to check."""
    if isinstance(X, (str, Path)):
        return Parquet(X)
    return Batches(X) if is_batches(X) else None


def scan(source: Source, weights: np.ndarray | None, *, missing: bool = False) -> Summary | None:
    """Read the samples once; None where there are none.

    Args:
        source: the samples.
        weights: shape (N,), >= 0.
        missing: whether NaN is a missing value rather than an error.
    Raises:
        ValueError: values that are not finite (counted over all samples, first position named), a column without a single
            value, or weights that are not as many as the samples.
    """
    total: Summary | None = None
    n = 0
    for block in Checked(source, missing=missing).blocks(SCAN_ROWS):
        if weights is None or len(weights) >= n + len(block):
            w_B = None if weights is None else weights[n : n + len(block)]
            part = summarise(block.numpy().astype(np.float64, copy=False), w_B)
            total = part if total is None else merge(total, part)
        n += len(block)
    if weights is not None and len(weights) != n:
        raise ValueError(f"sample_weight has {len(weights)} entries and X has {n} samples")
    if total is not None and missing and not (total.seen > 0).all():
        f = int((total.seen <= 0).argmax())
        raise ValueError(f"{_called(f, source.names)} holds no value at all (NaN in every row); leave it out")
    return total


def merge(a: Summary, b: Summary) -> Summary:
    """The summary of the samples of both (Chan, Golub and LeVeque 1979, eq. 1.5)."""
    seen_F = a.seen + b.seen
    share_F = b.seen / np.where(seen_F > 0, seen_F, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        apart_F = b.mean - a.mean
        mean_F = a.mean + apart_F * share_F
        scatter_F = a.scatter + b.scatter + apart_F**2 * (a.seen * share_F)
    return Summary(
        a.n + b.n, a.weight + b.weight, seen_F, mean_F, scatter_F, np.minimum(a.low, b.low), np.maximum(a.high, b.high)
    )


def summarise(x: np.ndarray, weights: np.ndarray | None = None) -> Summary:
    """The summary of one block, shape (B, F), NaN where a value is missing; weights of shape (B,)."""
    x_BF, w_B = x, weights
    with np.errstate(over="ignore", invalid="ignore"):
        if w_B is None and np.isfinite(x_BF.sum()):
            n, mean_F = len(x_BF), x_BF.mean(0)
            apart_BF = x_BF - mean_F
            scatter_F = np.einsum("ij,ij->j", apart_BF, apart_BF)
            return Summary(n, float(n), np.full(len(mean_F), float(n)), mean_F, scatter_F, x_BF.min(0), x_BF.max(0))
        w_B = np.ones(len(x_BF)) if w_B is None else np.asarray(w_B, dtype=np.float64)
        used_BF = ~np.isnan(x_BF) & (w_B > 0)[:, None]
        w_BF = np.where(used_BF, w_B[:, None], 0.0)
        seen_F, filled_BF = w_BF.sum(0), np.where(used_BF, x_BF, 0.0)
        mean_F = (w_BF * filled_BF).sum(0) / np.where(seen_F > 0, seen_F, 1.0)
        scatter_F = (w_BF * (filled_BF - mean_F) ** 2).sum(0)
    low_F, high_F = np.where(used_BF, x_BF, np.inf).min(0), np.where(used_BF, x_BF, -np.inf).max(0)
    return Summary(len(x_BF), float(w_B.sum()), seen_F, mean_F, scatter_F, low_F, high_F)


def _tensor(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array if array.dtype in (torch.float64, torch.float32) else array.double()
    plain = np.asarray(array)
    if plain.dtype not in (np.float64, np.float32):
        plain = plain.astype(np.float64)
    elif not plain.flags.writeable or min(plain.strides, default=0) < 0:
        # torch warns of memory that must not be written (nothing here writes to it, but a view cannot say so), and has no
        # negative strides.
        plain = np.array(plain, order="C")
    return torch.from_numpy(plain)


def _called(f: int, names: Sequence[str] | None) -> str:
    return f"column {names[f]!r}" if names is not None else f"column {f}"
