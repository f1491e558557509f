"""Options that are checked before any work is done for them; light, so that no command waits for another room's packages."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mixtura.core.checkpoint import check_replaceable

__all__ = ["check_device", "check_writable"]


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or this machine does not have."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:0, mps or the like, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, and this machine has no CUDA device; use --device cpu")


def check_writable(out: Path, sources: Sequence[str], *, mark: str = "config.json") -> None:
    """Refuse an output that is or holds one of the sources, is a file, or is a directory of other things: it is replaced whole.

    Args:
        out: directory to write.
        sources: what is read; names on the hub are passed over.
        mark: file by which an earlier result is known, which may be replaced.
    """
    for source in sources:
        if not (out.exists() and Path(source).exists()):
            continue
        if out.resolve() == Path(source).resolve():
            raise ValueError(f"{out} is also the source; write to another directory")
        if Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out} holds {source}, which would be lost; write to another directory")
    check_replaceable(out, mark)
