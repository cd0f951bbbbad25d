"""Mutants of what is done row by row at both ends: normalisation, the loss of every row, the way back."""

from __future__ import annotations

from mutant import ROW_KERNELS, Mutant

ENDS_FILE = "fastcl/kernels/rows.py"
TRITON = [
    Mutant(
        "unit rows are not rounded",
        ENDS_FILE,
        "z.to(ROUNDED).to(tl.float32)",
        "z",
        ROW_KERNELS + "test_unit_rows_are_rounded_where_that_is_asked_for[triton]",
    ),
    Mutant(
        "gradients of unit rows read in the layout of the rows",
        ENDS_FILE,
        "dz = _load_row(p_dz, o_m, o_d, stride_m, stride_d, mask)",
        "dz = _load_row(p_dz, o_m, o_d, d, 1, mask)",
        ROW_KERNELS + "test_unit_rows_and_the_way_back[33-130-dtype0-triton]",
    ),
    Mutant(
        "projection of the normalisation backward dropped",
        ENDS_FILE,
        "(dz - z * tl.sum(z * dz, 1)[:, None]) * rnorm",
        "dz * rnorm",
        ROW_KERNELS + "test_pair_backward[33-130-True-dtype0-True-1.0-None-triton]",
    ),
    Mutant(
        "1 / length not applied",
        ENDS_FILE,
        "tl.sum(z * dz, 1)[:, None]) * rnorm[:, None]",
        "tl.sum(z * dz, 1)[:, None])",
        ROW_KERNELS + "test_pair_backward[33-130-True-dtype0-True-1.0-None-triton]",
    ),
    Mutant(
        "zero rows get a gradient",
        ENDS_FILE,
        "tl.where(short, 0.0, 1.0 / norm / peak)",
        "1.0 / norm / peak",
        ROW_KERNELS + "test_normalize_lengths[1e-14]",
    ),
    Mutant(
        "lengths by plain squares",
        ENDS_FILE,
        "norm = tl.sqrt_rn(tl.sum(y * y, 1))",
        "norm = tl.sqrt_rn(tl.sum(x * x, 1)) / peak",
        ROW_KERNELS + "test_normalize_lengths[1e+30]",
    ),
    Mutant(
        "positives pulled by one side only",
        ENDS_FILE,
        "both = (pull1 + pull2)",
        "both = (pull1 + pull1)",
        ROW_KERNELS + "test_pair_backward[33-130-False-dtype0-True-1.0-None-triton]",
    ),
    Mutant(
        "second view pulled to itself",
        ENDS_FILE,
        "dx2 = _row_grad(z2, z1,",
        "dx2 = _row_grad(z2, z2,",
        ROW_KERNELS + "test_pair_backward[33-130-False-dtype0-True-1.0-None-triton]",
    ),
    Mutant(
        "coefficient of the log-sum-exp part missing",
        ENDS_FILE,
        "dz = factor * grad - pull",
        "dz = grad - pull",
        ROW_KERNELS + "test_pair_backward[33-130-False-dtype0-True-1.0-None-triton]",
    ),
    Mutant(
        "small losses rounded away",
        ENDS_FILE,
        "near = tl.where(whole == 1.0, e, tl.log(whole) * (e / tl.where(whole == 1.0, 1.0, whole - 1.0)))",
        "near = tl.log(whole)",
        ROW_KERNELS + "test_pair_loss[64-True-1.0-None-triton]",
    ),
    Mutant(
        "rows alone lose infinitely much",
        ENDS_FILE,
        'loss = tl.where(x == float("-inf"), 0.0, x)',
        "loss = x",
        ROW_KERNELS + "test_pair_loss_of_rows_without_negatives[False-triton]",
    ),
    Mutant(
        "second view has the positives of other rows",
        ENDS_FILE,
        "tl.where(o_m < n, o_m, o_m - n)",
        "tl.where(o_m < n, o_m, 0)",
        ROW_KERNELS + "test_pair_loss[64-True-1.0-None-triton]",
    ),
    Mutant(
        "what the log-sum-exp leaves of the positive",
        ENDS_FILE,
        "loss -= (pull - weight * scale) * pos",
        "loss -= pull * pos",
        ROW_KERNELS + "test_pair_loss[64-True-0.25-1.0-triton]",
    ),
    Mutant(
        "sums of later programs lost",
        ENDS_FILE,
        "range(0, count, BLOCK)",
        "range(0, BLOCK, BLOCK)",
        ROW_KERNELS + "test_sum_of_many_programs",
    ),
    Mutant(
        "upstream weights of rows do not pull",
        ENDS_FILE,
        "upstream = grad * tl.load(p_w + o, mask=m_row, other=0.0).to(tl.float64)",
        "upstream = grad * 1.0",
        ROW_KERNELS + "test_pair_backward[33-130-False-dtype0-True-1.0-None-triton]",
    ),
    Mutant(
        "gradient of the sum for that of the mean",
        ENDS_FILE,
        "grad = tl.load(p_grad).to(tl.float64) / divisor",
        "grad = tl.load(p_grad).to(tl.float64)",
        ROW_KERNELS + "test_pair_backward[33-130-False-dtype0-True-1.0-None-triton]",
    ),
    Mutant(
        "each product counted twice in the slope",
        ENDS_FILE,
        "slope2 = 0.5 * grad * tl.sum",
        "slope2 = grad * tl.sum",
        ROW_KERNELS + "test_pair_backward[33-130-False-dtype0-True-1.0-None-triton]",
    ),
    Mutant(
        "positives with a pull of their own depend on the scale",
        ENDS_FILE,
        "        share2 -= 1.0\n",
        "        share2 -= 0.0\n",
        ROW_KERNELS + "test_pair_backward[33-130-False-dtype0-True-0.25-1.0-triton]",
    ),
]

NATIVE = [
    Mutant(
        "C++: each product counted twice in the slope",
        "csrc/cpu/pair_backward.cpp",
        "0.5 * grad * z_g",
        "grad * z_g",
        ROW_KERNELS + "test_pair_backward[33-130-True-dtype0-True-1.0-None-cpp]",
    ),
    Mutant(
        "C++: gradient of the sum for that of the mean",
        "csrc/cpu/pair_backward.cpp",
        "g = grad.item<double>() / static_cast<double>(divisor)",
        "g = grad.item<double>() / static_cast<double>(divisor > 0)",
        ROW_KERNELS + "test_pair_backward[33-130-True-dtype0-True-1.0-None-cpp]",
    ),
    Mutant(
        "C++: positives with a pull of their own depend on the scale",
        "csrc/cpu/pair_backward.cpp",
        "pulled ? 1 - share[i] : -share[i]",
        "pulled ? -share[i] : -share[i]",
        ROW_KERNELS + "test_pair_backward[33-130-True-dtype0-True-0.25-1.0-cpp]",
    ),
    Mutant(
        "C++: losses of later blocks lost",
        "csrc/cpu/pair_loss.cpp",
        "for (const double sum : sums) total += sum;",
        "total = sums.empty() ? 0 : sums[0];",
        ROW_KERNELS + "test_pair_loss[3000-True-1.0-None-cpp]",
    ),
    Mutant(
        "C++: small losses rounded away",
        "csrc/cpu/pair_loss.cpp",
        "std::log1p(e)",
        "std::log(1 + e)",
        ROW_KERNELS + "test_pair_loss[64-True-1.0-None-cpp]",
    ),
    Mutant(
        "C++: rows alone lose infinitely much",
        "csrc/cpu/pair_loss.cpp",
        "if (alone) value = 0;",
        "if (!in.positive_counts && value > 0 && alone) value = 0;",
        ROW_KERNELS + "test_pair_loss_of_rows_without_negatives[False-cpp]",
    ),
    Mutant(
        "C++: the way back through the normalisation without the row's own direction",
        "csrc/cpu/unit_rows.cpp",
        "simd.dot(z + i * d, row, d)",
        "T(0)",
        ROW_KERNELS + "test_unit_rows_and_the_way_back[33-130-dtype0-cpp]",
    ),
    Mutant(
        "C++: unit rows are not rounded",
        "csrc/cpu/unit_rows.cpp",
        "if (rounded == at::kHalf) round_to",
        "if (rounded == at::kByte) round_to",
        ROW_KERNELS + "test_unit_rows_are_rounded_where_that_is_asked_for[cpp]",
    ),
]
