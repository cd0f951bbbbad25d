"""Sums of softplus over pairs: forward, and the weights of the backward.

Equivalent to, without the [r, c] matrices:

    x = sign * scale * a @ b.T + beta[:, None]; x[i, i + offset] = -inf; pairs that ids leave out: -inf
    sums = softplus(x).sum(1); slopes = sigmoid(x).sum(1)
    P = sigmoid(x) * w[:, None]; G = P @ b; G_columns = P.T @ a

No term depends on a normalisation, so the weight kernel also yields the sums: S is formed once for all.
Exponents are negative, hence no shift and no maximum. 16-bit weights are scaled by 2^14 as those of `lse_backward`.

In base 2, y = x * log2(e), because that leaves one multiply-add an element in front of the exponential.
"""

import triton
import triton.language as tl

from .lse_rows import allowed, masked_block, masked_blocks, needs_mask, unmasked_block
from .tiles import LN2, LOG2E, id_mask, load_block, load_row, store_weights, tile_product, walk

# log2(1 + e) / z as a polynomial in z^2, z = e / sqrt(1 + e), e in [0, 1]: the minimax one of degree 3 (by Remez's
# exchange in 50 digits, of the relative error, which is 4.7e-8 = 2^-24.3 at most). It is 2 asinh(z / 2) / (z log 2), an
# even function of z that is smooth up to |z| = 2, where z ends at 0.71: each degree gains a factor of 34.
C0 = tl.constexpr(1.4426949731290663)
C1 = tl.constexpr(-0.060107879143959477)
C2 = tl.constexpr(0.0067174164537491006)
C3 = tl.constexpr(-0.00085513375695782541)


@triton.jit
def sigmoid(y):
    """1 / (1 + 2^-y). Below -127 it is 0."""
    # Squared, because the inverse root is one instruction and a division six.
    root = tl.rsqrt(1.0 + tl.exp2(-y))
    return root * root


@triton.jit
def softplus_sigmoid(y):
    """(log2(1 + 2^y), its slope in y), both relatively exact at both ends, from one exponential and one root."""
    e = tl.exp2(-tl.abs(y))
    root = tl.rsqrt(1.0 + e)
    z = e * root
    w = z * z
    softplus = tl.maximum(y, 0.0) + z * (C0 + w * (C1 + w * (C2 + w * C3)))
    # 1 / (1 + e) or e / (1 + e).
    return softplus, tl.where(y >= 0, root, z) * root


@triton.jit
def _add_tile(acc, c, beta, keep, sums, slopes, MASKED: tl.constexpr):
    """(sums, slopes) with those of one tile."""
    y = acc * c + beta[:, None]
    if MASKED:
        y = tl.where(keep, y, float("-inf"))
    softplus, slope = softplus_sigmoid(y)
    return sums + tl.sum(softplus, 1), slopes + tl.sum(slope, 1)


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
    CHOSEN: tl.constexpr = SAME == "drop" or SAME == "only"
    c = tl.load(p_scale).to(tl.float32) * sign * LOG2E
    o_i, o_m, split, lo, hi = walk(cols, per_split, BLOCK_M, BLOCK_N)
    s0, l0, s1, l1, s2, l2, full = masked_blocks(o_i, offset, 0, cols, lo, hi, BLOCK_M, BLOCK_N)
    beta = load_row(p_beta, o_m, r, 0.0) * LOG2E
    ids_m = load_row(p_ids_a, o_m, r, 0)
    b_row = d_row.load([o_i, 0])
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    slopes = tl.zeros([BLOCK_M], dtype=tl.float32)

    for t in range(lo, full - l0 - l1 - l2):
        o_j = unmasked_block(t, s0, l0, s1, l1, s2, l2) * BLOCK_N
        acc = tile_product(b_row, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION)
        keep = id_mask(ids_m, load_block(p_ids_b, o_j, BLOCK_N), SAME)
        sums, slopes = _add_tile(acc, c, beta, keep, sums, slopes, CHOSEN)
    for t in range(0, l0 + l1 + l2 + hi - full):
        o_j = masked_block(t, s0, l0, s1, l1, s2, l2, full) * BLOCK_N
        acc = tile_product(b_row, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION)
        o_n = o_j + tl.arange(0, BLOCK_N)
        keep = allowed(o_m, o_n, offset, 0, cols)
        if CHOSEN:
            keep = keep & id_mask(ids_m, load_row(p_ids_b, o_n, cols, 0), SAME)
        sums, slopes = _add_tile(acc, c, beta, keep, sums, slopes, True)

    o_part = split.to(tl.int64) * r + o_m
    tl.store(p_sums + o_part, sums * LN2, mask=o_m < r)
    tl.store(p_slopes + o_part, slopes, mask=o_m < r)


@triton.jit
def _add_side(weight, product, p_beta, p_w, o, end, IS_ROW: tl.constexpr, WEIGHT_BITS: tl.constexpr):
    """weight + w * sigmoid of the rows, or of the columns."""
    beta = load_row(p_beta, o, end, 0.0) * LOG2E
    w = _scaled(p_w, o, end, WEIGHT_BITS)
    if IS_ROW:
        return weight + sigmoid(product + beta[:, None]) * w[:, None]
    else:
        return weight + sigmoid(product + beta[None, :]) * w[None, :]


@triton.jit
def _scaled(p_w, o, end, WEIGHT_BITS: tl.constexpr):
    """w * 2^WEIGHT_BITS of each row o."""
    if p_w is None:
        return tl.zeros_like(o).to(tl.float32) + 2.0**WEIGHT_BITS
    else:
        return load_row(p_w, o, end, 0.0) * 2.0**WEIGHT_BITS


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
    c = tl.load(p_scale).to(tl.float32) * sign * LOG2E
    o_chunk = tl.program_id(1) * BLOCK_M
    o_i = first_row + o_chunk
    o_j = tl.program_id(0) * BLOCK_N
    o_m = o_i + tl.arange(0, BLOCK_M)
    o_n = o_j + tl.arange(0, BLOCK_N)
    o_out = o_chunk + tl.arange(0, BLOCK_M)
    y = tile_product(None, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, True, PRECISION) * c
    # An argument of -inf has no sum and no slope.
    if needs_mask(o_i, o_j, offset, 0, cols, BLOCK_M, BLOCK_N):
        y = tl.where(allowed(o_m, o_n, offset, 0, cols), y, float("-inf"))
    if SAME == "drop" or SAME == "only":
        y = tl.where(id_mask(load_row(p_ids_a, o_m, r, 0), load_row(p_ids_b, o_n, cols, 0), SAME), y, float("-inf"))
    weight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if p_sums is not None:
        softplus, slope = softplus_sigmoid(y + load_row(p_beta_a, o_m, r, 0.0)[:, None] * LOG2E)
        o_part = tl.program_id(0).to(tl.int64) * rows + o_out
        tl.store(p_sums + o_part, tl.sum(softplus, 1) * LN2, mask=o_out < rows)
        tl.store(p_slopes + o_part, tl.sum(slope, 1), mask=o_out < rows)
        weight = slope * _scaled(p_w_a, o_m, r, WEIGHT_BITS)[:, None]
    elif p_beta_a is not None:
        weight = _add_side(weight, y, p_beta_a, p_w_a, o_m, r, True, WEIGHT_BITS)
    if p_beta_b is not None:
        weight = _add_side(weight, y, p_beta_b, p_w_b, o_n, cols, False, WEIGHT_BITS)
    store_weights(p_out, weight, o_out, o_n, rows, ld_out)
