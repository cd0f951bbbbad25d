// sum_j softplus(x_ij) and its slope sum_j sigmoid(x_ij) over the allowed j, x_ij = sign * S_ij +
// beta_i, and the products of weights made of sigmoids with the rows of both operands.
// Fused: product, masks, softplus, weights in one tile. Never stored: similarities, slopes.
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "exp_range.h"
#include "gradient_sums.h"
#include "pairs.h"
#include "schedule.h"

namespace fastcl::cpu {
namespace {

using RowNumbers = std::tuple<at::Tensor, at::Tensor>;
using Results = std::vector<at::Tensor>;

void fill_nan(const Results& out) {
  for (const at::Tensor& x : out) x.fill_(std::numeric_limits<double>::quiet_NaN());
}

// The sign is part of the factor of the products: pairs that are left out keep their -inf, of which
// softplus and sigmoid are 0.
template <typename T>
Pairs<T> signed_pairs(const PairArguments& args, double scale, double sign, Summands summands) {
  return Pairs<T>(args, static_cast<T>(sign * scale), summands);
}

// Sums of softplus and slopes of rows, `copies` independent sets of them.
class SlopeSums {
 public:
  SlopeSums(int64_t rows, int64_t copies)
      : rows_(rows), copies_(copies), sum_(rows * copies, 0.), slope_(rows * copies, 0.) {}

  double* sum(int64_t copy, int64_t row) { return &sum_[copy * rows_ + row]; }
  double* slope(int64_t copy, int64_t row) { return &slope_[copy * rows_ + row]; }

  void finish(const at::Tensor& sums, const at::Tensor& slopes) const {
    add_up(sum_, sums.data_ptr<double>());
    add_up(slope_, slopes.data_ptr<double>());
  }

 private:
  void add_up(const std::vector<double>& parts, double* total) const {
    for (int64_t i = 0; i < rows_; ++i) {
      total[i] = 0;
      for (int64_t k = 0; k < copies_; ++k) total[i] += parts[k * rows_ + i];
    }
  }

  int64_t rows_, copies_;
  std::vector<double> sum_, slope_;  // [copies, rows]
};

// out: sums, slopes.
template <typename T>
void forward(const PairArguments& args, double scale, double sign, const at::Tensor& beta,
             const Results& out) {
  if (!usable_scale(scale)) return fill_nan(out);
  const Pairs<T> pairs = signed_pairs<T>(args, scale, sign, Summands::kNone);
  const RowBlocks &row_blocks = pairs.rows(), &col_blocks = pairs.cols();
  const std::vector<T> betas = padded<T>(beta, args.a.size(0), T(0));
  const auto scratch = [&] { return pairs.scratch(); };
  const auto add_rows = [&](const Tile<T>& s, SlopeSums& sums, int64_t copy, int64_t row) {
    kernels<T>().softplus_row_sums(s, &betas[row], nullptr, sums.sum(copy, row),
                                   sums.slope(copy, row));
  };
  if (!args.b.has_value()) {
    SlopeSums sums(args.a.size(0), 1);
    for_each_block_pair(row_blocks.count(), scratch, [&](auto& tile, int64_t i, int64_t j) {
      const Tile<T> s = pairs.similarities(tile, i, j);
      add_rows(s, sums, 0, row_blocks.start(i));
      if (i == j) return;
      const int64_t col = row_blocks.start(j);
      kernels<T>().softplus_col_sums(s, &betas[col], sums.sum(0, col), sums.slope(0, col));
    });
    return sums.finish(out[0], out[1]);
  }
  const Stripes stripes(row_blocks.count(), col_blocks.count());
  SlopeSums sums(args.a.size(0), stripes.count);
  stripes.run(scratch, [&](auto& tile, int64_t stripe, int64_t i, int64_t j) {
    add_rows(pairs.similarities(tile, i, j), sums, stripe, row_blocks.start(i));
  });
  sums.finish(out[0], out[1]);
}

// One side of the weights: none of it without betas.
template <typename T>
struct Side {
  std::vector<T> beta, w;

  Side(const OptionalTensor& betas, const OptionalTensor& weights, int64_t n) {
    if (!betas.has_value()) return;
    beta = padded<T>(betas, n, T(0));
    w = padded<T>(weights, n, T(1));
  }

  const T* betas(int64_t i) const { return beta.empty() ? nullptr : &beta[i]; }
  const T* weights(int64_t i) const { return beta.empty() ? nullptr : &w[i]; }
};

template <typename T>
at::Tensor backward(const PairArguments& args, double scale, double sign,
                    const OptionalTensor& beta_a, const OptionalTensor& beta_b,
                    const OptionalTensor& w_a, const OptionalTensor& w_b) {
  if (!usable_scale(scale)) {
    const at::Tensor g = empty_like_rows(args.a, args.a.sizes());
    fill_nan({g});
    return g;
  }
  const Pairs<T> pairs = signed_pairs<T>(args, scale, sign, Summands::kColumns);
  const RowBlocks &row_blocks = pairs.rows(), &col_blocks = pairs.cols();
  const Side<T> row_side(beta_a, w_a, args.a.size(0));
  const Side<T> col_side(beta_b, w_b, args.columns().size(0));
  const auto scratch = [&] { return pairs.scratch(); };
  const auto weigh = [&](TileScratch<T>& tile, int64_t i, int64_t j) {
    const int64_t row = row_blocks.start(i), col = col_blocks.start(j);
    kernels<T>().sigmoid_weights(pairs.similarities(tile, i, j), row_side.betas(row),
                                 row_side.weights(row), col_side.betas(col), col_side.weights(col));
  };
  if (!args.b.has_value()) {
    GradientSums<T> g(args.a, row_blocks, 1, row_blocks.count());
    for_each_block_pair(row_blocks.count(), scratch, [&](auto& tile, int64_t i, int64_t j) {
      weigh(tile, i, j);
      g.add(0, i, tile, false, row_blocks, j);
      // Both sides are the same, so the weights are symmetric.
      if (i != j) g.add(0, j, tile, true, row_blocks, i);
    });
    return g.finish(1);
  }
  const Stripes stripes(row_blocks.count(), col_blocks.count());
  GradientSums<T> g(args.a, row_blocks, stripes.count, stripes.width);
  stripes.run(scratch, [&](auto& tile, int64_t stripe, int64_t i, int64_t j) {
    weigh(tile, i, j);
    g.add(stripe, i, tile, false, col_blocks, j);
  });
  return g.finish(1);
}

// out: sums, slopes; returns W b and W^T a.
template <typename T>
RowNumbers both(const PairArguments& args, double scale, double sign, const at::Tensor& beta,
                const OptionalTensor& w, const Results& out) {
  const at::Tensor &a = args.a, &b = *args.b;
  if (!usable_scale(scale)) {
    const RowNumbers g{empty_like_rows(a, a.sizes()), empty_like_rows(b, b.sizes())};
    fill_nan({out[0], out[1], std::get<0>(g), std::get<1>(g)});
    return g;
  }
  const Pairs<T> pairs = signed_pairs<T>(args, scale, sign, Summands::kBoth);
  const RowBlocks &row_blocks = pairs.rows(), &col_blocks = pairs.cols();
  const Side<T> side(beta, w, a.size(0));
  const Cells cells(row_blocks.count(), col_blocks.count());
  SlopeSums sums(a.size(0), cells.row_copies);
  GradientSums<T> g_a(a, row_blocks, cells.row_copies, col_blocks.count());
  GradientSums<T> g_b(b, col_blocks, cells.col_copies, row_blocks.count());
  const auto scratch = [&] { return pairs.scratch(); };
  cells.run(scratch, [&](auto& tile, int64_t row_copy, int64_t col_copy, int64_t i, int64_t j) {
    const int64_t row = row_blocks.start(i);
    kernels<T>().softplus_row_sums(pairs.similarities(tile, i, j), side.betas(row),
                                   side.weights(row), sums.sum(row_copy, row),
                                   sums.slope(row_copy, row));
    g_a.add(row_copy, i, tile, false, col_blocks, j);
    g_b.add(col_copy, j, tile, true, row_blocks, i);
  });
  sums.finish(out[0], out[1]);
  return {g_a.finish(1), g_b.finish(1)};
}

void check_sign(const char* op, double sign) {
  TORCH_CHECK_VALUE(sign == 1 || sign == -1, op, ": sign must be 1 or -1, got ", sign);
}

RowNumbers softplus_forward(const at::Tensor& a, const OptionalTensor& b, const at::Tensor& scale,
                            const at::Tensor& beta, double sign, int64_t offset,
                            const OptionalTensor& ids_a, const OptionalTensor& ids_b,
                            std::string_view same) {
  constexpr const char* kOp = "softplus_forward";
  check_operands(kOp, a, b, scale, offset, 0);
  check_vector(kOp, "beta", beta, a.size(0), compute_type(a));
  check_sign(kOp, sign);
  const PairArguments args(a, b, offset, 0, check_ids(kOp, a, b, ids_a, ids_b, same));
  const PlainDispatch plain;
  const Results out{row_numbers(a), row_numbers(a)};
  const auto run = compute_type(a) == at::kFloat ? &forward<float> : &forward<double>;
  run(args, scale.item<double>(), sign, beta.contiguous(), out);
  return {out[0], out[1]};
}

at::Tensor softplus_backward(const at::Tensor& a, const OptionalTensor& b, const at::Tensor& scale,
                             double sign, int64_t offset, const OptionalTensor& beta_a,
                             const OptionalTensor& beta_b, const OptionalTensor& w_a,
                             const OptionalTensor& w_b, const OptionalTensor& ids_a,
                             const OptionalTensor& ids_b, std::string_view same) {
  constexpr const char* kOp = "softplus_backward";
  check_operands(kOp, a, b, scale, offset, 0);
  check_sign(kOp, sign);
  const auto check = [&](const char* name, const OptionalTensor& x, int64_t n) {
    if (x.has_value()) check_vector(kOp, name, *x, n, compute_type(a));
  };
  check("beta_a", beta_a, a.size(0));
  check("w_a", w_a, a.size(0));
  if (b.has_value()) {
    check("beta_b", beta_b, b->size(0));
    check("w_b", w_b, b->size(0));
  }
  const PairArguments args(a, b, offset, 0, check_ids(kOp, a, b, ids_a, ids_b, same));
  const PlainDispatch plain;
  const auto run = compute_type(a) == at::kFloat ? &backward<float> : &backward<double>;
  const OptionalTensor rows = contiguous(beta_a), row_w = contiguous(w_a);
  return run(args, scale.item<double>(), sign, rows, b.has_value() ? contiguous(beta_b) : rows,
             row_w, b.has_value() ? contiguous(w_b) : row_w);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> softplus_both(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale, const at::Tensor& beta,
    double sign, int64_t offset, const OptionalTensor& w, const OptionalTensor& ids_a,
    const OptionalTensor& ids_b, std::string_view same) {
  constexpr const char* kOp = "softplus_both";
  check_operands(kOp, a, b, scale, offset, 0);
  check_vector(kOp, "beta", beta, a.size(0), compute_type(a));
  check_sign(kOp, sign);
  if (w.has_value()) check_vector(kOp, "w", *w, a.size(0), compute_type(a));
  const PairArguments args(a, b, offset, 0, check_ids(kOp, a, b, ids_a, ids_b, same));
  const PlainDispatch plain;
  const Results out{row_numbers(a), row_numbers(a)};
  const auto run = compute_type(a) == at::kFloat ? &both<float> : &both<double>;
  const auto [g_a, g_b] =
      run(args, scale.item<double>(), sign, beta.contiguous(), contiguous(w), out);
  return {out[0], out[1], g_a, g_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) {
  m.impl("softplus_forward", &softplus_forward);
  m.impl("softplus_backward", &softplus_backward);
  m.impl("softplus_both", &softplus_both);
}

}  // namespace fastcl::cpu
