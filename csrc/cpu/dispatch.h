// The instruction set the kernels run in: the widest that was compiled and this processor has, or the one that
// PHMDIFF_ISA names ("generic", "avx2", "avx512"), if it can run.
#pragma once

#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace phmdiff {

namespace generic {
PHM_CPU_KERNELS
}
#if defined(PHM_X86)
namespace avx2 {
PHM_CPU_KERNELS
}
namespace avx512 {
PHM_CPU_KERNELS
}
#endif

enum class Isa { generic, avx2, avx512 };

inline Isa best_isa() {
#if defined(PHM_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const char* asked = std::getenv("PHMDIFF_ISA");
  if (asked && !std::strcmp(asked, "generic")) return Isa::generic;
  if (avx512 && !(asked && !std::strcmp(asked, "avx2"))) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::generic;
}

inline Isa isa() {
  static const Isa best = best_isa();
  return best;
}

}  // namespace phmdiff

#if defined(PHM_X86)
#define PHM_CPU(call)                                         \
  (::phmdiff::isa() == ::phmdiff::Isa::avx512 ? ::phmdiff::avx512::call \
   : ::phmdiff::isa() == ::phmdiff::Isa::avx2 ? ::phmdiff::avx2::call   \
                                              : ::phmdiff::generic::call)
#else
#define PHM_CPU(call) (::phmdiff::generic::call)
#endif
