"""Forward of the similarity log-sum-exp over pairs that ids choose, with a bias a column.

Equivalent to, without the [r, c] matrices:

    S = scale * a @ b.T + bias[None, :]; equal = ids_a[:, None] == ids_b[None, :]
    S[i, i + offset] = -inf; S[i, partner(i) + offset] = -inf
    S[equal] = -inf ("drop") or S[~equal] = -inf ("only"); lse = S.logsumexp(1)
    "sum": counted = equal & (S != -inf); positives = (counted * (a @ b.T)).sum(1); counts = counted.sum(1)

Places are compared in the blocks alone where they matter, as in `lse_rows`; all others compare ids and nothing else.
A bias has no bound that the host knows and takes the online maximum. Partial sums are joined as those of `lse_rows`.
"""

import triton
import triton.language as tl

from .lse_rows import LOWEST, accumulate, allowed, masked_block, masked_blocks, unmasked_block
from .tiles import LOG2E, exponent_range, id_mask, load_block, load_row, tile_product, walk


@triton.jit
def _add_tile(
    acc, c, shift, bias, keep, equal, b_max, b_sum, positives, counts,
    BIASED: tl.constexpr, MASKED: tl.constexpr, SAME: tl.constexpr, ONLINE_MAX: tl.constexpr,
):  # fmt: skip
    """What one tile adds to (maximum, sum, positives, counts)."""
    s2, factor = acc, c
    if BIASED:
        s2, factor = acc * c + bias[None, :] * LOG2E, 1.0
    if SAME == "sum":
        # Without a bias too: a mask that ids alone make is laid out unlike the products, and moving it over spills.
        counted = equal & (s2 != float("-inf"))
        if MASKED:
            counted = counted & keep
        positives += tl.sum(tl.where(counted, acc, 0.0), 1)
        counts += tl.sum(counted.to(tl.int32), 1)
    b_max, b_sum = accumulate(s2, factor, shift, keep, b_max, b_sum, MASKED, ONLINE_MAX)
    return b_max, b_sum, positives, counts


@triton.jit(do_not_specialize=["r", "cols", "offset", "pair", "per_split"])
def lse_masked_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_norms,  # [] or None
    p_ids_a,  # [r] int64, or None with SAME "keep"
    p_ids_b,  # [cols] int64, or None
    p_bias,  # [cols] fp32, or None
    p_part,  # [splits, r] fp32: sums of exp2(S2 - shift), or of exp2(S2 - max)
    p_max,  # [splits, r] fp32, written with ONLINE_MAX only
    p_positives,  # [splits, r] fp32: sums of products, with SAME "sum" only
    p_counts,  # [splits, r] int32: how many, with SAME "sum" only
    r,
    cols,
    d,
    offset,
    pair,
    per_split,  # column blocks a program walks
    log2_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
    ONLINE_MAX: tl.constexpr,  # always with a bias
    CHECK_RANGE: tl.constexpr,
):
    c, shift, fits = exponent_range(p_scale, p_norms, log2_cols)
    if CHECK_RANGE:
        if fits == ONLINE_MAX:
            return
    BIASED: tl.constexpr = p_bias is not None
    # Of the hot loop: "sum" leaves no pair out, it counts some of them.
    CHOSEN: tl.constexpr = SAME == "drop" or SAME == "only"
    o_i, o_m, split, lo, hi = walk(cols, per_split, BLOCK_M, BLOCK_N)
    s0, l0, s1, l1, s2, l2, full = masked_blocks(o_i, offset, pair, cols, lo, hi, BLOCK_M, BLOCK_N)
    ids_m = load_row(p_ids_a, o_m, r, 0)
    b_row = d_row.load([o_i, 0])
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    positives = tl.zeros([BLOCK_M], dtype=tl.float32)
    counts = tl.zeros([BLOCK_M], dtype=tl.int32)

    for t in range(lo, full - l0 - l1 - l2):
        o_j = unmasked_block(t, s0, l0, s1, l1, s2, l2) * BLOCK_N
        acc = tile_product(b_row, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION)
        same = id_mask(ids_m, load_block(p_ids_b, o_j, BLOCK_N), SAME)
        bias = load_block(p_bias, o_j, BLOCK_N)
        b_max, b_sum, positives, counts = _add_tile(
            acc, c, shift, bias, same, same, b_max, b_sum, positives, counts, BIASED, CHOSEN, SAME, ONLINE_MAX
        )
    for t in range(0, l0 + l1 + l2 + hi - full):
        o_j = masked_block(t, s0, l0, s1, l1, s2, l2, full) * BLOCK_N
        acc = tile_product(b_row, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION)
        o_n = o_j + tl.arange(0, BLOCK_N)
        same = id_mask(ids_m, load_row(p_ids_b, o_n, cols, 0), SAME)
        keep = allowed(o_m, o_n, offset, pair, cols)
        if CHOSEN:
            keep = keep & same
        bias = load_row(p_bias, o_n, cols, 0.0)
        b_max, b_sum, positives, counts = _add_tile(
            acc, c, shift, bias, keep, same, b_max, b_sum, positives, counts, BIASED, True, SAME, ONLINE_MAX
        )

    o_part = split.to(tl.int64) * r + o_m
    tl.store(p_part + o_part, b_sum, mask=o_m < r)
    if ONLINE_MAX:
        tl.store(p_max + o_part, b_max, mask=o_m < r)
    if SAME == "sum":
        tl.store(p_positives + o_part, positives, mask=o_m < r)
        tl.store(p_counts + o_part, counts, mask=o_m < r)
