// Chooses the SIMD level once, from the running processor. EMBATTLE_SIMD=v2|v3|v4 forces a lower
// one; a level that the processor lacks is never chosen.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../launch.h"
#include "level_here.h"

namespace embattle {
namespace {

// The levels that were compiled (EMBATTLE_SIMD_LEVELS) and that the processor has, lowest first.
std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> levels;
  [[maybe_unused]] const int here = level_here();
#if defined(EMBATTLE_HAS_v2)
  if (here >= 2) levels.push_back(&cpu_kernels_v2);
#endif
#if defined(EMBATTLE_HAS_v3)
  if (here >= 3) levels.push_back(&cpu_kernels_v3);
#endif
#if defined(EMBATTLE_HAS_v4)
  if (here >= 4) levels.push_back(&cpu_kernels_v4);
#endif
  if (levels.empty())
    throw std::runtime_error(
        "embattle: this processor has x86-64-v" + std::to_string(here) +
        ", and the library holds no kernels for that level. Build it with "
        "EMBATTLE_SIMD_LEVELS=\"v2;v3;v4\"; a processor below x86-64-v2 (SSE4.2) is not supported");
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
