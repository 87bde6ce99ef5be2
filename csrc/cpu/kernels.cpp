// The table of one SIMD level's kernels.
#include "level.h"

namespace embattle {

#define EMBATTLE_KERNEL(name, Args) void EMBATTLE_AT_LEVEL(name)(const Args&, ParallelFor);
EMBATTLE_KERNELS(EMBATTLE_KERNEL)
#undef EMBATTLE_KERNEL

#define EMBATTLE_KERNEL(name, Args) .name = EMBATTLE_AT_LEVEL(name),
extern const CpuKernels EMBATTLE_AT_LEVEL(cpu_kernels) = {.level = EMBATTLE_QUOTE(EMBATTLE_LEVEL),
                                                          EMBATTLE_KERNELS(EMBATTLE_KERNEL)};

}  // namespace embattle
