"""Forward of the similarity log-sum-exp of rows and of columns at once: one matrix product serves both.

Equivalent to, without the [r, c] matrix:

    S = scale * a @ b.T; S[i, i + offset] = -inf; lse = S.logsumexp(1); lse_columns = S.logsumexp(0)

Rows and columns are cut into at most 64 super-blocks each, and one program owns a pair of them: at most 64 partial
sums a row and a column, each with one owner, so there are no atomics and results repeat to the bit. Within a pair a
column block stays in shared memory while the rows walk past, and its sums accumulate element-wise in registers; see
`lse_symmetric`, of which this is the form without symmetry.

With a constant shift alone: an online maximum of the columns would have to be reduced over the rows of every tile
and kept beside the products, at the price of shuffles and registers that spill. Where the range does not fit,
`lse_rows` runs twice with the roles swapped, two matrix products instead of one.
"""

import triton
import triton.language as tl

from .lse_rows import band
from .lse_symmetric import add_rows
from .tiles import exponent_range, tile_product


@triton.jit(do_not_specialize=["r", "cols", "offset", "rows_super", "cols_super"])
def lse_two_way_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_norms,  # [] or None
    p_row_part,  # [column supers, r] fp32: sums of exp2(S2 - shift) over the columns of a super-block
    p_col_part,  # [row supers, cols] fp32: the same over its rows
    r,
    cols,
    d,
    offset,  # column i + offset is left out for row i
    rows_super,  # row blocks in a super-block
    cols_super,  # column blocks in a super-block
    log2_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHECK_RANGE: tl.constexpr,
):
    c, shift, fits = exponent_range(p_scale, p_norms, log2_cols)
    if CHECK_RANGE:
        if fits == 0:
            return
    i_super = tl.program_id(0)
    j_super = tl.program_id(1)
    i_start = i_super * rows_super
    i_end = min(i_start + rows_super, tl.cdiv(r, BLOCK_M))
    j_start = j_super * cols_super
    p_rows = p_row_part + j_super.to(tl.int64) * r
    p_cols = p_col_part + i_super.to(tl.int64) * cols
    o_row = tl.arange(0, BLOCK_M)

    for j in range(j_start, min(j_start + cols_super, tl.cdiv(cols, BLOCK_N))):
        o_j = j * BLOCK_N
        o_n = o_j + tl.arange(0, BLOCK_N)
        b_col = d_col.load([o_j, 0])
        b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        # The row blocks that need a mask: those of these columns' own rows, the last one, and all of them beside
        # columns that end.
        full = max(min(i_end, r // BLOCK_M), i_start)
        if o_j + BLOCK_N > cols:
            full = i_start
        start, length = band(o_j - offset, o_j - offset + BLOCK_N - 1, i_start, full, BLOCK_M)
        for t in range(i_start, full - length):
            o_i = tl.where(t >= start, t + length, t) * BLOCK_M
            acc = tile_product(
                b_col, d_col, o_j, d_row, o_i, d, False, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION
            )
            e = tl.exp2(acc * c - shift)
            b_sum += e
            add_rows(p_rows, o_i + o_row, r, tl.sum(e, 1), j != j_start)
        for t in range(0, length + i_end - full):
            o_i = tl.where(t < length, start + t, full + t - length) * BLOCK_M
            acc = tile_product(
                b_col, d_col, o_j, d_row, o_i, d, False, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION
            )
            o_m = o_i + o_row
            keep = (o_n[None, :] != o_m[:, None] + offset) & (o_n < cols)[None, :] & (o_m < r)[:, None]
            e = tl.where(keep, tl.exp2(acc * c - shift), 0.0)
            b_sum += e
            add_rows(p_rows, o_m, r, tl.sum(e, 1), j != j_start)
        tl.store(p_cols + o_n, tl.sum(b_sum, 0), mask=o_n < cols)
        # The next walk may read a row's sum in another thread than the one that wrote it.
        tl.debug_barrier()
