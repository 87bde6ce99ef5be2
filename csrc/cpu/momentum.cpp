// momentum_step and momentum_step_: MI-FGSM and APGD, with their memory.
#include "ascent.h"

namespace embattle {
namespace {

struct Reader {
  const ConstData& x;
  template <class N>
  V operator()(int64_t i, N n) const {
    return load(x, i, n);
  }
};

template <class P>
struct Memory {
  const StepArgs& args;
  const P& place;
  bool finite;

  template <class N>
  V given(int64_t i, N n) const {
    return load(args.delta, i, n);
  }
  template <class N>
  V delta(int64_t i, N n) const {
    return given(i, n) - place.origin(i, n);
  }
};

// v' = decay v + g / ||g||_1, and delta + step_size u(v').
template <Norm kNorm, class P>
struct Iterative : Memory<P> {
  double unit, inverse;  // g * unit * inverse = g / ||g||_1
  Ascent ascent{};

  template <class N>
  V velocity(int64_t i, N n) const {
    const V old = load(this->args.velocity, i, n);
    if (!this->finite) return old;
    return old * this->args.decay + load(this->args.grad, i, n) * unit * inverse;
  }
  template <class N>
  V z(int64_t i, N n) const {
    const V d = this->delta(i, n);
    if (!ascent.moves) return d;
    return d + ascent.template operator()<kNorm>(i, velocity(i, n));
  }
};

// z1 = P(delta + step_size u(g)), then delta + decay (z1 - delta) + (1 - decay) (delta - v).
template <Norm kNorm, class P>
struct Averaged : Memory<P> {
  Ascent ascent{};
  Multiplier first{};
  bool inner = true;  // z is what is projected first

  template <class N>
  V z(int64_t i, N n) const {
    const V d = this->delta(i, n);
    if (!this->finite) return d;
    V z = d;
    if (ascent.moves) z += ascent.template operator()<kNorm>(i, load(this->args.grad, i, n));
    if (inner) return z;
    z = first.template operator()<kNorm>(z);
    if (this->place.boxed) z = this->place.in_box(i, n, z);
    const V old = load(this->args.velocity, i, n) - this->place.origin(i, n);
    return d + this->args.decay * (z - d) + (1 - this->args.decay) * (d - old);
  }
};

template <Norm kNorm, class P>
void step(const Cut& cut, const StepArgs& args, const P& place) {
  const double step_size = of_group(args.step_size, cut.index);
  const double eps = of_group(args.eps, cut.index);
  const Reader grad{args.grad};
  const bool finite = all_finite(cut, grad);
  if (!finite && args.nonfinite) ++args.nonfinite[cut.index];
  if (args.apgd) {
    Averaged<kNorm, P> source{{args, place, finite}};
    if (finite) {
      source.ascent = steepest<kNorm>(cut, step_size, args.top, grad);
      source.first = find<kNorm>(cut, eps, place, source, -1);
      source.inner = false;
    }
    finish<kNorm>(cut, eps, place, source, -1, [&](int64_t i, auto n) {
      store(args.velocity_out, i, n, load(args.delta, i, n));
    });
  } else {
    const double norm = finite ? length<Norm::l1>(cut, grad) : 0;
    const double unit = middling(norm);
    Iterative<kNorm, P> source{
        {args, place, finite}, unit, norm > 0 ? 1 / (norm * unit) : 0};
    if (finite)
      source.ascent = steepest<kNorm>(cut, step_size, args.top, [&](int64_t i, auto n) {
        return source.velocity(i, n);
      });
    finish<kNorm>(cut, eps, place, source, -1, [&](int64_t i, auto n) {
      store(args.velocity_out, i, n, source.velocity(i, n));
    });
  }
  if (cut.groups.mask)
    for_elements(
        cut,
        [&](int64_t i, auto n) {
          store(args.velocity_out, i, n, args.apgd ? place.origin(i, n) : V{});
        },
        false);
}

}  // namespace

void EMBATTLE_AT_LEVEL(momentum_step)(const StepArgs& args, ParallelFor parallel_for) {
  with_type(args.delta.dtype, [&](auto as) {
    typedef typename decltype(as)::type T;
    const Place<T, false> place(args.out, args.box);
    with_norm(args.norm, [&](auto of) {
      for_groups(args.groups, 0, args.groups.groups, parallel_for,
                 [&](const Cut& cut) { step<decltype(of)::norm>(cut, args, place); });
    });
  });
}

}  // namespace embattle
