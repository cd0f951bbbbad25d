// Launchers of the CUDA kernels, callable without CUDA or torch headers.
//
// Pointers are to device memory, contiguous; `stream` is a cudaStream_t. Every function returns a
// cudaError_t, allocates nothing and does not wait for the device, so that it can be captured in a
// graph. `scratch` has at least the bytes that the function of the same name with _scratch reports:
// none for rows that fit in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastcl::cuda {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

int segmented_sort_scratch(int64_t segments, int64_t n, size_t* bytes);

// The stable order of each segment, NaN of either sign the largest and -0 equal to +0.
int segmented_sort(const void* x,     // [segments, n]
                   void* values,      // [segments, n], the bits of x in their order
                   int32_t* indices,  // [segments, n], where they were
                   int64_t segments, int64_t n, Dtype dtype, bool descending, void* scratch,
                   void* stream);

int wasserstein_1d_scratch(int64_t p, int64_t m, int64_t k, size_t* bytes);

int wasserstein_1d(const float* x,  // [p, m]
                   const float* y,  // [p, k]
                   void* cost,      // float [p, m] if per_row, else double [p]
                   float* grad,     // [p, m]
                   int64_t p, int64_t m, int64_t k, bool per_row, void* scratch, void* stream);

}  // namespace fastcl::cuda
