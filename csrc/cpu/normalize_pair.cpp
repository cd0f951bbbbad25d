// z = rows of x1, then of x2, up-converted and divided by their norms; pos_i = <z_i, z_{i+n}>.
// Where bf16 is multiplied, bf16 rows stay bf16: rounded once more, and pos is of what was rounded.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "row_norm.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

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
