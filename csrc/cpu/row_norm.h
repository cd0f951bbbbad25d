// The length of a row, and the row divided by it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd.h"

namespace fastcl::cpu {

constexpr double kSmallestNorm = 1e-12;

// ||x||: scaled by the largest entry where the plain sum of squares is near the ends of the range.
// In double, because the norm of finite floats may exceed the largest float.
template <typename T>
inline double norm(const T* x, int64_t d) {
  constexpr T kLow = sizeof(T) == 4 ? T(1e-20) : T(1e-280);
  constexpr T kHigh = sizeof(T) == 4 ? T(1e36) : T(1e300);
  const T squares = kernels<T>().sum_squares(x, d);
  if (squares > kLow && squares < kHigh) return std::sqrt(static_cast<double>(squares));
  T largest = 0;
  for (int64_t k = 0; k < d; ++k) {
    if (!std::isfinite(x[k])) return std::numeric_limits<double>::quiet_NaN();
    largest = std::max(largest, std::abs(x[k]));
  }
  if (largest == 0) return 0;
  double sum = 0;
  for (int64_t k = 0; k < d; ++k) {
    const double ratio = static_cast<double>(x[k]) / largest;
    sum += ratio * ratio;
  }
  return largest * std::sqrt(sum);
}

// Returns 1/norm, 0 where the gradient is defined as 0.
template <typename T>
inline T normalize_row(T* x, int64_t d) {
  const double length = norm(x, d);
  if (length < kSmallestNorm) {
    kernels<T>().scale_row(x, static_cast<T>(1 / kSmallestNorm), d);
    return 0;
  }
  if (std::isnan(length) || std::isinf(length)) {
    std::fill_n(x, d, std::numeric_limits<T>::quiet_NaN());
    return std::numeric_limits<T>::quiet_NaN();
  }
  const T inverse = static_cast<T>(1 / length);
  // One feature has no direction to turn to: exactly 1 or -1, so that its gradient is exactly 0.
  if (d == 1) {
    x[0] = x[0] < 0 ? T(-1) : T(1);
    return inverse;
  }
  // A norm near the end of the range has an inverse that is not a normal number.
  if (inverse < std::numeric_limits<T>::min()) {
    for (int64_t k = 0; k < d; ++k) x[k] = static_cast<T>(x[k] / length);
  } else {
    kernels<T>().scale_row(x, inverse, d);
  }
  return inverse;
}

}  // namespace fastcl::cpu
