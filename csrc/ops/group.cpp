// The group ops on the CPU.
#include "group_ops.h"
#include "parallel.h"

namespace embattle {
namespace {

struct Cpu {
  static void group_norm(const NormArgs& args, const Tensor&) {
    cpu_kernels().group_norm(args, torch_parallel_for);
  }
  static void project(const ProjectArgs& args, const Tensor&) {
    cpu_kernels().project(args, torch_parallel_for);
  }
  static void pgd_step(const StepArgs& args, const Tensor&) {
    cpu_kernels().pgd_step(args, torch_parallel_for);
  }
  static void momentum_step(const StepArgs& args, const Tensor&) {
    cpu_kernels().momentum_step(args, torch_parallel_for);
  }
  static void random_start(const NoiseArgs& args, const Tensor&) {
    cpu_kernels().random_start(args, torch_parallel_for);
  }
  static void gaussian_noise(const NoiseArgs& args, const Tensor&) {
    cpu_kernels().gaussian_noise(args, torch_parallel_for);
  }
  static Tensor key(const Tensor& key, const Tensor& like) {
    check_device("random_start", "key", key, "the data", like);
    return key;
  }
};

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CPU, m) { EMBATTLE_REGISTER_GROUP_OPS(m, embattle::Cpu); }
