"""Small C kernels, built on first use where the machine has a compiler: products of few rows, products of 8-bit integers, and
ReLU layers of wide networks.

PyTorch has no product that reads a bfloat16 matrix for one or a few rows at the speed of memory (0.4 of it on two cores
of an AMD Zen 4, and 0.5 for a single float32 row), and none at all for codes of 1, 2 or 3 bits. `skinny` and `packed` are
these. `relu_layers` makes one pass of what takes PyTorch ten a layer. Nothing depends on them: without a compiler, with
``MIXTURA_NATIVE=0``, or where anything about the build fails, `why_not` and its like say so and PyTorch does the work.

The library is kept in :func:`~mixtura.core.cache.cache_directory` under a hash of source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
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
from mixtura.core.packing import PLANES

__all__ = [
    "int8_mixed",
    "packed",
    "packed_values",
    "relu_layers",
    "skinny",
    "why_not",
    "why_not_int8",
    "why_not_packed",
    "why_not_relu_layers",
]

log = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("skinny.c", "packed.c", "int8_rows.c", "arccosine.c"))
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math")
_SYMBOLS = {torch.float32: "skinny_f32", torch.bfloat16: "skinny_bf16"}
_PACKED_WIDTHS = (1, 2, 3, 4, 8)
_MOST_GROUP = 512  # codes a group for which packed.c has room
_INT8_STEP = 32  # codes that int8_rows.c takes at a time
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


def why_not_packed(x: Tensor, bits: int, groups: int, n_out: int) -> str | None:
    """Reason why `packed` cannot multiply x (M, I) with a matrix of n_out rows of codes in so many groups, or None.

    Where it can, `packed_values` can give the matrix.
    """
    if x.device.type != "cpu":
        return f"packed runs on the CPU, got {x.device}"
    if x.dtype == torch.float64:
        return "packed sums in float32, got float64"
    if bits not in _PACKED_WIDTHS:
        return f"packed takes codes of {_PACKED_WIDTHS} bits, got {bits}"
    size = x.shape[1] // groups
    if size % 16 or size > _MOST_GROUP or groups * n_out % (8 // min(PLANES[bits])):
        return (
            f"packed takes groups of 16 a <= {_MOST_GROUP} codes that fill whole bytes, got {groups} x {n_out} x {size}"
        )
    library = _library()
    return library if isinstance(library, str) else None


def packed(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """x times a matrix of packed codes, transposed.

    x is rounded to 16-bit integers group by group, an error of at most 2^-16 of the largest |x| of its group.

    Args:
        x: shape (M, I), floating point; I = G S.
        codes: bytes of :func:`mixtura.core.packing.pack` over the flattened (G, O, S), shape (G O S bits / 8,).
        scale: shape (G, O), int16 that holds the bits of float16.
        zero: shape (G, O), uint8; not read for 1 bit, whose codes stand for -scale and +scale.
        bits: 1, 2, 3, 4 or 8. `why_not_packed` must have said None.
    Returns:
        Shape (M, O), float32.
    """
    library = _library()
    assert not isinstance(library, str), library
    assert codes.is_contiguous() and scale.is_contiguous() and (zero is None or zero.is_contiguous())
    x_MI = x.float().contiguous()
    (rows, n_in), (groups, n_out) = x_MI.shape, scale.shape
    y_MO = torch.empty(rows, n_out)
    failed = library.packed_product(
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(scale.data_ptr()),
        ctypes.c_void_p(None if zero is None else zero.data_ptr()),
        *map(ctypes.c_int64, (bits, groups, n_out, n_in // groups)),
        ctypes.c_void_p(x_MI.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_void_p(y_MO.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for a product of {rows} x {n_in} with {n_out} x {n_in} packed weights")
    return y_MO


def packed_values(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, width: int) -> Tensor:
    """The matrix that `packed` multiplies with, float32, shape (O, I), for a width I."""
    library = _library()
    assert not isinstance(library, str), library
    assert codes.is_contiguous() and scale.is_contiguous() and (zero is None or zero.is_contiguous())
    groups, n_out = scale.shape
    y_OI = torch.empty(n_out, width)
    library.packed_values(
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(scale.data_ptr()),
        ctypes.c_void_p(None if zero is None else zero.data_ptr()),
        *map(ctypes.c_int64, (bits, groups, n_out, width // groups)),
        ctypes.c_void_p(y_OI.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return y_OI


def why_not_int8(x: Tensor, group_size: int) -> str | None:
    """Reason why `int8_mixed` cannot multiply x (M, I) with rows of codes in groups of this size, or None."""
    if x.device.type != "cpu":
        return f"int8_mixed runs on the CPU, got {x.device}"
    if x.dtype == torch.float64:
        return "int8_mixed adds groups in float32, got float64"
    if group_size % _INT8_STEP or group_size > _MOST_GROUP:
        return f"int8_mixed takes groups of {_INT8_STEP} a <= {_MOST_GROUP} codes, got {group_size}"
    library = _library()
    return library if isinstance(library, str) else None


def int8_mixed(
    x: Tensor,
    low: tuple[Tensor, Tensor, Tensor],
    high: tuple[Tensor, Tensor],
    place: Tensor,
    group_size: int,
    *,
    precise: bool = False,
) -> Tensor:
    """x times a matrix of rows of 4 and of 8 bits, transposed; integers first, scales after.

    Args:
        x: shape (M, I), floating point. It is rounded to 8-bit integers, each group of a row by its own largest value.
        low: codes, every group of every row packed by itself (:func:`mixtura.core.packing.pack`), uint8, (L, I / 2); scales,
            int16 that holds the bits of float16, (L, G); zero points, uint8, (L, G).
        high: codes, integers plus 128, uint8, (H, I); scales, (H, G).
        place: column of each row, the low ones first, int32, (L + H,), all different. All of these contiguous.
        group_size: I / G. `why_not_int8` must have said None.
        precise: round what the integers miss to integers of its own, and add both products.
    Returns:
        Shape (M, L + H), float32.
    """
    library = _library()
    assert not isinstance(library, str), library
    x_MI = x.float().contiguous()
    rows, n_in = x_MI.shape
    y_MO = torch.empty(rows, len(place))
    # Plain numbers, whose types are declared: wrapping each took as long as a small product.
    failed = library.int8_mixed(
        x_MI.data_ptr(),
        rows,
        n_in // group_size,
        group_size,
        precise,
        place.data_ptr(),
        *(t.data_ptr() for t in low),
        len(low[0]),
        *(t.data_ptr() for t in high),
        len(high[0]),
        y_MO.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a product of {rows} x {n_in} with {len(place)} x {n_in} packed weights")
    return y_MO


def why_not_relu_layers(cross: Tensor) -> str | None:
    """Reason why `relu_layers` cannot work on these covariances, or None."""
    if cross.device.type != "cpu" or cross.dtype != torch.float64:
        return f"relu_layers works on float64 on the CPU, got {cross.dtype} on {cross.device}"
    library = _library()
    return library if isinstance(library, str) else None


def relu_layers(cross: Tensor, left: Tensor, right: Tensor, weight: float = 1.0, bias: float = 0.0) -> Tensor:
    """Covariances after L layers c -> weight c + bias, each followed by a ReLU: E[relu(u) relu(v)] for Gaussian (u, v).

    Args:
        cross: covariances of N inputs with M before the first layer, shape (N, M), or (N, M, I, J) at each position.
            `why_not_relu_layers` must have said None.
        left: standard deviations of u before each ReLU, shape (L, N) or (L, N, I, J), >= 0.
        right: standard deviations of v, shape (L, M) or (L, M, I, J), >= 0.
        weight, bias: of every layer; 1 and 0 leave the ReLU alone.
    Returns:
        Shape of ``cross``, a new tensor.
    Source:
        Cho and Saul 2009, eq. 3 and 6 (n = 1), halved for one-sided activations.
    """
    library = _library()
    assert not isinstance(library, str), library
    found = cross.clone(memory_format=torch.contiguous_format)
    # A zero input has no direction, and its covariance with all others is zero whatever the correlation.
    smallest = 1e-154
    parts = [t.contiguous() for side in (left, right) for t in (side, side.clamp(min=smallest).reciprocal())]
    n, m = cross.shape[:2]
    library.relu_layers(
        *(ctypes.c_void_p(t.data_ptr()) for t in (found, *parts)),
        ctypes.c_double(weight),
        ctypes.c_double(bias),
        *map(ctypes.c_int64, (len(left), n, m, math.prod(cross.shape[2:]))),
    )
    return found


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
    for symbol in (*_SYMBOLS.values(), "relu_layers", "packed_values"):
        getattr(library, symbol).restype = None
    p, n = ctypes.c_void_p, ctypes.c_int64
    library.int8_mixed.argtypes = [p, n, n, n, n, p, p, p, p, n, p, p, n, p, n]
    return library


def _built(compiler: str) -> Path:
    key = hashlib.sha256()
    for source in _SOURCES:
        key.update(source.read_bytes())
    for part in (" ".join(_FLAGS), compiler, torch.__version__, platform.machine(), _processor()):
        key.update(part.encode())
    folder = cache_directory()
    path = folder / f"products-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        linked = Path(scratch) / "products.so"
        compiled = [str(Path(scratch) / f"{source.stem}.o") for source in _SOURCES]
        # Linked without OpenMP on purpose: its calls then bind to the runtime that PyTorch has loaded. A second runtime
        # would bring its own threads, which wait in a busy loop and take the cores from PyTorch's.
        for command in (
            *(
                [compiler, *_FLAGS, "-c", str(source), "-o", out]
                for source, out in zip(_SOURCES, compiled, strict=True)
            ),
            [compiler, "-shared", *compiled, "-o", str(linked)],
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
