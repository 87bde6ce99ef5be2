// The x86-64 level of the processor that this runs on.
#pragma once

#include "features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace embattle {

#if defined(__x86_64__)
inline int level_here() {
  const auto cpuid = [](uint32_t leaf, uint32_t (&answers)[4]) {
    return __get_cpuid_count(leaf, 0, &answers[0], &answers[1], &answers[2], &answers[3]) != 0;
  };
  const auto xcr0 = [] {
    uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
  };
  return highest_level(cpuid, xcr0);
}
#else
// The compiler's baseline, under the name of the lowest level.
inline int level_here() { return 2; }
#endif

}  // namespace embattle
