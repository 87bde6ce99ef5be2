// momentum_step and momentum_step_: MI-FGSM and APGD, with their memory.
#include "ascent.h"
#include "project_group.h"

namespace embattle {
namespace {

template <Norm kNorm>
void step(const Cut& cut, const StepArgs& args, const Place<Any>& place) {
  const double step_size = of_group(args.step_size, cut.index), decay = args.rule.decay;
  const double eps = of_group(args.eps, cut.index), top = args.rule.top;
  const Elements<Any> x(args.x), velocity(args.velocity), gradient(args.grad);
  const Elements<Any> memory(args.velocity_out);
  const auto given = [=](int64_t i, auto n) { return x.load(i, n); };
  const auto delta = [=, &place](int64_t i, auto n) { return given(i, n) - place.origin(i, n); };
  const auto grad = [=](int64_t i, auto n) { return gradient.load(i, n); };
  const bool finite = all_finite(cut, grad);
  if (!finite) {
    if (args.nonfinite) ++args.nonfinite[cut.index];
    const Elements<Any>& kept = args.rule.apgd ? x : velocity;
    for_elements(cut, [&](int64_t i, auto n) { memory.store(i, n, kept.load(i, n)); });
    project_group(cut, args, args.x, eps);
  } else if (args.rule.apgd) {
    // z1 = P(delta + step_size u(g)), then delta + decay (z1 - delta) + (1 - decay) (delta - v).
    const Ascent ascent = steepest<kNorm>(cut, step_size, top, grad);
    const auto moved = ascent.of<kNorm>(delta, grad);
    const Multiplier first = find<kNorm>(cut, eps, place, Source{given, moved}, -1);
    const auto z = [&](int64_t i, auto n) {
      const V d = delta(i, n), old = velocity.load(i, n) - place.origin(i, n);
      V z = first.template operator()<kNorm>(moved(i, n));
      if (place.boxed) z = place.in_box(i, n, z);
      return d + decay * (z - d) + (1 - decay) * (d - old);
    };
    finish<kNorm>(cut, eps, place, Source{given, z}, -1,
                  [&](int64_t i, auto n) { memory.store(i, n, given(i, n)); });
  } else {
    // v' = decay v + g / ||g||_1, and delta + step_size u(v').
    const double norm = length<Norm::l1>(cut, grad), unit = middling(norm);
    const double inverse = norm > 0 ? 1 / (norm * unit) : 0;
    const auto next = [=](int64_t i, auto n) {
      return velocity.load(i, n) * decay + grad(i, n) * unit * inverse;
    };
    const Ascent ascent = steepest<kNorm>(cut, step_size, top, next);
    finish<kNorm>(cut, eps, place, Source{given, ascent.of<kNorm>(delta, next)}, -1,
                  [&](int64_t i, auto n) { memory.store(i, n, next(i, n)); });
  }
  if (!cut.groups.mask) return;
  const auto clear_memory = [&](int64_t i, auto n) {
    memory.store(i, n, args.rule.apgd ? place.origin(i, n) : V{});
  };
  for_elements(cut, clear_memory, false);
}

}  // namespace

void EMBATTLE_AT_LEVEL(momentum_step)(const StepArgs& args, ParallelFor parallel_for) {
  const Place<Any> place(args.out, args.box);
  with_norm(args.norm, [&]<Norm kNorm>(Of<kNorm>) {
    for_groups(args.groups, parallel_for, [&](const Cut& cut) { step<kNorm>(cut, args, place); });
  });
}

}  // namespace embattle
