// Which form of the exponential fits the range of the similarities.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "pairs.h"
#include "simd.h"

namespace fastcl::cpu {

constexpr double kLog2E = 1.4426950408889634074;
// Rounding makes unit rows a little longer than 1.
constexpr double kBoundSlack = 1.01;

// Whether a scale is a positive finite number; everything is NaN otherwise.
inline bool usable_scale(double scale) { return scale > 0 && std::isfinite(scale); }

// exp(scale * <a, b>) as exp2(s * c - shift) with one shift for all rows, so that sums add up over
// tiles, or (fixed == false) as exp(s - x), x each row's own maximum or lse. In the second form s
// is the product times scale already, rounded once and alike in forward and backward: a row that
// one huge similarity dominates then has exactly the probability 1 there.
template <typename T>
struct ExpRange {
  bool usable;  // the scale is
  bool fixed;
  T factor;    // of the products in a tile
  T c, shift;

  // |s * scale| <= bound, sums over `cols` columns. `reserve`: binary orders of magnitude that
  // weights on the exponentials need in addition.
  ExpRange(double scale_value, double bound, int64_t cols, double reserve = 0) {
    // A few powers of two under the largest exponent are left for rounding.
    const double limit = (sizeof(T) == 4 ? 120 : 950) - reserve;
    const double bound2 = bound * kBoundSlack * kLog2E;
    const double sum2 = std::log2(static_cast<double>(std::max<int64_t>(cols, 1)));
    usable = usable_scale(scale_value);
    // False for NaN, and where a row may see a single column: the second form is exact there.
    fixed = cols > 2 && 2 * bound2 + sum2 <= 2 * limit;
    factor = fixed ? T(1) : static_cast<T>(scale_value);
    c = static_cast<T>(scale_value * kLog2E);
    // As near to the bound as the low end of the range allows: rounding errors grow with the
    // exponent's distance from 0, and the products near the bound are the ones that count.
    shift = fixed ? static_cast<T>(std::min(bound2, limit - bound2)) : T(0);
  }
};

// max_i ||x_i||; infinity if a row is not finite.
template <typename T>
double largest_norm(const at::Tensor& x) {
  const int64_t d = x.size(1);
  const T* const data = x.const_data_ptr<T>();
  const auto& simd = kernels<T>();
  const double largest = at::parallel_reduce(
      0, x.size(0), std::max<int64_t>(1, 65536 / std::max<int64_t>(d, 1)), 0.,
      [&](int64_t begin, int64_t end, double m) {
        for (int64_t i = begin; i < end; ++i) {
          const double squares = simd.sum_squares(data + i * d, d);
          m = std::max(m, std::isnan(squares) ? std::numeric_limits<double>::infinity() : squares);
        }
        return m;
      },
      [](double p, double q) { return std::max(p, q); });
  return std::sqrt(largest);
}

// The caller's bound of |scale * <a_i, b_j>|; negative where it does not know the scale: -1 for unit
// rows, any other for rows whose norms are to be found.
template <typename T>
double similarity_bound(double bound, double scale, const at::Tensor& a, const at::Tensor& b) {
  if (bound >= 0) return bound;
  if (bound == -1) return scale;
  if (a.scalar_type() == at::kBFloat16) {
    const at::Tensor wide = a.to(at::kFloat);
    return similarity_bound<T>(bound, scale, wide, a.is_same(b) ? wide : b.to(at::kFloat));
  }
  const double norm_a = largest_norm<T>(a);
  return scale * norm_a * (a.is_same(b) ? norm_a : largest_norm<T>(b));
}

// The range of an op. columns: it sums up columns, too.
template <typename T>
ExpRange<T> exp_range(const PairArguments& args, double scale, double bound, bool columns,
                      double reserve = 0) {
  const int64_t rows = args.a.size(0), cols = args.columns().size(0);
  // The longest sum, none where one of them may be of a single pair.
  const int64_t terms = !columns ? cols : std::min(rows, cols) > 2 ? std::max(rows, cols) : 0;
  // Biases have no bound.
  const double limit = args.bias.has_value()
                           ? std::numeric_limits<double>::infinity()
                           : similarity_bound<T>(bound, scale, args.a, args.columns());
  return ExpRange<T>(scale, limit, terms, reserve);
}

}  // namespace fastcl::cpu
