// The gradient of rows: sums of products of tiles of weights with blocks of rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace fastcl::cpu {

// G, as `copies` partial sums of it, by blocks of rows. After kFold products a block moves into
// a second level of sums: adding thousands of them one by one would lose digits.
template <typename T>
class GradientSums {
 public:
  GradientSums(const at::Tensor& a, const RowBlocks& blocks, int64_t copies, int64_t products)
      : rows_(a.size(0)), d_(a.size(1)), per_copy_(blocks.count()), copies_(copies) {
    sum_ = empty_like_rows(a, {copies * rows_, d_});
    if (products > kFold) total_ = empty_like_rows(a, {copies * rows_, d_});
    state_.resize(copies * per_copy_);
    for (int64_t copy = 0; copy < copies; ++copy) {
      for (int64_t b = 0; b < per_copy_; ++b) {
        Block& block = state_[copy * per_copy_ + b];
        block.offset = (copy * rows_ + blocks.start(b)) * d_;
        block.size = blocks.size(b) * d_;
        block.view = at::cpu::as_strided(sum_, {blocks.size(b), d_}, {d_, 1}, block.offset);
      }
    }
  }

  // block += the tile's weights, or their transpose, times block j of the rows
  void add(int64_t copy, int64_t b, TileScratch<T>& weights, bool transposed, const RowBlocks& rows,
           int64_t j) {
    Block& block = state_[copy * per_copy_ + b];
    if (block.pending == kFold) fold(block);
    if (rows.bf16() != nullptr) {
      weights.sum_bf16(transposed, rows.bf16()->summands(j), sum_.data_ptr<T>() + block.offset,
                       block.pending > 0);
    } else if (block.pending == 0) {
      at::cpu::mm_out(block.view, weights.view(transposed), rows.rows(j));
    } else {
      at::cpu::addmm_(block.view, weights.view(transposed), rows.rows(j));
    }
    ++block.pending;
  }

  at::Tensor finish(double factor) {
    const bool two_levels = total_.defined();
    const at::Tensor& parts = two_levels ? total_ : sum_;
    for (Block& block : state_) {
      if (two_levels && block.pending > 0) fold(block);
      if (block.pending == 0 && !block.folded) {
        std::fill_n(parts.data_ptr<T>() + block.offset, block.size, T(0));
      }
    }
    at::Tensor g = parts;
    if (copies_ > 1) {
      g = parts.narrow(0, 0, rows_).clone();
      for (int64_t copy = 1; copy < copies_; ++copy) g.add_(parts.narrow(0, copy * rows_, rows_));
    }
    return factor == 1 ? g : g.mul_(factor);
  }

 private:
  static constexpr int64_t kFold = 64;
  struct Block {
    at::Tensor view;
    int64_t offset = 0, size = 0;
    int64_t pending = 0;
    bool folded = false;
  };

  void fold(Block& block) {
    const T* const from = sum_.const_data_ptr<T>() + block.offset;
    T* const to = total_.data_ptr<T>() + block.offset;
    for (int64_t k = 0; k < block.size; ++k) to[k] = block.folded ? to[k] + from[k] : from[k];
    block.pending = 0;
    block.folded = true;
  }

  int64_t rows_, d_, per_copy_, copies_;
  at::Tensor sum_, total_;  // [copies * R, D]
  std::vector<Block> state_;
};

}  // namespace fastcl::cpu
