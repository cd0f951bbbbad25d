// Stable sort of every row: NaN is the largest, -0 equals +0. Values bit for bit, int32 positions.
// Fused: keys, sort and both outputs, a row at a time in one thread's scratch. Never stored: the
// keys of all rows, int64 positions.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "radix_sort.h"
#include "tiles.h"

namespace fastcl::cpu {

template <>
struct FloatBits<at::Half> {
  using Key = uint16_t;
  static constexpr Key kInfinity = 0x7C00;
};

template <>
struct FloatBits<at::BFloat16> {
  using Key = uint16_t;
  static constexpr Key kInfinity = 0x7F80;
};

namespace {

template <typename T>
void sort_rows(const at::Tensor& x, bool descending, at::Tensor& values, at::Tensor& indices) {
  using Item = IndexedKey<KeyOf<T>>;
  const int64_t n = x.size(1);
  const T* const p_x = x.const_data_ptr<T>();              // [S, N]
  T* const p_values = values.data_ptr<T>();                // [S, N]
  int32_t* const p_indices = indices.data_ptr<int32_t>();  // [S, N]
  // Complements reverse the order of the keys, and leave equal ones equal.
  const KeyOf<T> flip = descending ? static_cast<KeyOf<T>>(~KeyOf<T>{0}) : KeyOf<T>{0};
  at::parallel_for(0, x.size(0), rows_per_task(n), [&](int64_t begin, int64_t end) {
    const RadixScratch scratch(n * sizeof(Item));
    for (int64_t s = begin; s < end; ++s) {
      const T* const row = p_x + s * n;
      T* const to_values = p_values + s * n;
      int32_t* const to_indices = p_indices + s * n;
      const auto key = [=](int64_t i) { return static_cast<KeyOf<T>>(to_key(row[i]) ^ flip); };
      radix_sort<Item>(n, key, scratch, [=](int64_t rank, const Item& item) {
        to_values[rank] = row[item.index];
        to_indices[rank] = static_cast<int32_t>(item.index);
      });
    }
  });
}

std::tuple<at::Tensor, at::Tensor> segmented_sort(const at::Tensor& x, bool descending) {
  constexpr const char* kOp = "segmented_sort";
  check_matrix(kOp, "x", x);
  check_sortable(kOp, "x", x);
  const PlainDispatch plain;
  const auto call = [&](auto zero) {
    const at::Tensor rows = x.contiguous();
    at::Tensor values(at::detail::empty_cpu(x.sizes(), x.options()));
    at::Tensor indices(at::detail::empty_cpu(x.sizes(), x.options().dtype(at::kInt)));
    sort_rows<decltype(zero)>(rows, descending, values, indices);
    return std::tuple(values, indices);
  };
  switch (x.scalar_type()) {
    case at::kFloat:
      return call(float{});
    case at::kDouble:
      return call(double{});
    case at::kHalf:
      return call(at::Half{});
    case at::kBFloat16:
      return call(at::BFloat16{});
    default:
      TORCH_CHECK_TYPE(false, kOp, ": x must be float32, float64, float16 or bfloat16, got ",
                       x.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("segmented_sort", &segmented_sort); }

}  // namespace fastcl::cpu
