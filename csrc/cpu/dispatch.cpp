// Chooses the SIMD level once, from the running processor. EMBATTLE_SIMD=v2|v3|v4 forces a lower
// one; a level that the processor lacks is never chosen.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../launch.h"

namespace embattle {
namespace {

#if defined(__x86_64__)
[[maybe_unused]] bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

// The levels that were compiled (EMBATTLE_SIMD_LEVELS) and that the processor has, lowest first.
std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> levels;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(EMBATTLE_HAS_v2)
  levels.push_back(&cpu_kernels_v2);
#endif
#if defined(EMBATTLE_HAS_v3)
  if (has_v3()) levels.push_back(&cpu_kernels_v3);
#endif
#if defined(EMBATTLE_HAS_v4)
  if (has_v4()) levels.push_back(&cpu_kernels_v4);
#endif
  if (levels.empty())
    throw std::runtime_error(
        "embattle: compiled without the x86-64 level of this processor: build with "
        "EMBATTLE_SIMD_LEVELS=\"v2;v3;v4\"");
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
