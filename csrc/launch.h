// What a kernel is told: raw pointers, sizes, element types. No torch here: the CPU kernels are
// compiled once per SIMD level from files that include nothing but this and formulas.h, and the
// CUDA kernels take the same structs. Shapes stand in comments; every tensor is contiguous.
#pragma once

#include <cstdint>

namespace embattle {

enum class Norm : int { l1 = 1, l2 = 2, linf = 3 };
enum class Dtype : int { f32, f64, f16, bf16 };

// A tensor's memory and element type.
struct Data {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

struct ConstData {
  const void* data = nullptr;  // null: the argument is absent
  Dtype dtype = Dtype::f32;
};

// Consecutive rows of a [rows, dim] view, cut into groups.
struct Groups {
  int64_t rows = 0;
  int64_t dim = 0;
  int64_t groups = 0;
  int64_t rows_per_group = 0;        // uniform groups; unused when offsets is set
  const int64_t* offsets = nullptr;  // [groups + 1], ragged groups; or null
  const bool* mask = nullptr;        // [rows], true takes part; or null
};

// One number for all groups, or one per group.
struct PerGroup {
  double value = 0;
  const void* values = nullptr;  // [groups], or one element if `broadcast`; or null: `value` holds
  Dtype dtype = Dtype::f32;      // f32 or f64
  bool broadcast = false;
};

// The box and the centre of a perturbation; tensors are in the element type of the result.
struct Box {
  ConstData x0;     // [rows, dim] or absent
  ConstData lower;  // one element (broadcast) or [rows, dim]; or absent: lower_value holds
  ConstData upper;
  bool lower_broadcast = false;
  bool upper_broadcast = false;
  double lower_value = -__builtin_huge_val();  // not yet rounded to the element type
  double upper_value = __builtin_huge_val();
};

// The numbers of a step that are the same for all groups.
struct StepRule {
  double top = 1;           // l1: how many coordinates move; below 1 a fraction of the group
  int64_t max_groups = -1;  // how many groups of a sample move; -1: all
  double decay = 0;         // momentum_step only
  bool apgd = false;        // momentum_step only
};

// What project is told, and of their results steps and noise too.
struct ProjectArgs {
  Groups groups;
  Norm norm = Norm::l2;
  ConstData x{};   // [rows, dim]; absent for random_start
  Data out{};      // [rows, dim], dtype of x; may be x itself
  PerGroup eps{};  // infinite: no ball
  Box box{};
};

struct StepArgs : ProjectArgs {
  ConstData velocity;  // [rows, dim], of any dtype; momentum_step only
  ConstData grad;      // [rows, dim]
  Data velocity_out;   // [rows, dim], dtype of velocity; momentum_step only; may be velocity itself
  PerGroup step_size;
  StepRule rule;
  int64_t groups_per_sample = 1;
  int32_t* nonfinite = nullptr;  // [groups] or null
};

struct NoiseArgs : ProjectArgs {
  const int64_t* key = nullptr;  // [2]; on the device, or:
  bool key_on_host = false;      // where the CUDA launcher reads it, before it returns
  PerGroup std;
};

struct NormArgs {
  Groups groups;
  Norm norm = Norm::l2;
  ConstData x;  // [rows, dim]
  Data out;     // [groups], f64 for f64 input and f32 otherwise
};

// How a CPU kernel spreads work over threads: calls body(context, begin, end) on pieces of
// [0, count) that hold at least `grain` items, or once when there is little to do. Handed in by the
// torch-facing side, so that the kernels know nothing of torch.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct SampleNormArgs;  // launch_clip.h
struct ClipArgs;
struct LinearNormArgs;
struct EmbeddingNormArgs;
struct PerturbArgs;
struct SegmentSumArgs;
struct AdagradArgs;

// Every kernel, and what it is told: the CPU's of each SIMD level, and the CUDA launchers.
#define EMBATTLE_KERNELS(K)                 \
  K(group_norm, NormArgs)                   \
  K(project, ProjectArgs)                   \
  K(pgd_step, StepArgs)                     \
  K(momentum_step, StepArgs)                \
  K(random_start, NoiseArgs)                \
  K(gaussian_noise, NoiseArgs)              \
  K(per_sample_norm, SampleNormArgs)        \
  K(clip_and_sum, ClipArgs)                 \
  K(linear_grad_norm, LinearNormArgs)       \
  K(embedding_grad_norm, EmbeddingNormArgs) \
  K(embedding_perturb, PerturbArgs)         \
  K(segment_sum, SegmentSumArgs)            \
  K(rowwise_adagrad, AdagradArgs)

// The CPU kernels of one SIMD level.
struct CpuKernels {
  const char* level;
#define EMBATTLE_KERNEL(name, Args) void (*name)(const Args&, ParallelFor);
  EMBATTLE_KERNELS(EMBATTLE_KERNEL)
#undef EMBATTLE_KERNEL
};

extern const CpuKernels cpu_kernels_v2;  // also the one level of machines that are not x86-64
extern const CpuKernels cpu_kernels_v3;  // AVX2, FMA, F16C, BMI, and all else of x86-64-v3
extern const CpuKernels cpu_kernels_v4;  // AVX-512 F, BW, CD, DQ, VL

const CpuKernels& cpu_kernels();     // the level chosen at load
const char* cpu_levels_available();  // comma-separated, lowest first

}  // namespace embattle
