"""Mutants of the passes over rows and other rows, ids, biases, softplus and statistics: in C++ and in Triton."""

from __future__ import annotations

from mutant import PAIR_KERNELS, PAIR_LOSSES, PAIR_OPS, Mutant

RECTANGLE, SYMMETRIC = PAIR_OPS + "test_lse_of_rectangles", PAIR_OPS + "test_lse_of_the_rows_themselves"
SOFTPLUS = PAIR_OPS + "test_softplus"

# Neighbours share a file, as in native.py.
NATIVE = [
    Mutant(
        "C++: sums of later stripes not brought to one maximum",
        "csrc/cpu/lse_forward.cpp",
        "part : part * std::exp(part_max - shift);",
        "part : part;",
        RECTANGLE + "[cpp-70-530-33-keep-True-dtype0]",
    ),
    Mutant(
        "C++: positives of later stripes lost",
        "csrc/cpu/lse_forward.cpp",
        "sums[i] += sum_[k * rows_ + i];",
        "sums[i] += k == 0 ? sum_[i] : 0;",
        RECTANGLE + "[cpp-70-530-33-sum-False-dtype0]",
    ),
    Mutant(
        "C++: scale left in the positives",
        "csrc/cpu/lse_forward.cpp",
        "positives.finish(range.factor,",
        "positives.finish(1,",
        PAIR_OPS + "test_scales[cpp-1000.0-1.0-dtype0]",
    ),
    Mutant(
        "C++: positives of a diagonal tile counted twice",
        "csrc/cpu/lse_forward.cpp",
        "positives.add(s, pairs, 0, i, j, i != j);",
        "positives.add(s, pairs, 0, i, j, true);",
        SYMMETRIC + "[cpp-18-9-sum-False-dtype0]",
    ),
    Mutant(
        "C++: no counts where the scale is bad",
        "csrc/cpu/lse_forward.cpp",
        "if (sum) forward<T>(args, 1, bound, columns, out);",
        "if (sum) out[2].zero_();",
        PAIR_OPS + "test_a_bad_scale_gives_nan[0.0]",
    ),
    Mutant(
        "C++: pulls of the columns lost",
        "csrc/cpu/lse_backward.cpp",
        "padded<T>(col_pull, args.columns()",
        "padded<T>(OptionalTensor(), args.columns()",
        RECTANGLE + "[cpp-3-5-4-sum-False-dtype0]",
    ),
    Mutant(
        "C++: pulls not divided by the factor of the weights",
        "csrc/cpu/lse_backward.cpp",
        "row_pull_ = padded<T>(a.pull, args.a.size(0), T(0), factor);",
        "row_pull_ = padded<T>(a.pull, args.a.size(0), T(0));",
        RECTANGLE + "[cpp-3-5-4-sum-False-dtype0]",
    ),
    Mutant(
        "C++: pairs left out are pulled",
        "csrc/cpu/lse_backward.cpp",
        "    scratch.set_left_out(s, T(0));\n",
        "",
        SYMMETRIC + "[cpp-18-9-sum-False-dtype0]",
    ),
    Mutant(
        "C++: factor of the weights lost for the columns",
        "csrc/cpu/lse_backward.cpp",
        "g_columns.finish(weights.factor)",
        "g_columns.finish(1)",
        RECTANGLE + "[cpp-3-5-4-keep-False-dtype0]",
    ),
    Mutant(
        "C++: columns without a log-sum-exp take part",
        "csrc/cpu/lse_backward.cpp",
        "both_(!args.b.has_value() || b.lse.has_value()),",
        "both_(true),",
        PAIR_OPS + "test_sides_that_take_no_part[cpp-500.0-dtype0]",
    ),
    Mutant(
        "C++: every block of columns has the bias of the first",
        "csrc/cpu/pairs.h",
        "&bias_[cols().start(j)]",
        "&bias_[0 * cols().start(j)]",
        RECTANGLE + "[cpp-1-300-7-keep-True-dtype0]",
    ),
    Mutant(
        "C++: ids lose their high bits",
        "csrc/cpu/pairs.h",
        "span <= std::numeric_limits<Id<T>>::max()",
        "span + 1 > 0",
        PAIR_OPS + "test_kinds_of_ids[cpp-far apart-dtype0]",
    ),
    Mutant(
        "C++: ids of the columns alone have no code",
        "csrc/cpu/pairs.h",
        "      sorted.insert(sorted.end(), p_b, p_b + n_b);\n",
        "",
        PAIR_OPS + "test_kinds_of_ids[cpp-far apart-dtype0]",
    ),
    Mutant(
        "C++: missing weights of a softplus are zeros",
        "csrc/cpu/pair_softplus.cpp",
        "w = padded<T>(weights, n, T(1));",
        "w = padded<T>(weights, n, T(0));",
        PAIR_LOSSES + "test_shapes[cpp-siglip-2-5-dtype0]",
    ),
    Mutant(
        "C++: sign of a softplus ignored",
        "csrc/cpu/pair_softplus.cpp",
        "static_cast<T>(sign * scale)",
        "static_cast<T>(std::abs(sign) * scale)",
        SOFTPLUS + "[cpp-3-5-4-keep--1.0-dtype0]",
    ),
    Mutant(
        "C++: softplus of a diagonal tile counted twice",
        "csrc/cpu/pair_softplus.cpp",
        "      if (i == j) return;\n",
        "",
        SOFTPLUS + "[cpp-150-150-8-keep-1.0-dtype0]",
    ),
    Mutant(
        "C++: softplus of later stripes lost",
        "csrc/cpu/pair_softplus.cpp",
        "total[i] += parts[k * rows_ + i];",
        "total[i] += k == 0 ? parts[i] : 0;",
        SOFTPLUS + "[cpp-70-530-33-keep-1.0-dtype0]",
    ),
    Mutant(
        "C++: moment not moved with the maximum",
        "csrc/cpu/similarity_stats.cpp",
        "moment = factor * (moment + step * sum);",
        "moment = factor * moment;",
        PAIR_OPS + "test_stats[cpp-70-530-33-30.0-dtype0]",
    ),
    Mutant(
        "C++: NaN lost in the largest similarity",
        "csrc/cpu/similarity_stats.cpp",
        "std::isnan(all.sum) ? all.sum : all.largest;",
        "all.largest;",
        PAIR_OPS + "test_nan_is_not_lost[cpp-5.0-dtype0]",
    ),
    Mutant(
        "C++: number of column sums depends on the threads",
        "csrc/cpu/schedule.h",
        "stripes_ = std::min((kTasks + short_ - 1) / short_, long_ / short_);",
        "stripes_ = std::min((3 * at::get_num_threads() + short_ - 1) / short_, long_ / short_);",
        PAIR_OPS + "test_the_same_bits_whatever_the_threads[5.0-60-900]",
    ),
    Mutant(
        "C++: pairs with the last block lost",
        "csrc/cpu/schedule.h",
        "if (i < blocks && j < blocks) task(",
        "if (i < blocks && j < std::max<int64_t>(blocks - 1, 1)) task(",
        SYMMETRIC + "[cpp-300-0-keep-False-dtype0]",
    ),
    Mutant(
        "C++: blocks of columns without products keep garbage",
        "csrc/cpu/gradient_sums.h",
        "block.size, T(0));",
        "block.size, T(1));",
        RECTANGLE + "[cpp-5-0-4-keep-False-dtype0]",
    ),
    Mutant(
        "C++: only the same id became no other id",
        "csrc/cpu/simd_pairs.inl",
        "drop ? (same ? left_out : x) : (same ? x : left_out)",
        "drop ? (same ? left_out : x) : (same ? left_out : x)",
        RECTANGLE + "[cpp-3-5-4-only-False-dtype0]",
    ),
    Mutant(
        "C++: pairs left out are positives",
        "csrc/cpu/simd_pairs.inl",
        "== row_id[i]) & bits<T>(x != -__builtin_inf());",
        "== row_id[i]) & bits<T>(x == x);",
        SYMMETRIC + "[cpp-18-9-sum-False-dtype0]",
    ),
    Mutant(
        "C++: counts of earlier strips of rows added again",
        "csrc/cpu/simd_pairs.inl",
        "      __builtin_memset(strip_count, 0, sizeof(strip_count));\n",
        "      if (first == 0) __builtin_memset(strip_count, 0, sizeof(strip_count));\n",
        SYMMETRIC + "[cpp-300-0-sum-False-dtype0]",
    ),
    Mutant(
        "C++: the rows' side of the sigmoids lost",
        "csrc/cpu/simd_pairs.inl",
        "weight += load(col_w + j) *",
        "weight = load(col_w + j) *",
        SOFTPLUS + "[cpp-3-5-4-keep-1.0-dtype0]",
    ),
    Mutant(
        "C++: 0 times infinity in the moment",
        "csrc/cpu/simd_pairs.inl",
        "e * (x < smallest ? splat<T>(smallest) : x)",
        "e * (x < smallest ? x : x)",
        PAIR_OPS + "test_stats[cpp-3-5-4-30.0-dtype0]",
    ),
]

MASKED_FILE, TWO_WAY_FILE = "fastcl/kernels/lse_masked.py", "fastcl/kernels/lse_two_way.py"
COLUMNS = PAIR_KERNELS + "test_columns"
FORWARD = [
    Mutant(
        "scale and bias in the positives",
        MASKED_FILE,
        "tl.where(counted, acc, 0.0)",
        "tl.where(counted, s2, 0.0)",
        PAIR_KERNELS + "test_masked_forward[None-0-35-sum-True-dtype0]",
    ),
    Mutant(
        "columns that their bias rules out are counted",
        MASKED_FILE,
        'counted = equal & (s2 != float("-inf"))',
        'counted = equal & (s2 != float("inf"))',
        PAIR_KERNELS + "test_masked_forward[150-3-0-sum-True-dtype0]",
    ),
    Mutant(
        "bias left in base e",
        MASKED_FILE,
        "bias[None, :] * LOG2E",
        "bias[None, :]",
        PAIR_KERNELS + "test_masked_forward[150-3-0-keep-True-dtype0]",
    ),
    Mutant(
        "self on the wrong side of rows and columns",
        TWO_WAY_FILE,
        "(o_n[None, :] != o_m[:, None] + offset)",
        "(o_n[None, :] != o_m[:, None] - offset)",
        COLUMNS + "[130-257-99-5.0-5.0-dtype0]",
    ),
    Mutant(
        "masked blocks of rows forget the offset",
        TWO_WAY_FILE,
        "band(o_j - offset, o_j - offset + BLOCK_N - 1,",
        "band(o_j, o_j + BLOCK_N - 1,",
        COLUMNS + "[257-129--127-5.0-5.0-dtype0]",
    ),
    Mutant(
        "rows past the end in the sums of columns",
        TWO_WAY_FILE,
        " & (o_m < r)[:, None]",
        "",
        COLUMNS + "[130-257-99-5.0-5.0-dtype0]",
    ),
    Mutant(
        "sums of rows overwritten by the next block of columns",
        TWO_WAY_FILE,
        "add_rows(p_rows, o_i + o_row, r, tl.sum(e, 1), j != j_start)",
        "add_rows(p_rows, o_i + o_row, r, tl.sum(e, 1), False)",
        PAIR_KERNELS + "test_several_blocks[1]",
    ),
]

SOFTPLUS_FILE = "fastcl/kernels/softplus.py"
SLOPES = [
    Mutant(
        "slope of a softplus at its lower end",
        SOFTPLUS_FILE,
        "tl.where(y >= 0, root, z)",
        "tl.where(y >= 0, root, root)",
        PAIR_KERNELS + "test_softplus_is_relatively_exact_at_both_ends[-5.0]",
    ),
    Mutant(
        "softplus by the plain logarithm",
        SOFTPLUS_FILE,
        "softplus = tl.maximum(y, 0.0) + z * (C0 + w * (C1 + w * (C2 + w * C3)))",
        "softplus = tl.maximum(y, 0.0) + tl.log2(1.0 + e)",
        PAIR_KERNELS + "test_softplus_is_relatively_exact_at_both_ends[-80.0]",
    ),
    Mutant(
        "pairs left out have sigmoid weights",
        SOFTPLUS_FILE,
        'load_row(p_ids_b, o_n, cols, 0), SAME), y, float("-inf"))',
        "load_row(p_ids_b, o_n, cols, 0), SAME), y, y)",
        PAIR_KERNELS + "test_softplus_sides[False-False-ab-dtype0]",
    ),
    Mutant(
        "upstream weights lost where sums are made too",
        SOFTPLUS_FILE,
        "slope * _scaled(p_w_a, o_m, r, WEIGHT_BITS)[:, None]",
        "slope * _scaled(None, o_m, r, WEIGHT_BITS)[:, None]",
        PAIR_KERNELS + "test_softplus[70-33--64-only--1.0-dtype0]",
    ),
    Mutant(
        "sums of later chunks of rows in the place of the first",
        "fastcl/kernels/host_pairs.py",
        "total[first : first + count] = part",
        "total[:count] = part",
        PAIR_KERNELS + "test_softplus[70-33--64-only-1.0-dtype0]",
    ),
    Mutant(
        "distance below the maximum not moved with it",
        "fastcl/kernels/stats.py",
        "(b_below - b_sum * rise) * lower",
        "b_below * lower",
        PAIR_KERNELS + "test_several_blocks[1]",
    ),
    Mutant(
        "the same where splits are joined",
        "fastcl/kernels/host_pairs.py",
        "(part_below + part_sum * lower)",
        "part_below",
        PAIR_KERNELS + "test_stats[70-None-0-35-125.0-dtype0]",
    ),
]

BACKWARD_FILE = "fastcl/kernels/lse_backward.py"
HOST_FILE, OPERANDS_FILE = "fastcl/kernels/host.py", "fastcl/kernels/operands.py"
BACKWARD = [
    Mutant(
        "pulls without WEIGHT_BITS",
        BACKWARD_FILE,
        "pull * 2.0**WEIGHT_BITS",
        "pull",
        PAIR_KERNELS + "test_masked_backward[None-0-35-sum-False-dtype1]",
    ),
    Mutant(
        "pulls of the columns lost",
        BACKWARD_FILE,
        "pull += load_row(p_pull_b, o_n, cols, 0.0)[None, :]",
        "pull += 0.0",
        PAIR_KERNELS + "test_masked_backward[150-3-0-sum-False-dtype0]",
    ),
    Mutant(
        "columns that their bias rules out are pulled",
        BACKWARD_FILE,
        'weight = tl.where(acc != float("-inf"), weight, 0.0)',
        'weight = tl.where(acc != float("inf"), weight, 0.0)',
        PAIR_KERNELS + "test_masked_backward[150-3-0-sum-True-dtype0]",
    ),
    Mutant(
        "bias of the gradient left in base e",
        BACKWARD_FILE,
        "load_row(p_bias, o_n, cols, 0.0)[None, :] * LOG2E",
        "load_row(p_bias, o_n, cols, 0.0)[None, :]",
        PAIR_KERNELS + "test_masked_backward[150-3-0-keep-True-dtype0]",
    ),
    Mutant(
        "constant shift beside a bias",
        HOST_FILE,
        "bound if bias is None else math.inf",
        "bound",
        PAIR_KERNELS + "test_sides_that_take_no_part[True-5.0-True]",
    ),
    Mutant(
        "pulls overflow fp16",
        HOST_FILE,
        "weight_bits = 14 if pull_a is None else 13",
        "weight_bits = 14 if pull_a is None else 14",
        PAIR_KERNELS + "test_largest_weights[dtype1]",
    ),
    Mutant(
        "offset not negated where roles are swapped",
        HOST_FILE,
        "_partials_rows(b, a, -offset, 0, reach",
        "_partials_rows(b, a, offset, 0, reach",
        COLUMNS + "[130-257-99-125.0-125.0-dtype0]",
    ),
    Mutant(
        "the same with ids",
        HOST_FILE,
        "_masked_side(lse, b, a, -offset, 0,",
        "_masked_side(lse, b, a, offset, 0,",
        PAIR_KERNELS + "test_columns_with_masks[drop-0]",
    ),
    Mutant(
        "bias not added to the log-sum-exp of its column",
        HOST_FILE,
        "            lse += bias\n",
        "            lse += 0 * bias\n",
        PAIR_KERNELS + "test_columns_with_masks[keep-20]",
    ),
    Mutant(
        "the shorter side decides the path",
        HOST_FILE,
        "math.inf if bias is not None else bound, max(rows, cols) if columns else cols)",
        "math.inf if bias is not None else bound, cols)",
        PAIR_KERNELS + "test_the_longer_side_decides_the_path[70-1-lse_rows]",
    ),
    Mutant(
        "the columns' gradient of the last chunk of rows alone",
        OPERANDS_FILE,
        "[product if first == 0 else found[1].add_(product)]",
        "[product]",
        PAIR_KERNELS + "test_backward_of_both[5.0-5.0-40-True-True-dtype0]",
    ),
    Mutant(
        "the columns' gradient made of the first rows",
        OPERANDS_FILE,
        "_product_fp32(weights.T, a[chosen])",
        "_product_fp32(weights.T, a[: len(weights)])",
        PAIR_KERNELS + "test_backward_of_both[5.0-5.0-40-True-True-dtype0]",
    ),
]

TRITON = [*FORWARD, *SLOPES, *BACKWARD]
