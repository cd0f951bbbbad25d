// Stable sort of each row, values with indices.
// Fused: keys, all passes and the way back, in one kernel that reads x once and writes both results
// once. Longer rows sort their keys and indices in device memory.
#include "block_sort.cuh"
#include "device_sort.h"
#include "keys.cuh"
#include "launch.cuh"
#include "launch.h"
#include "long_rows.cuh"

namespace fastcl::cuda {
namespace {

// What both paths do with the bits of x: `flip` inverts the keys where the order is descending.
struct Order {
  FloatFormat format;
  uint32_t flip;

  __device__ uint32_t key(uint32_t bits) const { return key_of(bits, format) ^ flip; }

  // The element of x that has this key and stands at `index`.
  template <typename Bits>
  __device__ Bits value(uint32_t key, const Bits* x, uint32_t index) const {
    key ^= flip;
    return tells_bits(key, format) ? static_cast<Bits>(bits_of(key, format)) : x[index];
  }
};

// One segment a block. A 16-bit key and the index of its element share a word.
template <int kItems, typename Bits>
__global__ __launch_bounds__(tier_threads(kItems)) void sort_block_kernel(
    const Bits* __restrict__ x,     // [segments, n]
    Bits* __restrict__ values,      // [segments, n]
    int32_t* __restrict__ indices,  // [segments, n]
    int n, Order order) {
  constexpr bool kPacked = sizeof(Bits) == 2;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * n;
  x += begin, values += begin, indices += begin;
  const BlockSort<kItems> sort(n);
  uint32_t* const buffer = sort.buffer(0);
  uint32_t word[kItems], slot[kItems];  // slot: the index in the low half
  sort.load(x, word);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    slot[i] = static_cast<uint32_t>(sort.first() + i * kWarp);
    // Padding is larger than, or equal to and behind, every key.
    const uint32_t key = slot[i] < static_cast<uint32_t>(n) ? order.key(word[i]) : ~0u;
    word[i] = kPacked ? key << 16 | slot[i] : key;
  }
#pragma unroll 1
  for (int shift = kPacked ? 16 : 0; shift < 32; shift += kDigitBits) {
    sort.rank(word, shift, slot);
    sort.move(word, slot, buffer);
    if constexpr (!kPacked) sort.move_low(slot, buffer);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = sort.first() + i * kWarp;
    if (at >= n) break;
    const uint32_t from = kPacked ? word[i] & 0xFFFF : slot[i];
    values[at] = order.value(kPacked ? word[i] >> 16 : word[i], x, from);
    indices[at] = static_cast<int32_t>(from);
  }
}

template <typename Bits>
__global__ void sort_output_kernel(const Bits* __restrict__ x,         // [segments, n]
                                   const uint32_t* __restrict__ keys,  // [segments, n]
                                   const uint32_t* from,               // [segments, n]
                                   Bits* __restrict__ values,          // [segments, n]
                                   int32_t* indices,                   // [segments, n]
                                   int64_t n, Order order) {
  const LongRow row(n);
  x += row.begin, keys += row.begin, from += row.begin, values += row.begin, indices += row.begin;
  row.for_each([&](int64_t i) {
    const uint32_t index = from[i];
    values[i] = order.value(keys[i], x, index);
    indices[i] = static_cast<int32_t>(index);
  });
}

template <typename Bits>
__global__ void sort_input_kernel(const Bits* __restrict__ x,    // [segments, n]
                                  uint32_t* __restrict__ keys,   // [segments, n]
                                  uint32_t* __restrict__ index,  // [segments, n]
                                  int64_t n, Order order) {
  const LongRow row(n);
  x += row.begin, keys += row.begin, index += row.begin;
  row.for_each([&](int64_t i) {
    keys[i] = order.key(x[i]);
    index[i] = static_cast<uint32_t>(i);
  });
}

// Of one chunk of rows: keys twice, indices once beside the output, and what the sort itself needs.
struct LongScratch {
  uint32_t *keys[2], *index;
  void* sort;
  size_t sort_bytes = 0, bytes = 0;

  LongScratch(void* base, int64_t rows, int64_t n, int* error) {
    *error = device_sort_scratch(rows, n, true, &sort_bytes);
    Scratch scratch(base);
    for (uint32_t*& buffer : keys) buffer = scratch.words(rows * n);
    index = scratch.words(rows * n);
    sort = scratch.take(sort_bytes);
    bytes = scratch.used();
  }
};

template <typename Bits>
int sort_long(const Bits* x, Bits* values, int32_t* indices, int64_t segments, int64_t n,
              Order order, void* base, void* stream) {
  const int64_t chunk = chunk_rows(segments, n);
  int error = cudaSuccess;
  const LongScratch scratch(base, chunk, n, &error);
  for (int64_t row = 0; row < segments && error == cudaSuccess; row += chunk) {
    const int64_t rows = segments - row < chunk ? segments - row : chunk, at = row * n;
    uint32_t* keys[2] = {scratch.keys[0], scratch.keys[1]};
    uint32_t* index[2] = {reinterpret_cast<uint32_t*>(indices + at), scratch.index};
    const int64_t blocks = long_blocks(rows, n);
    error = launch(&sort_input_kernel<Bits>, blocks, kLongThreads, 0, stream, x + at, keys[0],
                   index[0], n, order);
    if (error != cudaSuccess) break;
    error = device_sort(keys, index, rows, n, 8 * sizeof(Bits), scratch.sort, scratch.sort_bytes,
                        stream);
    if (error != cudaSuccess) break;
    error = launch(&sort_output_kernel<Bits>, blocks, kLongThreads, 0, stream, x + at, keys[0],
                   index[0], values + at, indices + at, n, order);
  }
  return error;
}

template <typename Bits>
int sort_blocks(const Bits* x, Bits* values, int32_t* indices, int64_t segments, int n, Order order,
                int items, void* stream) {
  return with_items(items, [&](auto kItems) {
    const int threads = block_threads(n, kItems);
    cudaError_t error = cudaSuccess;
    for (int64_t row = 0; row < segments && error == cudaSuccess; row += kMaxBlocks) {
      const int64_t blocks = segments - row < kMaxBlocks ? segments - row : kMaxBlocks;
      error =
          launch(&sort_block_kernel<kItems, Bits>, blocks, threads, block_bytes(threads, kItems, 1),
                 stream, x + row * n, values + row * n, indices + row * n, n, order);
    }
    return error;
  });
}

template <typename Bits>
int sort_rows(const void* x, void* values, int32_t* indices, int64_t segments, int64_t n,
              FloatFormat format, bool descending, void* scratch, void* stream) {
  const Order order{format, descending ? format.all_bits() : 0};
  const auto* in = static_cast<const Bits*>(x);
  auto* out = static_cast<Bits*>(values);
  int items = 0;
  const cudaError_t error = block_items(n, 1, &items);
  if (error != cudaSuccess) return error;
  if (items == 0) {
    return sort_long(in, out, indices, segments, n, order, scratch, stream);
  }
  return sort_blocks(in, out, indices, segments, static_cast<int>(n), order, items, stream);
}

}  // namespace

int segmented_sort_scratch(int64_t segments, int64_t n, size_t* bytes) {
  *bytes = 0;
  int items = 0, error = block_items(n, 1, &items);
  if (error != cudaSuccess || items != 0 || segments == 0) return error;
  *bytes = LongScratch(nullptr, chunk_rows(segments, n), n, &error).bytes;
  return error;
}

int segmented_sort(const void* x, void* values, int32_t* indices, int64_t segments, int64_t n,
                   Dtype dtype, bool descending, void* scratch, void* stream) {
  if (segments == 0 || n == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::kFloat32:
      return sort_rows<uint32_t>(x, values, indices, segments, n, kFloat32Format, descending,
                                 scratch, stream);
    case Dtype::kFloat16:
      return sort_rows<uint16_t>(x, values, indices, segments, n, kFloat16Format, descending,
                                 scratch, stream);
    case Dtype::kBFloat16:
      return sort_rows<uint16_t>(x, values, indices, segments, n, kBFloat16Format, descending,
                                 scratch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastcl::cuda
