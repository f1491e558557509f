"""Matrix products over the rows of one expert, each by the fastest way that this machine and dtype have.

A mixture multiplies few rows by many different matrices, each used once a step: the opposite of what general matrix
products are tuned for. Measured on two cores of an AMD Zen 4 (benchmarks/experts_forward.py), what counts is

- never to rearrange a weight: oneDNN rearranges its *second* operand for bfloat16, so from 32 rows on the weight goes
  first and the few rows second;
- float32 through oneDNN, which is faster there than MKL from 3 rows on;
- one row as a batch of row blocks: MKL runs a single matrix-vector product on one core only, at half the memory's
  speed.

All ways agree up to rounding. Shapes: M rows of one expert, K inputs, N outputs, T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gather_sum", "linear", "times", "transposed_times"]

_FEW_ROWS_BF16 = 32  # from here on the weight goes first
_FEW_ROWS_F32 = 3  # from here on oneDNN
_BLOCKS = 8  # row blocks of a matrix-vector product; more than cores, so that no core waits for long


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x (M, K), weight (N, K), bias (N,), any strides. The result may be a transposed view."""
    weight = weight.to(x.dtype)
    y_MN = _linear(x, weight)
    return y_MN if bias is None else y_MN.add_(bias)


def times(y: Tensor, weight: Tensor) -> Tensor:
    """y @ weight for y (M, N), weight (N, K): what takes a gradient back through `linear`."""
    weight = weight.to(y.dtype)
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


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    n_rows, n_out = x.shape[0], weight.shape[0]
    if x.device.type != "cpu":
        return F.linear(x, weight)
    if x.dtype == torch.bfloat16:
        return torch.mm(weight, x.T).T if n_rows >= _FEW_ROWS_BF16 else F.linear(x, weight)
    if n_rows == 1 and n_out % _BLOCKS == 0 and weight.stride(1) == 1:
        blocks = weight.view(_BLOCKS, n_out // _BLOCKS, -1)
        return torch.bmm(blocks, x.T.expand(_BLOCKS, -1, -1)).view(1, n_out)
    if n_rows >= _FEW_ROWS_F32 and _onednn_float32(x):
        return _onednn_linear(x, weight)
    return torch.mm(weight, x.T).T


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
