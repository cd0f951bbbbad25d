// Chooses the instruction set once, at first use; tests may ask for a lower one.
#include "simd.h"

#include <atomic>
#include <cstring>

namespace fastcl::cpu {
namespace {

enum Level { kBaseline, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Level detect() {
#ifdef FASTCL_X86_DISPATCH
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (avx2) return kAvx2;
#endif
  return kBaseline;
}

Level highest() {
  static const Level found = detect();
  return found;
}

std::atomic<Level>& level() {
  static std::atomic<Level> chosen{highest()};
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
#ifdef FASTCL_X86_DISPATCH
  const Level chosen = level().load(std::memory_order_relaxed);
  if (chosen == kAvx512) return avx512::kernels_f32;
  if (chosen == kAvx2) return avx2::kernels_f32;
#endif
  return baseline::kernels_f32;
}

template <>
const Kernels<double>& kernels<double>() {
#ifdef FASTCL_X86_DISPATCH
  const Level chosen = level().load(std::memory_order_relaxed);
  if (chosen == kAvx512) return avx512::kernels_f64;
  if (chosen == kAvx2) return avx2::kernels_f64;
#endif
  return baseline::kernels_f64;
}

const char* simd_level() { return kNames[level().load(std::memory_order_relaxed)]; }

bool use_simd(const char* name) {
  for (int k = kBaseline; k <= highest(); ++k) {
    if (std::strcmp(name, kNames[k]) != 0) continue;
    level().store(static_cast<Level>(k), std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace fastcl::cpu
