// The table of one SIMD level's kernels.
#include "level.h"

namespace embattle {

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(per_sample_norm)(const SampleNormArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(clip_and_sum)(const ClipArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(linear_grad_norm)(const LinearNormArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(embedding_grad_norm)(const EmbeddingNormArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(embedding_perturb)(const PerturbArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(segment_sum)(const SegmentSumArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(rowwise_adagrad)(const AdagradArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(project)(const ProjectArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(pgd_step)(const StepArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(momentum_step)(const StepArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(random_start)(const NoiseArgs&, ParallelFor);
void EMBATTLE_AT_LEVEL(gaussian_noise)(const NoiseArgs&, ParallelFor);

extern const CpuKernels EMBATTLE_AT_LEVEL(cpu_kernels) = {
    EMBATTLE_QUOTE(EMBATTLE_LEVEL),       EMBATTLE_AT_LEVEL(group_norm),
    EMBATTLE_AT_LEVEL(per_sample_norm),   EMBATTLE_AT_LEVEL(clip_and_sum),
    EMBATTLE_AT_LEVEL(linear_grad_norm),  EMBATTLE_AT_LEVEL(embedding_grad_norm),
    EMBATTLE_AT_LEVEL(embedding_perturb), EMBATTLE_AT_LEVEL(segment_sum),
    EMBATTLE_AT_LEVEL(rowwise_adagrad),   EMBATTLE_AT_LEVEL(project),
    EMBATTLE_AT_LEVEL(pgd_step),          EMBATTLE_AT_LEVEL(momentum_step),
    EMBATTLE_AT_LEVEL(random_start),      EMBATTLE_AT_LEVEL(gaussian_noise),
};

}  // namespace embattle
