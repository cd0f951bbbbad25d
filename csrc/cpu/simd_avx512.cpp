#include "simd.h"

#ifdef FASTCL_X86_DISPATCH
#define FASTCL_SIMD_NAMESPACE avx512
#define FASTCL_SIMD_BYTES 64
#define FASTCL_SIMD_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"
#include "simd_kernels.inl"
#endif
