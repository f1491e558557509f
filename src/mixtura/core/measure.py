"""What a piece of work took: peak memory, seconds, and what this machine can do."""

import contextlib
import functools
import resource
import sys
import time
from pathlib import Path

import torch

__all__ = ["Meter", "bfloat16_over_float32", "matmul_rate", "peak_memory", "resident_memory"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Meter:
    """Context manager that measures wall-clock seconds and peak resident bytes of the block.

    On Linux the kernel's high-water mark is reset on entry, so the peak is the block's own; elsewhere it is the
    process's so far.

    Example:
        >>> with Meter() as meter:
        ...     _ = sum(range(1000))
        >>> meter.seconds > 0 and meter.peak_bytes > 0
        True
    """

    def __enter__(self) -> "Meter":
        # No such file, or a container that forbids it: the peak is then the process's.
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        self.seconds = 0.0
        self.peak_bytes = 0
        self._began = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak_bytes = peak_memory()


def peak_memory() -> int:
    """Largest resident memory of this process in bytes, since the last reset by :class:`Meter` where Linux allows it."""
    if (value := _status("VmHWM")) is not None:
        return value
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Resident memory of this process now, in bytes; 0 where the system does not tell."""
    return _status("VmRSS") or 0


def matmul_rate(dtype: torch.dtype = torch.float32, *, size: int = 768, seconds: float = 0.15) -> float:
    """Floating-point operations a second of a square matrix product on this machine, for estimates."""
    a = torch.randn(size, size).to(dtype)
    a @ a
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ a
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - began)


@functools.cache
def bfloat16_over_float32() -> float:
    """Rate of bfloat16 matrix products on this processor over that of float32 ones; measured once, a tenth of a second.

    About 0.1 on x86 without AVX-512, where PyTorch has no kernel of its own for them, and 1 to 8 elsewhere.
    """
    return matmul_rate(torch.bfloat16, size=512, seconds=0.05) / matmul_rate(torch.float32, size=512, seconds=0.05)


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
