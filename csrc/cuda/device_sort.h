// Sort of rows that do not fit in shared memory: cub's segmented radix sort, one block a row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastcl::cuda {

// Elements sorted at once, which bounds the scratch; a longer row is sorted alone.
constexpr int64_t kChunkElements = int64_t{1} << 28;

// Rows of n elements sorted at once.
constexpr int64_t chunk_rows(int64_t rows, int64_t n) {
  const int64_t chunk = n < kChunkElements ? kChunkElements / n : 1;
  return chunk < rows ? chunk : rows;
}

// Bytes that device_sort needs beside the buffers.
int device_sort_scratch(int64_t rows, int64_t n, bool pairs, size_t* bytes);

// Sorts rows of keys by their low `bits`, stably, and payload along with them unless it is null.
// From and to [0] of either; [1] is scratch. Buffers may change places, so both are returned.
int device_sort(uint32_t* (&keys)[2],     // [rows, n]
                uint32_t* (&payload)[2],  // [rows, n] or null
                int64_t rows, int64_t n, int bits, void* scratch, size_t scratch_bytes,
                void* stream);

}  // namespace fastcl::cuda
