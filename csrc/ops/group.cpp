// The group ops on the CPU.
#include "group_ops.h"
#include "parallel.h"

namespace embattle {
namespace {

struct Cpu {
  static void group_norm(const NormArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::group_norm, args);
  }
  static void project(const ProjectArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::project, args);
  }
  static void pgd_step(const StepArgs& args, const Tensor&) { on_cpu(&CpuKernels::pgd_step, args); }
  static void momentum_step(const StepArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::momentum_step, args);
  }
  static void random_start(const NoiseArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::random_start, args);
  }
  static void gaussian_noise(const NoiseArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::gaussian_noise, args);
  }
  static void check_key(const char* op, const Tensor& key, const Tensor& like) {
    check_device(op, "key", key, "the data", like);
  }
};

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CPU, m) { EMBATTLE_REGISTER_GROUP_OPS(m, embattle::Cpu); }
