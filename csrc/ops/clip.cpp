// The ops on per-sample gradients on the CPU.
#include "clip_ops.h"
#include "parallel.h"

namespace embattle {
namespace {

struct ClipCpu {
  static void per_sample_norm(const SampleNormArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::per_sample_norm, args);
  }
  static void clip_and_sum(const ClipArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::clip_and_sum, args);
  }
  static void linear_grad_norm(const LinearNormArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::linear_grad_norm, args);
  }
};

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CPU, m) { EMBATTLE_REGISTER_CLIP_OPS(m, embattle::ClipCpu); }
