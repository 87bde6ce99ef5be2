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
  using G = Group<T, kFull>;
  using A = typename G::A;
  using Chunk = typename G::Chunk;
  const A decay = A(p.rule.decay);
  each_group<T, kFull>(p, [&](G& group, int64_t index) {
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
        const Chunk g = group.fetch_gradient(k, c, valid);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i) {
          most = larger(most, G::extent(g[i]));
          s.a += double(magnitude(g[i] * unit));
        }
      });
      s.m = double(most);
      s = group.team().agree(kSumA | kMax, s);
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
    const auto driver = [&](int k, int64_t c, unsigned valid, Chunk& old) {
      Chunk m = group.fetch_gradient(k, c, valid);
      if (p.rule.apgd && !combined) return m;
      old = group.fetch_velocity(k, c, valid);
      if (p.rule.apgd) return m;
#pragma unroll
      for (int i = 0; i < G::kElements; ++i)
        m[i] = finite ? fused(decay, old[i], m[i] * unit * per_length) : old[i];
      return m;
    };
    Direction<A> u;
    if (finite) {
      bool driver_finite = true;
      u = group.template direction<kNorm>(
          [&](int k, int64_t c, unsigned valid) {
            Chunk old;
            return driver(k, c, valid, old);
          },
          value_of(p.step, index), &driver_finite);
    }
    // APGD projects twice: the step, and what it makes of the step and the one before.
    Projection inner;
    Chunk memory;  // of the chunk at hand: the velocity to store
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      Chunk old;
      const Chunk m = driver(k, c, valid, old), now = x.v;
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        memory[i] = p.rule.apgd ? x.x(i) : m[i];
        if (u.moving) x.v[i] = G::template moved<kNorm>(u, x.v[i], m[i], k * G::kElements + i);
      }
      if (!combined) return;
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        // In double and rounded as in the reference: large terms may leave little.
        const double z = double(G::template image<kNorm>(inner, x, i)), d = double(now[i]);
        x.v[i] = A(d + product(p.rule.decay, z - d) +
                   product(1 - p.rule.decay, d - double(old[i] - x.x0(i))));
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
  });
}

}  // namespace

int momentum_step(const StepArgs& args, const Context& context) {
  const bool plain =
      args.grad.dtype == args.x.dtype && args.velocity.dtype == args.x.dtype && !any(args.box);
  const auto kernels = [](auto type, auto norm, auto full) {
    return GroupKernel{momentum_kernel<decltype(type), norm, full>, kMomentumThreads<norm, full>};
  };
  Queue queue(context);
  return group_call(queue, params_of(args), args.norm, plain, kernels).run(queue);
}

}  // namespace embattle::cuda
