"""Names of a package that import their module when they are first used (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds ``name`` in the module ``names[name]``.

    It keeps ``import mixtura.lm`` light, and breaks the circle when transformers, still being imported, asks for
    mixtura's classes.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(names[name]), name)

    return find
