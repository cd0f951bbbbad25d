"""Statistics of the similarities of each row: log-sum-exp, largest, and mean under the softmax.

Equivalent to, without the [r, c] matrix:

    S = scale * a @ b.T; S[i, i + offset] = -inf; S[i, partner(i) + offset] = -inf
    lse = S.logsumexp(1); largest = S.amax(1); mean = (S.softmax(1) * S).sum(1)

One visit of each tile. The mean is kept as its distance below the maximum, sum(e * (S - max)) <= 0, whose terms do
not cancel. Partial results are joined in fp64 by the host.
"""

import triton
import triton.language as tl

from .lse_rows import LOWEST, allowed
from .tiles import LOG2E, tile_product, walk


@triton.jit(do_not_specialize=["r", "cols", "offset", "pair", "per_split"])
def stats_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_max,  # [splits, r] fp32: largest S2, LOWEST where nothing is allowed
    p_sum,  # [splits, r] fp32: sums of e = exp2(S2 - max)
    p_below,  # [splits, r] fp32: sums of e * (S2 - max)
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
):
    c = tl.load(p_scale).to(tl.float32) * LOG2E
    o_i, o_m, split, lo, hi = walk(cols, per_split, BLOCK_M, BLOCK_N)
    b_row = d_row.load([o_i, 0])
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_below = tl.zeros([BLOCK_M], dtype=tl.float32)

    for j in range(lo, hi):
        o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tile_product(
            b_row, d_row, o_i, d_col, j * BLOCK_N, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION
        )
        keep = allowed(o_m, o_n, offset, pair, cols)
        s2 = acc * c
        new_max = tl.maximum(b_max, tl.max(tl.where(keep, s2, float("-inf")), 1))
        # What was summed up moves down by the rise of the maximum: from LOWEST it is nothing that moves.
        rise = new_max - b_max
        lower = tl.exp2(-rise)
        below = s2 - new_max[:, None]
        e = tl.where(keep, tl.exp2(below), 0.0)
        b_below = (b_below - b_sum * rise) * lower + tl.sum(tl.where(keep, e * below, 0.0), 1)
        b_sum = b_sum * lower + tl.sum(e, 1)
        b_max = new_max

    o_part = split.to(tl.int64) * r + o_m
    tl.store(p_max + o_part, b_max, mask=o_m < r)
    tl.store(p_sum + o_part, b_sum, mask=o_m < r)
    tl.store(p_below + o_part, b_below, mask=o_m < r)
