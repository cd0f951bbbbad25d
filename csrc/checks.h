// Argument checks shared by the C++ ops. The public Python functions validate with friendlier
// messages; these guard direct calls of torch.ops.fastcl.*.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>

namespace fastcl {

inline void check_matrix(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": ", name, " must be a matrix, got shape ", x.sizes());
}

inline void check_shape(const char* op, const char* name, const at::Tensor& x,
                        at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(x.sizes() == expected, op, ": ", name, " must have shape ", expected, ", got ",
                    x.sizes());
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& x,
                        at::ScalarType expected) {
  TORCH_CHECK_TYPE(x.scalar_type() == expected, op, ": ", name, " must be ", expected, ", got ",
                   x.scalar_type());
}

// The type that kernels calculate in.
inline at::ScalarType compute_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Rows that are multiplied may be bfloat16, too: their products and sums are float32.
inline void check_row_dtype(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == compute_type(x) || x.scalar_type() == at::kBFloat16, op, ": ",
                   name, " must be float32, float64 or bfloat16, got ", x.scalar_type());
}

// Kernels calculate in float32 or float64 and nothing else.
inline void check_compute_dtype(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op, ": ", name,
                   " must be float32 or float64, got ", x.scalar_type());
}

inline void check_vector(const char* op, const char* name, const at::Tensor& x, int64_t length,
                         at::ScalarType dtype) {
  check_shape(op, name, x, {length});
  check_dtype(op, name, x, dtype);
}

// Positions in a row are int32.
inline void check_sortable(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.size(1) <= std::numeric_limits<int32_t>::max(), op, ": ", name,
                    " must have fewer than 2^31 columns, got shape ", x.sizes());
}

// One number a row, in the precision of the op that made it or of the wire it came over.
inline void check_lse(const char* op, const char* name, const at::Tensor& x, int64_t length) {
  check_shape(op, name, x, {length});
  check_compute_dtype(op, name, x);
}

inline void check_scalar(const char* op, const char* name, const at::Tensor& x,
                         at::ScalarType dtype) {
  check_shape(op, name, x, {});
  check_dtype(op, name, x, dtype);
}

// The operands of the similarity ops: a [R, D], b [C, D] or none (symmetric).
inline void check_operands(const char* op, const at::Tensor& a, const std::optional<at::Tensor>& b,
                           const at::Tensor& scale, int64_t offset, int64_t pair) {
  check_matrix(op, "a", a);
  check_row_dtype(op, "a", a);
  check_scalar(op, "scale", scale, compute_type(a));
  if (b.has_value()) {
    check_matrix(op, "b", *b);
    check_dtype(op, "b", *b, a.scalar_type());
    TORCH_CHECK_VALUE(b->size(1) == a.size(1), op, ": a and b must have as many columns, got ",
                      a.sizes(), " and ", b->sizes());
  } else {
    TORCH_CHECK_VALUE(offset == 0, op, ": offset must be 0 without b, got ", offset);
  }
  TORCH_CHECK_VALUE(pair == 0 || 2 * pair == a.size(0), op, ": pair must be 0 or half of ",
                    a.size(0), " rows, got ", pair);
}

// What becomes of the pairs of the same id: nothing (there are no ids), dropped, all others
// dropped, or their products summed up.
enum class Same { kKeep, kDrop, kOnly, kSum };

struct PairIds {
  std::optional<at::Tensor> a, b;  // contiguous int64 [R], [C]; without operand b a serves both
  Same same = Same::kKeep;
};

inline PairIds check_ids(const char* op, const at::Tensor& a, const std::optional<at::Tensor>& b,
                         const std::optional<at::Tensor>& ids_a,
                         const std::optional<at::Tensor>& ids_b, std::string_view same,
                         bool sums = false) {
  PairIds ids;
  if (same == "drop") {
    ids.same = Same::kDrop;
  } else if (same == "only") {
    ids.same = Same::kOnly;
  } else if (same == "sum" && sums) {
    ids.same = Same::kSum;
  } else {
    TORCH_CHECK_VALUE(same == "keep", op, ": same must be keep, drop",
                      sums ? ", only or sum" : " or only", ", got ", same);
  }
  const bool wanted = ids.same != Same::kKeep;
  TORCH_CHECK_VALUE(ids_a.has_value() || !wanted, op, ": ids_a must be given with same=", same);
  TORCH_CHECK_VALUE(ids_b.has_value() || !b.has_value() || !wanted, op,
                    ": ids_b must be given with b and same=", same);
  if (ids_a.has_value()) check_vector(op, "ids_a", *ids_a, a.size(0), at::kLong);
  if (ids_b.has_value()) {
    check_vector(op, "ids_b", *ids_b, (b.has_value() ? *b : a).size(0), at::kLong);
  }
  if (wanted) {
    ids.a = ids_a->contiguous();
    if (b.has_value()) ids.b = ids_b->contiguous();
  }
  return ids;
}

inline void check_bias(const char* op, const at::Tensor& a, const std::optional<at::Tensor>& b,
                       const std::optional<at::Tensor>& bias) {
  if (!bias.has_value()) return;
  check_vector(op, "bias", *bias, (b.has_value() ? *b : a).size(0), compute_type(a));
}

inline void check_columns(const char* op, const std::optional<at::Tensor>& b, bool columns) {
  TORCH_CHECK_VALUE(b.has_value() || !columns, op, ": columns must be False without b, got True");
}

}  // namespace fastcl
