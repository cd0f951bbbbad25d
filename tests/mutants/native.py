"""Mutants of the C++ kernels. Neighbours share a file: each change of file builds two objects anew, not one."""

from __future__ import annotations

from mutant import INPUTS, NT_XENT, RANKS, Mutant

# M = 300 rows are several blocks, 34 are one that vectors do not fill.
BLOCKS = NT_XENT + "test_shapes[cpp-150-20-dtype1]"
ONE_BLOCK = NT_XENT + "test_shapes[cpp-17-33-dtype1]"
ONLINE = NT_XENT + "test_temperatures[cpp-0.005-dtype1]"

MUTANTS = [
    Mutant(
        "C++: running maximum not rescaled",
        "csrc/cpu/lse_forward.cpp",
        "sum_[first + k] *= std::exp(static_cast<double>(m) - static_cast<double>(candidate));",
        "sum_[first + k] *= 1;",
        NT_XENT + "test_rows_not_normalised[cpp-3.0-dtype1]",
    ),
    Mutant(
        "C++: shift not added back",
        "csrc/cpu/lse_forward.cpp",
        "(std::log2(total) + range_.shift) / kLog2E",
        "std::log2(total) / kLog2E",
        ONE_BLOCK,
    ),
    Mutant(
        "C++: columns' half of the symmetry lost",
        "csrc/cpu/lse_forward.cpp",
        "i == j ? nullptr : &sums, row_blocks",
        "i <= j ? nullptr : &sums, row_blocks",
        BLOCKS,
    ),
    Mutant(
        "C++: sums of later stripes of columns lost",
        "csrc/cpu/lse_forward.cpp",
        "total += sum_[k * rows_ + i];",
        "total += k == 0 ? sum_[i] : 0;",
        RANKS + "[contract_over_several_tiles-dtype=float64-2]",
    ),
    Mutant(
        "C++: transposed half of the gradient lost",
        "csrc/cpu/lse_backward.cpp",
        "if (i != j) g.add(0, j,",
        "if (i > j) g.add(0, j,",
        BLOCKS,
    ),
    Mutant(
        "C++: u_i + u_j became 2 u_i",
        "csrc/cpu/lse_backward.cpp",
        "&rows.u[row], &cols.u[col]);",
        "&rows.u[row], &rows.u[row]);",
        BLOCKS,
    ),
    Mutant(
        "C++: sums of all but the last 64 blocks lost",
        "csrc/cpu/gradient_sums.h",
        "block.folded ? to[k] + from[k] : from[k]",
        "from[k]",
        NT_XENT + "test_more_blocks_than_one_level_of_sums",
    ),
    Mutant(
        "C++: gradients of later stripes of columns lost",
        "csrc/cpu/gradient_sums.h",
        "for (int64_t copy = 1; copy < copies_; ++copy) g.add_",
        "for (int64_t copy = copies_; copy < copies_; ++copy) g.add_",
        RANKS + "[contract_over_several_tiles-dtype=float64-2]",
    ),
    Mutant(
        "C++: positives pulled by one side only",
        "csrc/cpu/pair_backward.cpp",
        "in.pull(i) + in.pull(partner)",
        "in.pull(i) + in.pull(i)",
        ONE_BLOCK,
    ),
    Mutant(
        "C++: normalisation backward dropped",
        "csrc/cpu/pair_backward.cpp",
        "if (in.rnorm != nullptr) simd",
        "if (in.rnorm == in.pull) simd",
        ONE_BLOCK,
    ),
    Mutant(
        "C++: zero rows get a gradient",
        "csrc/cpu/row_norm.h",
        "kernels<T>().scale_row(x, static_cast<T>(1 / kSmallestNorm), d);\n    return 0;",
        "kernels<T>().scale_row(x, static_cast<T>(1 / kSmallestNorm), d);\n    return 1;",
        INPUTS + "test_zero_rows_get_no_gradient[default-float32]",
    ),
    Mutant(
        "C++: self mask dropped",
        "csrc/cpu/tiles.h",
        "    fill_diagonal(tile, 0, tile.rows, self_, value);\n",
        "",
        ONE_BLOCK,
    ),
    Mutant(
        "C++: offset ignored",
        "csrc/cpu/tiles.h",
        "a.start(i) + offset - b.start(j);",
        "a.start(i) + 0 * offset - b.start(j);",
        RANKS + "[contract-reduction=mean-grad_reduction=mean-2]",
    ),
    Mutant(
        "C++: constant shift where it does not fit",
        "csrc/cpu/exp_range.h",
        "fixed = cols > 2 && 2 * bound2 + sum2 <= 2 * limit;",
        "fixed = cols > 2 && sum2 <= 2 * limit;",
        ONLINE,
    ),
]
