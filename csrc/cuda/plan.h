// Host side of the group kernels: how many threads work on a group, what shared memory holds,
// launching.
#pragma once

#include <initializer_list>

#include "group.cuh"
#include "launching.h"

namespace embattle::cuda {

inline Stream stream_of(const ConstData& d, int elements, bool broadcast = false) {
  Stream s;
  s.data = d.data;
  s.type = d.dtype;
  s.aligned = aligned(d.data, size_t(std::min(16, elements * bytes_of(d.dtype))));
  s.broadcast = broadcast;
  return s;
}

struct Plan {
  int threads = 128;
  int64_t grid = 0;
  size_t shared = 0;
  bool cooperative = false;
  size_t workspace = 0;
};

// How many threads, blocks and bytes of shared memory a group gets. Fills in p.shape, p.resident
// and the slots of the streams that are to be kept in shared memory; `draws` is the size of a
// random value there, or 0; `most_threads` is the most that the kernel takes in a block, and all
// that a multiprocessor is sure to have registers for.
template <class Kernel>
cudaError_t plan_groups(Kernel* kernel, Plan* result, GroupParams& p, const Limits& limits,
                        int elements, int most_threads, std::initializer_list<Stream*> kept,
                        int draws = 0) {
  const Groups& g = p.groups;
  // Ragged groups: their sizes are on the device; most are expected below four times the average,
  // and longer ones are right all the same.
  const int64_t average = g.groups ? (g.rows + g.groups - 1) / g.groups : 0;
  const int64_t rows = g.offsets ? std::min(4 * average, g.rows) : g.rows_per_group;
  const int64_t numel = rows * g.dim;
  const int64_t chunks = std::max<int64_t>(
      1, !g.offsets && numel % elements == 0 ? numel / elements : numel / elements + 2);
  int64_t per_chunk = 0;
  for (const Stream* s : kept)
    if (s->data) per_chunk += elements * bytes_of(s->type);
  per_chunk += elements * draws;

  Plan& plan = *result = Plan{};
  const int64_t head = sizeof(TeamScratch);
  // Shared memory for two blocks on a multiprocessor, whose loads and arithmetic then overlap. The
  // plain kernels have registers for two blocks of 256 threads; one of 512 would be alone there.
  const int64_t half = limits.shared_per_multiprocessor / 2 - 1024 - head;
  const int64_t whole = limits.shared_per_block - head;
  const int64_t budget = std::min(half, whole);
  int64_t room = budget;
  const auto each_holds = [&](int64_t threads) { return (chunks + threads - 1) / threads; };
  if (chunks <= 128) {
    int lanes = 1;
    while (lanes < 32 && lanes < chunks) lanes *= 2;
    p.shape.lanes = lanes;
    plan.threads = 128;
    const int64_t teams = plan.threads / lanes;
    plan.grid = (g.groups + teams - 1) / teams;
    p.resident = int(each_holds(lanes));
  } else {
    plan.threads = std::min(chunks <= 512 ? 128 : 256, most_threads);
    p.shape.lanes = plan.threads;
    bool clusters = false;
    if (const cudaError_t error = has_clusters(kernel, &clusters); error != cudaSuccess)
      return error;
    const int64_t total = chunks * per_chunk;
    int64_t blocks = 1;
    if (clusters) {
      while (blocks < kMaxCluster && blocks * budget < total) blocks *= 2;
      // Few long groups: use the whole device.
      while (blocks < kMaxCluster && g.groups * blocks * 2 <= 2 * limits.multiprocessors &&
             chunks >= blocks * 2 * plan.threads * 4)
        blocks *= 2;
    }
    if (blocks * budget < total) room = whole;
    const bool lonely =
        g.groups * blocks < limits.multiprocessors && chunks > blocks * plan.threads * 4;
    if (blocks * room < total || lonely) {
      // Blocks at large. They meet in global memory, so all must be resident: a cooperative launch.
      const int64_t at_once = std::max<int64_t>(
          1, std::min<int64_t>(limits.shared_per_multiprocessor / (budget + head + 1024),
                               most_threads / plan.threads));
      const int64_t each = at_once == 1 ? whole : budget;
      const int64_t fit = at_once * limits.multiprocessors;
      // What of it whole chunks of all threads take.
      const int64_t of_all = std::max<int64_t>(plan.threads * per_chunk, 1);
      const int64_t holds = std::max<int64_t>(each / of_all, 1) * of_all;
      const int64_t wanted =
          std::max((total + holds - 1) / holds,
                   std::min(fit / std::max<int64_t>(g.groups, 1), chunks / (plan.threads * 4)));
      blocks = std::min(fit, std::max<int64_t>(wanted, 1));
      const int64_t teams = std::min(g.groups, fit / blocks);
      room = each;
      plan.cooperative = blocks > 1;
      plan.grid = teams * blocks;
      if (plan.cooperative)
        plan.workspace = size_t(teams) * (sizeof(TeamGlobal) + 2 * size_t(blocks) * sizeof(Sums));
    } else {
      p.shape.cluster = blocks > 1;
      plan.grid = g.groups * blocks;
    }
    p.shape.blocks = int(blocks);
    p.resident =
        int(std::min<int64_t>(each_holds(blocks * plan.threads),
                              per_chunk ? room / (plan.threads * per_chunk) : int64_t(1) << 20));
  }
  // A grid has at most 2^31 - 1 blocks; teams then take several groups.
  const int64_t most = ((int64_t(1) << 31) - 1) / p.shape.blocks * p.shape.blocks;
  plan.grid = std::min(plan.grid, most);

  int64_t at = 0;
  for (Stream* s : kept) {
    if (!s->data || p.resident == 0) continue;
    s->slot = int(at);
    at += int64_t(p.resident) * plan.threads * elements * bytes_of(s->type);
  }
  if (draws) {
    p.draws = int(at);
    at += int64_t(p.resident) * plan.threads * elements * draws;
  }
  plan.shared = size_t(head + at);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t launch(Kernel* kernel, GroupParams& p, const Plan& plan, const Context& context,
                   void* workspace) {
  if (plan.grid == 0) return cudaSuccess;
  if (plan.cooperative) {
    const size_t teams = size_t(plan.grid) / size_t(p.shape.blocks);
    p.team_global = static_cast<TeamGlobal*>(workspace);
    p.team_slots = reinterpret_cast<Sums*>(p.team_global + teams);
    const cudaError_t error = cudaMemsetAsync(workspace, 0, teams * sizeof(TeamGlobal),
                                              static_cast<cudaStream_t>(context.stream));
    if (error != cudaSuccess) return error;
  }
  const Meeting meeting{p.shape.cluster ? int(p.shape.blocks) : 1, plan.cooperative};
  return enqueue(kernel, plan.grid, plan.threads, plan.shared, context, meeting, p);
}

// Plans and launches a kernel over p's groups. `extra`: bytes of the workspace that before(memory)
// fills in; what it enqueues comes first.
template <class Kernel, class F>
cudaError_t run_groups(Kernel* kernel, GroupParams& p, int elements, int most_threads,
                       std::initializer_list<Stream*> kept, int draws, const Context& context,
                       size_t extra, F before) {
  Limits limits;
  cudaError_t error = Limits::of_current_device(&limits);
  Plan plan;
  if (error == cudaSuccess)
    error = plan_groups(kernel, &plan, p, limits, elements, most_threads, kept, draws);
  if (error != cudaSuccess) return error;
  const size_t teams = rounded(plan.workspace);
  unsigned char* workspace = nullptr;
  if (teams + extra) {
    workspace = static_cast<unsigned char*>(context.allocate(context.self, teams + extra));
    if (!workspace) return cudaErrorMemoryAllocation;
  }
  error = before(workspace + teams);
  return error != cudaSuccess ? error : launch(kernel, p, plan, context, workspace);
}
template <class Kernel>
cudaError_t run_groups(Kernel* kernel, GroupParams& p, int elements, int most_threads,
                       std::initializer_list<Stream*> kept, int draws, const Context& context) {
  return run_groups(kernel, p, elements, most_threads, kept, draws, context, 0,
                    [](void*) { return cudaSuccess; });
}

// Calls f(type_tag, full_tag) with the plain profile, where there is one and the call is `plain`.
template <class F>
int with_profile(Dtype type, bool plain, F f) {
  return with_type(type, [&](auto tag) -> int {
    if constexpr (sizeof(tag) < 8)
      if (plain) return f(tag, std::false_type{});
    return f(tag, std::true_type{});
  });
}

// What every group op says of its output, its ball and its box.
inline void set_ball(GroupParams& p, const Groups& groups, const Data& out, const PerGroup& eps,
                     const Box& box, int elements) {
  p.groups = groups;
  p.out = out.data;
  p.out_type = out.dtype;
  p.out_aligned = aligned(out.data, size_t(std::min(16, elements * bytes_of(out.dtype))));
  p.eps = eps;
  p.x0 = stream_of(box.x0, elements);
  p.lower = stream_of(box.lower, elements, box.lower_broadcast);
  p.upper = stream_of(box.upper, elements, box.upper_broadcast);
  p.lower_value = box.lower_value;
  p.upper_value = box.upper_value;
  p.boxed = is_boxed(box);
}

inline bool any(const Box& box) { return box.x0.data || is_boxed(box); }

}  // namespace embattle::cuda
