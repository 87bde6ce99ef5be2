// The ops on per-sample gradients on the CPU.
#include "clip_ops.h"
#include "parallel.h"

namespace embattle {
namespace {

struct ClipCpu {
  static void per_sample_norm(const SampleNormArgs& args, const Tensor&) {
    cpu_kernels().per_sample_norm(args, torch_parallel_for);
  }
  static void clip_and_sum(const ClipArgs& args, const Tensor&) {
    cpu_kernels().clip_and_sum(args, torch_parallel_for);
  }
  static void linear_grad_norm(const LinearNormArgs& args, const Tensor&) {
    cpu_kernels().linear_grad_norm(args, torch_parallel_for);
  }
};

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CPU, m) { EMBATTLE_REGISTER_CLIP_OPS(m, embattle::ClipCpu); }
