"""Sums of softplus over pairs: forward, and the weights of the backward.

Equivalent to, without the [r, c] matrices:

    x = sign * scale * a @ b.T + beta[:, None]; x[i, i + offset] = -inf; pairs that ids leave out: -inf
    sums = softplus(x).sum(1); slopes = sigmoid(x).sum(1)
    P = sigmoid(x) * w[:, None]; G = P @ b; G_columns = P.T @ a

No term depends on a normalisation, so the weight kernel also yields the sums: S is formed once for all.
Exponents are negative, hence no shift and no maximum. 16-bit weights are scaled by 2^14 as those of `lse_backward`.
"""

import triton
import triton.language as tl

from .lse_rows import allowed
from .tiles import LOG2E, chosen, load_row, tile_product, walk


@triton.jit
def _sigmoid(x):
    """(slope of the softplus, exp(-|x|))."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e), e


@triton.jit
def softplus_sigmoid(x):
    """(log(1 + exp(x)), its slope), both relatively exact at both ends."""
    slope, e = _sigmoid(x)
    # log(1 + e) = 2 atanh(e / (2 + e)), a series that keeps all digits of a small e; at e = 1 the first term left
    # out is 2^-26 of the sum.
    t = e / (2.0 + e)
    q = t * t
    series = 1.0 / 11 + q * (1.0 / 13)
    series = 1.0 / 9 + q * series
    series = 1.0 / 7 + q * series
    series = 1.0 / 5 + q * series
    series = 1.0 / 3 + q * series
    return tl.maximum(x, 0.0) + 2 * (t + t * q * series), slope


@triton.jit(do_not_specialize=["r", "cols", "offset", "per_split"])
def softplus_rows_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_beta,  # [r] fp32
    p_ids_a,  # [r] int64, or None with SAME "keep"
    p_ids_b,  # [cols] int64, or None
    p_sums,  # [splits, r] fp32
    p_slopes,  # [splits, r] fp32
    sign,  # 1.0 or -1.0
    r,
    cols,
    d,
    offset,  # column i + offset is left out for row i
    per_split,  # column blocks a program walks
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
):
    c = tl.load(p_scale).to(tl.float32) * sign
    o_i, o_m, split, lo, hi = walk(cols, per_split, BLOCK_M, BLOCK_N)
    beta = load_row(p_beta, o_m, r, 0.0)
    ids_m = load_row(p_ids_a, o_m, r, 0)
    b_row = d_row.load([o_i, 0])
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    slopes = tl.zeros([BLOCK_M], dtype=tl.float32)

    for j in range(lo, hi):
        o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tile_product(
            b_row, d_row, o_i, d_col, j * BLOCK_N, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION
        )
        keep = chosen(allowed(o_m, o_n, offset, 0, cols), ids_m, load_row(p_ids_b, o_n, cols, 0), SAME)
        softplus, slope = softplus_sigmoid(acc * c + beta[:, None])
        sums += tl.sum(tl.where(keep, softplus, 0.0), 1)
        slopes += tl.sum(tl.where(keep, slope, 0.0), 1)

    o_part = split.to(tl.int64) * r + o_m
    tl.store(p_sums + o_part, sums, mask=o_m < r)
    tl.store(p_slopes + o_part, slopes, mask=o_m < r)


@triton.jit
def _add_side(weight, product, beta, p_w, o, end, IS_ROW: tl.constexpr):
    """weight + w * sigmoid(product + beta) of the rows, or of the columns."""
    x = product + (beta[:, None] if IS_ROW else beta[None, :])
    slope, _ = _sigmoid(x)
    if p_w is not None:
        w = load_row(p_w, o, end, 0.0)
        slope *= w[:, None] if IS_ROW else w[None, :]
    return weight + slope


@triton.jit(do_not_specialize=["r", "cols", "offset", "first_row", "rows", "ld_out"])
def softplus_weight_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_beta_a,  # [r] fp32, or None: no weights of the rows
    p_beta_b,  # [cols] fp32, or None: no weights of the columns
    p_w_a,  # [r] fp32 in [-1, 1], or None for ones
    p_w_b,  # [cols] fp32, or None for ones
    p_ids_a,  # [r] int64, or None with SAME "keep"
    p_ids_b,  # [cols] int64, or None
    p_out,  # [rows, ld_out] in the dtype of b: weights of rows first_row .. first_row + rows
    p_sums,  # [column blocks, rows] fp32: sums of the softplus of a tile, or None; needs p_beta_a
    p_slopes,  # [column blocks, rows] fp32: of its slopes, or None
    sign,  # 1.0 or -1.0
    r,
    cols,
    d,
    offset,
    first_row,
    rows,
    ld_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    SAME: tl.constexpr,
):
    """w_a_i sigmoid(sign S_ij + beta_a_i) + w_b_j sigmoid(sign S_ij + beta_b_j), times 2^WEIGHT_BITS."""
    c = tl.load(p_scale).to(tl.float32) * sign
    o_chunk = tl.program_id(1) * BLOCK_M
    o_i = first_row + o_chunk
    o_j = tl.program_id(0) * BLOCK_N
    o_m = o_i + tl.arange(0, BLOCK_M)
    o_n = o_j + tl.arange(0, BLOCK_N)
    o_out = o_chunk + tl.arange(0, BLOCK_M)
    acc = tile_product(None, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, True, PRECISION) * c
    ids_m = load_row(p_ids_a, o_m, r, 0)
    keep = chosen(allowed(o_m, o_n, offset, 0, cols), ids_m, load_row(p_ids_b, o_n, cols, 0), SAME)
    weight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if p_sums is not None:
        softplus, weight = softplus_sigmoid(acc + load_row(p_beta_a, o_m, r, 0.0)[:, None])
        o_part = tl.program_id(0).to(tl.int64) * rows + o_out
        tl.store(p_sums + o_part, tl.sum(tl.where(keep, softplus, 0.0), 1), mask=o_out < rows)
        tl.store(p_slopes + o_part, tl.sum(tl.where(keep, weight, 0.0), 1), mask=o_out < rows)
        if p_w_a is not None:
            weight *= load_row(p_w_a, o_m, r, 0.0)[:, None]
    elif p_beta_a is not None:
        weight = _add_side(weight, acc, load_row(p_beta_a, o_m, r, 0.0), p_w_a, o_m, r, True)
    if p_beta_b is not None:
        weight = _add_side(weight, acc, load_row(p_beta_b, o_n, cols, 0.0), p_w_b, o_n, cols, False)
    weight = tl.where(keep, weight * 2.0**WEIGHT_BITS, 0.0)
    p_tile = p_out + o_out[:, None].to(tl.int64) * ld_out + o_n[None, :]
    tl.store(p_tile, weight.to(p_out.dtype.element_ty), mask=(o_out < rows)[:, None] & (o_n < cols)[None, :])
