// Products of bf16 matrices with sums in fp32: the operands as oneDNN's tile kernels read them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <cstdint>

#include "simd.h"

namespace fastcl::cpu {

// Whether the processor multiplies bf16 and torch's oneDNN offers the kernels. Found out once, by a
// product whose result is known: whoever rounds rows to bf16 relies on the answer not to change.
bool bf16_supported();

// The same, unless torch.backends.mkldnn is switched off at the moment: rows are then widened.
bool bf16_products();

// A matrix [k, n] as the second operand: panels of 64 columns, pairs of rows interleaved in each,
// [k / 2, 64, 2], padded with zeros. k is even.
struct Bf16Panels {
  static constexpr int64_t kWidth = 64;

  const at::BFloat16* data;
  int64_t k, n;

  static int64_t elements(int64_t k, int64_t n);
};

// Numbers of summed rows are padded with zeros to a multiple of this: see bf16_product.
constexpr int64_t kSummands = 32;

// c [m, n] (+)= a [m, k] b. oneDNN compiles a kernel for every shape and thread, and keeps it: the
// product is cut into shapes of few kinds, so that batches of all sizes share them.
void bf16_product(const at::BFloat16* a, int64_t m, int64_t lda, const Bf16Panels& b, float* c,
                  int64_t ldc, bool add);

// Frees what the kernels hold of the processor in this thread (the tile registers of AMX).
void bf16_release();

// A bf16 matrix [R, D] by blocks of rows, in the layouts that products need.
class Bf16Rows {
 public:
  Bf16Rows(const at::Tensor& x, int64_t block);

  // Before columns() and summands() are used.
  void pack_columns();
  void pack_summands();

  // Block b as the first operand.
  const at::BFloat16* rows(int64_t b) const {
    return rows_.const_data_ptr<at::BFloat16>() + b * block_ * ld();
  }
  int64_t ld() const { return rows_.size(1); }
  // Block b transposed as the second operand: of the similarities.
  Bf16Panels columns(int64_t b) const;
  // Block b itself as the second operand: its rows are summed up with weights.
  Bf16Panels summands(int64_t b) const;

 private:
  int64_t size(int64_t b) const;
  static const at::BFloat16* panels(const at::Tensor& packed, int64_t b) {
    return packed.const_data_ptr<at::BFloat16>() + b * packed.size(1);
  }
  template <typename Pack>
  at::Tensor pack(int64_t elements, const Pack& pack) const;

  int64_t count_, block_, d_;
  at::Tensor rows_, columns_, summands_;
};

// A tile rounded to bf16, zeros from `cols` up to a multiple of 32.
void bf16_tile(const Tile<float>& s, at::BFloat16* out, int64_t ld);
// The same of its transpose, zeros from `rows` up to a multiple of 32.
void bf16_tile_transposed(const Tile<float>& s, at::BFloat16* out, int64_t ld);

// n numbers rounded and widened.
void round_row(const float* x, at::BFloat16* out, int64_t n);
void widen_row(const at::BFloat16* x, float* out, int64_t n);

}  // namespace fastcl::cpu
