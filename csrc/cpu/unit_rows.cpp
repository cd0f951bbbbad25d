// z_i = x_i / max(||x_i||, 1e-12), and the way back: dx_i = (dz_i - z_i <z_i, dz_i>) / ||x_i||.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "row_norm.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

// Elements from which on a second thread pays for being woken.
constexpr int64_t kGrain = 65536;

int64_t row_grain(int64_t d) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(d, 1)); }

// Rounded to Row, kept as T.
template <typename Row, typename T>
void round_to(T* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) x[k] = static_cast<T>(static_cast<Row>(x[k]));
}

template <typename T>
void normalize(at::Tensor& z, at::Tensor& rnorm, std::optional<at::ScalarType> rounded) {
  const int64_t d = z.size(1);
  T* const p_z = z.data_ptr<T>();
  T* const p_rnorm = rnorm.data_ptr<T>();
  at::parallel_for(0, z.size(0), row_grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      p_rnorm[i] = normalize_row(p_z + i * d, d);
      if (rounded == at::kBFloat16) round_to<at::BFloat16>(p_z + i * d, d);
      if (rounded == at::kHalf) round_to<at::Half>(p_z + i * d, d);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> unit_rows(const at::Tensor& x,
                                             std::optional<at::ScalarType> rounded) {
  constexpr const char* kOp = "unit_rows";
  check_matrix(kOp, "x", x);
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), kOp,
                   ": x must be a floating-point tensor, got ", x.scalar_type());
  const PlainDispatch plain;
  const auto dtype = compute_type(x);
  const auto options = x.options().dtype(dtype);
  at::Tensor z(at::detail::empty_cpu(x.sizes(), options));
  at::Tensor rnorm(at::detail::empty_cpu({x.size(0)}, options));
  z.copy_(x);  // any strides, exact up-conversion
  dtype == at::kFloat ? normalize<float>(z, rnorm, rounded) : normalize<double>(z, rnorm, rounded);
  return {z, rnorm};
}

template <typename T, typename Out>
void project(const T* z, const T* rnorm, const T* dz, Out* dx, int64_t rows, int64_t d) {
  const auto& simd = kernels<T>();
  at::parallel_for(0, rows, row_grain(d), [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(std::is_same_v<T, Out> ? 0 : d);
    for (int64_t i = begin; i < end; ++i) {
      T* row;
      if constexpr (std::is_same_v<T, Out>) {
        row = dx + i * d;
      } else {
        row = buffer.data();
      }
      std::copy_n(dz + i * d, d, row);
      simd.project_row(row, z + i * d, simd.dot(z + i * d, row, d), rnorm[i], d);
      if constexpr (!std::is_same_v<T, Out>) {
        for (int64_t k = 0; k < d; ++k) dx[i * d + k] = static_cast<Out>(row[k]);
      }
    }
  });
}

at::Tensor unit_rows_backward(const at::Tensor& z, const at::Tensor& rnorm, const at::Tensor& dz,
                              at::ScalarType dtype) {
  constexpr const char* kOp = "unit_rows_backward";
  check_matrix(kOp, "z", z);
  check_compute_dtype(kOp, "z", z);
  check_vector(kOp, "rnorm", rnorm, z.size(0), z.scalar_type());
  check_shape(kOp, "dz", dz, z.sizes());
  check_dtype(kOp, "dz", dz, z.scalar_type());
  const PlainDispatch plain;
  at::Tensor dx(at::detail::empty_cpu(z.sizes(), z.options().dtype(dtype)));
  const at::Tensor c_z = z.contiguous(), c_r = rnorm.contiguous(), c_dz = dz.contiguous();
  const auto call = [&](auto zero, auto out) {
    using T = decltype(zero);
    using Out = decltype(out);
    project<T, Out>(c_z.const_data_ptr<T>(), c_r.const_data_ptr<T>(), c_dz.const_data_ptr<T>(),
                    dx.data_ptr<Out>(), z.size(0), z.size(1));
  };
  const auto call_as = [&](auto zero) {
    switch (dtype) {
      case at::kFloat:
        return call(zero, float{});
      case at::kDouble:
        return call(zero, double{});
      case at::kHalf:
        return call(zero, at::Half{});
      case at::kBFloat16:
        return call(zero, at::BFloat16{});
      default:
        TORCH_CHECK_TYPE(false, kOp, ": dtype must be a floating-point type, got ", dtype);
    }
  };
  z.scalar_type() == at::kFloat ? call_as(float{}) : call_as(double{});
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) {
  m.impl("unit_rows", &unit_rows);
  m.impl("unit_rows_backward", &unit_rows_backward);
}

}  // namespace fastcl::cpu
