#include "device_sort.h"

#include <cub/device/device_segmented_radix_sort.cuh>

#include <iterator>

namespace fastcl::cuda {

// Where each row begins, calculated instead of stored: a random-access iterator.
class RowOffsets {
 public:
  using iterator_category = std::random_access_iterator_tag;
  using value_type = int;
  using difference_type = std::ptrdiff_t;
  using pointer = const int*;
  using reference = int;

  RowOffsets(int n, int row) : n_(n), row_(row) {}

  __host__ __device__ int operator[](difference_type i) const {
    return static_cast<int>((row_ + i) * n_);
  }
  __host__ __device__ int operator*() const { return (*this)[0]; }
  __host__ __device__ RowOffsets operator+(difference_type i) const {
    RowOffsets moved = *this;
    moved.row_ += static_cast<int>(i);
    return moved;
  }

 private:
  int n_, row_;
};

namespace {

// Scratch null: only sets the bytes.
cudaError_t sort(cub::DoubleBuffer<uint32_t>& keys, cub::DoubleBuffer<uint32_t>* payload,
                 int64_t rows, int64_t n, int bits, void* scratch, size_t* bytes, void* stream) {
  const RowOffsets begin(static_cast<int>(n), 0), end(static_cast<int>(n), 1);
  const int items = static_cast<int>(rows * n), segments = static_cast<int>(rows);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (payload == nullptr) {
    return cub::DeviceSegmentedRadixSort::SortKeys(scratch, *bytes, keys, items, segments, begin,
                                                   end, 0, bits, queue);
  }
  return cub::DeviceSegmentedRadixSort::SortPairs(scratch, *bytes, keys, *payload, items, segments,
                                                  begin, end, 0, bits, queue);
}

}  // namespace

int device_sort_scratch(int64_t rows, int64_t n, bool pairs, size_t* bytes) {
  cub::DoubleBuffer<uint32_t> keys, payload;
  return sort(keys, pairs ? &payload : nullptr, rows, n, 32, nullptr, bytes, nullptr);
}

int device_sort(uint32_t* (&keys)[2], uint32_t* (&payload)[2], int64_t rows, int64_t n, int bits,
                void* scratch, size_t scratch_bytes, void* stream) {
  cub::DoubleBuffer<uint32_t> key_buffers(keys[0], keys[1]);
  cub::DoubleBuffer<uint32_t> payload_buffers(payload[0], payload[1]);
  const bool pairs = payload[0] != nullptr;
  const cudaError_t error = sort(key_buffers, pairs ? &payload_buffers : nullptr, rows, n, bits,
                                 scratch, &scratch_bytes, stream);
  keys[0] = key_buffers.Current(), keys[1] = key_buffers.Alternate();
  if (pairs) payload[0] = payload_buffers.Current(), payload[1] = payload_buffers.Alternate();
  return error;
}

}  // namespace fastcl::cuda
