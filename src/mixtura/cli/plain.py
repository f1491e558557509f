"""Where commands print what users named: as it is."""

from typing import Any

from rich.console import Console

__all__ = ["plain_console"]


def plain_console(**settings: Any) -> Console:
    """A console to which a class called ``[new]`` or a file called ``:cat:.wav`` is neither markup nor an emoji, in tables too.

    Args:
        settings: of rich's ``Console``, such as ``stderr`` or ``width``.
    """
    return Console(highlight=False, markup=False, emoji=False, **settings)
