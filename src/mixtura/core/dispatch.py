"""Tokens to experts and back: y_t = sum_k weights_tk * expert[indices_tk](x_t).

What one expert computes is an `ExpertStack`: down @ inner(up @ x), with optional biases and a last step. The backends
give the same outputs and gradients:

- ``loop``: plain autograd, one expert at a time. It is slow, obvious, and defines the meaning.
- ``grouped``: sorts the token-expert pairs once, runs each expert on one contiguous block of rows, and combines with
  one weighted sum per token. It never copies a weight, keeps only the up product for the backward pass, and leaves the
  choice of matrix product to `products`. It has no second derivative; ``loop`` has.
- ``triton``: for CUDA tensors, and only when it is asked for: its kernels (`gpu_dispatch`) agree with ``loop`` under
  Triton's interpreter, but have neither run nor been timed on a GPU yet.

An index equal to E is the *sentinel*: the pair is left out before any product, adds nothing, and gets no gradient.

Shapes: T tokens, D width, H hidden, O rows of the up product (2H when gated), E experts, K experts a token visits,
S token-expert pairs without the sentinels, M rows of one expert.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtura.core import products

__all__ = ["ACTIVATIONS", "BACKENDS", "ExpertStack", "dispatch", "experts_forward", "gated", "why_not"]

# Experts with few rows share a block of about so many: fewer calls, and it stays in the cache.
_FEW_ROWS = 32
_BLOCK_ROWS = 256

RowFunction = Callable[[Tensor], Tensor]  # acts on each row of (M, ...) alone

ACTIVATIONS: dict[str, RowFunction] = {
    "gelu": F.gelu,
    "identity": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class ExpertStack:
    """E feed-forward experts of one shape: ``finish(down @ inner(up @ x + up_bias) + down_bias)``."""

    up: Tensor  # (E, O, D); (E, D, O) when transposed
    down: Tensor  # (E, D, H); (E, H, D) when transposed
    inner: RowFunction  # (M, O) -> (M, H)
    up_bias: Tensor | None = None  # (E, O)
    down_bias: Tensor | None = None  # (E, D)
    finish: RowFunction | None = None  # (M, D) -> (M, D)
    transposed: bool = False
    parameters: Sequence[Tensor] = ()  # what `inner` and `finish` read and gradients must reach

    @property
    def n_experts(self) -> int:
        return self.up.shape[0]


def gated(activation: RowFunction) -> RowFunction:
    """Row function of a gated expert: [gate; up] of width 2H becomes activation(gate) * up."""

    def inner(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    return inner


def experts_forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    activation: str | RowFunction = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str = "grouped",
) -> Tensor:
    """Weighted sum of the outputs of the experts that each token visits.

    Args:
        x: tokens, shape (T, D).
        gate_up: shape (E, 2H, D): gate rows first, then up rows; or (E, H, D) for experts without a gate.
        down: shape (E, D, H).
        indices: experts of each token, shape (T, K), integers in [0, E]; E is the sentinel: skipped.
        weights: their weights, shape (T, K).
        activation: one of `ACTIVATIONS`, or an elementwise function.
        gate_up_bias: shape (E, 2H) or (E, H).
        down_bias: shape (E, D).
        backend: one of `BACKENDS`.
    Returns:
        Shape (T, D), dtype of x. A token with sentinels only gets 0.
    Raises:
        ValueError: shapes that do not fit together, an index outside [0, E] (with ``triton`` an assertion on the device),
            an unknown backend or activation, a backend that cannot run on x.
    Example:
        >>> x, eye = torch.tensor([[1.0, 2.0]]), torch.eye(2).expand(3, 2, 2)
        >>> experts_forward(x, eye, eye, torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.5]]), activation="relu")
        tensor([[0.5000, 1.0000]])
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        activation = ACTIVATIONS[activation]
    if gate_up.dim() != 3 or down.dim() != 3 or gate_up.shape[1] not in (down.shape[2], 2 * down.shape[2]):
        raise ValueError(
            "gate_up must be (E, 2H, D) or (E, H, D) and down (E, D, H), "
            f"got {tuple(gate_up.shape)} and {tuple(down.shape)}"
        )
    has_gate = gate_up.shape[1] == 2 * down.shape[2]
    stack = ExpertStack(
        up=gate_up,
        down=down,
        inner=gated(activation) if has_gate else activation,
        up_bias=gate_up_bias,
        down_bias=down_bias,
    )
    return dispatch(x, stack, indices, weights, backend=backend)


def dispatch(x: Tensor, stack: ExpertStack, indices: Tensor, weights: Tensor, *, backend: str = "grouped") -> Tensor:
    """`experts_forward` for any `ExpertStack`. Under autocast products run in its dtype; the result has x's dtype."""
    reason = why_not(backend, x)
    if reason is not None:
        raise ValueError(reason)
    _check_shapes(x, stack, indices, weights)
    if backend != "triton":  # which looks on the device: here the host would wait for it
        _check_range(indices, stack.n_experts)
    return BACKENDS[backend](x, stack, indices, weights)


def why_not(backend: str, x: Tensor) -> str | None:
    """Reason why a backend cannot run on this input, or None."""
    if backend not in BACKENDS:
        return f"backend must be one of {sorted(BACKENDS)}, got {backend!r}"
    if not x.is_floating_point():
        return f"x must be floating point, got {x.dtype}"
    return _why_not_triton(x) if backend == "triton" else None


def _why_not_triton(x: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux), or use backend='grouped'"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"triton computes in float32, bfloat16 or float16, got x of {x.dtype}; use backend='grouped'"
    from mixtura.core import gpu_dispatch

    if x.device.type == "cuda" or (x.device.type == "cpu" and gpu_dispatch.INTERPRETED):
        return None
    return f"triton needs a CUDA tensor, got one on {x.device}; use backend='grouped'"


def _loop(x: Tensor, stack: ExpertStack, indices: Tensor, weights: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x, dtype=_sum_dtype(x))
    for e in range(stack.n_experts):
        token, place = torch.where(indices == e)
        up, down = stack.up[e], stack.down[e]
        if stack.transposed:
            up, down = up.T, down.T
        h_MH = stack.inner(F.linear(x[token], up, None if stack.up_bias is None else stack.up_bias[e]))
        out_MD = F.linear(h_MH, down, None if stack.down_bias is None else stack.down_bias[e])
        if stack.finish is not None:
            out_MD = stack.finish(out_MD)
        y_TD = y_TD.index_add(0, token, (weights[token, place, None] * out_MD).to(y_TD.dtype))
    return y_TD.to(x.dtype)


def _grouped(x: Tensor, stack: ExpertStack, indices: Tensor, weights: Tensor) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    groups = _Groups.of(indices, stack.n_experts)
    x_TD = x.to(dtype)
    inputs = (x_TD, stack.up, stack.down, stack.up_bias, stack.down_bias, weights, *stack.parameters)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            y_TD: Tensor = _Grouped.apply(stack, groups, *inputs)  # type: ignore[no-untyped-call]
        else:
            y_TD = _run(stack, groups, x_TD, weights)
    return y_TD.to(x.dtype)


def _triton(x: Tensor, stack: ExpertStack, indices: Tensor, weights: Tensor) -> Tensor:
    from mixtura.core import gpu_dispatch  # needs triton, which only this backend does

    return gpu_dispatch.experts(x, stack, indices, weights)


BACKENDS: dict[str, Callable[[Tensor, ExpertStack, Tensor, Tensor], Tensor]] = {
    "grouped": _grouped,
    "loop": _loop,
    "triton": _triton,
}


@dataclass(frozen=True)
class _Groups:
    """Token-expert pairs sorted by expert, sentinels left out."""

    pairs: Tensor  # (S,), positions in the flattened (T, K)
    tokens: Tensor  # (S,)
    places: Tensor  # (T, K), row of each pair among the sorted ones; S for a sentinel
    counts: list[int]  # rows of each expert

    @classmethod
    def of(cls, indices: Tensor, n_experts: int) -> _Groups:
        n_tokens, k = indices.shape
        flat = indices.reshape(-1)
        order = flat.argsort(stable=True)  # sentinels are the largest index: they end up behind all experts
        counts = torch.bincount(flat, minlength=n_experts + 1)[:n_experts].tolist()
        n_rows = sum(counts)
        places = order.argsort().clamp_(max=n_rows)
        pairs = order[:n_rows]
        return cls(pairs, pairs // max(k, 1), places.view(n_tokens, k), counts)

    def blocks(self) -> Iterator[tuple[slice, list[products.Span]]]:
        """Rows of one expert or of several small ones in a row, with each one's span inside the block."""
        first = stop = 0
        spans: list[products.Span] = []
        for e, count in enumerate(self.counts):
            if not count:
                continue
            if spans and (count > _FEW_ROWS or stop - first >= _BLOCK_ROWS or spans[-1][2] - spans[-1][1] > _FEW_ROWS):
                yield slice(first, stop), spans
                first, spans = stop, []
            spans.append((e, stop - first, stop - first + count))
            stop += count
        if spans:
            yield slice(first, stop), spans


def _run(stack: ExpertStack, groups: _Groups, x: Tensor, weights: Tensor, kept: list[Tensor] | None = None) -> Tensor:
    """The mixture's output; appends the up product of each expert that has rows to ``kept``."""
    rows_SD = _row_buffer(groups, x)
    for rows, spans in groups.blocks():
        x_MD = x.index_select(0, groups.tokens[rows])
        u_MO = products.grouped_linear(x_MD, stack.up, stack.up_bias, spans, transposed=stack.transposed)
        if kept is not None:
            kept.append(u_MO)
        h_MH = stack.inner(u_MO)
        y_MD = rows_SD[rows]
        products.grouped_linear(h_MH, stack.down, stack.down_bias, spans, transposed=stack.transposed, out=y_MD)
        if stack.finish is not None:
            rows_SD[rows] = stack.finish(y_MD)
    if len(groups.pairs) < weights.numel():  # a sentinel's weight may be anything, also infinite
        weights = weights.masked_fill(groups.places == len(groups.pairs), 0.0)
    return products.gather_sum(rows_SD, groups.places, weights)


class _Grouped(torch.autograd.Function):
    """`_run` with a backward pass that goes expert by expert, too. Kept: the inputs and the up product of every row."""

    @staticmethod
    def forward(
        ctx: Any,
        stack: ExpertStack,
        groups: _Groups,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        weights: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        kept: list[Tensor] = []
        y_TD = _run(stack, groups, x, weights, kept)
        ctx.groups = groups
        ctx.stack = replace(stack, up=_NOTHING, down=_NOTHING, up_bias=None, down_bias=None, parameters=())
        ctx.n_parameters = len(parameters)
        ctx.save_for_backward(x, up, down, up_bias, down_bias, weights, *parameters, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, up_bias, down_bias, weights, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.n_parameters], rest[ctx.n_parameters :]
        groups: _Groups = ctx.groups
        stack: ExpertStack = replace(ctx.stack, up=up, down=down, up_bias=up_bias, down_bias=down_bias)
        back, flip = products.grouped_times, stack.transposed
        wants_x, wants_up, wants_down, wants_up_bias, wants_down_bias, wants_weights = ctx.needs_input_grad[2:8]
        grad_up = products.zeros_like(up) if wants_up else None
        grad_down = products.zeros_like(down) if wants_down else None
        grad_up_bias = torch.zeros_like(up_bias) if wants_up_bias else None
        grad_down_bias = torch.zeros_like(down_bias) if wants_down_bias else None
        grad_weights = weights.new_zeros(weights.shape) if wants_weights else None
        grad_parameters = [torch.zeros_like(p) if p.requires_grad else None for p in parameters]
        rows_SD = _row_buffer(groups, x)
        for (rows, spans), u_MO in zip(groups.blocks(), kept, strict=True):
            grad_MD = grad_y.index_select(0, groups.tokens[rows])
            pairs_M = groups.pairs[rows]
            weights_M1 = weights.reshape(-1)[pairs_M].unsqueeze(-1).to(x.dtype)
            with torch.enable_grad():
                u_MO = u_MO.detach().requires_grad_()
                h_MH = stack.inner(u_MO)
            if stack.finish is None and down_bias is None:
                # <grad, down @ h> = <grad @ down, h>: the expert's output itself is not needed.
                grad_out_MD = grad_MD * weights_M1
                grad_h_MH = back(grad_MD, down, spans, transposed=flip)
                grad_weights_M = (grad_h_MH * h_MH.detach()).sum(-1, dtype=_sum_dtype(x))
                grad_h_MH = grad_h_MH * weights_M1
            else:
                out_MD = products.grouped_linear(h_MH.detach(), down, down_bias, spans, transposed=flip)
                with torch.enable_grad():
                    out_MD = out_MD.detach().requires_grad_()
                    finished_MD = out_MD if stack.finish is None else stack.finish(out_MD)
                grad_weights_M = (grad_MD * finished_MD.detach()).sum(-1, dtype=_sum_dtype(x))
                grad_out_MD = _back(finished_MD, out_MD, grad_MD * weights_M1, parameters, grad_parameters)
                grad_h_MH = back(grad_out_MD, down, spans, transposed=flip)
            grad_u_MO = _back(h_MH, u_MO, grad_h_MH, parameters, grad_parameters)
            if grad_weights is not None:
                grad_weights.view(-1)[pairs_M] = grad_weights_M.to(weights.dtype)
            if grad_down is not None:
                _weight_grads(grad_down, grad_out_MD, h_MH.detach(), spans, flip)
            if grad_up is not None:
                _weight_grads(grad_up, grad_u_MO, x.index_select(0, groups.tokens[rows]), spans, flip)
            for total, grad in ((grad_up_bias, grad_u_MO), (grad_down_bias, grad_out_MD)):
                if total is not None:
                    for e, start, stop in spans:
                        total[e] = grad[start:stop].sum(0)
            if wants_x:
                rows_SD[rows] = back(grad_u_MO, up, spans, transposed=flip)
        grad_x = products.gather_sum(rows_SD, groups.places) if wants_x else None
        found = (grad_x, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_weights, *grad_parameters)
        return (None, None, *found)  # nothing for the stack and the groups


_NOTHING = torch.empty(0)


def _row_buffer(groups: _Groups, x: Tensor) -> Tensor:
    """Room for one row a pair, and a last row of zeros that the sentinels read."""
    rows_SD = x.new_empty(len(groups.tokens) + 1, x.shape[-1])
    rows_SD[-1] = 0
    return rows_SD


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _weight_grads(
    grad: Tensor, grad_out_MN: Tensor, x_MK: Tensor, spans: Sequence[products.Span], transposed: bool
) -> None:
    left, right = (x_MK, grad_out_MN) if transposed else (grad_out_MN, x_MK)
    for e, start, stop in spans:
        products.transposed_times(left[start:stop], right[start:stop], grad[e])


def _back(
    output: Tensor, input: Tensor, grad: Tensor, parameters: Sequence[Tensor], grad_parameters: Sequence[Tensor | None]
) -> Tensor:
    """Gradient at ``input`` of a row function's ``output``; adds those of its parameters to ``grad_parameters``."""
    wanted = [p for p, g in zip(parameters, grad_parameters, strict=True) if g is not None]
    grad_input, *found = torch.autograd.grad(output, [input, *wanted], grad, allow_unused=True)
    for total, part in zip((g for g in grad_parameters if g is not None), found, strict=True):
        if part is not None:
            total += part
    return grad_input


def _check_shapes(x: Tensor, stack: ExpertStack, indices: Tensor, weights: Tensor) -> None:
    n_experts = stack.n_experts
    width = stack.up.shape[1 if stack.transposed else 2]
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"x must have shape (T, D={width}), got {tuple(x.shape)}")
    if stack.down.shape[0] != n_experts or stack.down.shape[2 if stack.transposed else 1] != width:
        raise ValueError(
            f"up and down must agree in experts and width, got {tuple(stack.up.shape)} and {tuple(stack.down.shape)}"
        )
    if indices.dim() != 2 or indices.shape != weights.shape or len(indices) != len(x):
        raise ValueError(
            f"indices and weights must both have shape (T={len(x)}, K), "
            f"got {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    for name, bias in (("up_bias", stack.up_bias), ("down_bias", stack.down_bias)):
        if bias is not None and (bias.dim() != 2 or len(bias) != n_experts):
            raise ValueError(f"{name} must have shape (E={n_experts}, rows), got {tuple(bias.shape)}")


def _check_range(indices: Tensor, n_experts: int) -> None:
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high > n_experts:
            raise ValueError(
                f"indices must be in [0, {n_experts}], where {n_experts} skips the pair, got {low} to {high}"
            )
