// momentum_step: MI-FGSM's and APGD's steps with memory, always in the full profile.
#include "plan.h"

namespace embattle::cuda {
namespace {

template <class T, Norm kNorm>
__global__ void __launch_bounds__(512, 1) momentum_kernel(const __grid_constant__ GroupParams p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Team team(p.shape, reinterpret_cast<TeamScratch*>(shared), p.team_global, p.team_slots);
  using G = Group<T, true>;
  using Chunk = typename G::Chunk;
  for (int64_t index = team.index; index < p.groups.groups; index += team.count) {
    G group(p, team, shared, index);
    group.prefetch(p.x);
    group.prefetch(p.velocity);
    group.prefetch(p.grad);
    async_wait();
    const double step = value_of(p.step, index), eps = value_of(p.eps, index);

    // The gradient's extent and, for MI, its l1 length; both in units of a power of two.
    double largest = 0;
    group.each([&](int k, int64_t c, unsigned valid) {
      Chunk g;
      group.fetch_gradient(k, c, valid, g);
      for (int i = 0; i < G::kElements; ++i) largest = larger(largest, G::extent(g[i]));
    });
    largest = team.max(largest);
    const bool finite = largest < kInfinity;
    if (p.nonfinite && group.leads() && !finite) ++p.nonfinite[index];
    const double unit = range_scale<double>(largest);
    double per_length = 0;
    if (!p.apgd && finite && largest > 0) {
      double length = 0;
      group.each([&](int k, int64_t c, unsigned valid) {
        Chunk g;
        group.fetch_gradient(k, c, valid, g);
        for (int i = 0; i < G::kElements; ++i) length += magnitude(g[i] * unit);
      });
      per_length = 1 / team.sum(length);
    }

    // What the direction is taken of: MI's new velocity, or the gradient itself.
    const auto driver = [&](int k, int64_t c, unsigned valid, Chunk& m) {
      group.fetch_gradient(k, c, valid, m);
      if (p.apgd) return;
      Chunk old;
      group.template fetch<true>(p.velocity, k, c, valid, old);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i)
        m[i] = finite ? p.decay * old[i] + m[i] * unit * per_length : old[i];
    };
    Direction<double> u;
    if (finite) {
      bool driver_finite = true;
      u = group.template direction<kNorm>(driver, step, &driver_finite);
    }
    const auto first = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      if (!u.moving) return;
      Chunk m;
      driver(k, c, valid, m);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i)
        x.v[i] = G::template moved<kNorm>(u, x.v[i], m[i], c * G::kElements + i);
    };
    Projection inner;
    if (p.apgd && finite) inner = group.template project<kNorm>(first, eps);
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      first(k, c, valid, x);
      if (!p.apgd || !finite) return;
      Chunk old;
      group.template fetch<true>(p.velocity, k, c, valid, old);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        const double z = G::template image<kNorm>(inner, x, i), d = x.x[i] - x.x0[i];
        x.v[i] = d + p.decay * (z - d) + (1 - p.decay) * (d - (old[i] - x.x0[i]));
      }
    };
    const Projection projection = group.template project<kNorm>(source, eps);

    // A chunk's outputs are written after its inputs were read: both may be the inputs themselves.
    group.each([&](int k, int64_t c, unsigned valid) {
      typename G::V x;
      source(k, c, valid, x);
      Pack<T, G::kElements> result, memory;
      Chunk m;
      if (!p.apgd) driver(k, c, valid, m);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        result.at[i] = G::template stored<kNorm>(projection, x, i);
        memory.at[i] = Round<T>::nearest(p.apgd ? x.x[i] : m[i]);
      }
      const Stream none;
      group.write(p.velocity_out, p.out_aligned, c, valid, memory, p.apgd ? p.x0 : none);
      group.write(p.out, p.out_aligned, c, valid, result, p.x0);
    });
  }
}

}  // namespace

// Precondition: velocity has delta's dtype.
int momentum_step(const StepArgs& args, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  Limits limits;
  const cudaError_t error = Limits::of_current_device(&limits);
  if (error != cudaSuccess) return error;
  return with_type(args.delta.dtype, [&](auto tag) -> int {
    using T = decltype(tag);
    constexpr int kElements = Group<T, true>::kElements;
    GroupParams p;
    set_ball(p, args.groups, args.out, args.eps, args.box, kElements);
    p.x = stream_of(args.delta, kElements);
    p.velocity = stream_of(args.velocity, kElements);
    p.grad = stream_of(args.grad, kElements);
    p.velocity_out = args.velocity_out.data;
    p.out_aligned = p.out_aligned && aligned(args.velocity_out.data, sizeof(T) * kElements);
    p.step = args.step_size;
    p.top = args.top;
    p.decay = args.decay;
    p.apgd = args.apgd;
    p.nonfinite = args.nonfinite;
    const Plan plan = plan_groups(p, limits, kElements, {&p.x, &p.velocity, &p.grad});
    void* workspace = nullptr;
    if (plan.workspace) {
      workspace = context.allocate(context.self, plan.workspace);
      if (!workspace) return cudaErrorMemoryAllocation;
    }
    return with_norm(args.norm, [&](auto norm) {
      return launch(momentum_kernel<T, decltype(norm)::value>, p, plan, context, workspace);
    });
  });
}

}  // namespace embattle::cuda
