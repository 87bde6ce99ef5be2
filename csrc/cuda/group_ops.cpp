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
    if (args.velocity.dtype != args.delta.dtype)
      fail("embattle.momentum_step: on CUDA velocity must have the dtype of delta");
    launch("momentum_step", cuda::momentum_step, args, x);
  }
  static void random_start(NoiseArgs args, const Tensor& x) {
    draw("random_start", cuda::random_start, args, x);
  }
  static void gaussian_noise(NoiseArgs args, const Tensor& x) {
    draw("gaussian_noise", cuda::gaussian_noise, args, x);
  }
  // A key on the CPU is read there; one on the device stays where it is.
  static Tensor key(const Tensor& key, const Tensor& like) {
    if (!key.is_cpu()) check_device("random_start", "key", key, "the data", like);
    last_key_on_host = key.is_cpu();
    return key;
  }

 private:
  static void draw(const char* op, int (*launcher)(const NoiseArgs&, const cuda::Context&),
                   NoiseArgs& args, const Tensor& x) {
    args.key_on_host = last_key_on_host;
    launch(op, launcher, args, x);
  }
  // Where the key of this thread's call is: key() runs before the launcher.
  static thread_local bool last_key_on_host;
};
thread_local bool Cuda::last_key_on_host = false;

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CUDA, m) { EMBATTLE_REGISTER_GROUP_OPS(m, embattle::Cuda); }
