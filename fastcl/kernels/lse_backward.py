"""Backward of the similarity log-sum-exp: row-owned, two matrix products a tile, no atomics.

Equivalent to, without the [r, c] matrices:

    P = exp(S - lse_a[:, None]) * w_a[:, None] + exp(S - lse_b[None, :]) * w_b[None, :]
    P[i, i + offset] = 0; P[i, partner(i) + offset] = 0; G = P @ b

which is d(sum_i w_i lse_i)/da for local rows and all their columns, up to the factor scale. Both terms of P
share one exponential when a constant shift fits: P = exp2(S2 - shift) * (u_i + u_j) with
u_i = w_i * exp2(shift - lse2_i). Otherwise u would underflow, and P takes two exponentials:
P = exp2(S2 - k_i) * u_i + exp2(S2 - k_j) * u_j with k_i = round(lse2_i), u_i = w_i * exp2(k_i - lse2_i): an
integer k is exact, so lse2 loses nothing to rounding.

16-bit weights are scaled by 2^14 before the second product: with 2^20 columns a probability is below the
normal range of fp16, and the largest, 2 * 2^14, still fits (with pulls, 4 * 2^13).

`lse_weight_kernel` writes P alone, for features too wide to keep the gradient in registers and for all that the
row-owned kernel does not know: pairs that ids choose, a bias a column, pulls of pairs of the same id, and the
columns' gradient P.T @ a.
"""

import triton
import triton.language as tl

from .lse_rows import allowed, masked_block, masked_blocks, needs_mask, unmasked_block
from .tiles import LOG2E, exponent_range, id_mask, load_row, store_weights, tile_product, walk


@triton.jit(do_not_specialize=["r"])
def row_weight_kernel(
    p_lse,  # [r] fp64, or fp32 from other ranks
    p_w,  # [r] fp32 in [-1, 1], or None for ones
    p_scale,  # []
    p_norms,  # [] or None
    p_u,  # [r] fp32
    p_k,  # [r] fp32, written with ONLINE_MAX only
    r,
    log2_cols,
    WEIGHT_BITS: tl.constexpr,
    ONLINE_MAX: tl.constexpr,  # that path is launched
    CHECK_RANGE: tl.constexpr,  # and so is the other
    BLOCK_M: tl.constexpr,
):
    """Per-row factors of the tile weights, once in memory rather than once in every tile."""
    _, shift, fits = exponent_range(p_scale, p_norms, log2_cols)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_m < r
    lse = tl.load(p_lse + o_m, mask=m_row, other=0.0).to(tl.float64)
    lse2 = lse * LOG2E
    k = tl.zeros([BLOCK_M], dtype=tl.float32) + shift
    if CHECK_RANGE:
        k = tl.where(fits, k, tl.floor(lse2).to(tl.float32))
    elif ONLINE_MAX:
        k = tl.floor(lse2).to(tl.float32)
    u = tl.exp2((k.to(tl.float64) - lse2).to(tl.float32) + WEIGHT_BITS)
    if p_w is not None:
        u *= tl.load(p_w + o_m, mask=m_row, other=0.0)
    # A row without allowed columns has lse = -inf and takes no part.
    empty = lse == float("-inf")
    tl.store(p_u + o_m, tl.where(empty, 0.0, u), mask=m_row)
    if ONLINE_MAX:
        tl.store(p_k + o_m, tl.where(empty, float("inf"), k), mask=m_row)


@triton.jit
def _side(p_u, p_k, o, end, ONLINE_MAX: tl.constexpr):
    """(u, k) of one side of a tile; u is 0 past the end."""
    m_in = o < end
    u = tl.load(p_u + o, mask=m_in, other=0.0)
    k = u
    if ONLINE_MAX:
        k = tl.load(p_k + o, mask=m_in, other=float("inf"))
    return u, k


@triton.jit
def _column_side(p_u, p_k, o, end, HAS_COL: tl.constexpr, ONLINE_MAX: tl.constexpr):
    """The same of the columns, which are not there to be read without HAS_COL."""
    if HAS_COL:
        return _side(p_u, p_k, o, end, ONLINE_MAX)
    else:
        return o, o


@triton.jit
def tile_weight(acc, c, shift, row_u, row_k, col_u, col_k, HAS_COL: tl.constexpr, ONLINE_MAX: tl.constexpr):
    """P of one tile [BLOCK_M, BLOCK_N], times 2^WEIGHT_BITS."""
    if ONLINE_MAX:
        weight = tl.exp2(acc * c - row_k[:, None]) * row_u[:, None]
        if HAS_COL:
            weight += tl.exp2(acc * c - col_k[None, :]) * col_u[None, :]
        return weight
    else:
        e = tl.exp2(acc * c - shift)
        if HAS_COL:
            return e * (row_u[:, None] + col_u[None, :])
        else:
            return e * row_u[:, None]


@triton.jit
def _flush(p_out, m_out, acc, unscale, started):
    """p_out += acc; until `started` p_out holds garbage. The barrier orders a program's own updates."""
    before = tl.where(started, tl.load(p_out, mask=m_out, other=0.0), 0.0)
    tl.store(p_out, before + acc * unscale, mask=m_out)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["r", "cols", "offset", "pair", "per_split"])
def lse_backward_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_norms,  # [] or None
    p_row_u,  # [r] fp32
    p_row_k,  # [r] fp32, read with ONLINE_MAX only
    p_col_u,  # [cols] fp32, read with HAS_COL only
    p_col_k,  # [cols] fp32
    p_out,  # [splits, r, d] fp32
    r,
    cols,
    d,
    offset,
    pair,
    per_split,
    log2_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # covers d
    PRECISION: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    FLUSH: tl.constexpr,  # tiles between two flushes of the register accumulator
    HAS_COL: tl.constexpr,
    ONLINE_MAX: tl.constexpr,
    CHECK_RANGE: tl.constexpr,
):
    c, shift, fits = exponent_range(p_scale, p_norms, log2_cols)
    if CHECK_RANGE:
        if fits == ONLINE_MAX:
            return
    unscale: tl.constexpr = 0.5**WEIGHT_BITS
    o_i, o_m, split, lo, hi = walk(cols, per_split, BLOCK_M, BLOCK_N)
    s0, l0, s1, l1, s2, l2, full = masked_blocks(o_i, offset, pair, cols, lo, hi, BLOCK_M, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_out + (split.to(tl.int64) * r + o_m)[:, None] * d + o_d[None, :]
    m_rows = (o_m < r)[:, None] & (o_d < d)[None, :]
    b_row = d_row.load([o_i, 0])
    row_u, row_k = _side(p_row_u, p_row_k, o_m, r, ONLINE_MAX)
    grad = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    unmasked = full - l0 - l1 - l2

    for t0 in range(lo, unmasked, FLUSH):
        if t0 > lo:
            _flush(p_rows, m_rows, grad, unscale, t0 != lo + FLUSH)
            grad = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for t in range(t0, min(t0 + FLUSH, unmasked)):
            o_j = unmasked_block(t, s0, l0, s1, l1, s2, l2) * BLOCK_N
            b_col = d_col.load([o_j, 0])
            col_u, col_k = _column_side(p_col_u, p_col_k, o_j + tl.arange(0, BLOCK_N), cols, HAS_COL, ONLINE_MAX)
            acc = tl.dot(b_row, b_col.T, input_precision=PRECISION)
            weight = tile_weight(acc, c, shift, row_u, row_k, col_u, col_k, HAS_COL, ONLINE_MAX)
            grad = tl.dot(weight.to(b_col.dtype), b_col, grad, input_precision=PRECISION)
    for t in range(0, l0 + l1 + l2 + hi - full):
        o_j = masked_block(t, s0, l0, s1, l1, s2, l2, full) * BLOCK_N
        o_n = o_j + tl.arange(0, BLOCK_N)
        b_col = d_col.load([o_j, 0])
        col_u, col_k = _column_side(p_col_u, p_col_k, o_n, cols, HAS_COL, ONLINE_MAX)
        acc = tl.dot(b_row, b_col.T, input_precision=PRECISION)
        weight = tile_weight(acc, c, shift, row_u, row_k, col_u, col_k, HAS_COL, ONLINE_MAX)
        # Before the cast: the weight of self is unbounded and would be infinite in fp16.
        weight = tl.where(allowed(o_m, o_n, offset, pair, cols), weight, 0.0)
        grad = tl.dot(weight.to(b_col.dtype), b_col, grad, input_precision=PRECISION)
    _flush(p_rows, m_rows, grad, unscale, unmasked - lo > FLUSH)


@triton.jit
def _pulled(weight, counted, o_m, o_n, r, cols, p_pull_a, p_pull_b, WEIGHT_BITS: tl.constexpr):
    """P less the pulls of the pairs in `counted`."""
    pull = load_row(p_pull_a, o_m, r, 0.0)[:, None]
    if p_pull_b is not None:
        pull += load_row(p_pull_b, o_n, cols, 0.0)[None, :]
    return weight - tl.where(counted, pull * 2.0**WEIGHT_BITS, 0.0)


@triton.jit(do_not_specialize=["r", "cols", "offset", "pair", "first_row", "rows", "ld_out"])
def lse_weight_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_norms,  # [] or None
    p_row_u,
    p_row_k,
    p_col_u,
    p_col_k,
    p_ids_a,  # [r] int64, or None with SAME "keep"
    p_ids_b,  # [cols] int64, or None
    p_bias,  # [cols] fp32, or None
    p_pull_a,  # [r] fp32, with SAME "sum", or None
    p_pull_b,  # [cols] fp32, or None
    p_out,  # [rows, ld_out] in the dtype of b: P of rows first_row .. first_row + rows
    r,
    cols,
    d,
    offset,
    pair,
    first_row,
    rows,
    ld_out,
    log2_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    SAME: tl.constexpr,
    HAS_COL: tl.constexpr,
    ONLINE_MAX: tl.constexpr,
    CHECK_RANGE: tl.constexpr,
):
    c, shift, fits = exponent_range(p_scale, p_norms, log2_cols)
    if CHECK_RANGE:
        if fits == ONLINE_MAX:
            return
    o_chunk = tl.program_id(1) * BLOCK_M
    o_i = first_row + o_chunk
    o_j = tl.program_id(0) * BLOCK_N
    o_m = o_i + tl.arange(0, BLOCK_M)
    o_n = o_j + tl.arange(0, BLOCK_N)
    acc = tile_product(None, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, True, PRECISION)
    same = id_mask(load_row(p_ids_a, o_m, r, 0), load_row(p_ids_b, o_n, cols, 0), SAME)
    if p_bias is not None:
        acc = acc * c + load_row(p_bias, o_n, cols, 0.0)[None, :] * LOG2E
        c = 1.0
    row_u, row_k = _side(p_row_u, p_row_k, o_m, r, ONLINE_MAX)
    col_u, col_k = _column_side(p_col_u, p_col_k, o_n, cols, HAS_COL, ONLINE_MAX)
    weight = tile_weight(acc, c, shift, row_u, row_k, col_u, col_k, HAS_COL, ONLINE_MAX)
    if p_pull_a is not None:
        weight = _pulled(weight, same, o_m, o_n, r, cols, p_pull_a, p_pull_b, WEIGHT_BITS)
    if p_bias is not None:
        weight = tl.where(acc != float("-inf"), weight, 0.0)
    if SAME == "drop" or SAME == "only":
        weight = tl.where(same, weight, 0.0)
    if needs_mask(o_i, o_j, offset, pair, cols, BLOCK_M, BLOCK_N):
        weight = tl.where(allowed(o_m, o_n, offset, pair, cols), weight, 0.0)
    o_out = o_chunk + tl.arange(0, BLOCK_M)
    store_weights(p_out, weight, o_out, o_n, rows, ld_out)
