"""The backend ``triton`` of `dispatch`: a mixture on a GPU whose counts never travel to the host.

Pairs are sorted by expert once, on the device. Both products then run over the rows of all experts in one launch each, the
first reads tokens where they lie, and one more launch adds up what a token's experts say. The host only ever knows that
there are S = T K pairs, so nothing waits for the GPU, and `torch.compile` sees one graph without breaks. Kept for the
backward pass: the up product, what ``inner`` keeps, and the expert outputs; ``grouped`` keeps the up product alone. No
second derivative.

The kernels (`gpu_kernels`) agree with ``loop`` under Triton's interpreter, gradients too, and compile for NVIDIA's Ampere, Hopper
and Blackwell. They have not run on a GPU yet.

There is no kernel that fuses the gate in: a running count in token order, which a capacity's "first come" needs, makes
blocks of tokens wait for each other, and a stable sort gives the same order with any gate and any choice of who stays.

Shapes: T tokens, K experts a token visits, S = T K, E experts, D width, O and N outputs, I inputs, H hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import triton
from torch import Tensor

from mixtura.core import gpu_kernels

if TYPE_CHECKING:
    from mixtura.core.dispatch import ExpertStack

__all__ = ["INTERPRETED", "expert_product", "experts", "sort_pairs"]

INTERPRETED = gpu_kernels.INTERPRETED

_WIDTH = 1024  # columns of one row that a program sums


def experts(x: Tensor, stack: ExpertStack, indices: Tensor, weights: Tensor) -> Tensor:
    """`dispatch` of arguments whose shapes fit; an index outside [0, E] stops the device with an assertion."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    up, down = (stack.up.mT, stack.down.mT) if stack.transposed else (stack.up, stack.down)
    groups = sort_pairs(indices, stack.n_experts)
    with torch.autocast(device, enabled=False):
        u_SO = expert_product(x.to(dtype), up, stack.up_bias, *groups, True)
        h_SH = stack.inner(u_SO)
        y_SD = expert_product(h_SH, down, stack.down_bias, *groups, False)
        if stack.finish is not None:
            y_SD = stack.finish(y_SD)
        y_TD: Tensor = _sum(y_SD, weights, *groups)
    return y_TD.to(x.dtype)


def sort_pairs(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``order`` (S,), ``places`` (T, K) and ``offsets`` (E + 2,), as `gpu_kernels` describes them."""
    experts_S, order = indices.reshape(-1).sort(stable=True)
    names = torch.arange(n_experts + 2, device=indices.device, dtype=indices.dtype)
    offsets = torch.searchsorted(experts_S, names)  # bincount would ask the device for the largest index
    n_pairs = len(order)
    inside = (offsets[0] == 0) & (offsets[-1] == n_pairs)
    torch._assert_async(inside, f"indices must be in [0, {n_experts}], where {n_experts} skips the pair")
    places = torch.empty_like(order).scatter_(0, order, torch.arange(n_pairs, device=order.device))
    return order, places.view(indices.shape), offsets


@torch.library.custom_op("mixtura::expert_product", mutates_args=())
def expert_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, places: Tensor, offsets: Tensor, gather: bool
) -> Tensor:
    """weight[e] @ x[s] + bias[e] for the rows s of every expert e, shape (S, N), dtype of x.

    Args:
        x: tokens (T, I) with ``gather``, else sorted rows (S, I).
        weight: shape (E, N, I), any strides and dtype.
        bias: shape (E, N).
    """
    n_experts, n_out, n_in = weight.shape
    n_pairs = len(order)
    out_SN = x.new_empty(n_pairs, n_out)
    rows, columns, depth, launch = _tile(x.dtype, weight.dtype, n_pairs // n_experts)
    n_tiles = triton.cdiv(n_pairs, rows) + n_experts + 1
    with _device_of(x):
        gpu_kernels.expert_product[(n_tiles * triton.cdiv(n_out, columns),)](
            x,
            weight,
            weight if bias is None else bias,
            order,
            offsets,
            out_SN,
            max(places.shape[1], 1),
            n_experts + 1,
            n_out,
            n_in,
            *x.stride(),
            *weight.stride(),
            *((0, 0) if bias is None else bias.stride()),
            GATHER=gather,
            BIAS=bias is not None,
            GROUPS=triton.next_power_of_2(n_experts + 1),
            ROWS=rows,
            OUT=columns,
            IN=depth,
            SHARED=gpu_kernels.SHARED,
            **launch,
        )
    return out_SN


@expert_product.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, places: Tensor, offsets: Tensor, gather: bool
) -> Tensor:
    return x.new_empty(order.shape[0], weight.shape[1])


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gather = inputs
    ctx.save_for_backward(*tensors)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *groups = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = grad_bias = None
    if wants_x:
        grad_x = expert_product(grad, weight.mT, None, *groups, False)
        if ctx.gather:
            grad_x = _sum(grad_x, None, *groups)
    if wants_weight or wants_bias:
        grad_weight, grad_bias = _weight_gradients(grad, x, weight, *groups, ctx.gather, wants_bias)
        grad_bias = grad_bias.to(bias.dtype) if wants_bias else None
    return grad_x, grad_weight if wants_weight else None, grad_bias, None, None, None, None


expert_product.register_autograd(_product_backward, setup_context=_keep_product)


@torch.library.custom_op("mixtura::expert_weight_gradients", mutates_args=())
def _weight_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, order: Tensor, places: Tensor, offsets: Tensor, gather: bool, bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `expert_product` at its weight and, in float32, at its bias (empty without)."""
    n_experts, n_out, n_in = weight.shape
    grad_weight = torch.empty_like(weight)
    grad_bias = weight.new_empty(weight.shape[:2] if bias else (0, 0), dtype=torch.float32)
    # The roles turn: a tile is (outputs, inputs), and rows are what is summed over.
    size, _, depth, launch = _tile(x.dtype, x.dtype, max(n_out, n_in))
    n_programs = n_experts * triton.cdiv(n_out, size) * triton.cdiv(n_in, size)
    with _device_of(x):
        gpu_kernels.weight_gradient[(n_programs,)](
            grad,
            x,
            order,
            offsets,
            grad_weight,
            grad_bias,
            max(places.shape[1], 1),
            n_out,
            n_in,
            *grad.stride(),
            *x.stride(),
            *grad_weight.stride(),
            GATHER=gather,
            BIAS=bias,
            ROWS=depth,
            OUT=size,
            IN=size,
            **launch,
        )
    return grad_weight, grad_bias


@_weight_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, order: Tensor, places: Tensor, offsets: Tensor, gather: bool, bias: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(weight.shape[:2] if bias else (0, 0), dtype=torch.float32)


@torch.library.custom_op("mixtura::sum_pairs", mutates_args=())
def _sum(rows: Tensor, weights: Tensor | None, order: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """sum_k weights_tk * rows[places_tk] without the sentinels: shape (T, D), dtype of rows.

    Args:
        rows: shape (S, D).
        weights: shape (T, K); 1 when left out.
    """
    n_tokens, k = places.shape
    width = rows.shape[1]
    out_TD = rows.new_empty(n_tokens, width)
    block = min(_WIDTH, triton.next_power_of_2(width))
    with _device_of(rows):
        gpu_kernels.sum_pairs[(n_tokens, triton.cdiv(width, block))](
            rows,
            rows if weights is None else weights.contiguous(),
            places,
            offsets[-2:],
            out_TD,
            k,
            width,
            *rows.stride(),
            WEIGHTED=weights is not None,
            WIDTH=block,
        )
    return out_TD


@_sum.register_fake
def _(rows: Tensor, weights: Tensor | None, order: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(places.shape[0], rows.shape[1])


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.saved_tensors[1] is None:  # only a gradient is summed without weights
        _no_second_derivative(ctx)
    return (*_sum_gradients(grad, *ctx.saved_tensors), None, None, None)


_sum.register_autograd(_sum_backward, setup_context=_keep_sum)


@torch.library.custom_op("mixtura::sum_pairs_gradients", mutates_args=())
def _sum_gradients(
    grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, places: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `_sum` at its rows and its weights."""
    grad_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=rows.device)
    width = rows.shape[1]
    with _device_of(rows):
        gpu_kernels.sum_pairs_gradients[(len(order),)](
            grad,
            rows,
            weights.contiguous(),
            order,
            offsets[-2:],
            grad_rows,
            grad_weights,
            max(places.shape[1], 1),
            width,
            *grad.stride(),
            *rows.stride(),
            WIDTH=min(_WIDTH, triton.next_power_of_2(width)),
        )
    return grad_rows, grad_weights


@_sum_gradients.register_fake
def _(
    grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, places: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device), torch.empty(
        weights.shape, dtype=weights.dtype, device=weights.device
    )


def _no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("backend 'triton' has no second derivative; backend='loop' has")


for _gradients in (_weight_gradients, _sum_gradients):
    _gradients.register_autograd(_no_second_derivative)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Where kernels are launched: Triton takes the current device, whatever the tensors say."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


def _tile(dtype: torch.dtype, weight_dtype: torch.dtype, rows: int) -> tuple[int, int, int, dict[str, Any]]:
    """Rows, columns and depth of a tile, and how its kernel is launched, for experts of about so many rows.

    A fixed table and no search at run time: the number of rows changes with every batch, and each new choice costs a
    compilation. 16-bit tiles of 128 x 128 x 64 in three stages take 96 KB of shared memory, which every GPU that
    multiplies bfloat16 has, and so do two stages with float32 weights; float32 rows take a quarter of the area, for the
    registers. Few rows get low tiles.
    """
    half = dtype != torch.float32
    most = 128 if half else 64
    rows = min(max(16, triton.next_power_of_2(rows)), most)
    tf32 = not half and torch.backends.cuda.matmul.fp32_precision == "tf32"
    launch = {
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDEN": INTERPRETED,
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": 2 if half and weight_dtype == torch.float32 else 3,
    }
    return rows, most, most // 2, launch
