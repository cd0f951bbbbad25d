"""Host side of the passes over pairs that are no log-sum-exp: sums of softplus, and statistics."""

from __future__ import annotations

import math

import torch
import triton

from . import launch
from .operands import (
    blocks_of,
    descriptors,
    id_pair,
    operand_pair,
    precision,
    row_splits,
    vector,
    weighted_products,
)
from .softplus import softplus_rows_kernel, softplus_weight_kernel
from .stats import stats_kernel

LN2 = math.log(2.0)


def softplus_forward(a, b, scale, beta, sign: float, offset: int, *, ids_a=None, ids_b=None, same="keep"):
    rows, cols = a.shape[0], (a if b is None else b).shape[0]
    if rows == 0 or cols == 0:
        return tuple(a.new_zeros(rows, dtype=torch.float64) for _ in range(2))
    ids = id_pair(b, ids_a, ids_b, same)
    a, b = operand_pair(a, b)
    tile, chunked = launch.tile("softplus_rows", a)
    row_blocks, splits, per_split = row_splits(rows, cols, tile)
    # Apart, so that both begin at a multiple of 16 bytes, whatever the rows: kernels are specialised on that.
    parts = [a.new_empty((splits, rows), dtype=torch.float32) for _ in range(2)]
    softplus_rows_kernel[(row_blocks, splits)](
        *descriptors(a, b, tile), scale, vector(beta), *ids, *parts, sign, rows, cols, a.shape[1], offset, per_split,
        **blocks_of(tile), CHUNKED=chunked, PRECISION=precision(a.dtype), SAME=same, **tile.options,
    )  # fmt: skip
    return tuple(part.sum(0, dtype=torch.float64) for part in parts)


def softplus_backward(
    a, b, scale, sign: float, offset: int, beta_a, beta_b, w_a, w_b, *, ids_a=None, ids_b=None, same="keep"
):  # fmt: skip
    if b is None:
        beta_b, w_b = beta_a, w_a
    if 0 in (a.shape[0], (a if b is None else b).shape[0]):
        return a.new_zeros(a.shape, dtype=torch.float32)
    ids = id_pair(b, ids_a, ids_b, same)
    a, b = operand_pair(a, b)
    sides = [vector(x) for x in (beta_a, beta_b, w_a, w_b)]
    return _weighted(a, b, scale, sides, ids, sign, offset, same, False)[0]


def softplus_both(a, b, scale, beta, sign: float, offset: int, w=None, *, ids_a=None, ids_b=None, same="keep"):
    sums = [a.new_zeros(a.shape[0], dtype=torch.float64) for _ in range(2)]
    if 0 in (a.shape[0], b.shape[0]):
        return *sums, *(x.new_zeros(x.shape, dtype=torch.float32) for x in (a, b))
    ids = id_pair(b, ids_a, ids_b, same)
    a, b = operand_pair(a, b)
    grads = _weighted(a, b, scale, [vector(beta), None, vector(w), None], ids, sign, offset, same, True, sums)
    return *sums, *grads


def _weighted(a, b, scale, sides, ids, sign: float, offset: int, same: str, columns: bool, sums=(None, None)):
    """W @ b of the sides given, with `columns` also W.T @ a; fills `sums` [r] and slopes [r] where given."""
    (rows, d), cols = a.shape, b.shape[0]
    tile, _ = launch.tile("softplus_weight", a)
    col_blocks = triton.cdiv(cols, tile.block_n)
    weight_bits = 14 if a.dtype == torch.float16 else 0

    def fill(first: int, scratch) -> None:
        count = scratch.shape[0]
        # Bounded by the scratch: two numbers a row of a tile.
        parts = [total if total is None else a.new_empty((col_blocks, count), dtype=torch.float32) for total in sums]
        softplus_weight_kernel[(col_blocks, triton.cdiv(count, tile.block_m))](
            *descriptors(a, b, tile), scale, *sides, *ids, scratch, *parts, sign,
            rows, cols, d, offset, first, count, scratch.stride(0),
            **blocks_of(tile), PRECISION=precision(a.dtype), WEIGHT_BITS=weight_bits, SAME=same, **tile.options,
        )  # fmt: skip
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total[first : first + count] = part.sum(0, dtype=torch.float64)

    return weighted_products(a, b, columns, weight_bits, fill)


def similarity_stats(a, b, scale, offset: int, pair: int):
    rows, cols = a.shape[0], (a if b is None else b).shape[0]
    if rows == 0 or cols == 0:
        empty = a.new_full((rows,), -math.inf, dtype=torch.float64)
        return empty, empty.clone(), torch.zeros_like(empty)
    a, b = operand_pair(a, b)
    tile, chunked = launch.tile("stats", a)
    row_blocks, splits, per_split = row_splits(rows, cols, tile)
    parts = [a.new_empty((splits, rows), dtype=torch.float32) for _ in range(3)]
    stats_kernel[(row_blocks, splits)](
        *descriptors(a, b, tile), scale, *parts, rows, cols, a.shape[1], offset, pair, per_split,
        **blocks_of(tile), CHUNKED=chunked, PRECISION=precision(a.dtype), **tile.options,
    )  # fmt: skip
    part_max, part_sum, part_below = (part.double() for part in parts)
    best = part_max.amax(0)
    lower = part_max - best
    sums = (part_sum * lower.exp2()).sum(0)
    below = ((part_below + part_sum * lower) * lower.exp2()).sum(0)
    empty = sums == 0
    # The kernel's maximum does not see what is not a number; the sum does.
    best = torch.where(empty, -math.inf, torch.where(sums.isnan(), sums, best * LN2))
    mean = torch.where(empty, 0.0, best + below / sums * LN2)
    return sums.log() + best, best, mean
