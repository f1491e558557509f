"""Triton kernels of a mixture: products of the rows of each expert, the gradient of its weights, and the weighted sum.

The rows of an expert lie together and the counts stay on the device: each program finds its rows in ``offsets``. All sums
are kept in float32 and rounded once, when they are written; a weight of another dtype is converted tile by tile, never
copied. No atomic additions: a sum is always made in the same order, so results repeat to the bit.

Shapes: T tokens, K experts a token visits, S = T K pairs sorted by expert, E experts, G = E + 1 groups (the last holds the
*sentinels*: pairs without an expert), N outputs, I inputs, D width. ``offsets`` (E + 2,) are the first rows of the groups,
and S; ``order`` (S,) is the pair, counted through (T, K), in each row; ``places`` (T, K) is the row of each pair.
"""

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "SHARED", "expert_product", "sum_pairs", "sum_pairs_gradients", "weight_gradient"]

SHARED = 8  # tiles of rows that take turns at the columns together, so that both come from the cache


@triton.jit
def _find_tile(offsets, tile, n_groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Group of a tile, and which of that group's tiles it is; a tile behind the last has a group >= n_groups.

    No tile spans two groups, so there are at most S / ROWS + n_groups of them, whatever the counts.
    """
    group = tl.arange(0, GROUPS)
    known = group < n_groups
    low = tl.load(offsets + group, mask=known, other=0)
    high = tl.load(offsets + group + 1, mask=known, other=0)
    tiles = (high - low + ROWS - 1) // ROWS
    passed = tl.cumsum(tiles, 0) <= tile
    return tl.sum(passed.to(tl.int64), 0), tile - tl.sum(tl.where(passed, tiles, 0), 0)


@triton.jit
def _add_product(total, left, right, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def expert_product(
    x,
    weight,
    bias,
    order,
    offsets,
    out,
    k,
    n_groups,
    n_out,
    n_in,
    x_row,
    x_column,
    weight_expert,
    weight_out,
    weight_in,
    bias_expert,
    bias_out,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SHARED: tl.constexpr,
):
    """out[s] = weight[expert of s] @ x[s] + bias[expert of s], and 0 for sentinels; one program a tile (ROWS, OUT).

    With GATHER, x holds tokens (T, I) and row s reads the token of its pair; else x holds the sorted rows (S, I).
    """
    n_columns = tl.cdiv(n_out, OUT)
    n_tiles = tl.num_programs(0) // n_columns
    program = tl.program_id(0)
    tile, column = tl.swizzle2d(program // n_columns, program % n_columns, n_tiles, n_columns, SHARED)
    expert, tile = _find_tile(offsets, tile, n_groups, GROUPS, ROWS)
    if expert >= n_groups:
        return
    rows = tl.load(offsets + expert) + tile * ROWS + tl.arange(0, ROWS)
    live = rows < tl.load(offsets + expert + 1)
    columns = column * OUT + tl.arange(0, OUT)
    wanted = columns < n_out
    source = tl.load(order + rows, mask=live, other=0) // k if GATHER else rows
    # Sentinels read nothing: their token may hold anything, and they have no expert.
    has_expert = expert < n_groups - 1
    x_rows = x + source[:, None] * x_row
    weight_columns = weight + expert * weight_expert + columns[None, :].to(tl.int64) * weight_out
    total = tl.zeros((ROWS, OUT), tl.float32)
    for start in tl.range(0, tl.where(has_expert, n_in, 0), IN):
        inputs = start + tl.arange(0, IN)
        inside = inputs < n_in
        x_tile = tl.load(x_rows + inputs[None, :] * x_column, mask=live[:, None] & inside[None, :], other=0.0)
        w_tile = tl.load(
            weight_columns + inputs[:, None].to(tl.int64) * weight_in, mask=inside[:, None] & wanted[None, :], other=0.0
        )
        total = _add_product(total, x_tile, w_tile.to(x_tile.dtype), PRECISION, WIDEN)
    if BIAS:
        known = columns < tl.where(has_expert, n_out, 0)
        added = tl.load(bias + expert * bias_expert + columns * bias_out, mask=known, other=0.0)
        total += added.to(tl.float32)[None, :]
    tl.store(
        out + rows[:, None] * n_out + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=live[:, None] & wanted[None, :],
    )


@triton.jit
def weight_gradient(
    grad,
    x,
    order,
    offsets,
    grad_weight,
    grad_bias,
    k,
    n_out,
    n_in,
    grad_row,
    grad_column,
    x_row,
    x_column,
    weight_expert,
    weight_out,
    weight_in,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """grad_weight[e] = grad[rows of e].T @ x[rows of e], 0 for an expert without rows; one program a tile (OUT, IN)."""
    n_columns = tl.cdiv(n_in, IN)
    per_expert = tl.cdiv(n_out, OUT) * n_columns
    expert = (tl.program_id(0) // per_expert).to(tl.int64)
    tile = tl.program_id(0) % per_expert
    outputs = tile // n_columns * OUT + tl.arange(0, OUT)
    inputs = tile % n_columns * IN + tl.arange(0, IN)
    wanted, inside = outputs < n_out, inputs < n_in
    first = tl.load(offsets + expert)
    stop = tl.load(offsets + expert + 1)
    total = tl.zeros((OUT, IN), tl.float32)
    bias_total = tl.zeros((OUT,), tl.float32)
    for start in tl.range(first, stop, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < stop
        source = tl.load(order + rows, mask=live, other=0) // k if GATHER else rows
        g_tile = tl.load(
            grad + rows[None, :] * grad_row + outputs[:, None] * grad_column,
            mask=live[None, :] & wanted[:, None],
            other=0.0,
        )
        x_tile = tl.load(
            x + source[:, None] * x_row + inputs[None, :] * x_column, mask=live[:, None] & inside[None, :], other=0.0
        )
        total = _add_product(total, g_tile, x_tile, PRECISION, WIDEN)
        if BIAS:
            bias_total += tl.sum(g_tile.to(tl.float32), 1)
    tl.store(
        grad_weight
        + expert * weight_expert
        + outputs[:, None].to(tl.int64) * weight_out
        + inputs[None, :].to(tl.int64) * weight_in,
        total.to(grad_weight.dtype.element_ty),
        mask=wanted[:, None] & inside[None, :],
    )
    if BIAS:
        once = outputs < tl.where(tile % n_columns == 0, n_out, 0)
        tl.store(grad_bias + expert * n_out + outputs, bias_total, mask=once)


@triton.jit
def sum_pairs(
    rows,
    weights,
    places,
    n_live,
    out,
    k,
    width,
    row,
    column,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out[t] = sum_k weights[t, k] * rows[places[t, k]] without the sentinels; one program a token and WIDTH columns.

    ``n_live`` points at the number of rows that are no sentinels; weights (T, K) are contiguous.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    stop = tl.load(n_live)
    total = tl.zeros((WIDTH,), tl.float32)
    for i in tl.range(0, k):
        place = tl.load(places + token * k + i)
        live = place < stop
        read = columns < tl.where(live, width, 0)
        value = tl.load(rows + place * row + columns * column, mask=read, other=0.0).to(tl.float32)
        if WEIGHTED:  # a sentinel's weight may be anything, also infinite
            value *= tl.load(weights + token * k + i, mask=live, other=0.0).to(tl.float32)
        total += value
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def sum_pairs_gradients(
    grad,
    rows,
    weights,
    order,
    n_live,
    grad_rows,
    grad_weights,
    k,
    width,
    grad_row,
    grad_column,
    row,
    column,
    WIDTH: tl.constexpr,
):
    """Gradients of `sum_pairs` with weights at its rows and its weights, 0 for sentinels; one program a row."""
    place = tl.program_id(0).to(tl.int64)
    live = place < tl.load(n_live)
    pair = tl.load(order + place)
    weight = tl.load(weights + pair, mask=live, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in tl.range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        read = columns < tl.where(live, width, 0)
        g = tl.load(grad + pair // k * grad_row + columns * grad_column, mask=read, other=0.0).to(tl.float32)
        value = tl.load(rows + place * row + columns * column, mask=read, other=0.0).to(tl.float32)
        total += g * value
        tl.store(grad_rows + place * width + columns, (weight * g).to(grad_rows.dtype.element_ty), mask=columns < width)
    tl.store(grad_weights + pair, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


# Set by TRITON_INTERPRET=1 when this module is imported: then kernels run on CPU tensors, step by step in NumPy.
INTERPRETED = not isinstance(expert_product, triton.JITFunction)
