// With g = grad / divisor, G the gradient of the log-sum-exps and r = pull - weight s (0 without
// pull), row i is pulled to its partner by p_i = g w_i (weight s share_i + r):
//   dz_i = g weight s G_i - (p_i + p_p(i)) z_p(i),
// then back through the normalisation: dx_i = (dz_i - z_i <z_i, dz_i>) / ||x_i||. Fused: one pass
// over z and G, written once in `dtype`. slope_i is the part of row i in the gradient of s.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

template <typename T, typename Row>
struct Inputs {
  const Row* z;         // [2n, D]
  const T* g;           // [2n, D]
  const T* rnorm;       // [2n] or null
  const T* pos;         // [n]
  const double* share;  // [2n]
  const T* w;           // [2n] or null
  double grad, scale, weight, rest;
  bool pulled;  // by a number of its own, and not by weight * scale
  int64_t n, d;

  double upstream(int64_t i) const { return w == nullptr ? grad : grad * w[i]; }
  // How strongly row i is pulled to its partner.
  double pull(int64_t i) const { return upstream(i) * (weight * scale * share[i] + rest); }
  // Each product stands in row i and in row k of G, hence the half; of the positive -share, or
  // 1 - share where its pull does not depend on the scale.
  double slope(int64_t i, double z_g) const {
    const double own = pulled ? 1 - share[i] : -share[i];
    return weight * (0.5 * grad * z_g + upstream(i) * own * pos[i < n ? i : i - n]);
  }
};

// Calculates in T and writes as Out.
template <typename T, typename Row, typename Out>
void run(const Inputs<T, Row>& in, Out* dx1, Out* dx2, double* slope) {
  const auto& simd = kernels<T>();
  const T factor = static_cast<T>(in.grad * in.weight * in.scale);
  const int64_t n = in.n, d = in.d;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(d, 1));
  at::parallel_for(0, 2 * n, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> row(std::is_same_v<T, Out> ? 0 : d);
    std::vector<T> wide(std::is_same_v<T, Row> ? 0 : 2 * d);
    const auto wide_row = [&](int64_t i, int64_t slot) -> const T* {
      if constexpr (std::is_same_v<T, Row>) {
        return in.z + i * d;
      } else {
        widen_row(in.z + i * d, wide.data() + slot * d, d);
        return wide.data() + slot * d;
      }
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t partner = i < n ? i + n : i - n;
      Out* const dx = i < n ? dx1 + i * d : dx2 + partner * d;
      T* dz;
      if constexpr (std::is_same_v<T, Out>) {
        dz = dx;
      } else {
        dz = row.data();
      }
      const T* const z = wide_row(i, 0);
      T z_dz;
      const T pull = static_cast<T>(in.pull(i) + in.pull(partner));
      const T z_g =
          simd.pair_gradient(z, wide_row(partner, 1), in.g + i * d, factor, pull, dz, &z_dz, d);
      slope[i] = in.slope(i, z_g);
      if (in.rnorm != nullptr) simd.project_row(dz, z, z_dz, in.rnorm[i], d);
      if constexpr (!std::is_same_v<T, Out>) {
        for (int64_t k = 0; k < d; ++k) dx[k] = static_cast<Out>(dz[k]);
      }
    }
  });
}

template <typename T, typename Row>
void run_as(const Inputs<T, Row>& in, at::Tensor& dx1, at::Tensor& dx2, at::Tensor& slope) {
  const auto call = [&](auto out) {
    using Out = decltype(out);
    run<T, Row, Out>(in, dx1.data_ptr<Out>(), dx2.data_ptr<Out>(), slope.data_ptr<double>());
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
    const at::Tensor& z, const at::Tensor& rnorm, const at::Tensor& grad_lse, const at::Tensor& pos,
    const at::Tensor& share, const at::Tensor& scale, const at::Tensor& grad,
    const std::optional<at::Tensor>& w, double weight, std::optional<double> pull, int64_t divisor,
    at::ScalarType dtype) {
  constexpr const char* kOp = "pair_backward";
  check_matrix(kOp, "z", z);
  check_row_dtype(kOp, "z", z);
  const int64_t rows = z.size(0), d = z.size(1);
  TORCH_CHECK_VALUE(rows % 2 == 0, kOp, ": z must have an even number of rows, got ", rows);
  const auto compute = compute_type(z);
  check_vector(kOp, "rnorm", rnorm, rnorm.numel() == 0 ? 0 : rows, compute);
  check_shape(kOp, "grad_lse", grad_lse, z.sizes());
  check_dtype(kOp, "grad_lse", grad_lse, compute);
  check_vector(kOp, "pos", pos, rows / 2, compute);
  check_vector(kOp, "share", share, rows, at::kDouble);
  check_scalar(kOp, "scale", scale, compute);
  check_scalar(kOp, "grad", grad, compute);
  if (w.has_value()) check_vector(kOp, "w", *w, rows, compute);
  const PlainDispatch plain;
  const auto empty = [&](at::IntArrayRef shape, at::ScalarType type) {
    return at::Tensor(at::detail::empty_cpu(shape, z.options().dtype(type)));
  };
  at::Tensor dx1 = empty({rows / 2, d}, dtype), dx2 = empty({rows / 2, d}, dtype);
  at::Tensor slope = empty({rows}, at::kDouble);
  const at::Tensor c_z = z.contiguous(), c_g = grad_lse.contiguous(), c_r = rnorm.contiguous();
  const at::Tensor c_pos = pos.contiguous(), c_share = share.contiguous();
  const at::Tensor c_w = w.has_value() ? w->contiguous() : at::Tensor();
  const double s = scale.item<double>(), g = grad.item<double>() / static_cast<double>(divisor);
  const auto call = [&](auto zero, auto zero_row) {
    using T = decltype(zero);
    using Row = decltype(zero_row);
    const auto data = [](const at::Tensor& x) {
      return x.defined() && x.numel() > 0 ? x.const_data_ptr<T>() : nullptr;
    };
    const Row* const p_z = c_z.numel() > 0 ? c_z.const_data_ptr<Row>() : nullptr;
    const Inputs<T, Row> in{p_z, data(c_g), data(c_r), data(c_pos),
                            c_share.const_data_ptr<double>(), data(c_w), g, s, weight,
                            pull.has_value() ? *pull - weight * s : 0, pull.has_value(), rows / 2,
                            d};
    run_as<T, Row>(in, dx1, dx2, slope);
  };
  if (z.scalar_type() == at::kBFloat16) {
    call(float{}, at::BFloat16{});
  } else {
    compute == at::kFloat ? call(float{}, float{}) : call(double{}, double{});
  }
  return {dx1, dx2, slope};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("pair_backward", &pair_backward); }

}  // namespace fastcl::cpu
