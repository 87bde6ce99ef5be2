// The table of one SIMD level's kernels.
#include "level.h"

namespace embattle {

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(per_sample_norm)(const SampleNormArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(clip_and_sum)(const ClipArgs&, ParallelFor);

extern const CpuKernels EMBATTLE_AT_LEVEL(cpu_kernels) = {
    EMBATTLE_QUOTE(EMBATTLE_LEVEL),
    EMBATTLE_AT_LEVEL(group_norm),
    EMBATTLE_AT_LEVEL(per_sample_norm),
    EMBATTLE_AT_LEVEL(clip_and_sum),
};

}  // namespace embattle
