// The ops on per-sample gradients and embedding tables on CUDA.
#include "../ops/clip_ops.h"
#include "../ops/embedding_ops.h"
#include "torch_launch.h"

namespace embattle {
namespace {

struct SampleCuda {
  static void per_sample_norm(const SampleNormArgs& args, const Tensor& x) {
    launch("per_sample_norm", cuda::per_sample_norm, args, x);
  }
  static void clip_and_sum(const ClipArgs& args, const Tensor& x) {
    launch("clip_and_sum", cuda::clip_and_sum, args, x);
  }
  static void linear_grad_norm(const LinearNormArgs& args, const Tensor& x) {
    launch("linear_grad_norm", cuda::linear_grad_norm, args, x);
  }
  static void embedding_grad_norm(const EmbeddingNormArgs& args, const Tensor& x) {
    launch("embedding_grad_norm", cuda::embedding_grad_norm, args, x);
  }
  static void embedding_perturb(const PerturbArgs& args, const Tensor& x) {
    launch("embedding_perturb", cuda::embedding_perturb, args, x);
  }
  static void segment_sum(const char* op, const SegmentSumArgs& args, const Tensor& x) {
    launch(op, cuda::segment_sum, args, x);
  }
  static void rowwise_adagrad(const AdagradArgs& args, const Tensor& x) {
    launch("rowwise_adagrad_", cuda::rowwise_adagrad, args, x);
  }
};

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CUDA, m) {
  EMBATTLE_REGISTER_CLIP_OPS(m, embattle::SampleCuda);
  EMBATTLE_REGISTER_EMBEDDING_OPS(m, embattle::SampleCuda);
}
