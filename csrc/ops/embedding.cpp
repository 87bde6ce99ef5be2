// The ops on embedding tables on the CPU.
#include "embedding_ops.h"
#include "parallel.h"

namespace embattle {
namespace {

struct EmbeddingCpu {
  static void embedding_grad_norm(const EmbeddingNormArgs& args, const Tensor&) {
    cpu_kernels().embedding_grad_norm(args, torch_parallel_for);
  }
  static void embedding_perturb(const PerturbArgs& args, const Tensor&) {
    cpu_kernels().embedding_perturb(args, torch_parallel_for);
  }
  static void segment_sum(const SegmentSumArgs& args, const Tensor&) {
    cpu_kernels().segment_sum(args, torch_parallel_for);
  }
  static void rowwise_adagrad(const AdagradArgs& args, const Tensor&) {
    cpu_kernels().rowwise_adagrad(args, torch_parallel_for);
  }
};

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CPU, m) {
  EMBATTLE_REGISTER_EMBEDDING_OPS(m, embattle::EmbeddingCpu);
}
