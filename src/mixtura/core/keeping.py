"""Estimators on disk: ``save`` and ``load`` as safetensors and JSON, nothing pickled.

A saved estimator is a directory: ``estimator.json`` (class, version, parameters, plain fitted attributes) and
``arrays.safetensors`` (every array among them). Loading builds only classes of this package.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mixtura.core.checkpoint import atomic_directory, read_json, verify_safetensors, write_json

__all__ = ["Keeping", "check_place"]

META, ARRAYS = "estimator.json", "arrays.safetensors"
PACKAGE = __name__.partition(".")[0]


class Keeping:
    """Mixin of an estimator: what it was given and what it learned, written to a directory and read back.

    Kept are the constructor's parameters (``get_params``) and the attributes that end in an underscore. A value may be
    None, a number, text, an array or tensor, a record (dataclass) or another such estimator of this package, or a list,
    tuple or dict of those.
    """

    def save(self, path: str | Path) -> None:
        """Write the estimator to the directory ``path``, whole or not at all; one that was saved there before is replaced.

        Raises:
            ValueError: ``path`` is a file, or a directory with anything else in it.
            TypeError: a parameter or attribute holds something else than the values named above; it is named.
        """
        check_place(path)
        arrays: dict[str, np.ndarray] = {}
        meta = _parts(self, "", arrays)
        with atomic_directory(path) as beside:
            save_file(arrays, beside / ARRAYS)
            write_json(beside / META, meta)

    def save_pretrained(self, path: str | Path) -> None:
        """``save``, by the name that models have for it."""
        self.save(path)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """``load``, by the name that models have for it."""
        return cls.load(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an estimator that ``save`` wrote.

        Raises:
            ValueError: no such directory, a damaged file, or an estimator of another class (both are named).
        """
        path = Path(path)
        if not (path / META).exists():
            raise ValueError(f"{path} holds no saved estimator: {META} is missing")
        meta = read_json(path / META)
        if meta.get("class") != _path(cls):
            raise ValueError(
                f"{path} holds an estimator of class {meta.get('class')}; load it with that class, not with {_path(cls)}"
            )
        verify_safetensors(path)
        arrays = load_file(path / ARRAYS)
        found: Self = _build(cls, meta, arrays)
        return found


def check_place(path: str | Path) -> None:
    """Raise a ValueError where saving to ``path`` would replace anything but an estimator that was saved before."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} exists and is not a directory; an estimator is saved as a directory of its own")
    foreign = sorted(file.name for file in path.iterdir() if file.name not in (META, ARRAYS)) if path.exists() else []
    if foreign:
        raise ValueError(
            f"{path} is a directory with other files in it ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}), "
            "which saving would replace; give a new or an empty one"
        )


def _parts(estimator: Any, at: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Class, parameters and fitted attributes of an estimator, as JSON; its arrays stand under ``at``."""
    fitted = {name: value for name, value in vars(estimator).items() if name.endswith("_") and not name.startswith("_")}
    return {
        "class": _path(type(estimator)),
        "parameters": {
            name: _write(value, f"{at}parameter/{name}", arrays)
            for name, value in estimator.get_params(deep=False).items()
        },
        "fitted": {name: _write(value, f"{at}fitted/{name}", arrays) for name, value in fitted.items()},
    }


def _build(kind: Any, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    found = kind(**{name: _read(value, arrays) for name, value in meta["parameters"].items()})
    for name, value in meta["fitted"].items():
        setattr(found, name, _read(value, arrays))
    return found


def _write(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """``value`` as JSON; arrays move to ``arrays`` under ``name``. What JSON lacks is a dict with one key ``$kind``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has no infinity, and hex keeps every bit.
        return {"$float": value.hex()}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Tensor):
        arrays[name] = np.ascontiguousarray(value.detach().cpu().numpy())
        return {"$tensor": name}
    if isinstance(value, np.generic):
        return _write(value.item(), name, arrays)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            return {"$list": _write(value.tolist(), name, arrays), "as": value.dtype.str}
        arrays[name] = np.ascontiguousarray(value)
        return {"$array": name}
    if isinstance(value, (list, tuple)):
        items = [_write(item, f"{name}/{i}", arrays) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        pairs = [
            [_write(key, f"{name}/{i}/key", arrays), _write(item, f"{name}/{i}", arrays)]
            for i, (key, item) in enumerate(value.items())
        ]
        return {"$dict": pairs}
    if isinstance(value, Keeping) and type(value).__module__.partition(".")[0] == PACKAGE:
        return {"$estimator": _parts(value, f"{name}/", arrays)}
    if dataclasses.is_dataclass(value) and type(value).__module__.partition(".")[0] == PACKAGE:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        written = {key: _write(item, f"{name}/{key}", arrays) for key, item in fields.items()}
        return {"$record": _path(type(value)), "fields": written}
    raise TypeError(
        f"{name.replace('/', ' ', 1)} is a {type(value).__name__}, which cannot be saved without pickle; "
        "numbers, text, arrays, records and estimators of this package and lists or dicts of them can"
    )


def _read(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_read(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float.fromhex(value["$float"])
    if "$dtype" in value:
        return getattr(torch, value["$dtype"])
    if "$tensor" in value:
        return torch.from_numpy(arrays[value["$tensor"]])
    if "$array" in value:
        return arrays[value["$array"]]
    if "$list" in value:
        return np.array(_read(value["$list"], arrays), dtype=value["as"])
    if "$tuple" in value:
        return tuple(_read(item, arrays) for item in value["$tuple"])
    if "$dict" in value:
        return {_read(key, arrays): _read(item, arrays) for key, item in value["$dict"]}
    if "$estimator" in value:
        return _build(_own(value["$estimator"]["class"]), value["$estimator"], arrays)
    return _own(value["$record"])(**{key: _read(item, arrays) for key, item in value["fields"].items()})


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _own(path: str) -> type:
    """The dataclass or estimator at an import path of this package; all else is refused, so that loading runs nothing foreign."""
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] == PACKAGE:
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Keeping)):
            return found
    raise ValueError(f"{path!r} is no record of {PACKAGE}; the file was not written by save")
