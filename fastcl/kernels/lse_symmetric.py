"""Forward of the symmetric similarity log-sum-exp (b is a): half the tiles, half the exponentials.

Equivalent to, without the [m, m] matrix:

    S = scale * z @ z.T; S.fill_diagonal_(-inf); S[i, i + pair] = S[i + pair, i] = -inf; lse = S.logsumexp(1)

S is symmetric, so only tiles on or above the diagonal are visited, and each one serves two row blocks:
its row sums belong to block i, its column sums to block j. The m rows are cut into at most 64 super-blocks,
and one program owns one pair of them: that bounds the partial sums at 64 a row (a partial per tile would be
34 GB at m = 2^20) and gives each partial one owner, so there are no atomics and results repeat to the bit.

Within a pair a column block j stays in shared memory while the rows walk past. Column sums accumulate
element-wise in registers and are reduced once per walk, because a reduction along rows costs shuffles in
every tile; the row reduction stays inside a thread but for two shuffles.
"""

import triton
import triton.language as tl

from .tiles import exponent_range, tile_product


@triton.jit
def add_rows(p_part, o_m, m, row_sum, started):
    """p_part[o_m] += row_sum; until `started` the slot holds garbage. One owner, no atomics."""
    m_rows = o_m < m
    before = tl.where(started, tl.load(p_part + o_m, mask=m_rows, other=0.0), 0.0)
    tl.store(p_part + o_m, before + row_sum, mask=m_rows)


@triton.jit(do_not_specialize=["m", "pair", "blocks", "per_super"])
def lse_symmetric_kernel(
    d_row,  # z [m, d], block [BLOCK_M, BLOCK_D]
    d_col,  # z [m, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_norms,  # [] or None
    p_part,  # [supers, m] fp32: part[k, i] = sum over the columns of super-block k of exp2(S2[i, :] - shift)
    m,
    d,
    pair,  # rows i and i + pair are a positive pair and leave each other out; 0 for none
    blocks,  # column blocks of BLOCK_N in m
    per_super,  # column blocks in a super-block
    log2_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a multiple of BLOCK_M
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHECK_RANGE: tl.constexpr,
):
    c, shift, fits = exponent_range(p_scale, p_norms, log2_cols)
    if CHECK_RANGE:
        if fits == 0:
            return
    RATIO: tl.constexpr = BLOCK_N // BLOCK_M
    pid = tl.program_id(0)
    j_super = ((tl.sqrt_rn(8.0 * pid + 1.0) - 1.0) * 0.5).to(tl.int32)
    i_super = pid - j_super * (j_super + 1) // 2
    j_start = j_super * per_super
    i_start = i_super * per_super * RATIO
    p_row_part = p_part + j_super.to(tl.int64) * m
    p_col_part = p_part + i_super.to(tl.int64) * m
    o_row = tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)

    for j in range(j_start, min(j_start + per_super, blocks)):
        o_j = j * BLOCK_N
        o_n = o_j + o_col
        b_col = d_col.load([o_j, 0])
        b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        i_end = min(i_start + per_super * RATIO, (j + 1) * RATIO)
        i_mask = min(i_end, j * RATIO)
        if o_j + BLOCK_N > m:
            i_mask = i_start
        # The row blocks that hold partners of these columns go to the masked loop as well.
        p_start = min(max(o_j - pair, 0) // BLOCK_M, i_mask)
        p_end = min(max((o_j + BLOCK_N - 1 - pair + BLOCK_M) // BLOCK_M, 0), i_mask)
        p_start = max(p_start, i_start)
        p_rows = max(p_end - p_start, 0)
        if pair == 0:
            p_rows = 0
        for t in range(i_start, i_mask - p_rows):
            i = tl.where(t >= p_start, t + p_rows, t)
            o_i = i * BLOCK_M
            acc = tile_product(
                b_col, d_col, o_j, d_row, o_i, d, False, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION
            )
            e = tl.exp2(acc * c - shift)
            b_sum += e
            add_rows(p_row_part, o_i + o_row, m, tl.sum(e, 1), j != max(i // RATIO, j_start))
        for t in range(i_mask - p_rows, i_end):
            i = tl.where(t < i_mask, p_start + t - i_mask + p_rows, t)
            o_i = i * BLOCK_M
            acc = tile_product(
                b_col, d_col, o_j, d_row, o_i, d, False, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION
            )
            o_m = o_i + o_row
            # Strictly above the diagonal: drops self, counts each pair of a diagonal tile once, and with
            # the columns' end also bounds the rows.
            keep = (o_m[:, None] < o_n[None, :]) & (o_n[None, :] < m) & (o_n[None, :] != o_m[:, None] + pair)
            e = tl.where(keep, tl.exp2(acc * c - shift), 0.0)
            b_sum += e
            add_rows(p_row_part, o_m, m, tl.sum(e, 1), j != max(i // RATIO, j_start))
        # In a diagonal pair rows and columns share a slot: the barriers order its updates between threads.
        tl.debug_barrier()
        add_rows(p_col_part, o_n, m, tl.sum(b_sum, 0), i_super == j_super)
        tl.debug_barrier()
