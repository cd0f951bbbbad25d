"""Device functions that every pass over similarity tiles shares.

A tile is S[o_m : o_m + BLOCK_M, o_n : o_n + BLOCK_N] of S = scale * a @ b.T, held in registers and never
written to memory. Exponents are in base 2 (`exp2` is one instruction): c = scale * log2(e), and a tile of
raw products `acc` becomes exp2(acc * c - shift), one FMA and one exponential an element.

Names: d_ tensor descriptor, p_ pointer, o_ offset, b_ block.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Exponents stay this far inside the fp32 range [2^-126, 2^127], so that sums over columns, and weights times
# the 2^14 that fp16 needs, stay normal numbers.
RANGE = tl.constexpr(112.0)
# Rounding rows to fp16 can lengthen a unit row by 2^-11 and the product of two by twice that.
UNIT_SLACK = tl.constexpr(1.01)


@triton.jit
def exponent_range(
    p_scale,  # [] fp32
    p_norms,  # [] fp32: max ||a|| * max ||b||, or None for unit rows and where the host chose the path
    log2_cols,
):
    """(c, shift, fits): whether one constant shift keeps every partial sum of exponentials in range.

    The shift is as near to the bound as the low end of the range allows: rounding errors grow with the
    exponent's distance from 0, and the products near the bound are the ones that count.
    """
    c = tl.load(p_scale).to(tl.float32) * LOG2E
    bound = c * UNIT_SLACK
    if p_norms is not None:
        bound *= tl.load(p_norms)
    shift = tl.minimum(bound, RANGE - bound)
    return c, shift, 2 * bound + log2_cols <= 2 * RANGE


@triton.jit
def walk(cols, per_split, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a program that holds rows and walks blocks of columns: (first row, rows, split, first block, end)."""
    o_i = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    lo = split * per_split
    hi = min(lo + per_split, tl.cdiv(cols, BLOCK_N))
    return o_i, o_i + tl.arange(0, BLOCK_M), split, lo, hi


@triton.jit
def tile_product(
    b_resident,  # [BLOCK_R, BLOCK_D]: rows held over the whole walk; unused when CHUNKED
    d_resident,  # [r, d]
    o_resident,
    d_walk,  # [w, d]
    o_walk,
    d,
    RESIDENT_IS_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Raw products of one tile [BLOCK_M, BLOCK_N] in fp32, and the walking block (None-like when CHUNKED)."""
    if CHUNKED:
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for o_d in range(0, d, BLOCK_D):
            b_r = d_resident.load([o_resident, o_d])
            b_w = d_walk.load([o_walk, o_d])
            if RESIDENT_IS_ROW:
                acc = tl.dot(b_r, b_w.T, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(b_w, b_r.T, acc, input_precision=PRECISION)
        return acc
    else:
        b_w = d_walk.load([o_walk, 0])
        if RESIDENT_IS_ROW:
            return tl.dot(b_resident, b_w.T, input_precision=PRECISION)
        else:
            return tl.dot(b_w, b_resident.T, input_precision=PRECISION)


@triton.jit
def load_row(p_x, o, end, other):
    """One number of each row o, `other` past the end; where there are none, o itself, which nobody reads."""
    if p_x is None:
        return o
    else:
        return tl.load(p_x + o, mask=o < end, other=other)


@triton.jit
def load_block(p_x, start, BLOCK: tl.constexpr):
    """The same of a whole block: without a mask, and from one address, neighbours are loaded at once."""
    if p_x is None:
        return start
    else:
        return tl.load(p_x + start + tl.arange(0, BLOCK))


@triton.jit
def id_mask(ids_m, ids_n, SAME: tl.constexpr):
    """Mask [BLOCK_M, BLOCK_N] of the pairs of different ids with SAME "drop", of the same with "only" and "sum"; None
    with "keep"."""
    if SAME == "drop":
        return ids_m[:, None] != ids_n[None, :]
    elif SAME == "keep":
        return None
    else:
        return ids_m[:, None] == ids_n[None, :]


@triton.jit
def store_weights(p_out, weight, o_out, o_n, rows, ld_out):
    """Weights [BLOCK_M, BLOCK_N] into scratch [rows, ld_out] whose rows start at multiples of 16 bytes.

    What pads a row is written as well: with a mask that ends at any column each element is a store of its own.
    """
    # The compiler sees 16 bytes in a product only.
    UNIT: tl.constexpr = 128 // p_out.dtype.element_ty.primitive_bitwidth
    ld_out = ld_out // UNIT * UNIT
    p_tile = p_out + o_out[:, None].to(tl.int64) * ld_out + o_n[None, :]
    tl.store(p_tile, weight.to(p_out.dtype.element_ty), mask=(o_out < rows)[:, None] & (o_n < ld_out)[None, :])
