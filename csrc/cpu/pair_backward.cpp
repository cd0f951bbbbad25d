// dz_i = lse_coef G_i - (pull_i + pull_p(i)) z_p(i), then back through the normalisation:
// dx_i = (dz_i - z_i <z_i, dz_i>) / ||x_i||. Fused: one pass over z and G, written once in `dtype`.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

template <typename T>
struct Inputs {
  const T* z;      // [2n, D]
  const T* g;      // [2n, D]
  const T* rnorm;  // [2n] or null
  const T* pull;   // [2n]
  T lse_coef;
  int64_t n, d;
};

// Calculates in T and writes as Out.
template <typename T, typename Out>
void run(const Inputs<T>& in, Out* dx1, Out* dx2, T* rowdot) {
  const auto& simd = kernels<T>();
  const int64_t n = in.n, d = in.d;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(d, 1));
  at::parallel_for(0, 2 * n, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> row(std::is_same_v<T, Out> ? 0 : d);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t partner = i < n ? i + n : i - n;
      Out* const dx = i < n ? dx1 + i * d : dx2 + partner * d;
      T* dz;
      if constexpr (std::is_same_v<T, Out>) {
        dz = dx;
      } else {
        dz = row.data();
      }
      const T* const z = in.z + i * d;
      T z_dz;
      rowdot[i] = simd.pair_gradient(z, in.z + partner * d, in.g + i * d, in.lse_coef,
                                     in.pull[i] + in.pull[partner], dz, &z_dz, d);
      if (in.rnorm != nullptr) simd.project_row(dz, z, z_dz, in.rnorm[i], d);
      if constexpr (!std::is_same_v<T, Out>) {
        for (int64_t k = 0; k < d; ++k) dx[k] = static_cast<Out>(dz[k]);
      }
    }
  });
}

template <typename T>
void run_as(const Inputs<T>& in, at::Tensor& dx1, at::Tensor& dx2, at::Tensor& rowdot) {
  const auto call = [&](auto out) {
    using Out = decltype(out);
    run<T, Out>(in, dx1.data_ptr<Out>(), dx2.data_ptr<Out>(), rowdot.data_ptr<T>());
  };
  switch (dx1.scalar_type()) {
    case at::kFloat:
      return call(float{});
    case at::kDouble:
      return call(double{});
    case at::kHalf:
      return call(at::Half{});
    case at::kBFloat16:
      return call(at::BFloat16{});
    default:
      TORCH_CHECK_TYPE(false, "pair_backward: dtype must be a floating-point type, got ",
                       dx1.scalar_type());
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pair_backward(
    const at::Tensor& z, const at::Tensor& rnorm, const at::Tensor& grad_lse,
    const at::Tensor& lse_coef, const at::Tensor& pull, at::ScalarType dtype) {
  constexpr const char* kOp = "pair_backward";
  check_matrix(kOp, "z", z);
  check_compute_dtype(kOp, "z", z);
  const int64_t rows = z.size(0), d = z.size(1);
  TORCH_CHECK_VALUE(rows % 2 == 0, kOp, ": z must have an even number of rows, got ", rows);
  const auto compute = z.scalar_type();
  check_vector(kOp, "rnorm", rnorm, rnorm.numel() == 0 ? 0 : rows, compute);
  check_shape(kOp, "grad_lse", grad_lse, z.sizes());
  check_dtype(kOp, "grad_lse", grad_lse, compute);
  check_scalar(kOp, "lse_coef", lse_coef, compute);
  check_vector(kOp, "pull", pull, rows, compute);
  const PlainDispatch plain;
  const auto empty = [&](at::IntArrayRef shape, at::ScalarType type) {
    return at::Tensor(at::detail::empty_cpu(shape, z.options().dtype(type)));
  };
  at::Tensor dx1 = empty({rows / 2, d}, dtype), dx2 = empty({rows / 2, d}, dtype);
  at::Tensor rowdot = empty({rows}, compute);
  const at::Tensor c_z = z.contiguous(), c_g = grad_lse.contiguous(), c_r = rnorm.contiguous();
  const at::Tensor c_pull = pull.contiguous();
  const auto call = [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const at::Tensor& x) {
      return x.numel() > 0 ? x.const_data_ptr<T>() : nullptr;
    };
    const Inputs<T> in{data(c_z),          data(c_g), data(c_r), data(c_pull),
                       lse_coef.item<T>(), rows / 2,  d};
    run_as<T>(in, dx1, dx2, rowdot);
  };
  compute == at::kFloat ? call(float{}) : call(double{});
  return {dx1, dx2, rowdot};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("pair_backward", &pair_backward); }

}  // namespace fastcl::cpu
