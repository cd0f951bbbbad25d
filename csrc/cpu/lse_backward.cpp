// G = W b of the weights W_ij = w_a_i e^(S_ij - lse_a_i) + w_b_j e^(S_ij - lse_b_j) of the allowed
// pairs, less pull_a_i + pull_b_j where the ids are the same: the gradient of the weighted lse of
// rows and columns, and of the sums of the same id, without the factor scale. G_columns = W^T a.
// Fused: product, masks, both weights in one tile. Never stored: similarities, probabilities.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "exp_range.h"
#include "gradient_sums.h"
#include "pairs.h"
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

// The numbers of one side: lse, weights, and what to take off the weights of the same id.
struct SideArguments {
  OptionalTensor lse, w, pull;

  void check(const char* side, int64_t n, at::ScalarType dtype) const {
    const auto name = [&](const char* what) { return std::string(what) + side; };
    if (lse.has_value()) check_lse("lse_backward", name("lse_").c_str(), *lse, n);
    if (w.has_value()) check_vector("lse_backward", name("w_").c_str(), *w, n, dtype);
    if (pull.has_value()) check_vector("lse_backward", name("pull_").c_str(), *pull, n, dtype);
  }

  SideArguments contiguous() const {
    return {cpu::contiguous(lse), cpu::contiguous(w), cpu::contiguous(pull)};
  }
};

// What is in a tile of weights, for both sides.
template <typename T>
class Weights {
 public:
  Weights(const PairArguments& args, const Pairs<T>& pairs, const ExpRange<T>& range,
          const SideArguments& a, const SideArguments& b, double factor)
      : pairs_(pairs),
        range_(range),
        both_(!args.b.has_value() || b.lse.has_value()),
        rows_(range, args.a.size(0), pointer(a.lse), pointer(a.w), factor) {
    if (args.b.has_value()) {
      cols_.emplace(range, args.b->size(0), pointer(b.lse), pointer(b.w), factor);
    }
    if (a.pull.has_value() || b.pull.has_value()) {
      row_pull_ = padded<T>(a.pull, args.a.size(0), T(0), factor);
      const OptionalTensor& col_pull = args.b.has_value() ? b.pull : a.pull;
      col_pull_ = padded<T>(col_pull, args.columns().size(0), T(0), factor);
    }
  }

  void fill(TileScratch<T>& scratch, int64_t i, int64_t j) const {
    const Tile<T> s = pairs_.similarities(scratch, i, j);
    const int64_t row = pairs_.rows().start(i), col = pairs_.cols().start(j);
    weigh(s, range_, rows_, row, cols_.has_value() ? *cols_ : rows_, col, both_);
    if (row_pull_.empty()) return;
    kernels<T>().pull_same_ids(s, pairs_.row_ids(i), pairs_.col_ids(j), &row_pull_[row],
                               &col_pull_[col]);
    scratch.set_left_out(s, T(0));
  }

 private:
  const Pairs<T>& pairs_;
  ExpRange<T> range_;
  bool both_;
  Side<T> rows_;
  std::optional<Side<T>> cols_;
  std::vector<T> row_pull_, col_pull_;
};

template <typename T>
std::vector<at::Tensor> backward(const PairArguments& args, double scale, double bound,
                                 const SideArguments& a, const SideArguments& b, bool columns) {
  const WeightRange weights = args.b.has_value() && b.lse.has_value()
                                  ? weight_range<T>({&a.w, &b.w})
                                  : weight_range<T>({&a.w});
  const ExpRange<T> range = exp_range<T>(args, scale, bound, columns, weights.span);
  if (!range.usable) {
    std::vector<at::Tensor> out{empty_like_rows(args.a, args.a.sizes())};
    if (columns) out.push_back(empty_like_rows(*args.b, args.b->sizes()));
    for (at::Tensor& x : out) x.fill_(std::numeric_limits<double>::quiet_NaN());
    return out;
  }
  const Pairs<T> pairs(args, range.factor, columns ? Summands::kBoth : Summands::kColumns);
  const Weights<T> w(args, pairs, range, a, b, weights.factor);
  const RowBlocks &row_blocks = pairs.rows(), &col_blocks = pairs.cols();
  const auto scratch = [&] { return pairs.scratch(); };
  if (!args.b.has_value()) {
    GradientSums<T> g(args.a, row_blocks, 1, row_blocks.count());
    for_each_block_pair(row_blocks.count(), scratch, [&](auto& tile, int64_t i, int64_t j) {
      w.fill(tile, i, j);
      g.add(0, i, tile, false, row_blocks, j);
      // The weights are symmetric, so the transposed tile serves the other block.
      if (i != j) g.add(0, j, tile, true, row_blocks, i);
    });
    return {g.finish(weights.factor)};
  }
  if (columns) {
    const Cells cells(row_blocks.count(), col_blocks.count());
    GradientSums<T> g(args.a, row_blocks, cells.row_copies, col_blocks.count());
    GradientSums<T> g_columns(*args.b, col_blocks, cells.col_copies, row_blocks.count());
    cells.run(scratch, [&](auto& tile, int64_t row_copy, int64_t col_copy, int64_t i, int64_t j) {
      w.fill(tile, i, j);
      g.add(row_copy, i, tile, false, col_blocks, j);
      g_columns.add(col_copy, j, tile, true, row_blocks, i);
    });
    return {g.finish(weights.factor), g_columns.finish(weights.factor)};
  }
  const Stripes stripes(row_blocks.count(), col_blocks.count());
  GradientSums<T> g(args.a, row_blocks, stripes.count, stripes.width);
  stripes.run(scratch, [&](auto& tile, int64_t stripe, int64_t i, int64_t j) {
    w.fill(tile, i, j);
    g.add(stripe, i, tile, false, col_blocks, j);
  });
  return {g.finish(weights.factor)};
}

std::vector<at::Tensor> lse_backward(
    const at::Tensor& a, const OptionalTensor& b, const at::Tensor& scale, double bound,
    int64_t offset, int64_t pair, const at::Tensor& lse_a, const OptionalTensor& lse_b,
    const OptionalTensor& w_a, const OptionalTensor& w_b, const OptionalTensor& ids_a,
    const OptionalTensor& ids_b, std::string_view same, const OptionalTensor& bias,
    const OptionalTensor& pull_a, const OptionalTensor& pull_b, bool columns) {
  constexpr const char* kOp = "lse_backward";
  check_operands(kOp, a, b, scale, offset, pair);
  const PairIds ids = check_ids(kOp, a, b, ids_a, ids_b, same, true);
  check_bias(kOp, a, b, bias);
  check_columns(kOp, b, columns);
  TORCH_CHECK_VALUE(ids.same == Same::kSum || !(pull_a.has_value() || pull_b.has_value()), kOp,
                    ": same must be sum with pull_a or pull_b, got ", same);
  SideArguments rows{lse_a, w_a, pull_a}, cols{lse_b, w_b, pull_b};
  rows.check("a", a.size(0), compute_type(a));
  if (b.has_value()) cols.check("b", b->size(0), compute_type(a));
  const PlainDispatch plain;
  const PairArguments args(a, b, offset, pair, ids, bias);
  rows = rows.contiguous();
  cols = b.has_value() ? cols.contiguous() : rows;
  const auto run = compute_type(a) == at::kFloat ? &backward<float> : &backward<double>;
  return run(args, scale.item<double>(), bound, rows, cols, columns);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("lse_backward", &lse_backward); }

}  // namespace fastcl::cpu
