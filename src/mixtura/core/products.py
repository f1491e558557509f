"""Matrix products over the rows of each expert, by the fastest way that this machine and dtype have.

A mixture multiplies few rows by many different matrices, each used once a step: the opposite of what general matrix
products are tuned for. Measured on two cores of an AMD Zen 4 (benchmarks/experts_forward.py), what counts is

- float32 through oneDNN, which is faster there than MKL from 3 rows on;
- few rows by `native.skinny`, at the speed of memory. Without it, one float32 row as a batch of row blocks: MKL runs a
  single matrix-vector product on one core only, at half the memory's speed;
- gradients of all weights in memory that the system hands out as zeros: those of experts without rows cost nothing.

All ways agree up to rounding. Shapes: S rows of all experts, M of one, E experts, K inputs, N outputs, T tokens,
D width. A span is a triple (expert, first row, row behind the last).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.core import native

__all__ = ["Span", "gather_sum", "grouped_linear", "grouped_times", "transposed_times", "zeros_like"]

Span = tuple[int, int, int]

_FEW_ROWS_F32 = 3  # from here on oneDNN
_SKINNY_ROWS = 24  # mean rows an expert up to which `native.skinny` wins
_BLOCKS = 8  # row blocks of a matrix-vector product; more than cores, so that no core waits for long
_LARGE_BYTES = 4 << 20  # from here on zeros are fresh memory


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spans: Sequence[Span],
    *,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x[start:stop] @ weight[e].T + bias[e] for every span, shape (S, N).

    Args:
        x: shape (S, K); every row in exactly one span.
        weight: shape (E, N, K); (E, K, N) when transposed.
        bias: shape (E, N).
        out: where to write the result, shape (S, N).
    """
    if not transposed and len(x) <= _SKINNY_ROWS * len(spans) and native.why_not(x, weight) is None:
        y_SN = native.skinny(x, weight, spans)
    elif len(spans) == 1 and out is None:
        y_SN = _linear(x, _matrix(weight, spans[0][0], x, transposed))
    else:
        y_SN = x.new_empty(len(x), weight.shape[2 if transposed else 1]) if out is None else out
        for e, start, stop in spans:
            _linear_into(y_SN[start:stop], x[start:stop], _matrix(weight, e, x, transposed))
    if bias is not None:
        for e, start, stop in spans:
            y_SN[start:stop] += bias[e].to(x.dtype)
    return y_SN if out is None or y_SN is out else out.copy_(y_SN)


def grouped_times(y: Tensor, weight: Tensor, spans: Sequence[Span], *, transposed: bool = False) -> Tensor:
    """y[start:stop] @ weight[e] for every span, shape (S, K): takes a gradient back through `grouped_linear`."""
    parts = [_times(y[start:stop], _matrix(weight, e, y, transposed)) for e, start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _matrix(weight: Tensor, e: int, x: Tensor, transposed: bool) -> Tensor:
    """Weight of one expert as a linear layer holds it, (N, K), in the dtype of x."""
    return (weight[e].T if transposed else weight[e]).to(x.dtype)


def _times(y: Tensor, weight: Tensor) -> Tensor:
    if _onednn_float32(y):
        return _onednn_linear(y, weight.T)
    return torch.mm(y, weight)


def transposed_times(y: Tensor, x: Tensor, out: Tensor) -> None:
    """Writes y.T @ x into out (N, K) for y (M, N), x (M, K): the gradient of `linear`'s weight."""
    if out.dtype == y.dtype:
        torch.mm(y.T, x, out=out)
    else:
        out.copy_(torch.mm(y.T, x))


def gather_sum(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_k weights_tk * rows[places_tk]: shape (T, D), dtype of rows.

    Args:
        rows: shape (S, D).
        places: shape (T, K), in [0, S).
        weights: shape (T, K); 1 when left out.
    """
    if rows.dtype == torch.float64 or rows.shape[0] == 0 or places.shape[1] == 0 or rows.device.type != "cpu":
        picked_TKD = rows[places]
        if weights is not None:
            picked_TKD = picked_TKD * weights.unsqueeze(-1)
        return picked_TKD.sum(1).to(rows.dtype)
    # One pass over the rows that accumulates in float32. index_add_ takes 30 times as long for float32.
    scale = None if weights is None else weights.to(rows.dtype)
    return F.embedding_bag(places, rows, mode="sum", per_sample_weights=scale)


def zeros_like(weight: Tensor) -> Tensor:
    """Zeros of weight's shape and dtype, of which only what is written takes memory and time."""
    if weight.device.type != "cpu" or weight.nbytes < _LARGE_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    # Not in huge pages: 400 MB then took 61 to 771 ms to touch on a virtual machine, and 156 always without.
    memory = mmap.mmap(-1, weight.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=weight.dtype).view(weight.shape)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    n_rows, n_out = x.shape[0], weight.shape[0]
    if x.device.type != "cpu":
        return F.linear(x, weight)
    if x.dtype == torch.bfloat16:
        return F.linear(x, weight)
    if n_rows == 1 and n_out % _BLOCKS == 0 and weight.stride(1) == 1:
        blocks = weight.view(_BLOCKS, n_out // _BLOCKS, -1)
        return torch.bmm(blocks, x.T.expand(_BLOCKS, -1, -1)).view(1, n_out)
    if n_rows >= _FEW_ROWS_F32 and _onednn_float32(x):
        return _onednn_linear(x, weight)
    return torch.mm(weight, x.T).T


def _linear_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    if x.dtype == torch.bfloat16:
        torch.mm(x, weight.T, out=out)
    else:
        out.copy_(_linear(x, weight))


def _onednn_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _HAS_ONEDNN and bool(torch.backends.mkldnn.enabled)


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]


def _find_onednn() -> bool:
    # The operator that torch.compile uses for linear layers. It is not public, so its absence must not hurt.
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight = torch.ones(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return bool(torch.equal(_onednn_linear(x, weight), x @ weight.T))
    except (RuntimeError, TypeError, NotImplementedError):
        return False


_HAS_ONEDNN = _find_onednn()
