// One-dimensional Wasserstein distance of each row pair, and its gradient.
// Fused: both sorts, the transport plan and the way back to the places of x, in one kernel that
// reads x and y once and writes the gradient once. Longer rows sort in device memory.
#include <type_traits>

#include "block_sort.cuh"
#include "cells.cuh"
#include "device_sort.h"
#include "launch.cuh"
#include "launch.h"
#include "long_rows.cuh"

namespace fastcl::cuda {
namespace {

constexpr int kCellThreads = 512;
// From this many Y a cell on, a warp shares the cell.
constexpr int64_t kSharedCell = 16;

// Per row of x each element's own cost, else one sum.
template <bool kPerRow>
using CostOf = std::conditional_t<kPerRow, float, double>;

// The sum over the threads, in thread 0, in an order that depends on their number alone.
__device__ inline double block_sum(double value, double* sums) {
#pragma unroll
  for (int delta = kWarp / 2; delta > 0; delta /= 2) {
    value += __shfl_down_sync(kFullWarp, value, delta);
  }
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += sums[w];
  }
  return total;
}

// The keys of y in their order to `sorted`; no thread has read it before.
template <int kItems>
__device__ void sort_y(const float* y, int k, uint32_t* sorted) {
  const BlockSort<kItems> sort(k);
  uint32_t word[kItems], slot[kItems];
  sort.load_keys(y, word);
#pragma unroll
  for (int i = 0; i < kItems; ++i) slot[i] = 0;
#pragma unroll 1
  for (int shift = 0; shift < 32; shift += kDigitBits) {
    sort.rank(word, shift, slot);
    if (shift == 32 - kDigitBits) break;
    sort.move(word, slot, sorted);
  }
  sort.scatter(word, slot, sorted);
}

// One row pair a block. The last pass over x moves nothing: a thread meets its Y by rank.
template <int kItems, bool kPerRow>
__global__ __launch_bounds__(tier_threads(kItems)) void wasserstein_block_kernel(
    const float* __restrict__ x,         // [p, m]
    const float* __restrict__ y,         // [p, k]
    CostOf<kPerRow>* __restrict__ cost,  // [p, m] or [p]
    float* __restrict__ grad,            // [p, m]
    int m, int k) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * m;
  const BlockSort<kItems> sort(m);
  uint32_t* const buffer = sort.buffer(0);
  uint32_t* const sorted_y = sort.buffer(1);
  sort_y<kItems>(y + static_cast<int64_t>(blockIdx.x) * k, k, sorted_y);

  uint32_t word[kItems], slot[kItems];  // key of x; place in x in the low half, rank in the high
  sort.load_keys(x + row, word);
#pragma unroll
  for (int i = 0; i < kItems; ++i) slot[i] = static_cast<uint32_t>(sort.first() + i * kWarp);
#pragma unroll 1
  for (int shift = 0; shift < 32; shift += kDigitBits) {
    sort.rank(word, shift, slot);
    if (shift == 32 - kDigitBits) break;
    sort.move(word, slot, buffer);
    sort.move_low(slot, buffer);
  }

  const double scale = 1 / (m == k ? static_cast<double>(m) : static_cast<double>(m) * k);
  float* const staged = reinterpret_cast<float*>(buffer);
  double total = 0;
  if (sort.active()) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int rank = static_cast<int>(sort.rank_of(slot[i]));
      if (rank >= m) continue;
      const float value = number_of(word[i]);
      Cell cell = m == k ? equal_cell(value, number_of(sorted_y[rank]))
                         : cell_part<int>(value, sorted_y, rank, m, k, 0, 1);
      cell.term *= scale;
      total += cell.term;
      staged[slot[i] & 0xFFFF] = static_cast<float>(cell.grad * scale);
      word[i] = bits_of_float(static_cast<float>(cell.term));
    }
  }
  if constexpr (!kPerRow) {
    total = block_sum(total, sort.sums());
    if (threadIdx.x == 0) cost[blockIdx.x] = total;
  } else {
    __syncthreads();
    // Nobody reads y any more.
    float* const terms = reinterpret_cast<float*>(sorted_y);
    if (sort.active()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (static_cast<int>(sort.rank_of(slot[i])) < m)
          terms[slot[i] & 0xFFFF] = float_of(word[i]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < m; i += blockDim.x) cost[row + i] = terms[i];
  }
  for (int i = threadIdx.x; i < m; i += blockDim.x) grad[row + i] = staged[i];
}

__global__ void keys_kernel(const float* __restrict__ x,    // [rows, n]
                            uint32_t* __restrict__ keys,    // [rows, n]
                            uint32_t* __restrict__ places,  // [rows, n] or null
                            int64_t n) {
  const LongRow row(n);
  row.for_each([&](int64_t i) {
    keys[row.begin + i] = key_of(bits_of_float(x[row.begin + i]), kFloat32Format);
    if (places != nullptr) places[row.begin + i] = static_cast<uint32_t>(i);
  });
}

// One row a block, kLanes threads a cell.
template <int kLanes, bool kPerRow>
__global__ __launch_bounds__(kCellThreads) void cells_kernel(
    const uint32_t* __restrict__ x_keys,  // [rows, m]
    const uint32_t* __restrict__ places,  // [rows, m]
    const uint32_t* __restrict__ y_keys,  // [rows, k]
    CostOf<kPerRow>* __restrict__ cost,   // [rows, m] or [rows]
    float* __restrict__ grad,             // [rows, m]
    int64_t m, int64_t k) {
  const int64_t row = blockIdx.x * m;
  y_keys += blockIdx.x * k;
  const int lane = threadIdx.x % kLanes;
  const double scale = 1 / (m == k ? static_cast<double>(m) : static_cast<double>(m) * k);
  double total = 0;
  for (int64_t r = threadIdx.x / kLanes; r < m; r += kCellThreads / kLanes) {
    const float value = number_of(x_keys[row + r]);
    Cell cell = m == k ? equal_cell(value, number_of(y_keys[r]))
                       : cell_part<int64_t>(value, y_keys, r, m, k, lane, kLanes);
#pragma unroll
    for (int delta = kLanes / 2; delta > 0; delta /= 2) {
      cell.term += __shfl_down_sync(kFullWarp, cell.term, delta);
      cell.grad += __shfl_down_sync(kFullWarp, cell.grad, delta);
    }
    if (lane != 0) continue;
    cell.term *= scale;
    total += cell.term;
    const int64_t at = row + places[row + r];
    grad[at] = static_cast<float>(cell.grad * scale);
    if constexpr (kPerRow) cost[at] = static_cast<float>(cell.term);
  }
  if constexpr (!kPerRow) {
    total = block_sum(total, reinterpret_cast<double*>(block_memory()));
    if (threadIdx.x == 0) cost[blockIdx.x] = total;
  }
}

// Of one chunk of rows: keys twice and places twice, and what the sorts themselves need.
struct LongScratch {
  uint32_t *x_keys[2], *places[2], *y_keys[2];
  void* sort;
  size_t sort_bytes = 0, bytes = 0;

  LongScratch(void* base, int64_t rows, int64_t m, int64_t k, int* error) {
    size_t x_bytes = 0, y_bytes = 0;
    *error = device_sort_scratch(rows, m, true, &x_bytes);
    if (*error == cudaSuccess) *error = device_sort_scratch(rows, k, false, &y_bytes);
    Scratch scratch(base);
    for (uint32_t*& buffer : x_keys) buffer = scratch.words(rows * m);
    for (uint32_t*& buffer : places) buffer = scratch.words(rows * m);
    for (uint32_t*& buffer : y_keys) buffer = scratch.words(rows * k);
    sort_bytes = x_bytes > y_bytes ? x_bytes : y_bytes;
    sort = scratch.take(sort_bytes);
    bytes = scratch.used();
  }
};

int64_t longer(int64_t m, int64_t k) { return m > k ? m : k; }

// The rows of one chunk.
template <bool kPerRow>
int run_chunk(const float* x, const float* y, CostOf<kPerRow>* cost, float* grad, int64_t rows,
              int64_t m, int64_t k, const LongScratch& scratch, void* stream) {
  uint32_t* x_keys[2] = {scratch.x_keys[0], scratch.x_keys[1]};
  uint32_t* places[2] = {scratch.places[0], scratch.places[1]};
  uint32_t* y_keys[2] = {scratch.y_keys[0], scratch.y_keys[1]};
  uint32_t* none[2] = {nullptr, nullptr};
  int error = launch(&keys_kernel, long_blocks(rows, m), kLongThreads, 0, stream, x, x_keys[0],
                     places[0], m);
  if (error != cudaSuccess) return error;
  error =
      launch(&keys_kernel, long_blocks(rows, k), kLongThreads, 0, stream, y, y_keys[0], nullptr, k);
  if (error != cudaSuccess) return error;
  error = device_sort(x_keys, places, rows, m, 32, scratch.sort, scratch.sort_bytes, stream);
  if (error != cudaSuccess) return error;
  error = device_sort(y_keys, none, rows, k, 32, scratch.sort, scratch.sort_bytes, stream);
  if (error != cudaSuccess) return error;
  const auto kernel =
      k < kSharedCell * m ? &cells_kernel<1, kPerRow> : &cells_kernel<kWarp, kPerRow>;
  return launch(kernel, rows, kCellThreads, kSumBytes, stream, x_keys[0], places[0], y_keys[0],
                cost, grad, m, k);
}

template <bool kPerRow>
int run_long(const float* x, const float* y, CostOf<kPerRow>* cost, float* grad, int64_t p,
             int64_t m, int64_t k, void* base, void* stream) {
  const int64_t chunk = chunk_rows(p, longer(m, k));
  int error = cudaSuccess;
  const LongScratch scratch(base, chunk, m, k, &error);
  for (int64_t row = 0; row < p && error == cudaSuccess; row += chunk) {
    const int64_t rows = p - row < chunk ? p - row : chunk;
    error = run_chunk<kPerRow>(x + row * m, y + row * k, cost + row * (kPerRow ? m : 1),
                               grad + row * m, rows, m, k, scratch, stream);
  }
  return error;
}

template <bool kPerRow>
int run(const float* x, const float* y, void* costs, float* grad, int64_t p, int64_t m, int64_t k,
        void* scratch, void* stream) {
  auto* cost = static_cast<CostOf<kPerRow>*>(costs);
  int items = 0;
  const cudaError_t error = block_items(longer(m, k), 2, &items);
  if (error != cudaSuccess) return error;
  if (items == 0) return run_long<kPerRow>(x, y, cost, grad, p, m, k, scratch, stream);
  return with_items(items, [&](auto kItems) {
    const int threads = block_threads(static_cast<int>(longer(m, k)), kItems);
    return launch(&wasserstein_block_kernel<kItems, kPerRow>, p, threads,
                  block_bytes(threads, kItems, 2), stream, x, y, cost, grad, static_cast<int>(m),
                  static_cast<int>(k));
  });
}

}  // namespace

int wasserstein_1d_scratch(int64_t p, int64_t m, int64_t k, size_t* bytes) {
  *bytes = 0;
  int items = 0, error = block_items(longer(m, k), 2, &items);
  if (error != cudaSuccess || items != 0 || p == 0) return error;
  *bytes = LongScratch(nullptr, chunk_rows(p, longer(m, k)), m, k, &error).bytes;
  return error;
}

int wasserstein_1d(const float* x, const float* y, void* cost, float* grad, int64_t p, int64_t m,
                   int64_t k, bool per_row, void* scratch, void* stream) {
  if (p == 0) return cudaSuccess;
  if (m == 0 || k == 0 || p > kMaxBlocks) return cudaErrorInvalidValue;
  return per_row ? run<true>(x, y, cost, grad, p, m, k, scratch, stream)
                 : run<false>(x, y, cost, grad, p, m, k, scratch, stream);
}

}  // namespace fastcl::cuda
