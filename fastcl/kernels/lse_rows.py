"""Forward of the rectangular similarity log-sum-exp: each row block walks its share of the columns.

Equivalent to, without the [r, c] matrix:

    S = scale * a @ b.T; S[i, i + offset] = -inf; S[i, partner(i) + offset] = -inf; lse = S.logsumexp(1)

It serves local rows against gathered columns, and with ONLINE_MAX any rows whose products do not fit one
constant shift (small temperatures, rows that are not normalised). Each program writes one partial sum (and
one maximum) a row; `lse_combine_kernel` joins at most 64 of them in a fixed order.
"""

import triton
import triton.language as tl

from .tiles import LN2, exponent_range, tile_product, walk

# Finite, so that (maximum - maximum) is 0 and not NaN before the first allowed column.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def band(first, last, lo, hi, BLOCK_N: tl.constexpr):
    """Blocks of columns first .. last, clipped to [lo, hi): (start, length), length 0 where there are none."""
    start = min(max(first, lo * BLOCK_N) // BLOCK_N, hi)
    return start, max(min((max(last, -1) + BLOCK_N) // BLOCK_N, hi) - start, 0)


@triton.jit
def masked_blocks(o_i, offset, pair, cols, lo, hi, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The column blocks of [lo, hi) that need a mask, as three bands and a tail: all others run in a loop without
    masks, because a mask in the hot loop costs registers until it spills.

    Row i leaves out columns offset + i (itself) and offset + partner(i), which is i + pair in the first `pair`
    rows and i - pair in the second; pair = 0 leaves out itself alone. Ascending: second half's partner, self, first
    half's partner. The tail is a last block that columns do not fill.
    """
    full = max(min(hi, cols // BLOCK_N), lo)
    first = o_i + offset
    last = first + BLOCK_M - 1
    start0, length0 = band(first - pair, last - pair, lo, full, BLOCK_N)
    if (pair == 0) | (o_i + BLOCK_M <= pair):
        start0 = lo
        length0 = 0
    start1, length1 = band(first, last, start0 + length0, full, BLOCK_N)
    start2, length2 = band(first + pair, last + pair, start1 + length1, full, BLOCK_N)
    if (pair == 0) | (o_i >= pair):
        length2 = 0
    return start0, length0, start1, length1, start2, length2, full


@triton.jit
def unmasked_block(t, start0, length0, start1, length1, start2, length2):
    """The t-th block (counting from lo) that lies in no band."""
    t = tl.where(t >= start0, t + length0, t)
    t = tl.where(t >= start1, t + length1, t)
    return tl.where(t >= start2, t + length2, t)


@triton.jit
def masked_block(t, start0, length0, start1, length1, start2, length2, full):
    """The t-th block (counting from 0) that lies in a band or the tail."""
    j = full + t - length0 - length1 - length2
    j = tl.where(t < length0 + length1 + length2, start2 + t - length0 - length1, j)
    j = tl.where(t < length0 + length1, start1 + t - length0, j)
    return tl.where(t < length0, start0 + t, j)


@triton.jit
def allowed(o_m, o_n, offset, pair, cols):
    """Mask [BLOCK_M, BLOCK_N] of the columns that count for each row."""
    partner = tl.where(o_m < pair, o_m + pair, o_m - pair) + offset
    keep = (o_n[None, :] != o_m[:, None] + offset) & (o_n[None, :] < cols)
    # pair = 0 makes the partner self.
    return keep & (o_n[None, :] != partner[:, None])


@triton.jit
def _meets(first, o_j, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether any of the columns first .. first + BLOCK_M - 1 is in the block from o_j."""
    return (first < o_j + BLOCK_N) & (first + BLOCK_M > o_j)


@triton.jit
def needs_mask(o_i, o_j, offset, pair, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile may hold a column that `allowed` leaves out."""
    own = o_i + offset
    partners = _meets(own + pair, o_j, BLOCK_M, BLOCK_N) | _meets(own - pair, o_j, BLOCK_M, BLOCK_N)
    return _meets(own, o_j, BLOCK_M, BLOCK_N) | partners | (o_j + BLOCK_N > cols)


@triton.jit
def accumulate(acc, c, shift, keep, b_max, b_sum, MASKED: tl.constexpr, ONLINE_MAX: tl.constexpr):
    """Add one tile's exponentials to the row sums: (new maximum, new sum)."""
    if ONLINE_MAX:
        s2 = acc * c
        if MASKED:
            s2 = tl.where(keep, s2, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(s2, 1))
        b_sum = b_sum * tl.exp2(b_max - new_max) + tl.sum(tl.exp2(s2 - new_max[:, None]), 1)
        return new_max, b_sum
    else:
        e = tl.exp2(acc * c - shift)
        if MASKED:
            e = tl.where(keep, e, 0.0)
        return b_max, b_sum + tl.sum(e, 1)


@triton.jit(do_not_specialize=["r", "cols", "offset", "pair", "per_split"])
def lse_rows_kernel(
    d_row,  # a [r, d], block [BLOCK_M, BLOCK_D]
    d_col,  # b [cols, d], block [BLOCK_N, BLOCK_D]
    p_scale,  # []
    p_norms,  # [] or None
    p_part,  # [splits, r] fp32: sums of exp2(S2 - shift), or of exp2(S2 - max)
    p_max,  # [splits, r] fp32, written with ONLINE_MAX only
    r,
    cols,
    d,
    offset,  # column i + offset is left out for row i
    pair,  # and column partner(i) + offset: see masked_blocks
    per_split,  # column blocks a program walks
    log2_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ONLINE_MAX: tl.constexpr,
    CHECK_RANGE: tl.constexpr,
):
    c, shift, fits = exponent_range(p_scale, p_norms, log2_cols)
    if CHECK_RANGE:
        if fits == ONLINE_MAX:
            return
    o_i, o_m, split, lo, hi = walk(cols, per_split, BLOCK_M, BLOCK_N)
    s0, l0, s1, l1, s2, l2, full = masked_blocks(o_i, offset, pair, cols, lo, hi, BLOCK_M, BLOCK_N)
    b_row = d_row.load([o_i, 0])
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    for t in range(lo, full - l0 - l1 - l2):
        o_j = unmasked_block(t, s0, l0, s1, l1, s2, l2) * BLOCK_N
        acc = tile_product(b_row, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION)
        b_max, b_sum = accumulate(acc, c, shift, None, b_max, b_sum, False, ONLINE_MAX)
    for t in range(0, l0 + l1 + l2 + hi - full):
        o_j = masked_block(t, s0, l0, s1, l1, s2, l2, full) * BLOCK_N
        acc = tile_product(b_row, d_row, o_i, d_col, o_j, d, True, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKED, PRECISION)
        keep = allowed(o_m, o_j + tl.arange(0, BLOCK_N), offset, pair, cols)
        b_max, b_sum = accumulate(acc, c, shift, keep, b_max, b_sum, True, ONLINE_MAX)

    o_part = split.to(tl.int64) * r + o_m
    tl.store(p_part + o_part, b_sum, mask=o_m < r)
    if ONLINE_MAX:
        tl.store(p_max + o_part, b_max, mask=o_m < r)


@triton.jit(do_not_specialize=["r", "fixed", "parts"])
def lse_combine_kernel(
    p_fixed,  # [fixed, r] fp32: sums of exp2(S2 - shift)
    p_part,  # [parts, r] fp32: sums of exp2(S2 - max)
    p_max,  # [parts, r] fp32
    p_scale,  # []
    p_norms,  # [] or None
    p_lse,  # [r] fp64, natural logarithm
    r,
    fixed,  # 0 where that path was not launched
    parts,  # the same
    log2_cols,
    BLOCK_M: tl.constexpr,
    CHECK_RANGE: tl.constexpr,  # both paths were launched: one of them returned at once
):
    c, shift, fits = exponent_range(p_scale, p_norms, log2_cols)
    if CHECK_RANGE:
        fixed = tl.where(fits, fixed, 0)
        parts = tl.where(fits, 0, parts)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_m < r
    b_max = tl.zeros([BLOCK_M], dtype=tl.float32) + tl.where(parts > 0, LOWEST, shift)
    p_row_max = p_max + o_m
    for _ in range(0, parts):
        b_max = tl.maximum(b_max, tl.load(p_row_max, mask=m_row, other=LOWEST))
        p_row_max += r
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    p_row_part = p_fixed + o_m
    for _ in range(0, fixed):
        b_sum += tl.load(p_row_part, mask=m_row, other=0.0)
        p_row_part += r
    p_row_part = p_part + o_m
    p_row_max = p_max + o_m
    for _ in range(0, parts):
        part = tl.load(p_row_part, mask=m_row, other=0.0)
        b_sum += part * tl.exp2(tl.load(p_row_max, mask=m_row, other=LOWEST) - b_max)
        p_row_part += r
        p_row_max += r
    # One number a row, so fp64 is free: an fp32 lse of 100 errs by 4e-6, and so would every weight of its row.
    lse = (tl.log2(b_sum.to(tl.float64)) + b_max.to(tl.float64)) * LN2
    tl.store(p_lse + o_m, lse, mask=m_row)
