// The ops' schemas, and all ops on the CPU: the checks of the headers beside, then the kernels of
// the SIMD level that was chosen, with torch's thread pool.
#include "../cpu/denormals.h"
#include "clip_ops.h"
#include "embedding_ops.h"
#include "group_ops.h"
#include "step_ops.h"

namespace embattle {
namespace {

void torch_parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  if (count <= 0) return;
  if (count <= grain)
    body(context, 0, count);
  else
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      const KeepDenormals here;
      body(context, begin, end);
    });
}

struct Cpu {
#define EMBATTLE_KERNEL(name, Args)                                \
  static void name(const char*, const Args& args, const Tensor&) { \
    const KeepDenormals here;                                      \
    cpu_kernels().name(args, torch_parallel_for);                  \
  }
  EMBATTLE_KERNELS(EMBATTLE_KERNEL)
#undef EMBATTLE_KERNEL
};

// The rows that occur, ascending, and their sums. On the CPU only: how many they are is known to
// the device alone.
std::tuple<Tensor, Tensor> embedding_grad_rows(const EmbeddingGradRows& a) {
  Segments segments = weighted_segments(a);
  if (a.rows > 0 && segments.args.count > (int64_t(1) << 62) / a.rows)
    refuse(a.op, segments.args.count, " indices into ", a.rows,
           " rows are more than can be sorted");
  struct Found {
    const Segments& segments;
    Tensor keys, sums;
  } result{segments, {}, {}};
  const auto allocate = [](void* self, int64_t found, int64_t** keys, void** sums) {
    Found& r = *static_cast<Found*>(self);
    r.keys = new_tensor(r.segments.indices, {found});
    r.sums = new_tensor(r.segments.grad, {found, r.segments.args.dim});
    *keys = static_cast<int64_t*>(r.keys.mutable_data_ptr());
    *sums = r.sums.mutable_data_ptr();
  };
  const FoundRows found{&result, allocate};
  segments.args.found = &found;
  Cpu::segment_sum(a.op, segments.args, segments.grad);
  return {std::move(result.keys), std::move(result.sums)};
}

template <Register kWhat>
void add(torch::stable::detail::StableLibrary& library) {
  Ops<kWhat> ops(library);
  StepOps<Cpu>::add(ops);
  GroupOps<Cpu>::add(ops);
  ClipOps<Cpu>::add(ops);
  EmbeddingOps<Cpu>::add(ops);
  ops.template op<&embedding_grad_rows>("embedding_grad_rows");
}

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY(embattle, m) { embattle::add<embattle::Register::schemas>(m); }
STABLE_TORCH_LIBRARY_IMPL(embattle, CPU, m) { embattle::add<embattle::Register::functions>(m); }
