// The library's sort in device memory, for tests without a GPU.
#include "../../csrc/cuda/device_sort.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace fastcl::cuda {

int device_sort_scratch(int64_t, int64_t, bool, size_t* bytes) {
  *bytes = 1;
  return 0;
}

int device_sort(uint32_t* (&keys)[2], uint32_t* (&payload)[2], int64_t rows, int64_t n, int bits,
                void*, size_t, void*) {
  const uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;
  std::vector<int64_t> order(n);
  for (int64_t row = 0; row < rows; ++row) {
    const uint32_t* const key = keys[0] + row * n;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return (key[a] & mask) < (key[b] & mask); });
    for (int64_t i = 0; i < n; ++i) {
      keys[1][row * n + i] = key[order[i]];
      if (payload[0] != nullptr) payload[1][row * n + i] = payload[0][row * n + order[i]];
    }
  }
  // Results in the other buffers, as they may be.
  std::swap(keys[0], keys[1]);
  std::swap(payload[0], payload[1]);
  return 0;
}

}  // namespace fastcl::cuda
