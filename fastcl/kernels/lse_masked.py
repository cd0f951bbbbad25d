"""Forward of the similarity log-sum-exp over pairs that ids choose, with a bias a column.

Equivalent to, without the [r, c] matrices:

    S = scale * a @ b.T + bias[None, :]; equal = ids_a[:, None] == ids_b[None, :]
    S[i, i + offset] = -inf; S[i, partner(i) + offset] = -inf
    S[equal] = -inf ("drop") or S[~equal] = -inf ("only"); lse = S.logsumexp(1)
    "sum": counted = equal & (S != -inf); positives = (counted * (a @ b.T)).sum(1); counts = counted.sum(1)

Ids have to be compared in every tile, so there is one loop and it is masked, and always the online maximum: a bias
has no bound that the host knows. Partial sums are joined as those of `lse_rows` are.
"""

import triton
import triton.language as tl

from .lse_rows import LOWEST, accumulate, allowed
from .tiles import LOG2E, chosen, load_row, tile_product, walk


@triton.jit(do_not_specialize=["r", "cols", "offset", "pair", "per_split"])
def lse_masked_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_ids_a,  # [r] int64, or None with SAME "keep"
    p_ids_b,  # [cols] int64, or None
    p_bias,  # [cols] fp32, or None
    p_part,  # [splits, r] fp32: sums of exp2(S2 - max)
    p_max,  # [splits, r] fp32
    p_positives,  # [splits, r] fp32: sums of products, with SAME "sum" only
    p_counts,  # [splits, r] int32: how many, with SAME "sum" only
    r,
    cols,
    d,
    offset,
    pair,
    per_split,  # column blocks a program walks
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
):
    c = tl.load(p_scale).to(tl.float32) * LOG2E
    o_i, o_m, split, lo, hi = walk(cols, per_split, BLOCK_M, BLOCK_N)
    ids_m = load_row(p_ids_a, o_m, r, 0)
    b_row = d_row.load([o_i, 0])
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    positives = tl.zeros([BLOCK_M], dtype=tl.float32)
    counts = tl.zeros([BLOCK_M], dtype=tl.int32)

    for j in range(lo, hi):
        o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tile_product(
            b_row, d_row, o_i, d_col, j * BLOCK_N, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION
        )
        ids_n = load_row(p_ids_b, o_n, cols, 0)
        keep = chosen(allowed(o_m, o_n, offset, pair, cols), ids_m, ids_n, SAME)
        s2 = acc * c
        if p_bias is not None:
            s2 += tl.load(p_bias + o_n, mask=o_n < cols, other=0.0)[None, :] * LOG2E
            keep = keep & (s2 != float("-inf"))
        if SAME == "sum":
            counted = keep & (ids_m[:, None] == ids_n[None, :])
            positives += tl.sum(tl.where(counted, acc, 0.0), 1)
            counts += tl.sum(counted.to(tl.int32), 1)
        b_max, b_sum = accumulate(s2, 1.0, 0.0, keep, b_max, b_sum, True, True)

    o_part = split.to(tl.int64) * r + o_m
    tl.store(p_part + o_part, b_sum, mask=o_m < r)
    tl.store(p_max + o_part, b_max, mask=o_m < r)
    if SAME == "sum":
        tl.store(p_positives + o_part, positives, mask=o_m < r)
        tl.store(p_counts + o_part, counts, mask=o_m < r)
