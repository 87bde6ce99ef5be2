// Host side of the group kernels: how many threads work on a group, what shared memory holds,
// launching.
#pragma once

#include "group.cuh"
#include "launching.h"

namespace embattle::cuda {

// A kernel for an element type, a norm and a profile.
struct GroupKernel {
  void (*kernel)(GroupParams) = nullptr;
  int most_threads = 0;  // that a multiprocessor is sure to have registers for
  int draw = 0;          // bytes of a random value that it keeps
};

// A call of a kernel on groups, planned.
struct GroupCall : GroupKernel {
  GroupParams p;
  Grid grid;

  // What the workspace is to have for teams that meet in global memory.
  int64_t teams() const { return grid.cooperative ? grid.blocks / p.shape.blocks : 0; }
  Array<TeamGlobal> counters() { return {&p.team_global, teams()}; }
  Array<Sums> slots() { return {&p.team_slots, 2 * teams() * p.shape.blocks}; }

  void launch(Queue& queue) const {
    queue.clear(p.team_global, size_t(teams()) * sizeof(TeamGlobal));
    queue.launch(kernel, grid, p);
  }
  // Where nothing else of the op needs a workspace.
  cudaError_t run(Queue& queue) {
    queue.allocate(counters(), slots());
    launch(queue);
    return queue.error();
  }
};

// How many threads, blocks and bytes of shared memory a group gets. Fills in the grid, and of the
// params the shape, `resident` and the slots of what is to be kept in shared memory.
inline void plan_groups(GroupCall& call, Queue& queue) {
  GroupParams& p = call.p;
  Grid& grid = call.grid;
  const Groups& g = p.groups;
  const int64_t multiprocessors = queue.device(cudaDevAttrMultiProcessorCount);
  const int64_t shared = queue.device(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t shared_of_block = queue.device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (queue.error() != cudaSuccess) return;
  const int elements = 16 / bytes_of(p.x.dtype);
  const auto fits = [&](const void* data, Dtype type) {
    return aligned(data, size_t(std::min(16, elements * bytes_of(type))));
  };
  for (Stream* s : {&p.x, &p.grad, &p.velocity, &p.x0, &p.lower, &p.upper})
    s->aligned = fits(s->data, s->dtype);
  const bool same = p.velocity.dtype == p.x.dtype;
  p.out_aligned = fits(p.out.data, p.x.dtype);
  p.velocity_aligned = same && fits(p.velocity_out.data, p.x.dtype);
  // Ragged groups: their sizes are on the device; most are expected below four times the average,
  // and longer ones are right all the same.
  const int64_t average = g.groups ? (g.rows + g.groups - 1) / g.groups : 0;
  const int64_t rows = g.offsets ? std::min(4 * average, g.rows) : g.rows_per_group;
  const int64_t numel = rows * g.dim;
  const int64_t chunks = std::max<int64_t>(
      1, !g.offsets && numel % elements == 0 ? numel / elements : numel / elements + 2);
  // What a chunk has in shared memory: a velocity of another type is read again in each pass.
  Stream none;
  Stream* const kept[] = {&p.x, same ? &p.velocity : &none, &p.grad};
  int64_t per_chunk = elements * call.draw;
  for (const Stream* s : kept)
    if (s->data) per_chunk += elements * bytes_of(s->dtype);

  const int64_t head = sizeof(TeamScratch);
  // Shared memory for two blocks on a multiprocessor, whose loads and arithmetic then overlap. The
  // plain kernels have registers for two blocks of 256 threads; one of 512 would be alone there.
  const int64_t half = shared / 2 - 1024 - head;
  const int64_t whole = shared_of_block - head;
  const int64_t budget = std::min(half, whole);
  int64_t room = budget;
  const auto each_holds = [&](int64_t threads) { return (chunks + threads - 1) / threads; };
  if (chunks <= 128) {
    p.shape.lanes = power_of_two(chunks, 32);
    grid.threads = 128;
    const int64_t teams = grid.threads / p.shape.lanes;
    grid.blocks = (g.groups + teams - 1) / teams;
    p.resident = int(each_holds(p.shape.lanes));
  } else {
    grid.threads = chunks <= 512 ? 128 : 256;
    p.shape.lanes = grid.threads;
    const int64_t total = chunks * per_chunk;
    int64_t blocks = 1;
    if (queue.has_clusters(call.kernel)) {
      while (blocks < kMaxCluster && blocks * budget < total) blocks *= 2;
      // Few long groups: use the whole device.
      while (blocks < kMaxCluster && g.groups * blocks * 2 <= 2 * multiprocessors &&
             chunks >= blocks * 2 * grid.threads * 4)
        blocks *= 2;
    }
    // A little that is read again costs less than one block alone on a multiprocessor.
    const bool nearly =
        blocks > 1 && blocks * budget >= total - total / 4 && call.most_threads >= 2 * grid.threads;
    if (blocks * budget < total && !nearly) room = whole;
    const bool lonely = g.groups * blocks < multiprocessors && chunks > blocks * grid.threads * 4;
    if ((blocks * room < total && !nearly) || lonely) {
      // Blocks at large. They meet in global memory, so all must be resident: a cooperative launch.
      const int64_t at_once = std::max<int64_t>(
          1, std::min<int64_t>(shared / (budget + head + 1024), call.most_threads / grid.threads));
      room = at_once == 1 ? whole : budget;
      const int64_t fit = at_once * multiprocessors;
      // What of it whole chunks of all threads take.
      const int64_t of_all = std::max<int64_t>(grid.threads * per_chunk, 1);
      const int64_t holds = std::max<int64_t>(room / of_all, 1) * of_all;
      const int64_t wanted =
          std::max((total + holds - 1) / holds,
                   std::min(fit / std::max<int64_t>(g.groups, 1), chunks / (grid.threads * 4)));
      blocks = std::min(fit, std::max<int64_t>(wanted, 1));
      grid.blocks = std::min(g.groups, fit / blocks) * blocks;
      grid.cooperative = blocks > 1;
    } else {
      p.shape.cluster = blocks > 1;
      grid.cluster = int(blocks);
      grid.blocks = g.groups * blocks;
    }
    p.shape.blocks = int(blocks);
    p.resident =
        int(std::min<int64_t>(each_holds(blocks * grid.threads),
                              per_chunk ? room / (grid.threads * per_chunk) : int64_t(1) << 20));
  }
  // A grid has at most 2^31 - 1 blocks; teams then take several groups.
  const int64_t most = ((int64_t(1) << 31) - 1) / p.shape.blocks * p.shape.blocks;
  grid.blocks = std::min(grid.blocks, most);

  int64_t at = 0;
  const auto slot = [&](int bytes) {
    const int64_t begin = at;
    at += int64_t(p.resident) * grid.threads * elements * bytes;
    return int(begin);
  };
  for (Stream* s : kept)
    if (s->data && p.resident) s->slot = slot(bytes_of(s->dtype));
  p.draws = slot(call.draw);
  grid.shared = size_t(head + at);
}

// Plans a call on p's groups. choose(type, norm, full) gives the kernel; the plain profile is taken
// where there is one and the call is `plain`.
template <class F>
GroupCall group_call(Queue& queue, const GroupParams& p, Norm norm, bool plain, F choose) {
  GroupCall call;
  call.p = p;
  GroupKernel& kernel = call;
  for_type(p.x.dtype, [&](auto type) {
    with_norm(norm, [&](auto n) {
      if constexpr (sizeof(type) < 8)
        if (plain) return void(kernel = choose(type, n, std::false_type{}));
      kernel = choose(type, n, std::true_type{});
    });
  });
  plan_groups(call, queue);
  return call;
}

// Whether an op needs the full profile for its box and its origin.
inline bool any(const Box& box) { return box.x0.data || is_boxed(box); }

// What every group op says of its input, its output, its ball and its box.
inline GroupParams params_of(const ProjectArgs& args) {
  const Box& box = args.box;
  GroupParams p;
  p.groups = args.groups;
  p.x = {args.x.data, args.out.dtype};
  p.out = args.out;
  p.eps = args.eps;
  p.x0 = {box.x0};
  p.lower = {box.lower, box.lower_broadcast};
  p.upper = {box.upper, box.upper_broadcast};
  p.lower_value = box.lower_value;
  p.upper_value = box.upper_value;
  p.boxed = is_boxed(box);
  return p;
}

// The same of a step.
inline GroupParams params_of(const StepArgs& args) {
  GroupParams p = params_of(static_cast<const ProjectArgs&>(args));
  p.grad = {args.grad};
  p.velocity = {args.velocity};
  p.velocity_out = args.velocity_out;
  p.step = args.step_size;
  p.rule = args.rule;
  p.nonfinite = args.nonfinite;
  return p;
}

// Runs a step for the args.max_groups groups of each sample with the largest gradient in the dual
// norm; of the others the perturbation becomes zero.
cudaError_t run_chosen(Queue& queue, GroupCall& step, const StepArgs& args);

}  // namespace embattle::cuda
