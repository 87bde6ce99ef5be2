// momentum_step: MI-FGSM's and APGD's steps with memory.
#include "plan.h"

namespace embattle::cuda {
namespace {

// As kMostThreads. The l1 search beside three inputs needs more registers than 512 threads can
// have; inputs come by asynchronous copies, so fewer threads have as many bytes in flight.
template <Norm kNorm, bool kFull>
constexpr int kMomentumThreads = !kFull && kNorm == Norm::l1 ? 384 : kMostThreads<kFull>;

template <class T, Norm kNorm, bool kFull>
__global__ void __launch_bounds__(kMomentumThreads<kNorm, kFull>, 1)
    momentum_kernel(const __grid_constant__ GroupParams p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Team team(p.shape, reinterpret_cast<TeamScratch*>(shared), p.team_global, p.team_slots);
  using G = Group<T, kFull>;
  using A = typename G::A;
  using Chunk = typename G::Chunk;
  const A decay = A(p.rule.decay);
  for (int64_t index = team.index; index < p.groups.groups; index += team.count()) {
    G group(p, team, shared, index);
    group.prefetch(p.x, p.velocity, p.grad);
    async_wait();

    // The gradient's extent and, for MI, its l1 length; both in units of a power of two.
    bool finite = true;
    A unit = 1, per_length = 0;
#pragma unroll 1
    for (bool again = false;; again = true) {
      Sums s;
      A most = 0;
      group.each([&](int k, int64_t c, unsigned valid) {
        Chunk g;
        group.fetch_gradient(k, c, valid, g);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i) {
          most = larger(most, G::extent(g[i]));
          s.a += double(magnitude(g[i] * unit));
        }
      });
      s.m = double(most);
      s = team.agree(kSumA | kMax, s);
      if (!again) {
        finite = s.m < kInfinity;
        unit = range_scale<A>(s.m);
        if (p.rule.apgd || !finite || s.m == 0) break;
      }
      if (again || unit == 1) {
        per_length = A(1 / s.a);
        break;
      }
    }
    if (p.nonfinite && group.leads() && !finite) ++p.nonfinite[index];

    // What the direction is taken of: MI's new velocity, or the gradient itself. It has the same
    // bits in every pass: products are fused here, not as the compiler likes. `old`, the velocity,
    // is also APGD's where the step is combined with the one before.
    bool combined = false;
    const auto driver = [&](int k, int64_t c, unsigned valid, Chunk& m, Chunk& old) {
      group.fetch_gradient(k, c, valid, m);
      if (p.rule.apgd && !combined) return;
      group.fetch_velocity(k, c, valid, old);
      if (p.rule.apgd) return;
#pragma unroll
      for (int i = 0; i < G::kElements; ++i)
        m[i] = finite ? fused(decay, old[i], m[i] * unit * per_length) : old[i];
    };
    Direction<A> u;
    if (finite) {
      bool driver_finite = true;
      u = group.template direction<kNorm>(
          [&](int k, int64_t c, unsigned valid, Chunk& m) {
            Chunk old;
            driver(k, c, valid, m, old);
          },
          value_of(p.step, index), &driver_finite);
    }
    // APGD projects twice: the step, and what it makes of the step and the one before.
    Projection inner;
    Chunk memory;  // of the chunk at hand: the velocity to store
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      Chunk m, old, now;
      driver(k, c, valid, m, old);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        now[i] = x.v[i];
        memory[i] = p.rule.apgd ? G::given(x, i) : m[i];
        if (u.moving) x.v[i] = G::template moved<kNorm>(u, x.v[i], m[i], k * G::kElements + i);
      }
      if (!combined) return;
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        // In double and rounded as in the reference: large terms may leave little.
        const double z = double(G::template image<kNorm>(inner, x, i)), d = double(now[i]);
        x.v[i] = A(d + product(p.rule.decay, z - d) +
                   product(1 - p.rule.decay, d - double(G::from_origin(x, i, old[i]))));
      }
    };
    group.template project<kNorm>(
        source, value_of(p.eps, index),
        [&](const Projection& projection) {
          if (combined || !p.rule.apgd || !finite) return false;
          inner = projection;
          combined = true;
          return true;
        },
        [&](int, int64_t c, unsigned valid, const typename G::V& x, const Projection& projection) {
          // Both outputs may be inputs themselves: these have been read.
          group.write_velocity(c, valid, memory);
          group.template store<kNorm>(c, valid, x, projection);
        });
  }
}

}  // namespace

int momentum_step(const StepArgs& args, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  const bool plain = args.grad.dtype == args.delta.dtype &&
                     args.velocity.dtype == args.delta.dtype && !any(args.box);
  return with_profile(args.delta.dtype, plain, [&](auto tag, auto full) {
    using T = decltype(tag);
    constexpr bool kFull = decltype(full)::value;
    constexpr int kElements = Group<T, kFull>::kElements;
    const bool typed = args.velocity.dtype == dtype_of<T>;
    GroupParams p;
    set_ball(p, args.groups, args.out, args.eps, args.box, kElements);
    p.x = stream_of(args.delta, kElements);
    p.velocity = stream_of(args.velocity, kElements);
    p.grad = stream_of(args.grad, kElements);
    p.velocity_out = args.velocity_out.data;
    p.velocity_aligned = typed && aligned(args.velocity_out.data, sizeof(T) * kElements);
    p.step = args.step_size;
    p.rule = args.rule;
    p.nonfinite = args.nonfinite;
    Stream none;  // a velocity of another type is read again in each pass
    return with_norm(args.norm, [&](auto norm) {
      constexpr Norm kNorm = decltype(norm)::value;
      return run_groups(momentum_kernel<T, kNorm, kFull>, p, kElements,
                        kMomentumThreads<kNorm, kFull>,
                        {&p.x, typed ? &p.velocity : &none, &p.grad}, 0, context);
    });
  });
}

}  // namespace embattle::cuda
