// The squared 2-Wasserstein distance of two samples a row, x_p [M] and y_p [K], and its gradient
// with respect to x. The quantile functions X and Y are steps: X_r of width 1/M, Y_k of width 1/K.
//   term_r = integral over cell r of X of (X_r - Y(q))^2 dq,   gradient: of 2 (X_r - Y(q)) dq
// Fused: both sorts, terms and gradient, which the last pass of the sort of x puts where the
// elements came from. Never stored: sorted x, ranks, differences.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "../checks.h"
#include "radix_sort.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

// Integrals over one cell of X, without the factor 1 / units().
struct CellSums {
  double difference, square;
};

// Sorted y, with the edges of the cells as integers, in units of 1 / units().
template <typename T>
struct Quantiles {
  const T* y;  // [K], sorted
  int64_t m, k;

  double units() const { return m == k ? static_cast<double>(m) : static_cast<double>(m * k); }

  CellSums cell(int64_t rank, double x) const {
    if (m == k) {
      const double d = x - y[rank];
      return {d, d * d};
    }
    // Cell r of X is [r K, r K + K), cell j of Y is [j M, j M + M).
    const int64_t end = (rank + 1) * k;
    int64_t left = rank * k;
    CellSums sums{0, 0};
    for (int64_t j = left / m; left < end; ++j) {
      const int64_t right = std::min((j + 1) * m, end);
      const double width = static_cast<double>(right - left), d = x - y[j];
      sums.difference += width * d;
      sums.square += width * (d * d);
      left = right;
    }
    return sums;
  }
};

// Returns the sum of the terms. `terms` is null where that sum is all that is wanted.
template <typename T>
double transport(const T* x, const Quantiles<T>& quantiles, const RadixScratch& scratch, T* terms,
                 T* grad) {
  using Item = IndexedKey<KeyOf<T>>;
  const double scale = 1 / quantiles.units();
  double total = 0;
  const auto key = [=](int64_t i) { return to_key(x[i]); };
  radix_sort<Item>(quantiles.m, key, scratch, [&](int64_t rank, const Item& item) {
    const CellSums sums = quantiles.cell(rank, from_key<T>(item.key));
    grad[item.index] = static_cast<T>(sums.difference * (2 * scale));
    if (terms != nullptr) terms[item.index] = static_cast<T>(sums.square * scale);
    total += sums.square;
  });
  return total * scale;
}

template <typename T>
void run(const at::Tensor& x, const at::Tensor& y, at::Tensor& cost, at::Tensor& grad) {
  using Item = BareKey<KeyOf<T>>;
  const int64_t m = x.size(1), k = y.size(1);
  const bool per_row = cost.dim() == 2;
  const T* const p_x = x.const_data_ptr<T>();                          // [P, M]
  const T* const p_y = y.const_data_ptr<T>();                          // [P, K]
  T* const p_terms = per_row ? cost.data_ptr<T>() : nullptr;           // [P, M]
  double* const p_cost = per_row ? nullptr : cost.data_ptr<double>();  // [P]
  T* const p_grad = grad.data_ptr<T>();                                // [P, M]
  at::parallel_for(0, x.size(0), rows_per_task(m + k), [&](int64_t begin, int64_t end) {
    const RadixScratch scratch(
        std::max<int64_t>(m * sizeof(IndexedKey<KeyOf<T>>), k * sizeof(Item)));
    const std::unique_ptr<T[]> sorted(new T[k]);
    T* const p_sorted = sorted.get();
    for (int64_t p = begin; p < end; ++p) {
      const T* const y_row = p_y + p * k;
      const auto key = [=](int64_t i) { return to_key(y_row[i]); };
      radix_sort<Item>(k, key, scratch, [=](int64_t rank, const Item& item) {
        p_sorted[rank] = from_key<T>(item.key);
      });
      const double total = transport<T>(p_x + p * m, {p_sorted, m, k}, scratch,
                                        per_row ? p_terms + p * m : nullptr, p_grad + p * m);
      if (!per_row) p_cost[p] = total;
    }
  });
}

std::tuple<at::Tensor, at::Tensor> wasserstein_1d(const at::Tensor& x, const at::Tensor& y,
                                                  bool per_row) {
  constexpr const char* kOp = "wasserstein_1d";
  check_matrix(kOp, "x", x);
  check_matrix(kOp, "y", y);
  check_compute_dtype(kOp, "x", x);
  check_dtype(kOp, "y", y, x.scalar_type());
  TORCH_CHECK_VALUE(x.size(0) == y.size(0), kOp, ": x and y must have as many rows, got ",
                    x.sizes(), " and ", y.sizes());
  TORCH_CHECK_VALUE(x.size(1) > 0 && y.size(1) > 0, kOp, ": x and y must have columns, got ",
                    x.sizes(), " and ", y.sizes());
  check_sortable(kOp, "x", x);
  check_sortable(kOp, "y", y);
  const PlainDispatch plain;
  const at::Tensor c_x = x.contiguous(), c_y = y.contiguous();
  at::Tensor grad(at::detail::empty_cpu(x.sizes(), x.options()));
  at::Tensor cost(per_row
                      ? at::detail::empty_cpu(x.sizes(), x.options())
                      : at::detail::empty_cpu({x.size(0)}, x.options().dtype(at::kDouble)));
  x.scalar_type() == at::kFloat ? run<float>(c_x, c_y, cost, grad)
                                : run<double>(c_x, c_y, cost, grad);
  return {cost, grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("wasserstein_1d", &wasserstein_1d); }

}  // namespace fastcl::cpu
