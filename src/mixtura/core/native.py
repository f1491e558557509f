"""A small C kernel for the products of few rows, built on first use where the machine has a compiler.

PyTorch has no product that reads a bfloat16 matrix for one or a few rows at the speed of memory (0.4 of it on two cores
of an AMD Zen 4, and 0.5 for a single float32 row). `skinny` does. Nothing depends on it: without a compiler, with
``MIXTURA_NATIVE=0``, or where anything about the build fails, `why_not` says so and `products` uses PyTorch.

The library is kept in :func:`~mixtura.core.cache.cache_directory` under a hash of source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixtura.core.cache import cache_directory

__all__ = ["skinny", "why_not"]

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("skinny.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
_SYMBOLS = {torch.float32: "skinny_f32", torch.bfloat16: "skinny_bf16"}
_BUILD_SECONDS = 60


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Reason why `skinny` cannot multiply these, or None."""
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"skinny runs on the CPU, got {x.device} and {weight.device}"
    if x.dtype not in _SYMBOLS or weight.dtype != x.dtype:
        return f"skinny takes float32 or bfloat16, both alike, got {x.dtype} and {weight.dtype}"
    if not weight.is_contiguous() or weight.shape[1] % 4 or weight.shape[2] % 32:
        return f"skinny takes a contiguous weight of 4 a rows and 32 b columns, got {tuple(weight.shape)}"
    library = _library()
    return library if isinstance(library, str) else None


def skinny(x: Tensor, weight: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
    """x[start:stop] @ weight[e].T for every span (e, start, stop), summed in float32.

    Args:
        x: shape (S, K); every row in exactly one span.
        weight: shape (E, N, K), contiguous. `why_not` must have said None.
    Returns:
        Shape (S, N), dtype of x.
    """
    library = _library()
    assert not isinstance(library, str), library
    x_SK = x.contiguous()
    y_SN = torch.empty(x.shape[0], weight.shape[1])
    flat = [number for span in spans for number in span]
    call = getattr(library, _SYMBOLS[weight.dtype])
    call(
        ctypes.c_void_p(x_SK.data_ptr()),
        ctypes.c_void_p(weight.data_ptr()),
        (ctypes.c_int64 * len(flat))(*flat),
        ctypes.c_int64(len(spans)),
        ctypes.c_int64(weight.shape[2]),
        ctypes.c_int64(weight.shape[1]),
        ctypes.c_void_p(y_SN.data_ptr()),
    )
    return y_SN.to(x.dtype)


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none. Built once a process at most."""
    if os.environ.get("MIXTURA_NATIVE", "1") == "0":
        return "MIXTURA_NATIVE=0"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return "no C compiler (cc, gcc or clang) on the PATH"
    try:
        path = _built(compiler)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("few-row products stay with PyTorch: %s", error)
        return f"building or loading failed: {error}"
    for symbol in _SYMBOLS.values():
        getattr(library, symbol).restype = None
    return library


def _built(compiler: str) -> Path:
    source = _SOURCE.read_bytes()
    key = hashlib.sha256()
    for part in (source, " ".join(_FLAGS), compiler, torch.__version__, platform.machine(), _processor()):
        key.update(part if isinstance(part, bytes) else part.encode())
    folder = cache_directory()
    path = folder / f"skinny-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch) / "skinny.o", Path(scratch) / "skinny.so"
        # Linked without OpenMP on purpose: its calls then bind to the runtime that PyTorch has loaded. A second runtime
        # would bring its own threads, which wait in a busy loop and take the cores from PyTorch's.
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_BUILD_SECONDS)
        linked.replace(path)  # another process may have been faster; both files are the same
    log.info("built %s with %s", path, compiler)
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return platform.processor()
