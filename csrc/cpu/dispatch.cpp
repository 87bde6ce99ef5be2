// Chooses the SIMD level once, from the running processor. EMBATTLE_SIMD=v2|v3|v4 forces a lower
// one; a level that the processor lacks is never chosen.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../launch.h"

namespace embattle {
namespace {

std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> levels{&cpu_kernels_v2};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    levels.push_back(&cpu_kernels_v3);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      levels.push_back(&cpu_kernels_v4);
  }
#endif
  return levels;
}

const CpuKernels* choose() {
  const auto levels = available();
  if (const char* wanted = std::getenv("EMBATTLE_SIMD"))
    for (const CpuKernels* level : levels)
      if (std::strcmp(level->level, wanted) == 0) return level;
  return levels.back();
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels* const chosen = choose();
  return *chosen;
}

const char* cpu_levels_available() {
  static const std::string names = [] {
    std::string text;
    for (const CpuKernels* level : available()) {
      if (!text.empty()) text += ',';
      text += level->level;
    }
    return text;
  }();
  return names.c_str();
}

}  // namespace embattle
