// The cells of the one-dimensional transport plan: quantile functions are steps, X_r of width 1/M
// and Y_j of width 1/K, and cell r is where X is X_r. Widths are integers in units of 1/(MK).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "keys.cuh"

namespace fastcl::cuda {

__host__ __device__ inline float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

__host__ __device__ inline uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

__host__ __device__ inline float number_of(uint32_t key) {
  return float_of(bits_of(key, kFloat32Format));
}

// Integrals over one cell, of (X_r - Y)^2 and of 2 (X_r - Y), in units of the widths.
struct Cell {
  double term, grad;
};

// M = K, in units of 1/M. In double: differences of floats are exact, squares do not overflow.
__host__ __device__ inline Cell equal_cell(float x, float y) {
  const double d = static_cast<double>(x) - static_cast<double>(y);
  return {d * d, 2 * d};
}

// Any M and K, in units of 1/(MK): the part of cell r in every `step`-th of its Y, from number
// `first` on. Every overlap visited is wider than zero, so that no infinity meets a zero.
template <typename Int>
__host__ __device__ inline Cell cell_part(float x, const uint32_t* y_keys, Int r, Int m, Int k,
                                          Int first, Int step) {
  const Int begin = r * k, end = begin + k;
  Cell sum{0, 0};
  for (Int j = begin / m + first; j * m < end; j += step) {
    const Int from = j * m > begin ? j * m : begin;
    const Int to = (j + 1) * m < end ? (j + 1) * m : end;
    const double d = static_cast<double>(x) - static_cast<double>(number_of(y_keys[j]));
    const double weighted = static_cast<double>(to - from) * d;
    sum.term += weighted * d;
    sum.grad += 2 * weighted;
  }
  return sum;
}

}  // namespace fastcl::cuda
