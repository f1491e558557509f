"""The option --device, checked before any work is done for it."""

import torch

__all__ = ["check_device"]


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or this machine does not have."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:0, mps or the like, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, and this machine has no CUDA device; use --device cpu")
