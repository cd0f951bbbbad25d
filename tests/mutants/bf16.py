"""Mutants of the products of bf16 rows on the CPU, and of one instruction set alone."""

from __future__ import annotations

from mutant import Mutant

BF16 = "tests/test_bf16.py::"
EXACT = BF16 + "test_as_exact_as_the_type_allows[130-90-63-5.0]"
ROUNDED = BF16 + "test_rows_are_rounded_once_and_positives_are_of_them[40-33-True]"
LEVELS = "tests/test_simd_levels.py::"

MUTANTS = [
    Mutant(
        "bf16: odd rows left out of the sums",
        "csrc/cpu/bf16.cpp",
        "out[2 * c + 1] = odd[c];",
        "out[2 * c + 1] = BFloat16(0);",
        EXACT,
    ),
    Mutant(
        "bf16: the row after an odd last one is no zeros",
        "csrc/cpu/bf16.cpp",
        "zeros(padded == n ? 0 : d, BFloat16(0));",
        'zeros(padded == n ? 0 : d, BFloat16(std::nanf("")));',
        BF16 + "test_as_exact_as_the_type_allows[65-63-33-5.0]",
    ),
    Mutant(
        "bf16: pairs of rows in each other's place in the transposed tile",
        "csrc/cpu/bf16.cpp",
        "_mm512_cvtne2ps_pbh(odd, even)",
        "_mm512_cvtne2ps_pbh(even, odd)",
        BF16 + "test_every_column_counts_once[25.0-330]",
    ),
    Mutant(
        "bf16: quarters in each other's place in the transposed tile",
        "csrc/cpu/bf16.cpp",
        "t[c + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);",
        "t[c + 8] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);",
        BF16 + "test_every_column_counts_once[25.0-330]",
    ),
    Mutant(
        "bf16: rows of an odd length without their column of zeros",
        "csrc/cpu/bf16.cpp",
        "rows_.narrow(1, d_, 1).zero_();",
        "rows_.narrow(1, d_, 1).fill_(std::numeric_limits<double>::quiet_NaN());",
        BF16 + "test_every_column_counts_once[25.0-331]",
    ),
    Mutant(
        "bf16: products kept where oneDNN is switched off",
        "csrc/cpu/pairs.h",
        "x.scalar_type() == at::kBFloat16 && !bf16_products()",
        "x.scalar_type() == at::kBFloat16 && !bf16_supported()",
        BF16 + "test_without_onednn_rows_are_widened",
    ),
    Mutant(
        "bf16: sums over blocks forgotten",
        "csrc/cpu/gradient_sums.h",
        "block.pending > 0);",
        "false);",
        EXACT,
    ),
    Mutant(
        "bf16: positives of rows that were not rounded",
        "csrc/cpu/normalize_pair.cpp",
        "round_row(buffer, row, d);\n          widen_row(row, buffer, d);",
        "round_row(buffer, row, d);",
        ROUNDED,
    ),
    Mutant(
        "bf16: rows widened in Python alone",
        "fastcl/ops/__init__.py",
        "x.dtype == torch.bfloat16 and _native.BF16:",
        "x.dtype == torch.bfloat16 and not _native.BF16:",
        ROUNDED,
    ),
    Mutant(
        "instruction set: sums over half the lanes with AVX2",
        "csrc/cpu/simd_math.inl",
        "for (int64_t width = kLanes<T> / 2; width > 0;",
        "for (int64_t width = kLanes<T> == 8 && sizeof(T) == 4 ? 2 : kLanes<T> / 2; width > 0;",
        LEVELS + "test_rows[avx2-20-64-True-dtype0]",
    ),
    Mutant(
        "instruction set: the one that was asked for not taken",
        "csrc/cpu/simd_dispatch.cpp",
        "level().store(static_cast<Level>(k), std::memory_order_relaxed);",
        "static_cast<void>(level());",
        LEVELS + "test_the_level_in_use_is_reported[baseline]",
    ),
]
