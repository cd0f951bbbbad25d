// Unsigned keys in the order of floating-point numbers, and the way back to their bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastcl::cuda {

// A floating-point type by its bits: what the 16-bit types differ in, so that they share kernels.
struct FloatFormat {
  uint32_t sign, infinity;

  __host__ __device__ constexpr uint32_t all_bits() const { return sign | (sign - 1); }
};

constexpr FloatFormat kFloat32Format{0x80000000u, 0x7F800000u};
constexpr FloatFormat kFloat16Format{0x8000u, 0x7C00u};
constexpr FloatFormat kBFloat16Format{0x8000u, 0x7F80u};

// Keys compare as the numbers do: both zeros have one key, and all NaN have the largest.
__host__ __device__ inline uint32_t key_of(uint32_t bits, FloatFormat format) {
  const uint32_t magnitude = bits & (format.sign - 1);
  const uint32_t key = bits > format.sign ? bits ^ format.all_bits() : magnitude | format.sign;
  return magnitude > format.infinity ? format.all_bits() : key;
}

// Whether the key stands for one number: not if it is that of the zeros or of NaN.
__host__ __device__ inline bool tells_bits(uint32_t key, FloatFormat format) {
  return key != format.sign && key != format.all_bits();
}

// The number's bits; +0 for the zeros, a NaN for NaN.
__host__ __device__ inline uint32_t bits_of(uint32_t key, FloatFormat format) {
  return (key & format.sign) != 0 ? key ^ format.sign : key ^ format.all_bits();
}

}  // namespace fastcl::cuda
