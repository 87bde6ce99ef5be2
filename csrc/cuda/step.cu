// pgd_step and project.
#include "plan.h"

namespace embattle::cuda {
namespace {

template <class T, Norm kNorm, bool kFull>
__global__ void __launch_bounds__(kMostThreads<kFull>, 1)
    step_kernel(const __grid_constant__ GroupParams p) {
  using G = Group<T, kFull>;
  using A = typename G::A;
  each_group<T, kFull>(p, [&](G& group, int64_t index) {
    group.prefetch(p.x, p.grad);
    async_wait();
    Direction<A> u;
    if (p.grad.data) {
      bool finite = true;
      const auto gradient = [&](int k, int64_t c, unsigned valid) {
        return group.fetch_gradient(k, c, valid);
      };
      u = group.template direction<kNorm>(gradient, value_of(p.step, index), &finite);
      if (p.nonfinite && group.leads() && !finite) ++p.nonfinite[index];
    }
    const bool still = p.chosen && !p.chosen[index];
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      if (still) {
        x.v = {};
      } else if (u.moving) {
        const auto g = group.fetch_gradient(k, c, valid);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i)
          x.v[i] = G::template moved<kNorm>(u, x.v[i], g[i], k * G::kElements + i);
      }
    };
    group.template project<kNorm>(source, value_of(p.eps, index));
  });
}

constexpr auto kKernels = [](auto type, auto norm, auto full) {
  return GroupKernel{step_kernel<decltype(type), norm, full>, kMostThreads<full>};
};

}  // namespace

int pgd_step(const StepArgs& args, const Context& context) {
  const bool plain = args.grad.dtype == args.x.dtype && !any(args.box);
  Queue queue(context);
  GroupCall step = group_call(queue, params_of(args), args.norm, plain, kKernels);
  return args.rule.max_groups < 0 ? step.run(queue) : run_chosen(queue, step, args);
}

int project(const ProjectArgs& args, const Context& context) {
  Queue queue(context);
  return group_call(queue, params_of(args), args.norm, !any(args.box), kKernels).run(queue);
}

}  // namespace embattle::cuda
