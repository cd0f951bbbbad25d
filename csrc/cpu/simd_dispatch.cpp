// Chooses the instruction set once, at first use.
#include "simd.h"

namespace fastcl::cpu {
namespace {

enum class Level { kBaseline, kAvx2, kAvx512 };

Level detect() {
#ifdef FASTCL_X86_DISPATCH
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Level::kAvx512;
  }
  if (avx2) {
    return Level::kAvx2;
  }
#endif
  return Level::kBaseline;
}

Level level() {
  static const Level chosen = detect();
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
#ifdef FASTCL_X86_DISPATCH
  if (level() == Level::kAvx512) return avx512::kernels_f32;
  if (level() == Level::kAvx2) return avx2::kernels_f32;
#endif
  return baseline::kernels_f32;
}

template <>
const Kernels<double>& kernels<double>() {
#ifdef FASTCL_X86_DISPATCH
  if (level() == Level::kAvx512) return avx512::kernels_f64;
  if (level() == Level::kAvx2) return avx2::kernels_f64;
#endif
  return baseline::kernels_f64;
}

const char* simd_level() {
  switch (level()) {
    case Level::kAvx512:
      return "avx512";
    case Level::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fastcl::cpu
