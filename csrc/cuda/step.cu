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
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      if (still) {
#pragma unroll
        for (int i = 0; i < G::kElements; ++i) x.v[i] = 0;
      } else if (u.moving) {
        typename G::Chunk g;
        group.fetch_gradient(k, c, valid, g);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i)
          x.v[i] = G::template moved<kNorm>(u, x.v[i], g[i], k * G::kElements + i);
      }
    };
    group.template project<kNorm>(source, value_of(p.eps, index));
  }
}

template <class T, bool kFull>
int run(GroupParams& p, Norm norm, const StepArgs* step, const Context& context) {
  // max_groups chooses first.
  Limits limits;
  size_t scores = 0;
  const bool choose = step && step->rule.max_groups >= 0;
  cudaError_t error = cudaSuccess;
  if (choose) error = Limits::of_current_device(&limits);
  if (choose && error == cudaSuccess) error = select_workspace(*step, limits, &scores);
  if (error != cudaSuccess) return error;
  return with_norm(norm, [&](auto tag) {
    return run_groups(step_kernel<T, decltype(tag)::value, kFull>, p, Group<T, kFull>::kElements,
                      kMostThreads<kFull>, {&p.x, &p.grad}, 0, context, scores, [&](void* memory) {
                        if (!choose) return cudaSuccess;
                        unsigned char* chosen = nullptr;
                        const cudaError_t failed =
                            select_groups(*step, limits, memory, &chosen, context);
                        p.chosen = chosen;
                        return failed;
                      });
  });
}

}  // namespace

int pgd_step(const StepArgs& args, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  const bool plain = args.grad.dtype == args.delta.dtype && !any(args.box);
  return with_profile(args.delta.dtype, plain, [&](auto tag, auto full) {
    using T = decltype(tag);
    constexpr bool kFull = decltype(full)::value;
    constexpr int kElements = Group<T, kFull>::kElements;
    GroupParams p;
    set_ball(p, args.groups, args.out, args.eps, args.box, kElements);
    p.x = stream_of(args.delta, kElements);
    p.grad = stream_of(args.grad, kElements);
    p.step = args.step_size;
    p.rule = args.rule;
    p.nonfinite = args.nonfinite;
    return run<T, kFull>(p, args.norm, &args, context);
  });
}

int project(const ProjectArgs& args, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  return with_profile(args.delta.dtype, !any(args.box), [&](auto tag, auto full) {
    using T = decltype(tag);
    constexpr bool kFull = decltype(full)::value;
    constexpr int kElements = Group<T, kFull>::kElements;
    GroupParams p;
    set_ball(p, args.groups, args.out, args.eps, args.box, kElements);
    p.x = stream_of(args.delta, kElements);
    return run<T, kFull>(p, args.norm, nullptr, context);
  });
}

}  // namespace embattle::cuda
