// momentum_step and momentum_step_: MI-FGSM and APGD, with their memory.
#include "ascent.h"
#include "project_group.h"

namespace embattle {
namespace {

// What both styles read.
struct Memory {
  const Place<Any>& place;
  Elements<Any> x, velocity, grad;
  double decay;

  template <class N>
  V given(int64_t i, N n) const {
    return x.load(i, n);
  }
  template <class N>
  V delta(int64_t i, N n) const {
    return given(i, n) - place.origin(i, n);
  }
};

// v' = decay v + g / ||g||_1, and delta + step_size u(v').
template <Norm kNorm>
struct Iterative : Memory {
  double unit, inverse;  // g * unit * inverse = g / ||g||_1
  Ascent ascent{};

  template <class N>
  V next(int64_t i, N n) const {
    return velocity.load(i, n) * decay + grad.load(i, n) * unit * inverse;
  }
  template <class N>
  V z(int64_t i, N n) const {
    const V d = delta(i, n);
    if (!ascent.moves) return d;
    return d + ascent.template operator()<kNorm>(i, next(i, n));
  }
};

// z1 = P(delta + step_size u(g)), then delta + decay (z1 - delta) + (1 - decay) (delta - v).
template <Norm kNorm>
struct Averaged : Memory {
  Ascent ascent{};
  Multiplier first{};
  bool inner = true;  // z is what is projected first

  template <class N>
  V z(int64_t i, N n) const {
    const V d = delta(i, n);
    V z = d;
    if (ascent.moves) z += ascent.template operator()<kNorm>(i, grad.load(i, n));
    if (inner) return z;
    z = first.template operator()<kNorm>(z);
    if (place.boxed) z = place.in_box(i, n, z);
    const V old = velocity.load(i, n) - place.origin(i, n);
    return d + decay * (z - d) + (1 - decay) * (d - old);
  }
};

template <Norm kNorm>
void step(const Cut& cut, const StepArgs& args, const Place<Any>& place) {
  const double step_size = of_group(args.step_size, cut.index);
  const double eps = of_group(args.eps, cut.index);
  const Elements<Any> x(args.delta), velocity(args.velocity), gradient(args.grad);
  const Elements<Any> memory(args.velocity_out);
  const auto grad = [&](int64_t i, auto n) { return gradient.load(i, n); };
  const bool finite = all_finite(cut, grad);
  if (!finite && args.nonfinite) ++args.nonfinite[cut.index];
  const auto clear_memory = [&] {
    const auto put = [&](int64_t i, auto n) {
      memory.store(i, n, args.rule.apgd ? place.origin(i, n) : V{});
    };
    if (cut.groups.mask) for_elements(cut, put, false);
  };
  if (!finite) {
    const Elements<Any>& kept = args.rule.apgd ? x : velocity;
    for_elements(cut, [&](int64_t i, auto n) { memory.store(i, n, kept.load(i, n)); });
    project_group(cut, kNorm, args.delta, args.out, eps, args.box);
    return clear_memory();
  }
  const Memory common{place, x, velocity, gradient, args.rule.decay};
  if (args.rule.apgd) {
    Averaged<kNorm> source{common};
    source.ascent = steepest<kNorm>(cut, step_size, args.rule.top, grad);
    source.first = find<kNorm>(cut, eps, place, source, -1);
    source.inner = false;
    finish<kNorm>(cut, eps, place, source, -1,
                  [&](int64_t i, auto n) { memory.store(i, n, x.load(i, n)); });
  } else {
    const double norm = length<Norm::l1>(cut, grad);
    const double unit = middling(norm);
    Iterative<kNorm> source{common, unit, norm > 0 ? 1 / (norm * unit) : 0};
    const auto next = [&](int64_t i, auto n) { return source.next(i, n); };
    source.ascent = steepest<kNorm>(cut, step_size, args.rule.top, next);
    finish<kNorm>(cut, eps, place, source, -1,
                  [&](int64_t i, auto n) { memory.store(i, n, next(i, n)); });
  }
  clear_memory();
}

}  // namespace

void EMBATTLE_AT_LEVEL(momentum_step)(const StepArgs& args, ParallelFor parallel_for) {
  const Place<Any> place(args.out, args.box);
  with_norm(args.norm, [&](auto of) {
    for_groups(args.groups, parallel_for,
               [&](const Cut& cut) { step<decltype(of)::norm>(cut, args, place); });
  });
}

}  // namespace embattle
