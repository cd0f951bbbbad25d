#include "simd.h"

#ifdef FASTCL_X86_DISPATCH
#define FASTCL_SIMD_NAMESPACE avx2
#define FASTCL_SIMD_BYTES 32
#define FASTCL_SIMD_TARGET "avx2,fma"
#include "simd_kernels.inl"
#endif
