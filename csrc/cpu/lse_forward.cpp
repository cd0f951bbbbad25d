// lse_i = log sum over the allowed j of exp(scale * <a_i, b_j>): all but row i itself and its partner.
// Fused: product, mask, exponential and sums per tile. Never stored: the [R, C] similarities.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "exp_range.h"
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

  // Adds the row sums of a tile at `row`, and its column sums at `col` unless that is negative.
  void add(const Tile<T>& s, int64_t row, int64_t col) {
    const auto& simd = kernels<T>();
    const bool columns = col >= 0;
    if (range_.fixed) {
      simd.exp2_sums(s, range_.c, range_.shift, &sum_[row], columns ? &sum_[col] : nullptr);
      return;
    }
    T row_max[kMaxTileCols], col_max[kMaxTileCols];
    simd.maxima(s, row_max, columns ? col_max : nullptr);
    raise_maxima(row, s.rows, row_max);
    simd.exp_row_sums(s, row_max, &sum_[row]);
    if (columns) {
      raise_maxima(col, s.cols, col_max);
      simd.exp_col_sums(s, col_max, &sum_[col]);
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

template <typename T>
void forward(const at::Tensor& a, const std::optional<at::Tensor>& b, double scale, double bound,
             int64_t offset, int64_t pair, at::Tensor& lse) {
  const at::Tensor& columns = b.has_value() ? *b : a;
  const int64_t cols = columns.size(0);
  const ExpRange<T> range(scale, similarity_bound<T>(bound, scale, a, columns), cols);
  if (!range.usable) {
    lse.fill_(std::numeric_limits<double>::quiet_NaN());
    return;
  }
  const RowBlocks row_blocks(a, block_rows<T>(a.size(0)));
  if (!b.has_value()) {
    RowSums<T> sums(a.size(0), 1, range);
    const auto scratch = [&] {
      return TileScratch<T>(a, row_blocks.block(), row_blocks.block());
    };
    for_each_block_pair(row_blocks.count(), scratch, [&](auto& tile, int64_t i, int64_t j) {
      const Tile<T> s = tile.product(row_blocks, i, row_blocks, j, 0, pair, range.factor);
      sums.add(s, row_blocks.start(i), i == j ? -1 : row_blocks.start(j));
    });
    sums.finish(lse.data_ptr<double>());
    return;
  }
  const RowBlocks col_blocks(columns, block_rows<T>(cols));
  const Stripes stripes(row_blocks.count(), col_blocks.count());
  RowSums<T> sums(a.size(0), stripes.count, range);
  const auto scratch = [&] { return TileScratch<T>(a, row_blocks.block(), col_blocks.block()); };
  stripes.run(scratch, [&](auto& tile, int64_t stripe, int64_t i, int64_t j) {
    const Tile<T> s = tile.product(row_blocks, i, col_blocks, j, offset, pair, range.factor);
    sums.add(s, stripe * a.size(0) + row_blocks.start(i), -1);
  });
  sums.finish(lse.data_ptr<double>());
}

at::Tensor lse_forward(const at::Tensor& a, const std::optional<at::Tensor>& b,
                       const at::Tensor& scale, double bound, int64_t offset, int64_t pair) {
  check_operands("lse_forward", a, b, scale, offset, pair);
  const PlainDispatch plain;
  const at::Tensor rows = a.contiguous();
  const auto cols = b.has_value() ? std::optional(b->contiguous()) : std::nullopt;
  // One number a row, so double is free; rounded, it would be an error of every weight of its row.
  at::Tensor lse(at::detail::empty_cpu({a.size(0)}, a.options().dtype(at::kDouble)));
  const double factor = scale.item<double>();
  if (a.scalar_type() == at::kFloat) {
    forward<float>(rows, cols, factor, bound, offset, pair, lse);
  } else {
    forward<double>(rows, cols, factor, bound, offset, pair, lse);
  }
  return lse;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("lse_forward", &lse_forward); }

}  // namespace fastcl::cpu
