"""Progress bars for long work: tqdm, silent when ``MIXTURA_PROGRESS=0`` or nobody looks."""

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm.auto import tqdm

__all__ = ["bar", "progress"]

T = TypeVar("T")


def bar(*, desc: str, unit: str, total: int | None = None, initial: int = 0, hidden: bool = False) -> Any:
    """A tqdm bar to update by hand, on standard error.

    It is off when the environment variable ``MIXTURA_PROGRESS`` is ``0``, and when standard error is no terminal and
    the variable is unset: a log file gains nothing from a thousand carriage returns. ``hidden`` turns it off anyway.
    """
    wanted = os.environ.get("MIXTURA_PROGRESS")
    off = hidden or wanted == "0" or (wanted is None and not sys.stderr.isatty())
    return tqdm(desc=desc, unit=unit, total=total, initial=initial, disable=off, dynamic_ncols=True, leave=False)


def progress(iterable: Iterable[T], *, desc: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Yield the items of ``iterable`` under a bar named ``desc`` that counts ``unit``."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(desc=desc, unit=unit, total=total) as shown:
        for item in iterable:
            yield item
            shown.update()
