// z = rows of x1, then of x2, up-converted and divided by their norms; pos_i = <z_i, z_{i+n}>.
// Where bf16 is multiplied, bf16 rows stay bf16: rounded once more, and pos is of what was rounded.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

constexpr double kSmallestNorm = 1e-12;

// ||x||: scaled by the largest entry where the plain sum of squares is near the ends of the range.
// In double, because the norm of finite floats may exceed the largest float.
template <typename T>
double norm(const T* x, int64_t d) {
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
T normalize_row(T* x, int64_t d) {
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
  // A norm near the end of the range has an inverse that is not a normal number.
  if (inverse < std::numeric_limits<T>::min()) {
    for (int64_t k = 0; k < d; ++k) x[k] = static_cast<T>(x[k] / length);
  } else {
    kernels<T>().scale_row(x, inverse, d);
  }
  return inverse;
}

// Calculates in T; the rows are stored as Row.
template <typename T, typename Row>
void run(at::Tensor& z, at::Tensor& rnorm, at::Tensor& pos) {
  const int64_t n = pos.size(0), d = z.size(1);
  Row* const p_z = z.data_ptr<Row>();
  T* const p_pos = pos.data_ptr<T>();
  T* const p_rnorm = rnorm.numel() > 0 ? rnorm.data_ptr<T>() : nullptr;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(d, 1));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> wide(std::is_same_v<T, Row> ? 0 : 2 * d);
    const auto prepare = [&](int64_t i, T* buffer) -> const T* {
      Row* const row = p_z + i * d;
      if constexpr (std::is_same_v<T, Row>) {
        if (p_rnorm != nullptr) p_rnorm[i] = normalize_row(row, d);
        return row;
      } else {
        widen_row(row, buffer, d);
        if (p_rnorm != nullptr) {
          p_rnorm[i] = normalize_row(buffer, d);
          round_row(buffer, row, d);
          widen_row(row, buffer, d);
        }
        return buffer;
      }
    };
    for (int64_t i = begin; i < end; ++i) {
      const T* const first = prepare(i, wide.data());
      const T* const second = prepare(i + n, wide.data() + (wide.empty() ? 0 : d));
      p_pos[i] = kernels<T>().dot(first, second, d);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> normalize_pair(const at::Tensor& x1,
                                                              const at::Tensor& x2,
                                                              bool normalize) {
  constexpr const char* kOp = "normalize_pair";
  check_matrix(kOp, "x1", x1);
  check_shape(kOp, "x2", x2, x1.sizes());
  check_dtype(kOp, "x2", x2, x1.scalar_type());
  TORCH_CHECK_TYPE(at::isFloatingType(x1.scalar_type()), kOp,
                   ": x1 must be a floating-point tensor, got ", x1.scalar_type());
  const PlainDispatch plain;
  const auto dtype = compute_type(x1);
  const bool bf16 = x1.scalar_type() == at::kBFloat16 && bf16_supported();
  const int64_t n = x1.size(0);
  const auto empty = [&](at::IntArrayRef shape, at::ScalarType type) {
    return at::Tensor(at::detail::empty_cpu(shape, x1.options().dtype(type)));
  };
  at::Tensor z = empty({2 * n, x1.size(1)}, bf16 ? at::kBFloat16 : dtype);
  at::Tensor rnorm = empty({normalize ? 2 * n : 0}, dtype);
  at::Tensor pos = empty({n}, dtype);
  z.narrow(0, 0, n).copy_(x1);  // any strides, exact up-conversion
  z.narrow(0, n, n).copy_(x2);
  if (bf16) {
    run<float, at::BFloat16>(z, rnorm, pos);
  } else {
    dtype == at::kFloat ? run<float, float>(z, rnorm, pos) : run<double, double>(z, rnorm, pos);
  }
  return {z, rnorm, pos};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("normalize_pair", &normalize_pair); }

}  // namespace fastcl::cpu
