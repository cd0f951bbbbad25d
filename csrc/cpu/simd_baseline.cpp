#define FASTCL_SIMD_NAMESPACE baseline
#define FASTCL_SIMD_BYTES 16
#include "simd_kernels.inl"
