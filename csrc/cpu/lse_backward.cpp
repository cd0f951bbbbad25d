// G_i = sum over the allowed j of (w_a_i e^(S_ij - lse_a_i) + w_b_j e^(S_ij - lse_b_j)) b_j, the
// gradient of the weighted lse of rows and columns without the factor scale.
// Fused: product, mask, both weights in one tile. Never stored: similarities, probabilities.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "exp_range.h"
#include "schedule.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

// A power of two near max |w|, and the binary orders of magnitude that the non-zero |w| span.
struct WeightRange {
  double factor = 1, span = 0;
};

template <typename T>
WeightRange weight_range(std::initializer_list<const std::optional<at::Tensor>*> weights) {
  double largest = 0, smallest = std::numeric_limits<double>::infinity();
  for (const auto* w : weights) {
    // Missing weights are ones.
    const T one = 1;
    const T* data = w->has_value() ? (*w)->const_data_ptr<T>() : &one;
    const int64_t n = w->has_value() ? (*w)->numel() : 1;
    for (int64_t k = 0; k < n; ++k) {
      const double x = std::abs(data[k]);
      if (x > 0 && std::isfinite(x)) {
        largest = std::max(largest, x);
        smallest = std::min(smallest, x);
      }
    }
  }
  if (largest == 0) return {};
  return {std::exp2(std::ceil(std::log2(largest))), std::ceil(std::log2(largest / smallest))};
}

// What the weights of one side of the tile need per row. Padded, so that vectors may read past the
// last one.
template <typename T>
struct Side {
  std::vector<T> u;       // fixed shift: w * exp2(shift - lse * log2(e))
  std::vector<T> k, w;    // otherwise: k = floor(lse), exact, and w * exp(k - lse)

  Side(const ExpRange<T>& range, int64_t n, const at::Tensor* lse_in, const at::Tensor* w_in,
       double factor) {
    const int64_t padded = n + kMaxTileCols;
    (range.fixed ? u : k).assign(padded, T(0));
    if (!range.fixed) w.assign(padded, T(0));
    if (lse_in == nullptr) return;
    const T* const p_w = w_in == nullptr ? nullptr : w_in->const_data_ptr<T>();
    const auto fill = [&](const auto* p_lse) {
      at::parallel_for(0, n, 2048, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const double weight = (p_w == nullptr ? 1. : p_w[i]) / factor;
          const double lse = p_lse[i];
          // Without allowed columns nothing depends on the row.
          const bool empty = std::isinf(lse) && lse < 0;
          if (range.fixed) {
            u[i] = empty ? T(0) : static_cast<T>(weight * std::exp2(range.shift - lse * kLog2E));
          } else {
            k[i] = empty ? T(1e30) : static_cast<T>(std::floor(lse));
            w[i] = empty ? T(0) : static_cast<T>(weight * std::exp(std::floor(lse) - lse));
          }
        }
      });
    };
    lse_in->scalar_type() == at::kDouble ? fill(lse_in->const_data_ptr<double>())
                                         : fill(lse_in->const_data_ptr<float>());
  }
};

// G, as `copies` partial sums of it, by blocks of rows. After kFold products a block moves into
// a second level of sums: adding thousands of them one by one would lose digits.
template <typename T>
class GradientSums {
 public:
  GradientSums(const at::Tensor& a, const RowBlocks& blocks, int64_t copies, int64_t products)
      : rows_(a.size(0)), d_(a.size(1)), per_copy_(blocks.count()), copies_(copies) {
    sum_ = empty_like_rows(a, {copies * rows_, d_});
    if (products > kFold) total_ = empty_like_rows(a, {copies * rows_, d_});
    state_.resize(copies * per_copy_);
    for (int64_t copy = 0; copy < copies; ++copy) {
      for (int64_t b = 0; b < per_copy_; ++b) {
        Block& block = state_[copy * per_copy_ + b];
        block.offset = (copy * rows_ + blocks.start(b)) * d_;
        block.size = blocks.size(b) * d_;
        block.view = at::cpu::as_strided(sum_, {blocks.size(b), d_}, {d_, 1}, block.offset);
      }
    }
  }

  // block += weights * rows
  void add(int64_t copy, int64_t b, const at::Tensor& weights, const at::Tensor& rows) {
    Block& block = state_[copy * per_copy_ + b];
    if (block.pending == kFold) fold(block);
    if (block.pending == 0) {
      at::cpu::mm_out(block.view, weights, rows);
    } else {
      at::cpu::addmm_(block.view, weights, rows);
    }
    ++block.pending;
  }

  at::Tensor finish(double factor) {
    const bool two_levels = total_.defined();
    const at::Tensor& parts = two_levels ? total_ : sum_;
    for (Block& block : state_) {
      if (two_levels && block.pending > 0) fold(block);
      if (block.pending == 0 && !block.folded) {
        std::fill_n(parts.data_ptr<T>() + block.offset, block.size, T(0));
      }
    }
    at::Tensor g = parts;
    if (copies_ > 1) {
      g = parts.narrow(0, 0, rows_).clone();
      for (int64_t copy = 1; copy < copies_; ++copy) g.add_(parts.narrow(0, copy * rows_, rows_));
    }
    return factor == 1 ? g : g.mul_(factor);
  }

 private:
  static constexpr int64_t kFold = 64;
  struct Block {
    at::Tensor view;
    int64_t offset = 0, size = 0;
    int64_t pending = 0;
    bool folded = false;
  };

  void fold(Block& block) {
    const T* const from = sum_.const_data_ptr<T>() + block.offset;
    T* const to = total_.data_ptr<T>() + block.offset;
    for (int64_t k = 0; k < block.size; ++k) to[k] = block.folded ? to[k] + from[k] : from[k];
    block.pending = 0;
    block.folded = true;
  }

  int64_t rows_, d_, per_copy_, copies_;
  at::Tensor sum_, total_;  // [copies * R, D]
  std::vector<Block> state_;
};

template <typename T>
void weigh(const Tile<T>& s, const ExpRange<T>& range, const Side<T>& rows, int64_t row,
           const Side<T>& cols, int64_t col, bool both) {
  if (range.fixed) {
    kernels<T>().exp2_weights(s, range.c, range.shift, &rows.u[row], &cols.u[col]);
  } else {
    kernels<T>().exp_weights(s, &rows.k[row], &rows.w[row], both ? &cols.k[col] : nullptr,
                             &cols.w[col]);
  }
}

using OptionalTensor = std::optional<at::Tensor>;

const at::Tensor* pointer(const OptionalTensor& x) { return x.has_value() ? &*x : nullptr; }

template <typename T>
at::Tensor backward(const at::Tensor& a, const OptionalTensor& b, double scale, double bound,
                    int64_t offset, int64_t pair, const at::Tensor& lse_a,
                    const OptionalTensor& lse_b, const OptionalTensor& w_a,
                    const OptionalTensor& w_b) {
  const at::Tensor& columns = b.has_value() ? *b : a;
  const bool both = !b.has_value() || lse_b.has_value();
  const WeightRange weights = b.has_value() && both ? weight_range<T>({&w_a, &w_b})
                                                    : weight_range<T>({&w_a});
  const ExpRange<T> range(scale, similarity_bound<T>(bound, scale, a, columns), columns.size(0),
                          weights.span);
  if (!range.usable) {
    return empty_like_rows(a, a.sizes()).fill_(std::numeric_limits<double>::quiet_NaN());
  }
  const RowBlocks row_blocks(a, block_rows<T>(a.size(0)));
  const Side<T> row_side(range, a.size(0), &lse_a, pointer(w_a), weights.factor);
  if (!b.has_value()) {
    GradientSums<T> g(a, row_blocks, 1, row_blocks.count());
    const auto scratch = [&] {
      return TileScratch<T>(a, row_blocks.block(), row_blocks.block());
    };
    for_each_block_pair(row_blocks.count(), scratch, [&](auto& tile, int64_t i, int64_t j) {
      const Tile<T> s = tile.product(row_blocks, i, row_blocks, j, 0, pair, range.factor);
      weigh(s, range, row_side, row_blocks.start(i), row_side, row_blocks.start(j), true);
      g.add(0, i, tile.view(), row_blocks.rows(j));
      // The weights are symmetric, so the transposed tile serves the other block.
      if (i != j) g.add(0, j, tile.view_transposed(), row_blocks.rows(i));
    });
    return g.finish(weights.factor);
  }
  const RowBlocks col_blocks(columns, block_rows<T>(columns.size(0)));
  const Side<T> col_side(range, columns.size(0), pointer(lse_b), pointer(w_b), weights.factor);
  const Stripes stripes(row_blocks.count(), col_blocks.count());
  GradientSums<T> g(a, row_blocks, stripes.count, stripes.width);
  const auto scratch = [&] { return TileScratch<T>(a, row_blocks.block(), col_blocks.block()); };
  stripes.run(scratch, [&](auto& tile, int64_t stripe, int64_t i, int64_t j) {
    const Tile<T> s = tile.product(row_blocks, i, col_blocks, j, offset, pair, range.factor);
    weigh(s, range, row_side, row_blocks.start(i), col_side, col_blocks.start(j), both);
    g.add(stripe, i, tile.view(), col_blocks.rows(j));
  });
  return g.finish(weights.factor);
}

void check_side(const char* lse_name, const OptionalTensor& lse, const char* w_name,
                const OptionalTensor& w, int64_t n, at::ScalarType dtype) {
  if (lse.has_value()) check_lse("lse_backward", lse_name, *lse, n);
  if (w.has_value()) check_vector("lse_backward", w_name, *w, n, dtype);
}

OptionalTensor contiguous(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(x->contiguous()) : std::nullopt;
}

at::Tensor lse_backward(const at::Tensor& a, const OptionalTensor& b, const at::Tensor& scale,
                        double bound, int64_t offset, int64_t pair, const at::Tensor& lse_a,
                        const OptionalTensor& lse_b, const OptionalTensor& w_a,
                        const OptionalTensor& w_b) {
  check_operands("lse_backward", a, b, scale, offset, pair);
  check_side("lse_a", lse_a, "w_a", w_a, a.size(0), a.scalar_type());
  if (b.has_value()) check_side("lse_b", lse_b, "w_b", w_b, b->size(0), a.scalar_type());
  const PlainDispatch plain;
  const auto run = a.scalar_type() == at::kFloat ? &backward<float> : &backward<double>;
  return run(a.contiguous(), contiguous(b), scale.item<double>(), bound, offset, pair,
             lse_a.contiguous(), contiguous(lse_b), contiguous(w_a), contiguous(w_b));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("lse_backward", &lse_backward); }

}  // namespace fastcl::cpu
