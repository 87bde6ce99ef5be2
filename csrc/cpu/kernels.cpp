// The table of one SIMD level's kernels.
#include "level.h"

namespace embattle {

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs&, ParallelFor);

extern const CpuKernels EMBATTLE_AT_LEVEL(cpu_kernels) = {
    EMBATTLE_QUOTE(EMBATTLE_LEVEL),
    EMBATTLE_AT_LEVEL(group_norm),
};

}  // namespace embattle
