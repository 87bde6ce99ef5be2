// The group ops on CUDA: the checks of group_ops.h, then the launchers on torch's current stream.
#include "../ops/group_ops.h"

#include "torch_launch.h"

namespace embattle {
namespace {

struct Cuda {
  static void group_norm(const NormArgs& args, const Tensor& x) {
    launch("group_norm", cuda::group_norm, args, x);
  }
  static void project(const ProjectArgs& args, const Tensor& x) {
    launch("project", cuda::project, args, x);
  }
  static void pgd_step(const StepArgs& args, const Tensor& x) {
    launch("pgd_step", cuda::pgd_step, args, x);
  }
  static void momentum_step(const StepArgs& args, const Tensor& x) {
    launch("momentum_step", cuda::momentum_step, args, x);
  }
  static void random_start(const NoiseArgs& args, const Tensor& x) {
    launch("random_start", cuda::random_start, args, x);
  }
  static void gaussian_noise(const NoiseArgs& args, const Tensor& x) {
    launch("gaussian_noise", cuda::gaussian_noise, args, x);
  }
  // A key on the CPU is read there; one on the device stays where it is.
  static void check_key(const char* op, const Tensor& key, const Tensor& like) {
    if (!key.is_cpu()) check_device(op, "key", key, "the data", like);
  }
};

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CUDA, m) { EMBATTLE_REGISTER_GROUP_OPS(m, embattle::Cuda); }
