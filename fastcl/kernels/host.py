"""Host side of the Triton kernels: the matrix-shaped ops of `fastcl.ops` on CUDA tensors.

Shapes are checked by the losses, types are chosen in `operands`. No function here waits for the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import launch
from .host_pairs import similarity_stats, softplus_backward, softplus_both, softplus_forward
from .lse_backward import lse_backward_kernel, lse_weight_kernel, row_weight_kernel
from .lse_masked import lse_masked_kernel
from .lse_rows import lse_combine_kernel, lse_rows_kernel
from .lse_symmetric import lse_symmetric_kernel
from .lse_two_way import lse_two_way_kernel
from .operands import (
    Range,
    aligned_rows,
    blocks_of,
    descriptors,
    empty_rows,
    id_pair,
    precision,
    product_dtype,
    row_splits,
    split,
    vector,
    weighted_products,
)
from .rows import (
    normalize_pair_kernel,
    pair_backward_kernel,
    pair_loss_kernel,
    sum_kernel,
    unit_rows_backward_kernel,
    unit_rows_kernel,
)

__all__ = [
    "aligned_rows",
    "empty_rows",
    "lse_backward",
    "lse_forward",
    "normalize_pair",
    "pair_backward",
    "pair_loss",
    "product_dtype",
    "similarity_stats",
    "softplus_backward",
    "softplus_both",
    "softplus_forward",
    "unit_rows",
    "unit_rows_backward",
]

ROW_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
VECTOR_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
VECTOR_BLOCK = 128
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Of the one program that adds up what others left.
SUM_BLOCK = 1024


def normalize_pair(x1, x2, normalize: bool):
    n, d = x1.shape
    z = empty_rows(x1, 2 * n, d, product_dtype(x1.dtype, normalize))
    rnorm = x1.new_empty(2 * n if normalize else 0, dtype=torch.float32)
    pos = x1.new_empty(n, dtype=torch.float32)
    if n:
        block_m, block_d = launch.row_block(d)
        normalize_pair_kernel[(triton.cdiv(n, block_m),)](
            x1, x2, z, rnorm, pos, n, d, *x1.stride(), *x2.stride(), z.stride(0),
            NORMALIZE=normalize, BLOCK_M=block_m, BLOCK_D=block_d, **ROW_OPTIONS,
        )  # fmt: skip
    return z, rnorm, pos


def unit_rows(x, rounded):
    n, d = x.shape
    z, rnorm = x.new_empty((n, d), dtype=torch.float32), x.new_empty(n, dtype=torch.float32)
    if n:
        block_m, block_d = launch.row_block(d)
        unit_rows_kernel[(triton.cdiv(n, block_m),)](
            x, z, rnorm, n, d, *x.stride(), ROUNDED=TRITON_DTYPES[rounded or torch.float32],
            BLOCK_M=block_m, BLOCK_D=block_d, **ROW_OPTIONS,
        )  # fmt: skip
    return z, rnorm


def unit_rows_backward(z, rnorm, dz, dtype):
    n, d = z.shape
    dx = z.new_empty((n, d), dtype=dtype)
    if n:
        block_m, block_d = launch.row_block(d)
        unit_rows_backward_kernel[(triton.cdiv(n, block_m),)](
            z, rnorm, dz, dx, n, d, *dz.stride(), BLOCK_M=block_m, BLOCK_D=block_d, **ROW_OPTIONS
        )
    return dx


def pair_loss(pos, lse, scale, weight: float, pull: float | None, positive_counts: bool, divisor, dtype):
    rows, programs = lse.shape[0], triton.cdiv(lse.shape[0], VECTOR_BLOCK)
    loss = pos.new_empty(rows if divisor is None else (), dtype=dtype)
    whole, share = (pos.new_empty(rows, dtype=torch.float64) for _ in range(2))
    found = loss if divisor is None else pos.new_empty(programs, dtype=torch.float64)
    if rows:
        pair_loss_kernel[(programs,)](
            vector(lse), vector(pos), scale, found, whole, share, rows // 2, weight, pull or 0.0,
            PULLED=pull is not None, POSITIVE_COUNTS=positive_counts, SUM=divisor is not None, BLOCK_M=VECTOR_BLOCK, **VECTOR_OPTIONS,
        )  # fmt: skip
    if divisor is not None:
        sum_kernel[(1,)](found, loss, programs, divisor, BLOCK=SUM_BLOCK, **VECTOR_OPTIONS)
    return loss, whole, share


def pair_backward(z, rnorm, grad_lse, pos, share, scale, grad, w, weight: float, pull: float | None, divisor, dtype):
    n, d = z.shape[0] // 2, z.shape[1]
    dx1, dx2 = z.new_empty((n, d), dtype=dtype), z.new_empty((n, d), dtype=dtype)
    slope = z.new_empty(2 * n, dtype=torch.float64)
    if n:
        block_m, block_d = launch.row_block(d)
        pair_backward_kernel[(triton.cdiv(n, block_m),)](
            z, rnorm, grad_lse, vector(pos), vector(share), scale, grad, vector(w), dx1, dx2, slope, n, d,
            z.stride(0), divisor, weight, pull or 0.0,
            PULLED=pull is not None, NORMALIZE=rnorm.numel() > 0, BLOCK_M=block_m, BLOCK_D=block_d, **ROW_OPTIONS,
        )  # fmt: skip
    return dx1, dx2, slope


def lse_forward(
    a, b, scale, bound: float, offset: int, pair: int, *,
    ids_a=None, ids_b=None, same: str = "keep", bias=None, columns: bool = False,
):  # fmt: skip
    if columns and pair:
        raise ValueError(f"lse_forward: pair must be 0 with columns, got {pair}")
    rows, cols = a.shape[0], (a if b is None else b).shape[0]
    found = [a.new_empty(count, dtype=torch.float64) for count in ((rows, cols) if columns else (rows,))]
    if rows == 0 or cols == 0:
        found = [x.fill_(-math.inf) for x in found]
        return [*found, torch.zeros_like(found[0]), a.new_zeros(rows, dtype=torch.int64)] if same == "sum" else found
    ids = id_pair(b, ids_a, ids_b, same)
    a, b = aligned_rows(a), None if b is None else aligned_rows(b)
    # A bias has no bound.
    reach = Range(a, b, scale, math.inf if bias is not None else bound, max(rows, cols) if columns else cols)
    if same != "keep" or bias is not None:
        return _lse_masked(found, a, a if b is None else b, offset, pair, reach, ids, same, vector(bias))
    fixed = online = [None] * len(found)
    for online_max in reach.paths:
        if columns and not online_max:
            fixed = _partials_two_way(a, b, offset, reach)
        elif b is None and not online_max:
            fixed = [_partials_symmetric(a, pair, reach)]
        else:
            parts = [_partials_rows(a, a if b is None else b, offset, pair, reach, online_max)]
            if columns:
                parts.append(_partials_rows(b, a, -offset, 0, reach, online_max))
            if online_max:
                online = parts
            else:
                fixed = [part for part, _ in parts]
    for lse, *parts in zip(found, fixed, online, strict=True):
        _combine(lse, *parts, reach)
    return found


def _lse_masked(found, a, b, offset: int, pair: int, reach: Range, ids, same: str, bias):
    """The columns' log-sum-exp from a second visit, with the roles swapped."""
    extras = _masked_side(found[0], a, b, offset, pair, reach, ids, same, bias)
    if same == "sum":
        positives, counts = extras
        return [found[0], positives.sum(0, dtype=torch.float64), counts.sum(0, dtype=torch.int64)]
    for lse in found[1:]:
        _masked_side(lse, b, a, -offset, 0, reach, ids[::-1], same, None)
        if bias is not None:
            # One number for all that a column adds up.
            lse += bias
    return found


def _masked_side(lse, a, b, offset: int, pair: int, reach: Range, ids, same: str, bias):
    """Fills the log-sum-exp of the rows; partial sums of the products of the pairs of the same id, and their number."""
    rows, cols, d = a.shape[0], b.shape[0], a.shape[1]
    tile, chunked = launch.tile("lse_masked", a)
    row_blocks, splits, per_split = row_splits(rows, cols, tile)
    part, part_max = (a.new_empty((splits, rows), dtype=torch.float32) for _ in range(2))
    positives = counts = None
    if same == "sum":
        positives, counts = torch.empty_like(part), torch.empty_like(part, dtype=torch.int32)
    for online_max in reach.paths:
        lse_masked_kernel[(row_blocks, splits)](
            *descriptors(a, b, tile), reach.scale, reach.norms, *ids, bias, part, part_max, positives, counts,
            rows, cols, d, offset, pair, per_split, reach.log2_cols,
            **blocks_of(tile), CHUNKED=chunked, PRECISION=precision(a.dtype), SAME=same,
            **reach.constants(online_max), **tile.options,
        )  # fmt: skip
    # Both paths fill the same parts: the one that does not fit returns at once.
    _combine(lse, part if False in reach.paths else None, (part, part_max) if True in reach.paths else None, reach)
    return positives, counts


def _combine(lse, fixed, online, reach: Range) -> None:
    """From the partial sums of the constant shift, from those of the online maximum with their maxima, or from those of
    the two that the device chose."""
    rows = lse.shape[0]
    part, part_max = online or (fixed, fixed)
    counts = 0 if fixed is None else fixed.shape[0], 0 if online is None else part.shape[0]
    lse_combine_kernel[(triton.cdiv(rows, VECTOR_BLOCK),)](
        part if fixed is None else fixed, part, part_max, reach.scale, reach.norms, lse, rows, *counts,
        reach.log2_cols, BLOCK_M=VECTOR_BLOCK, CHECK_RANGE=reach.check, **VECTOR_OPTIONS,
    )  # fmt: skip


def _partials_symmetric(z, pair: int, reach: Range):
    m, d = z.shape
    tile, chunked = launch.tile("lse_symmetric", z)
    blocks = triton.cdiv(m, tile.block_n)
    per_super = triton.cdiv(blocks, launch.MAX_PARTIALS)
    supers = triton.cdiv(blocks, per_super)
    part = z.new_empty((supers, m), dtype=torch.float32)
    lse_symmetric_kernel[(supers * (supers + 1) // 2,)](
        *descriptors(z, z, tile), reach.scale, reach.norms, part, m, d, pair, blocks, per_super, reach.log2_cols,
        **blocks_of(tile), CHUNKED=chunked, PRECISION=precision(z.dtype), CHECK_RANGE=reach.check, **tile.options,
    )  # fmt: skip
    return part


def _partials_two_way(a, b, offset: int, reach: Range):
    """Partial sums of the rows, and of the columns."""
    (rows, d), cols = a.shape, b.shape[0]
    tile, chunked = launch.tile("lse_two_way", a)
    row_blocks, col_blocks = triton.cdiv(rows, tile.block_m), triton.cdiv(cols, tile.block_n)
    cols_super = triton.cdiv(col_blocks, launch.MAX_PARTIALS)
    col_supers = triton.cdiv(col_blocks, cols_super)
    least = triton.cdiv(row_blocks, launch.FLUSH_TILES)
    row_supers, rows_super = split(col_supers, row_blocks, launch.MAX_PARTIALS, least)
    row_part = a.new_empty((col_supers, rows), dtype=torch.float32)
    col_part = a.new_empty((row_supers, cols), dtype=torch.float32)
    lse_two_way_kernel[(row_supers, col_supers)](
        *descriptors(a, b, tile), reach.scale, reach.norms, row_part, col_part, rows, cols, d, offset,
        rows_super, cols_super, reach.log2_cols,
        **blocks_of(tile), CHUNKED=chunked, PRECISION=precision(a.dtype), CHECK_RANGE=reach.check, **tile.options,
    )  # fmt: skip
    return row_part, col_part


def _partials_rows(a, b, offset: int, pair: int, reach: Range, online_max: bool):
    rows, cols, d = a.shape[0], b.shape[0], a.shape[1]
    tile, chunked = launch.tile("lse_rows", a)
    row_blocks, splits, per_split = row_splits(rows, cols, tile)
    part = a.new_empty((splits, rows), dtype=torch.float32)
    part_max = torch.empty_like(part) if online_max else part
    lse_rows_kernel[(row_blocks, splits)](
        *descriptors(a, b, tile), reach.scale, reach.norms, part, part_max, rows, cols, d, offset, pair, per_split,
        reach.log2_cols, **blocks_of(tile), CHUNKED=chunked, PRECISION=precision(a.dtype),
        **reach.constants(online_max), **tile.options,
    )  # fmt: skip
    return part, part_max


def _row_weights(lse, w, reach: Range, weight_bits: int):
    """(u, k) of one side of the tile weights, for the path that will run."""
    rows = lse.shape[0]
    u, k = (lse.new_empty(rows, dtype=torch.float32) for _ in range(2))
    row_weight_kernel[(triton.cdiv(rows, VECTOR_BLOCK),)](
        lse, w, reach.scale, reach.norms, u, k, rows, reach.log2_cols, WEIGHT_BITS=weight_bits,
        BLOCK_M=VECTOR_BLOCK, **reach.constants(True in reach.paths), **VECTOR_OPTIONS,
    )  # fmt: skip
    return u, k


def lse_backward(
    a, b, scale, bound: float, offset: int, pair: int, lse_a, lse_b, w_a, w_b, *,
    ids_a=None, ids_b=None, same: str = "keep", bias=None, pull_a=None, pull_b=None, columns: bool = False,
):  # fmt: skip
    rows, cols = a.shape[0], (a if b is None else b).shape[0]
    if rows == 0 or cols == 0:
        return [x.new_zeros(x.shape, dtype=torch.float32) for x in ((a, b) if columns else (a,))]
    if b is None:
        pull_b = pull_a
    has_col = b is None or lse_b is not None
    ids = id_pair(b, ids_a, ids_b, same)
    extras = (*ids, vector(bias), vector(pull_a), vector(pull_b))
    plain = all(x is None for x in extras)
    a, b = aligned_rows(a), None if b is None else aligned_rows(b)
    reach = Range(a, b, scale, bound if bias is None else math.inf, max(rows, cols) if columns else cols)
    weight_bits = 0
    if a.dtype == torch.float16:
        weight_bits = 14 if pull_a is None else 13
    row_side = col_side = _row_weights(vector(lse_a), vector(w_a), reach, weight_bits)
    if b is None:
        b = a
    elif has_col:
        col_side = _row_weights(vector(lse_b), vector(w_b), reach, weight_bits)
    constants = {"HAS_COL": has_col, "PRECISION": precision(a.dtype), "WEIGHT_BITS": weight_bits}
    operands = (a, b, *row_side, *col_side)
    if plain and not columns and launch.tile("lse_backward", a) is not None:
        return [_backward_tiles(operands, offset, pair, reach, constants)]
    return _backward_weights(operands, extras, offset, pair, reach, constants | {"SAME": same}, columns)


def _backward_tiles(operands, offset: int, pair: int, reach: Range, constants: dict):
    a, b, *sides = operands
    (rows, d), cols = a.shape, b.shape[0]
    tiles = {path: launch.tile("lse_backward_online" if path else "lse_backward", a)[0] for path in reach.paths}
    # Where both paths are launched either writes the same partial gradients; a split without columns writes zeros.
    row_blocks = min(triton.cdiv(rows, tile.block_m) for tile in tiles.values())
    col_blocks = min(triton.cdiv(cols, tile.block_n) for tile in tiles.values())
    splits, _ = split(row_blocks, col_blocks, launch.MAX_GRAD_PARTIALS)
    part = a.new_empty((splits, rows, d), dtype=torch.float32)
    for online_max, tile in tiles.items():
        per_split = triton.cdiv(triton.cdiv(cols, tile.block_n), splits)
        lse_backward_kernel[(triton.cdiv(rows, tile.block_m), splits)](
            *descriptors(a, b, tile), reach.scale, reach.norms, *sides, part, rows, cols, d, offset, pair, per_split,
            reach.log2_cols, **blocks_of(tile), FLUSH=launch.FLUSH_TILES, **constants,
            **reach.constants(online_max), **tile.options,
        )  # fmt: skip
    return part[0] if splits == 1 else part.sum(0)


def _backward_weights(operands, extras, offset: int, pair: int, reach: Range, constants: dict, columns: bool):
    """By way of the weights in memory: any width, any mask, both operands' gradients."""
    a, b, *sides = operands
    (rows, d), cols = a.shape, b.shape[0]
    tile, _ = launch.tile("lse_weight", a)

    def fill(first: int, scratch) -> None:
        count = scratch.shape[0]
        for online_max in reach.paths:
            lse_weight_kernel[(triton.cdiv(cols, tile.block_n), triton.cdiv(count, tile.block_m))](
                *descriptors(a, b, tile), reach.scale, reach.norms, *sides, *extras, scratch,
                rows, cols, d, offset, pair, first, count, scratch.stride(0), reach.log2_cols,
                **blocks_of(tile), **constants, **reach.constants(online_max), **tile.options,
            )  # fmt: skip

    return weighted_products(a, b, columns, constants["WEIGHT_BITS"], fill)
