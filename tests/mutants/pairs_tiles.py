"""Mutants of the walks over tiles: which blocks compare what, which path is taken, and the arithmetic of a softplus."""

from __future__ import annotations

from mutant import KERNELS, PAIR_KERNELS, PAIR_TILES, Mutant

MASKED_FILE, SOFTPLUS_FILE = "fastcl/kernels/lse_masked.py", "fastcl/kernels/softplus.py"
ROWS_FILE, TILES_FILE, HOST_FILE = "fastcl/kernels/lse_rows.py", "fastcl/kernels/tiles.py", "fastcl/kernels/host.py"
WALKS, BLOCKS = PAIR_TILES + "test_walks_of_all_kinds_of_blocks", PAIR_TILES + "test_softplus_in_blocks_of_all_kinds"

MUTANTS = [
    Mutant(
        "ids of the first block in all of them",
        MASKED_FILE,
        "load_block(p_ids_b, o_j, BLOCK_N)",
        "load_block(p_ids_b, 0, BLOCK_N)",
        WALKS + "[400-150-0-5.0-5.0-drop-False]",
    ),
    Mutant(
        "bias of the first block in all of them",
        MASKED_FILE,
        "load_block(p_bias, o_j, BLOCK_N)",
        "load_block(p_bias, 0, BLOCK_N)",
        WALKS + "[400-150-0-5.0-5.0-keep-True]",
    ),
    Mutant(
        "whole blocks compare no ids",
        MASKED_FILE,
        "b_max, b_sum, positives, counts, BIASED, CHOSEN, SAME,",
        "b_max, b_sum, positives, counts, BIASED, False, SAME,",
        WALKS + "[400-150-0-5.0-5.0-only-False]",
    ),
    Mutant(
        "blocks with masks compare no ids",
        MASKED_FILE,
        "            keep = keep & same\n",
        "            keep = keep\n",
        WALKS + "[400-150-0-5.0-5.0-drop-False]",
    ),
    Mutant(
        "partners beside ids not left out",
        MASKED_FILE,
        "keep = allowed(o_m, o_n, offset, pair, cols)",
        "keep = allowed(o_m, o_n, offset, 0, cols)",
        WALKS + "[None-0-165-125.0-125.0-drop-False]",
    ),
    Mutant(
        "self counts as its own positive",
        MASKED_FILE,
        "            counted = counted & keep\n",
        "            counted = counted\n",
        WALKS + "[None-0-165-5.0-5.0-sum-False]",
    ),
    Mutant(
        "constant shift beside a bias in the forward",
        HOST_FILE,
        "math.inf if bias is not None else bound, max",
        "bound, max",
        WALKS + "[400-150-0-5.0-5.0-keep-True]",
    ),
    Mutant(
        "the device's choice among one path",
        HOST_FILE,
        "    for online_max in reach.paths:\n        lse_masked_kernel",
        "    for online_max in reach.paths[:1]:\n        lse_masked_kernel",
        WALKS + "[400-150-0-125.0--1.0-drop-False]",
    ),
    Mutant(
        "whole blocks of a softplus compare no ids",
        SOFTPLUS_FILE,
        "_add_tile(acc, c, beta, keep, sums, slopes, CHOSEN)",
        "_add_tile(acc, c, beta, keep, sums, slopes, False)",
        BLOCKS + "[-400-drop]",
    ),
    Mutant(
        "blocks of a softplus with masks compare no ids",
        SOFTPLUS_FILE,
        "            keep = keep & id_mask",
        "            keep = keep | id_mask",
        BLOCKS + "[383-only]",
    ),
    Mutant(
        "diagonal of a softplus without its offset",
        SOFTPLUS_FILE,
        "masked_blocks(o_i, offset, 0, cols,",
        "masked_blocks(o_i, 0, 0, cols,",
        BLOCKS + "[383-keep]",
    ),
    Mutant(
        "series of the logarithm without its last term",
        SOFTPLUS_FILE,
        "w * (C2 + w * C3)",
        "w * C2",
        PAIR_TILES + "test_one_softplus_and_its_slope[0.0]",
    ),
    Mutant(
        "last coefficient of the logarithm cut short",
        SOFTPLUS_FILE,
        "-0.00085513375695782541",
        "-0.000855",
        PAIR_TILES + "test_polynomial_of_the_logarithm",
    ),
    Mutant(
        "sigmoid by the root alone",
        SOFTPLUS_FILE,
        "return root * root",
        "return root",
        PAIR_KERNELS + "test_softplus_sides[True-True-b-dtype0]",
    ),
    Mutant(
        "sums of a softplus left in base 2",
        SOFTPLUS_FILE,
        "sums * LN2",
        "sums",
        PAIR_TILES + "test_one_softplus_and_its_slope[1.0]",
    ),
    Mutant(
        "the same where weights are made too",
        SOFTPLUS_FILE,
        "tl.sum(softplus, 1) * LN2",
        "tl.sum(softplus, 1)",
        PAIR_KERNELS + "test_softplus[70-33--64-only-1.0-dtype0]",
    ),
    Mutant(
        "a tile whose first corner alone is on the diagonal",
        ROWS_FILE,
        "(first < o_j + BLOCK_N) &",
        "(first < o_j + BLOCK_N - 1) &",
        BLOCKS + "[383-keep]",
    ),
    Mutant(
        "a tile whose last corner alone is on the diagonal",
        ROWS_FILE,
        "(first + BLOCK_M > o_j)",
        "(first + BLOCK_M > o_j + 1)",
        BLOCKS + "[-127-keep]",
    ),
    Mutant(
        "partners in no tile of weights",
        ROWS_FILE,
        "BLOCK_N) | partners |",
        "BLOCK_N) |",
        KERNELS + "test_symmetric_rows[True-300-dtype0]",
    ),
    Mutant(
        "columns past the end in the sums beside weights",
        ROWS_FILE,
        " | partners | (o_j + BLOCK_N > cols)",
        " | partners",
        PAIR_KERNELS + "test_softplus[130-129-0-drop-1.0-dtype0]",
    ),
    Mutant(
        "last columns of weights not written",
        TILES_FILE,
        "(o_n < ld_out)[None, :]",
        "(o_n < ld_out - UNIT)[None, :]",
        PAIR_TILES + "test_weights_beside_the_padding_of_their_rows[136]",
    ),
]
