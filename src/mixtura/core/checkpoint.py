"""Nothing is lost while something is written: write beside, then rename.

A directory or file appears under its name only when it is complete. An interrupt, a full disk or an exception leaves
what stood there before, and removes the half-written sibling.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = ["atomic_directory", "atomic_file", "check_replaceable", "read_json", "verify_safetensors", "write_json"]


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of ``path`` to write to; it becomes ``path`` when the block ends without an error.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_file(folder / "a.txt") as beside:
        ...     _ = beside.write_text("whole")
        >>> (folder / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary sibling directory; it takes the place of ``path`` when the block ends without an error.

    A directory cannot replace a filled one in a single step, so the old one steps aside first and is deleted last; if
    the second rename fails, the old one steps back.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} exists and is not a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    beside, aside = (path.with_name(f".{path.name}.{tag}.{kind}") for kind in ("partial", "old"))
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            path.rename(aside)
        try:
            beside.rename(path)
        except OSError:
            if aside.exists():
                aside.rename(path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(path: str | Path, mark: str) -> None:
    """Refuse to replace a directory, whole as :func:`atomic_directory` does, that is no earlier result.

    Args:
        path: what is to be written; it need not exist.
        mark: file by which an earlier result is known.
    Raises:
        ValueError: a file, or a directory with files in it and without the mark.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file; give a directory to write")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).exists():
        raise ValueError(f"{path} holds other files, which would be lost; name a new directory")


def write_json(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` as indented JSON, whole or not at all. NaN and infinity are refused: they are no JSON."""
    with atomic_file(path) as beside:
        beside.write_text(json.dumps(payload, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is no JSON or holds something else than an object; the path and position are named.
    """
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(payload, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(payload).__name__}")
    return payload


def verify_safetensors(directory: str | Path) -> None:
    """Check that every safetensors file below ``directory`` opens, so that a truncated download is named as such.

    Only headers and lengths are read, never the tensors.

    Raises:
        ValueError: a file is truncated or its header is damaged; the file is named.
    """
    for file in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is damaged ({error}); copy or download it again, "
                "its size should match the one in the place it came from"
            ) from error


def _sync(file: Path) -> None:
    # Without it a crash after the rename can leave an empty file under the final name.
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
