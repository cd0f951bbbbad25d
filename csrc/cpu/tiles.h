// Tiles of the similarity matrix: a product of two row blocks in a scratch that stays in L2.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../checks.h"
#include "bf16.h"
#include "simd.h"

namespace fastcl::cpu {

// Kernels run on plain tensors: no autograd recording, no casts to 16 bits under autocast.
class PlainDispatch {
  c10::impl::ExcludeDispatchKeyGuard autograd_{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  c10::impl::ExcludeDispatchKeyGuard autocast_{c10::autocast_dispatch_keyset};
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Rows of a block. It depends on the matrix alone, never on the number of threads: results stay
// the same bit for bit. Large blocks suit the matrix product, eight of them keep two threads busy.
// Even ones: products of a leftover row or two would be slow, and round differently.
template <typename T>
int64_t block_rows(int64_t rows) {
  constexpr int64_t kLargest = sizeof(T) == 4 ? 256 : 192;
  static_assert(kLargest <= kMaxTileCols);
  const int64_t wanted = std::clamp<int64_t>(round_up(divide_up(rows, 8), 32), 64, kLargest);
  if (rows == 0) return wanted;
  return round_up(divide_up(rows, divide_up(rows, wanted)), 8);
}

// In the type that is calculated in.
inline at::Tensor empty_like_rows(const at::Tensor& x, at::IntArrayRef shape) {
  return at::Tensor(at::detail::empty_cpu(shape, x.options().dtype(compute_type(x))));
}

// A contiguous matrix [R, D] cut into blocks of rows, with a view of each made once, or with the
// layouts of each that products of bf16 take.
class RowBlocks {
 public:
  // columns: the blocks are columns of tiles; summands: they are summed up with weights.
  RowBlocks(const at::Tensor& x, int64_t block, bool columns, bool summands)
      : rows_(x.size(0)), block_(block), count_(divide_up(rows_, block)) {
    const int64_t d = x.size(1);
    if (x.scalar_type() == at::kBFloat16) {
      bf16_.emplace(x, block);
      if (columns) bf16_->pack_columns();
      if (summands) bf16_->pack_summands();
      return;
    }
    for (int64_t b = 0; b < count_; ++b) {
      const int64_t offset = x.storage_offset() + start(b) * d;
      views_.push_back(at::cpu::as_strided(x, {size(b), d}, {d, 1}, offset));
      transposed_.push_back(at::cpu::as_strided(x, {d, size(b)}, {1, d}, offset));
    }
  }

  int64_t count() const { return count_; }
  int64_t block() const { return block_; }
  int64_t start(int64_t b) const { return b * block_; }
  int64_t size(int64_t b) const { return std::min(block_, rows_ - b * block_); }
  const at::Tensor& rows(int64_t b) const { return views_[b]; }             // [size, D]
  const at::Tensor& transposed(int64_t b) const { return transposed_[b]; }  // [D, size]
  const Bf16Rows* bf16() const { return bf16_.has_value() ? &*bf16_ : nullptr; }

 private:
  int64_t rows_, block_, count_;
  std::vector<at::Tensor> views_, transposed_;
  std::optional<Bf16Rows> bf16_;  // instead of the views
};

struct Bf16Scratch {
  at::Tensor weights;
  Bf16Scratch() = default;
  Bf16Scratch(Bf16Scratch&&) = default;
  ~Bf16Scratch() { bf16_release(); }
};

// The scratch of one thread.
template <typename T>
class TileScratch {
 public:
  TileScratch(const at::Tensor& like, int64_t max_rows, int64_t max_cols)
      : ld_(round_up(max_cols, like.scalar_type() == at::kBFloat16 ? Bf16Panels::kWidth : kPadLanes)),
        buffer_(empty_like_rows(like, {max_rows, ld_})) {
    if (like.scalar_type() != at::kBFloat16) return;
    bf16_.emplace();
    const int64_t wide = round_up(std::max(max_rows, max_cols), kSummands);
    bf16_->weights = at::Tensor(
        at::detail::empty_cpu({std::max(max_rows, max_cols), wide}, like.options()));
  }

  // s = factor * a_block * b_block^T, -inf in the padding and where a row meets itself (column
  // row + offset) or its partner: column row + pair + offset in the first `pair` rows,
  // row - pair + offset in the others; pair 0 for none.
  Tile<T> product(const RowBlocks& a, int64_t i, const RowBlocks& b, int64_t j, int64_t offset,
                  int64_t pair, T factor) {
    const int64_t rows = a.size(i), cols = b.size(j);
    constexpr T kMasked = -std::numeric_limits<T>::infinity();
    T* const s = buffer_.data_ptr<T>();
    multiply(a, i, b, j, s);
    if (factor != 1) {
      // Not by the product's own factor: BLAS multiplies one operand by it, and S_ij and S_ji differ.
      for (int64_t r = 0; r < rows; ++r) kernels<T>().scale_row(s + r * ld_, factor, cols);
    }
    const int64_t padded = round_up(cols, kPadLanes);
    if (padded != cols) {
      for (int64_t r = 0; r < rows; ++r) {
        std::fill(s + r * ld_ + cols, s + r * ld_ + padded, kMasked);
      }
    }
    const Tile<T> tile{s, rows, cols, ld_};
    tile_ = tile;
    self_ = a.start(i) + offset - b.start(j);  // column left out in row 0
    pair_ = pair;
    half_ = std::clamp<int64_t>(pair - a.start(i), 0, rows);
    set_left_out(tile, kMasked);
    return tile;
  }

  // The value where a row of the last product() meets itself or its partner.
  void set_left_out(const Tile<T>& tile, T value) const {
    fill_diagonal(tile, 0, tile.rows, self_, value);
    if (pair_ > 0) {
      fill_diagonal(tile, 0, half_, self_ + pair_, value);
      fill_diagonal(tile, half_, tile.rows, self_ - pair_, value);
    }
  }

  // The valid part of the tile of the last product(), or its transpose.
  at::Tensor view(bool transposed) const {
    if (transposed) return at::cpu::as_strided(buffer_, {tile_.cols, tile_.rows}, {1, ld_}, 0);
    return at::cpu::as_strided(buffer_, {tile_.rows, tile_.cols}, {ld_, 1}, 0);
  }

  // out (+)= the same times the rows of a block of bf16.
  void sum_bf16(bool transposed, const Bf16Panels& rows, T* out, bool add) {
    if constexpr (std::is_same_v<T, float>) {
      at::BFloat16* const w = bf16_->weights.template data_ptr<at::BFloat16>();
      const int64_t m = transposed ? tile_.cols : tile_.rows;
      const int64_t ld = round_up(transposed ? tile_.rows : tile_.cols, kSummands);
      transposed ? bf16_tile_transposed(tile_, w, ld) : bf16_tile(tile_, w, ld);
      bf16_product(w, m, ld, rows, out, rows.n, add);
    }
  }

 private:
  void multiply(const RowBlocks& a, int64_t i, const RowBlocks& b, int64_t j, T* s) {
    if constexpr (std::is_same_v<T, float>) {
      if (a.bf16() != nullptr) {
        return bf16_product(a.bf16()->rows(i), a.size(i), a.bf16()->ld(), b.bf16()->columns(j), s,
                            ld_, false);
      }
    }
    at::Tensor view = at::cpu::as_strided(buffer_, {a.size(i), b.size(j)}, {ld_, 1}, 0);
    at::cpu::mm_out(view, a.rows(i), b.transposed(j));
  }

  // s[r, r + diagonal] = value for the rows first..last-1 in which that column exists.
  static void fill_diagonal(const Tile<T>& s, int64_t first, int64_t last, int64_t diagonal,
                            T value) {
    last = std::min(last, s.cols - diagonal);
    for (int64_t r = std::max(first, -diagonal); r < last; ++r) {
      s.data[r * s.ld + r + diagonal] = value;
    }
  }

  int64_t ld_;
  at::Tensor buffer_;
  Tile<T> tile_{};  // of the last product()
  std::optional<Bf16Scratch> bf16_;
  int64_t self_ = 0, pair_ = 0, half_ = 0;
};

}  // namespace fastcl::cpu
