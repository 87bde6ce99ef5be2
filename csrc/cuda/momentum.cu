// momentum_step: MI-FGSM's and APGD's steps with memory.
#include "plan.h"

namespace embattle::cuda {
namespace {

// Of a block. In float the l1 search beside three inputs needs more registers than 512 threads can
// have; inputs come by asynchronous copies, so fewer threads have as many bytes in flight.
template <class T, Norm kNorm, bool kFull>
constexpr int kMomentumThreads =
    !kFull && kNorm == Norm::l1 && sizeof(T) == 4 ? 384 : kMostThreads<kFull>;

template <class T, Norm kNorm, bool kFull>
__global__ void __launch_bounds__(kMomentumThreads<T, kNorm, kFull>, 1)
    momentum_kernel(const __grid_constant__ GroupParams p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Team team(p.shape, reinterpret_cast<TeamScratch*>(shared), p.team_global, p.team_slots);
  using G = Group<T, kFull>;
  using A = typename G::A;
  using Chunk = typename G::Chunk;
  const A decay = A(p.decay);
  for (int64_t index = team.index; index < p.groups.groups; index += team.count()) {
    G group(p, team, shared, index);
    group.prefetch(p.x);
    group.prefetch(p.velocity);
    group.prefetch(p.grad);
    async_wait();

    // The gradient's extent and, for MI, its l1 length; both in units of a power of two.
    double largest = 0;
    group.each([&](int k, int64_t c, unsigned valid) {
      Chunk g;
      group.fetch_gradient(k, c, valid, g);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) largest = larger(largest, G::extent(g[i]));
    });
    largest = team.max(largest);
    const bool finite = largest < kInfinity;
    if (p.nonfinite && group.leads() && !finite) ++p.nonfinite[index];
    const A unit = range_scale<A>(largest);
    A per_length = 0;
    if (!p.apgd && finite && largest > 0) {
      double length = 0;
      group.each([&](int k, int64_t c, unsigned valid) {
        Chunk g;
        group.fetch_gradient(k, c, valid, g);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i) length += double(magnitude(g[i] * unit));
      });
      per_length = A(1 / team.sum(length));
    }

    // What the direction is taken of: MI's new velocity, or the gradient itself. It has the same
    // bits in every pass: products are fused here, not as the compiler likes.
    const auto driver = [&](int k, int64_t c, unsigned valid, Chunk& m) {
      group.fetch_gradient(k, c, valid, m);
      if (p.apgd) return;
      Chunk old;
      group.template fetch<true>(p.velocity, k, c, valid, old);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i)
        m[i] = finite ? fused(decay, old[i], m[i] * unit * per_length) : old[i];
    };
    Direction<A> u;
    if (finite) {
      bool driver_finite = true;
      u = group.template direction<kNorm>(driver, value_of(p.step, index), &driver_finite);
    }
    const auto first = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      if (!u.moving) return;
      Chunk m;
      driver(k, c, valid, m);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i)
        x.v[i] = G::template moved<kNorm>(u, x.v[i], m[i], k * G::kElements + i);
    };
    // APGD projects twice: the step, and what it makes of the step and the one before. One loop, as
    // the projection is long.
    Projection inner, projection;
    bool combined = false;
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      first(k, c, valid, x);
      if (!combined) return;
      Chunk now, old;
      group.fetch_offset(k, c, valid, p.x, now);
      group.fetch_offset(k, c, valid, p.velocity, old);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        // In double and rounded as in the reference: large terms may leave little.
        const double z = double(G::template image<kNorm>(inner, x, i)), d = double(now[i]);
        x.v[i] = A(d + product(p.decay, z - d) + product(1 - p.decay, d - double(old[i])));
      }
    };
#pragma unroll 1
    for (;;) {
      projection = group.template project<kNorm>(source, value_of(p.eps, index));
      if (combined || !p.apgd || !finite) break;
      inner = projection;
      combined = true;
    }

    // A chunk's outputs are written after its inputs were read: both may be the inputs themselves.
    group.each([&](int k, int64_t c, unsigned valid) {
      typename G::V x;
      source(k, c, valid, x);
      Pack<T, G::kElements> result, memory;
#pragma unroll
      for (int i = 0; i < G::kElements; ++i)
        result.at[i] = G::template stored<kNorm>(projection, x, i);
      Chunk m;
      if (p.apgd)
        group.template fetch<true>(p.x, k, c, valid, m);
      else
        driver(k, c, valid, m);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) memory.at[i] = Round<T>::nearest(m[i]);
      const Stream none;
      group.write(p.velocity_out, p.out_aligned, c, valid, memory, p.apgd ? p.x0 : none);
      group.write(p.out, p.out_aligned, c, valid, result, p.x0);
    });
  }
}

template <class T, bool kFull>
int run(const StepArgs& args, const Context& context) {
  Limits limits;
  const cudaError_t error = Limits::of_current_device(&limits);
  if (error != cudaSuccess) return error;
  constexpr int kElements = Group<T, kFull>::kElements;
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
  return with_norm(args.norm, [&](auto tag) -> int {
    constexpr Norm kNorm = decltype(tag)::value;
    const Plan plan = plan_groups(p, limits, kElements, kMomentumThreads<T, kNorm, kFull>,
                                  {&p.x, &p.velocity, &p.grad});
    void* workspace = nullptr;
    if (plan.workspace) {
      workspace = context.allocate(context.self, plan.workspace);
      if (!workspace) return cudaErrorMemoryAllocation;
    }
    return launch(momentum_kernel<T, kNorm, kFull>, p, plan, context, workspace);
  });
}

}  // namespace

// Precondition: velocity has delta's dtype.
int momentum_step(const StepArgs& args, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  return with_type(args.delta.dtype, [&](auto tag) -> int {
    using T = decltype(tag);
    if constexpr (sizeof(T) < 8) {
      if (args.grad.dtype == args.delta.dtype && !any(args.box))
        return run<T, false>(args, context);
    }
    return run<T, true>(args, context);
  });
}

}  // namespace embattle::cuda
