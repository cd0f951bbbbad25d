// Elementwise kernels over rows longer than a thread block, and the layout of their scratch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace fastcl::cuda {

constexpr int kLongThreads = 256;
constexpr int kLongElements = 4096;  // of one row, in one block

inline int64_t long_blocks(int64_t rows, int64_t n) {
  return rows * ((n + kLongElements - 1) / kLongElements);
}

// The share of one row of n that belongs to this block.
class LongRow {
 public:
  __device__ explicit LongRow(int64_t n) {
    const int64_t blocks = (n + kLongElements - 1) / kLongElements;
    const int64_t row = blockIdx.x / blocks, part = blockIdx.x - row * blocks;
    begin = row * n;
    first_ = part * kLongElements + threadIdx.x;
    end_ = (part + 1) * kLongElements < n ? (part + 1) * kLongElements : n;
  }

  template <typename Body>
  __device__ void for_each(const Body& body) const {
    for (int64_t i = first_; i < end_; i += kLongThreads) body(i);
  }

  int64_t begin;  // of the row, in elements

 private:
  int64_t first_, end_;
};

// Hands out pieces of scratch; from null on it only counts the bytes.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<unsigned char*>(base)) {}

  void* take(size_t bytes) {
    unsigned char* const piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (bytes + 255) / 256 * 256;
    return piece;
  }
  uint32_t* words(int64_t count) {
    return static_cast<uint32_t*>(take(static_cast<size_t>(count) * 4));
  }
  size_t used() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

}  // namespace fastcl::cuda
