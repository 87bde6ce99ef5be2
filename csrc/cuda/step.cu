// pgd_step and project.
#include "plan.h"
#include "select.cuh"

namespace embattle::cuda {
namespace {

template <class T, Norm kNorm, bool kFull>
__global__ void __launch_bounds__(kMostThreads<kFull>, 1)
    step_kernel(const __grid_constant__ GroupParams p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Team team(p.shape, reinterpret_cast<TeamScratch*>(shared), p.team_global, p.team_slots);
  using G = Group<T, kFull>;
  using A = typename G::A;
  for (int64_t index = team.index; index < p.groups.groups; index += team.count()) {
    G group(p, team, shared, index);
    group.prefetch(p.x, p.grad);
    async_wait();
    Direction<A> u;
    if (p.grad.data) {
      bool finite = true;
      const auto gradient = [&](int k, int64_t c, unsigned valid, typename G::Chunk& g) {
        group.fetch_gradient(k, c, valid, g);
      };
      u = group.template direction<kNorm>(gradient, value_of(p.step, index), &finite);
      if (p.nonfinite && group.leads() && !finite) ++p.nonfinite[index];
    }
    const bool still = p.chosen && !p.chosen[index];
    // What has moved is kept where the passes after the first one read it: so many chunks.
    constexpr bool kKeeps = kNorm != Norm::linf && !kFull && std::is_same_v<T, A>;
    int kept = 0;
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      if (kKeeps && k < kept) return;
      if (still) {
#pragma unroll
        for (int i = 0; i < G::kElements; ++i) x.v[i] = 0;
      } else if (u.moving) {
        typename G::Chunk g;
        group.fetch_gradient(k, c, valid, g);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i)
          x.v[i] = G::template moved<kNorm>(u, x.v[i], g[i], k * G::kElements + i);
        if constexpr (kKeeps) {
          if (k < p.resident) {
            group.keep_values(k, x);
            kept = k + 1;
          }
        }
      }
    };
    group.template project<kNorm>(source, value_of(p.eps, index));
  }
}

template <class T, Norm kNorm, bool kFull>
int run_norm(GroupParams& p, const StepArgs* step, const Context& context) {
  Limits limits;
  cudaError_t error = Limits::of_current_device(&limits);
  if (error != cudaSuccess) return error;
  const auto kernel = step_kernel<T, kNorm, kFull>;
  Plan plan;
  error = plan_groups(kernel, &plan, p, limits, Group<T, kFull>::kElements, kMostThreads<kFull>,
                      {&p.x, &p.grad});
  if (error != cudaSuccess) return error;
  // The workspace: what blocks at large meet in, then what max_groups needs.
  const bool choose = step && step->max_groups >= 0;
  const size_t teams = rounded(plan.workspace);
  size_t scores = 0;
  if (choose) error = select_workspace(*step, limits, &scores);
  if (error != cudaSuccess) return error;
  void* workspace = nullptr;
  if (teams + scores) {
    workspace = context.allocate(context.self, teams + scores);
    if (!workspace) return cudaErrorMemoryAllocation;
  }
  if (choose) {
    unsigned char* chosen = nullptr;
    error = select_groups(*step, limits, static_cast<unsigned char*>(workspace) + teams, &chosen,
                          context);
    if (error != cudaSuccess) return error;
    p.chosen = chosen;
  }
  return launch(kernel, p, plan, context, workspace);
}

template <class T, bool kFull>
int run(GroupParams& p, Norm norm, const StepArgs* step, const Context& context) {
  return with_norm(
      norm, [&](auto tag) { return run_norm<T, decltype(tag)::value, kFull>(p, step, context); });
}

}  // namespace

int pgd_step(const StepArgs& args, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  return with_type(args.delta.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto prepared = [&](int elements) {
      GroupParams p;
      set_ball(p, args.groups, args.out, args.eps, args.box, elements);
      p.x = stream_of(args.delta, elements);
      p.grad = stream_of(args.grad, elements);
      p.step = args.step_size;
      p.top = args.top;
      p.nonfinite = args.nonfinite;
      return p;
    };
    if constexpr (sizeof(T) < 8) {
      if (args.grad.dtype == args.delta.dtype && !any(args.box)) {
        GroupParams p = prepared(Group<T, false>::kElements);
        return run<T, false>(p, args.norm, &args, context);
      }
    }
    GroupParams p = prepared(Group<T, true>::kElements);
    return run<T, true>(p, args.norm, &args, context);
  });
}

int project(const ProjectArgs& args, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  return with_type(args.delta.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto prepared = [&](int elements) {
      GroupParams p;
      set_ball(p, args.groups, args.out, args.eps, args.box, elements);
      p.x = stream_of(args.delta, elements);
      return p;
    };
    if constexpr (sizeof(T) < 8) {
      if (!any(args.box)) {
        GroupParams p = prepared(Group<T, false>::kElements);
        return run<T, false>(p, args.norm, nullptr, context);
      }
    }
    GroupParams p = prepared(Group<T, true>::kElements);
    return run<T, true>(p, args.norm, nullptr, context);
  });
}

}  // namespace embattle::cuda
