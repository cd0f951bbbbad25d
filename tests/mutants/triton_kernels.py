"""Mutants of the Triton kernels and of their host side."""

from __future__ import annotations

from mutant import KERNELS, Mutant

TILES = [
    Mutant(
        "last chunk of features lost",
        "fastcl/kernels/tiles.py",
        "for o_d in range(0, d, BLOCK_D):",
        "for o_d in range(0, d - BLOCK_D, BLOCK_D):",
        KERNELS + "test_symmetric_widths[257-dtype1]",
    ),
    Mutant(
        "lengths of rows not in the range check",
        "fastcl/kernels/tiles.py",
        "        bound *= tl.load(p_norms)\n",
        "        bound *= 1.0\n",
        KERNELS + "test_rows_of_any_length[8.0-dtype0]",
    ),
    Mutant(
        "base 2 forgotten in the exponent",
        "fastcl/kernels/tiles.py",
        "c = tl.load(p_scale).to(tl.float32) * LOG2E",
        "c = tl.load(p_scale).to(tl.float32)",
        KERNELS + "test_symmetric_rows[False-6-dtype0]",
    ),
]

SYMMETRIC_FILE = "fastcl/kernels/lse_symmetric.py"
SYMMETRIC = [
    Mutant(
        "self mask dropped, the diagonal counts",
        SYMMETRIC_FILE,
        "keep = (o_m[:, None] < o_n[None, :])",
        "keep = (o_m[:, None] <= o_n[None, :])",
        KERNELS + "test_symmetric_rows[True-62-dtype0]",
    ),
    Mutant(
        "both triangles of a diagonal tile",
        SYMMETRIC_FILE,
        "keep = (o_m[:, None] < o_n[None, :])",
        "keep = (o_m[:, None] != o_n[None, :])",
        KERNELS + "test_symmetric_rows[False-62-dtype0]",
    ),
    Mutant(
        "partner mask dropped",
        SYMMETRIC_FILE,
        " & (o_n[None, :] != o_m[:, None] + pair)",
        "",
        KERNELS + "test_symmetric_rows[True-62-dtype0]",
    ),
    Mutant(
        "partner off by one",
        SYMMETRIC_FILE,
        "(o_n[None, :] != o_m[:, None] + pair)",
        "(o_n[None, :] != o_m[:, None] + pair - 1)",
        KERNELS + "test_partners_are_left_out_and_nothing_else[0.05-40-dtype0]",
    ),
    Mutant(
        "partners in the loop without masks",
        SYMMETRIC_FILE,
        "max((o_j + BLOCK_N - 1 - pair + BLOCK_M) // BLOCK_M, 0)",
        "max((o_j + BLOCK_N - 1 - pair) // BLOCK_M, 0)",
        KERNELS + "test_partners_are_left_out_and_nothing_else[0.05-130-dtype1]",
    ),
    Mutant(
        "ragged edge not masked",
        SYMMETRIC_FILE,
        " & (o_n[None, :] < m)",
        "",
        KERNELS + "test_symmetric_rows[False-130-dtype0]",
    ),
    Mutant(
        "ragged edge in the loop without masks",
        SYMMETRIC_FILE,
        "if o_j + BLOCK_N > m:",
        "if o_j > m:",
        KERNELS + "test_symmetric_rows[False-130-dtype0]",
    ),
    Mutant(
        "row half of the symmetry lost",
        SYMMETRIC_FILE,
        "            add_rows(p_row_part, o_i + o_row, m, tl.sum(e, 1), j != max(i // RATIO, j_start))\n",
        "            add_rows(p_row_part, o_i + o_row, m, tl.sum(e, 1) * 0, j != max(i // RATIO, j_start))\n",
        KERNELS + "test_symmetric_rows[False-258-dtype1]",
    ),
    Mutant(
        "column half of the symmetry lost",
        SYMMETRIC_FILE,
        "add_rows(p_col_part, o_n, m, tl.sum(b_sum, 0), i_super == j_super)",
        "add_rows(p_col_part, o_n, m, tl.sum(b_sum, 0) * 0, i_super == j_super)",
        KERNELS + "test_symmetric_rows[False-62-dtype0]",
    ),
    Mutant(
        "last column lost",
        SYMMETRIC_FILE,
        "(o_n[None, :] < m)",
        "(o_n[None, :] < m - 1)",
        KERNELS + "test_every_column_decides[140-dtype0]",
    ),
    Mutant(
        "last block of a super-block lost",
        SYMMETRIC_FILE,
        "range(j_start, min(j_start + per_super, blocks))",
        "range(j_start, min(j_start + max(per_super - 1, 1), blocks))",
        KERNELS + "test_super_blocks[520-2]",
    ),
    Mutant(
        "partial sums overwritten",
        SYMMETRIC_FILE,
        "before + row_sum",
        "row_sum",
        KERNELS + "test_super_blocks[257-1]",
    ),
]

ROWS_FILE = "fastcl/kernels/lse_rows.py"
RECTANGULAR = [
    Mutant(
        "self not left out of rectangles",
        ROWS_FILE,
        "keep = (o_n[None, :] != o_m[:, None] + offset) & (o_n[None, :] < cols)",
        "keep = (o_n[None, :] < cols) & (o_m[:, None] >= 0)",
        KERNELS + "test_rectangular_offsets[72-260-0.2-48-dtype0]",
    ),
    Mutant(
        "offset ignored",
        ROWS_FILE,
        "(o_n[None, :] != o_m[:, None] + offset)",
        "(o_n[None, :] != o_m[:, None])",
        KERNELS + "test_rectangular_offsets[72-260-0.2-48-dtype0]",
    ),
    Mutant(
        "bands of masked blocks forget the offset",
        ROWS_FILE,
        "    first = o_i + offset\n",
        "    first = o_i + 0 * offset\n",
        KERNELS + "test_rectangular_offsets[72-260-0.008-48-dtype0]",
    ),
    Mutant(
        "halves meet at the wrong row",
        ROWS_FILE,
        "partner = tl.where(o_m < pair, o_m + pair, o_m - pair) + offset",
        "partner = tl.where(o_m <= pair, o_m + pair, o_m - pair) + offset",
        KERNELS + "test_partners_are_left_out_and_nothing_else[0.008-40-dtype0]",
    ),
    Mutant(
        "partners of the first half in the loop without masks",
        ROWS_FILE,
        "    if (pair == 0) | (o_i >= pair):\n        length2 = 0\n",
        "    length2 = 0\n",
        KERNELS + "test_partners_are_left_out_and_nothing_else[0.008-130-dtype0]",
    ),
    Mutant(
        "ragged edge of rectangles not masked",
        ROWS_FILE,
        " & (o_n[None, :] < cols)\n",
        "\n",
        KERNELS + "test_rectangular_without_mask[63]",
    ),
    Mutant(
        "last block of columns lost",
        "fastcl/kernels/tiles.py",
        "hi = min(lo + per_split, tl.cdiv(cols, BLOCK_N))",
        "hi = min(lo + per_split, max(cols // BLOCK_N, 1))",
        KERNELS + "test_rectangular_without_mask[129]",
    ),
    Mutant(
        "online maximum not rescaled",
        ROWS_FILE,
        "b_sum * tl.exp2(b_max - new_max) +",
        "b_sum +",
        KERNELS + "test_online_maximum_over_several_blocks[1]",
    ),
    Mutant(
        "shift not added back",
        ROWS_FILE,
        "tl.where(parts > 0, LOWEST, shift)",
        "tl.where(parts > 0, LOWEST, 0.0)",
        KERNELS + "test_symmetric_rows[False-6-dtype0]",
    ),
    Mutant(
        "partial sums not brought to one maximum",
        ROWS_FILE,
        "b_sum += part * tl.exp2(tl.load(p_row_max, mask=m_row, other=LOWEST) - b_max)",
        "b_sum += part",
        KERNELS + "test_temperatures[random-0.005-dtype0]",
    ),
    Mutant(
        "last partial sum lost",
        ROWS_FILE,
        "    for _ in range(0, fixed):\n",
        "    for _ in range(0, max(fixed - 1, 1)):\n",
        KERNELS + "test_super_blocks[520-2]",
    ),
    Mutant(
        "sums of the path that was not taken",
        ROWS_FILE,
        "parts = tl.where(fits, 0, parts)",
        "parts = tl.where(fits, parts, parts)",
        KERNELS + "test_rows_of_any_length[1.0-dtype0]",
    ),
    Mutant(
        "logarithm left in base 2",
        ROWS_FILE,
        "b_max.to(tl.float64)) * LN2",
        "b_max.to(tl.float64))",
        KERNELS + "test_symmetric_rows[False-6-dtype0]",
    ),
]

BACKWARD_FILE = "fastcl/kernels/lse_backward.py"
BACKWARD = [
    Mutant(
        "self and partner not left out of the gradient",
        BACKWARD_FILE,
        "infinite in fp16.\n        weight = tl.where(allowed(o_m, o_n, offset, pair, cols), weight, 0.0)\n",
        "infinite in fp16.\n",
        KERNELS + "test_symmetric_rows[True-62-dtype1]",
    ),
    Mutant(
        "the same in the wide kernel",
        BACKWARD_FILE,
        "    if needs_mask(o_i, o_j, offset, pair, cols, BLOCK_M, BLOCK_N):",
        "    if needs_mask(o_i, o_j, 1 << 20, 0, cols, BLOCK_M, BLOCK_N):",
        KERNELS + "test_symmetric_rows[True-64-dtype0]",
    ),
    Mutant(
        "u_i + u_j became 2 u_i",
        BACKWARD_FILE,
        "return e * (row_u[:, None] + col_u[None, :])",
        "return e * (row_u[:, None] + row_u[:, None])",
        KERNELS + "test_symmetric_rows[False-62-dtype1]",
    ),
    Mutant(
        "the columns' half of the weights lost",
        BACKWARD_FILE,
        "weight += tl.exp2(acc * c - col_k[None, :]) * col_u[None, :]",
        "weight += 0.0",
        KERNELS + "test_temperatures[random-0.005-dtype1]",
    ),
    Mutant(
        "WEIGHT_BITS not undone",
        BACKWARD_FILE,
        "unscale: tl.constexpr = 0.5**WEIGHT_BITS",
        "unscale: tl.constexpr = 1.0",
        KERNELS + "test_symmetric_rows[False-6-dtype1]",
    ),
    Mutant(
        "a flush lost",
        BACKWARD_FILE,
        "before + acc * unscale",
        "acc * unscale",
        KERNELS + "test_flushed_and_split_gradients[1-1]",
    ),
    Mutant(
        "accumulator not cleared after a flush",
        BACKWARD_FILE,
        "            grad = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)\n        for t in",
        "        for t in",
        KERNELS + "test_flushed_and_split_gradients[1-1]",
    ),
    Mutant(
        "integers of the online maximum where the constant shift fits",
        BACKWARD_FILE,
        "k = tl.where(fits, k, tl.floor(lse2).to(tl.float32))",
        "k = tl.floor(lse2).to(tl.float32)",
        KERNELS + "test_rows_of_any_length[1.0-dtype1]",
    ),
    Mutant(
        "upstream weights not applied",
        BACKWARD_FILE,
        "u *= tl.load(p_w + o_m, mask=m_row, other=0.0)",
        "u *= 1.0",
        KERNELS + "test_upstream_weights[0.3-dtype0]",
    ),
    Mutant(
        "later chunks of the wide kernel start at row 0",
        BACKWARD_FILE,
        "o_i = first_row + o_chunk",
        "o_i = o_chunk + 0 * first_row",
        KERNELS + "test_wide_features_in_chunks_of_rows[dtype0]",
    ),
]

HOST_FILE, OPERANDS_FILE = "fastcl/kernels/host.py", "fastcl/kernels/operands.py"
HOST = [
    Mutant(
        "partial gradients of later splits lost",
        HOST_FILE,
        "return part[0] if splits == 1 else part.sum(0)",
        "return part[0]",
        KERNELS + "test_flushed_and_split_gradients[2-2]",
    ),
    Mutant(
        "WEIGHT_BITS not undone in the wide kernel",
        OPERANDS_FILE,
        "[x.mul_(0.5**weight_bits) for x in found]",
        "[x for x in found]",
        KERNELS + "test_wide_features_in_chunks_of_rows[dtype1]",
    ),
    Mutant(
        "constant shift where it does not fit",
        OPERANDS_FILE,
        "self.paths = (not fixed_shift_fits(bound, cols),)",
        "self.paths = (False,)",
        KERNELS + "test_temperatures[antipodal-0.005-dtype0]",
    ),
    Mutant(
        "last split lost",
        OPERANDS_FILE,
        "return triton.cdiv(col_blocks, per_split), per_split",
        "return max(1, triton.cdiv(col_blocks, per_split) - 1), per_split",
        KERNELS + "test_rectangular_without_mask[129]",
    ),
]

MUTANTS = [*TILES, *SYMMETRIC, *RECTANGULAR, *BACKWARD, *HOST]
