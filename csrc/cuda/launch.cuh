// Kernel launches with dynamic shared memory, and what the device offers.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "block_sort.cuh"

namespace fastcl::cuda {

// Blocks a launch can have.
constexpr int64_t kMaxBlocks = INT32_MAX;

// Every thread block gets `shared` bytes, which may be more than a kernel has by default.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
                   void* stream, Args... args) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Items a thread for segments of n in one thread block each, 0 if they do not fit.
inline cudaError_t block_items(int64_t n, int buffers, int* items) {
  *items = 0;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  for (const Tier& tier : kTiers) {
    if (n > tier.limit()) continue;
    const int threads = block_threads(static_cast<int>(n), tier.items);
    if (block_bytes(threads, tier.items, buffers) <= static_cast<size_t>(limit)) {
      *items = tier.items;
    }
    return cudaSuccess;
  }
  return cudaSuccess;
}

// Calls `run(std::integral_constant<int, items>)`.
template <typename Run>
cudaError_t with_items(int items, const Run& run) {
  switch (items) {
    case kTiers[0].items:
      return run(std::integral_constant<int, kTiers[0].items>());
    case kTiers[1].items:
      return run(std::integral_constant<int, kTiers[1].items>());
    default:
      return run(std::integral_constant<int, kTiers[2].items>());
  }
}

}  // namespace fastcl::cuda
