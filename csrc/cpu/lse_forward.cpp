// lse_i = log sum over the allowed j of exp(scale * <a_i, b_j> + bias_j): all but row i itself, its
// partner and what the ids leave out. From the same tiles the log-sum-exp of the columns, or the
// sums of <a_i, b_j> over the pairs of the same id.
// Fused: product, masks, exponential and sums per tile. Never stored: the [R, C] similarities.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "exp_range.h"
#include "pairs.h"
#include "schedule.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

// Totals of all rows in double, `copies` independent sets of them: sums over the tiles with the
// fixed shift, or relative to the running maximum m_i.
template <typename T>
class RowSums {
 public:
  RowSums(int64_t rows, int64_t copies, const ExpRange<T>& range)
      : rows_(rows), copies_(copies), range_(range), sum_(rows * copies, 0.) {
    if (!range.fixed) max_.assign(rows * copies, -std::numeric_limits<T>::infinity());
  }

  // Adds the row sums of a tile at `row` and, unless that is null, its column sums at `col` of
  // `columns`, which may be this.
  void add(const Tile<T>& s, int64_t row, RowSums* columns, int64_t col) {
    const auto& simd = kernels<T>();
    const bool both = columns != nullptr;
    if (range_.fixed) {
      double* const col_sum = both ? &columns->sum_[col] : nullptr;
      simd.exp2_sums(s, range_.c, range_.shift, &sum_[row], col_sum);
      return;
    }
    T row_max[kMaxTileCols], col_max[kMaxTileCols];
    simd.maxima(s, row_max, both ? col_max : nullptr);
    raise_maxima(row, s.rows, row_max);
    simd.exp_row_sums(s, row_max, &sum_[row]);
    if (both) {
      columns->raise_maxima(col, s.cols, col_max);
      simd.exp_col_sums(s, col_max, &columns->sum_[col]);
    }
  }

  // The copies combined in their order.
  void finish(double* lse) {
    const auto one = [&](int64_t i) -> double {
      if (range_.fixed) {
        double total = 0;
        for (int64_t k = 0; k < copies_; ++k) total += sum_[k * rows_ + i];
        return (std::log2(total) + range_.shift) / kLog2E;
      }
      double m = -std::numeric_limits<double>::infinity();
      for (int64_t k = 0; k < copies_; ++k) m = std::max<double>(m, max_[k * rows_ + i]);
      const double shift = std::isinf(m) && m < 0 ? 0. : m;
      double total = 0;
      for (int64_t k = 0; k < copies_; ++k) {
        const double part = sum_[k * rows_ + i], part_max = max_[k * rows_ + i];
        // part_max is -inf for an empty part, and for one of NaN alone, which must stay NaN.
        total += std::isinf(part_max) && part_max < 0 ? part : part * std::exp(part_max - shift);
      }
      return shift + std::log(total);
    };
    at::parallel_for(0, rows_, 2048, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) lse[i] = one(i);
    });
  }

 private:
  // tile_max: in, maxima of one tile; out, what to subtract from it.
  void raise_maxima(int64_t first, int64_t n, T* tile_max) {
    for (int64_t k = 0; k < n; ++k) {
      T& m = max_[first + k];
      const T candidate = tile_max[k];
      if (candidate > m) {
        sum_[first + k] *= std::exp(static_cast<double>(m) - static_cast<double>(candidate));
        m = candidate;
      }
      tile_max[k] = m == -std::numeric_limits<T>::infinity() ? T(0) : m;
    }
  }

  int64_t rows_, copies_;
  ExpRange<T> range_;
  std::vector<double> sum_;  // [copies, rows]
  std::vector<T> max_;       // the same, empty with the fixed shift
};

// Sum and number of the products of the same id of each row, `copies` independent sets of them.
template <typename T>
class PositiveSums {
 public:
  PositiveSums(int64_t rows, int64_t copies)
      : rows_(rows), copies_(copies), sum_(rows * copies, 0.), count_(rows * copies, 0) {}

  // Adds those of the rows of tile (i, j) and, with `columns`, of its columns.
  void add(const Tile<T>& s, const Pairs<T>& pairs, int64_t copy, int64_t i, int64_t j,
           bool columns) {
    const int64_t row = copy * rows_ + pairs.rows().start(i), col = pairs.cols().start(j);
    kernels<T>().same_id_sums(s, pairs.row_ids(i), pairs.col_ids(j), &sum_[row], &count_[row],
                              columns ? &sum_[col] : nullptr, columns ? &count_[col] : nullptr);
  }

  // factor: what the products were multiplied by.
  void finish(double factor, double* sums, int64_t* counts) const {
    for (int64_t i = 0; i < rows_; ++i) {
      sums[i] = 0;
      counts[i] = 0;
      for (int64_t k = 0; k < copies_; ++k) {
        sums[i] += sum_[k * rows_ + i];
        counts[i] += count_[k * rows_ + i];
      }
      sums[i] /= factor;
    }
  }

 private:
  int64_t rows_, copies_;
  std::vector<double> sum_;  // [copies, rows]
  std::vector<int64_t> count_;
};

using Results = std::vector<at::Tensor>;

// out: lse of the rows; with `columns` that of the columns; with Same::kSum positives and counts.
template <typename T>
void forward(const PairArguments& args, double scale, double bound, bool columns, Results& out) {
  const bool sum = args.ids.same == Same::kSum;
  const ExpRange<T> range = exp_range<T>(args, scale, bound, columns);
  if (!range.usable) {
    // The counts are of the ids alone.
    if (sum) forward<T>(args, 1, bound, columns, out);
    for (at::Tensor& x : out) {
      if (x.scalar_type() == at::kDouble) x.fill_(std::numeric_limits<double>::quiet_NaN());
    }
    return;
  }
  const Pairs<T> pairs(args, range.factor, Summands::kNone);
  const RowBlocks &row_blocks = pairs.rows(), &col_blocks = pairs.cols();
  const int64_t rows = args.a.size(0);
  const auto scratch = [&] { return pairs.scratch(); };
  const auto finish = [&](RowSums<T>& sums, const PositiveSums<T>& positives) {
    sums.finish(out[0].data_ptr<double>());
    if (sum) {
      positives.finish(range.factor, out[1].data_ptr<double>(), out[2].data_ptr<int64_t>());
    }
  };
  if (!args.b.has_value()) {
    RowSums<T> sums(rows, 1, range);
    PositiveSums<T> positives(sum ? rows : 0, 1);
    for_each_block_pair(row_blocks.count(), scratch, [&](auto& tile, int64_t i, int64_t j) {
      const Tile<T> s = pairs.products(tile, i, j);
      if (sum) positives.add(s, pairs, 0, i, j, i != j);
      sums.add(s, row_blocks.start(i), i == j ? nullptr : &sums, row_blocks.start(j));
    });
    finish(sums, positives);
  } else if (columns) {
    const Cells cells(row_blocks.count(), col_blocks.count());
    const int64_t cols = args.b->size(0);
    RowSums<T> sums(rows, cells.row_copies, range), col_sums(cols, cells.col_copies, range);
    cells.run(scratch, [&](auto& tile, int64_t row_copy, int64_t col_copy, int64_t i, int64_t j) {
      const Tile<T> s = pairs.similarities(tile, i, j);
      sums.add(s, row_copy * rows + row_blocks.start(i), &col_sums,
               col_copy * cols + col_blocks.start(j));
    });
    sums.finish(out[0].data_ptr<double>());
    col_sums.finish(out[1].data_ptr<double>());
  } else {
    const Stripes stripes(row_blocks.count(), col_blocks.count());
    RowSums<T> sums(rows, stripes.count, range);
    PositiveSums<T> positives(sum ? rows : 0, stripes.count);
    stripes.run(scratch, [&](auto& tile, int64_t stripe, int64_t i, int64_t j) {
      const Tile<T> s = pairs.products(tile, i, j);
      if (sum) positives.add(s, pairs, stripe, i, j, false);
      pairs.add_bias(s, j);
      sums.add(s, stripe * rows + row_blocks.start(i), nullptr, 0);
    });
    finish(sums, positives);
  }
}

Results lse_forward(const at::Tensor& a, const OptionalTensor& b, const at::Tensor& scale,
                    double bound, int64_t offset, int64_t pair, const OptionalTensor& ids_a,
                    const OptionalTensor& ids_b, std::string_view same, const OptionalTensor& bias,
                    bool columns) {
  constexpr const char* kOp = "lse_forward";
  check_operands(kOp, a, b, scale, offset, pair);
  const PairIds ids = check_ids(kOp, a, b, ids_a, ids_b, same, true);
  check_bias(kOp, a, b, bias);
  check_columns(kOp, b, columns);
  TORCH_CHECK_VALUE(!columns || ids.same != Same::kSum, kOp,
                    ": same must be keep, drop or only with columns, got sum");
  const PlainDispatch plain;
  const PairArguments args(a, b, offset, pair, ids, bias);
  // One number a row, so double is free; rounded, it would be an error of every weight of its row.
  Results out{row_numbers(a)};
  if (columns) out.push_back(row_numbers(*b));
  if (ids.same == Same::kSum) {
    out.push_back(row_numbers(a));
    out.push_back(row_numbers(a, at::kLong));
  }
  const auto run = compute_type(a) == at::kFloat ? &forward<float> : &forward<double>;
  run(args, scale.item<double>(), bound, columns, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("lse_forward", &lse_forward); }

}  // namespace fastcl::cpu
