// All ops on CUDA: the checks of ops/, then the launchers on torch's current stream.
#include "../ops/clip_ops.h"
#include "../ops/embedding_ops.h"
#include "../ops/group_ops.h"
#include "../ops/step_ops.h"
#include "torch_launch.h"

namespace embattle {
namespace {

struct Cuda {
#define EMBATTLE_KERNEL(name, Args)                                     \
  static void name(const char* op, const Args& args, const Tensor& x) { \
    launch(op, cuda::name, args, x);                                    \
  }
  EMBATTLE_KERNELS(EMBATTLE_KERNEL)
#undef EMBATTLE_KERNEL
};

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CUDA, m) {
  using namespace embattle;
  const Ops<Register::functions> ops(m);
  StepOps<Cuda>::add(ops);
  GroupOps<Cuda>::add(ops);
  ClipOps<Cuda>::add(ops);
  EmbeddingOps<Cuda>::add(ops);
}
