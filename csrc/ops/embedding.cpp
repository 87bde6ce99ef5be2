// The ops on embedding tables on the CPU.
#include "embedding_ops.h"
#include "parallel.h"

namespace embattle {
namespace {

struct EmbeddingCpu {
  static void embedding_grad_norm(const EmbeddingNormArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::embedding_grad_norm, args);
  }
  static void embedding_perturb(const PerturbArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::embedding_perturb, args);
  }
  static void segment_sum(const char*, const SegmentSumArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::segment_sum, args);
  }
  static void rowwise_adagrad(const AdagradArgs& args, const Tensor&) {
    on_cpu(&CpuKernels::rowwise_adagrad, args);
  }
};

// The rows that occur, ascending, and their sums.
std::tuple<Tensor, Tensor> embedding_grad_rows(const Tensor& indices, const Tensor& grad,
                                               int64_t rows, const OptionalTensor& weights,
                                               int64_t padding) {
  Segments segments =
      weighted_segments("embedding_grad_rows", indices, grad, rows, weights, padding);
  if (rows > 0 && segments.args.count > (int64_t(1) << 62) / rows)
    fail("embattle.embedding_grad_rows: ", segments.args.count, " indices into ", rows,
         " rows are more than can be sorted");
  struct Result {
    const Segments& segments;
    Tensor keys, sums;
  } result{segments, {}, {}};
  const auto allocate = [](void* self, int64_t found, int64_t** keys, void** sums) {
    Result& r = *static_cast<Result*>(self);
    r.keys = torch::stable::new_empty(r.segments.indices, {found});
    r.sums = torch::stable::new_empty(r.segments.grad, {found, r.segments.args.dim});
    *keys = static_cast<int64_t*>(r.keys.mutable_data_ptr());
    *sums = r.sums.mutable_data_ptr();
  };
  const FoundRows found{&result, allocate};
  segments.args.found = &found;
  on_cpu(&CpuKernels::segment_sum, segments.args);
  return {std::move(result.keys), std::move(result.sums)};
}

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CPU, m) {
  m.impl("embedding_grad_rows", TORCH_BOX(&embattle::embedding_grad_rows));
  EMBATTLE_REGISTER_EMBEDDING_OPS(m, embattle::EmbeddingCpu);
}
