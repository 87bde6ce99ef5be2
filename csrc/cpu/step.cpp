// pgd_step and pgd_step_: steepest ascent and projection. l2 takes two passes, the second from
// cache: one reduction gives ||g||, <d, g> and ||d||, hence the length of the step's result.
#include "ascent.h"
#include "project_group.h"
#include "scratch.h"
#include "short_rows.h"

namespace embattle {
namespace {

// ||d + a g||^2 by the three sums of one pass: exact to 1e-8, which float64 elements are not
// content with, unless the terms cancel. `false`: they do, and the sum has to be taken over the
// elements.
inline bool square_of_step(double dd, double dg, double gg, double a, Dtype dtype, double* square) {
  const double gain = a * a * gg;
  *square = dd + 2 * a * dg + gain;
  return *square >= (dtype == Dtype::f64 ? 0.5 : 1e-8) * (dd + gain);
}

template <Norm kNorm, class T>
struct Stepped {
  const Elements<T>& x;
  const Place<T>& place;
  const Elements<T>& grad;
  const Ascent& ascent;

  template <class N>
  V given(int64_t i, N n) const {
    return x.load(i, n);
  }
  template <class N>
  V z(int64_t i, N n) const {
    const V d = given(i, n) - place.origin(i, n);
    return ascent.moves ? d + ascent.template operator()<kNorm>(i, grad.load(i, n)) : d;
  }
};

template <Norm kNorm, class T>
void step_in_double(const Cut& cut, const StepArgs& args, const Place<T>& place,
                    const Elements<T>& gradient) {
  const Elements<T> x(args.delta);
  const auto grad = [&](int64_t i, auto n) { return gradient.load(i, n); };
  const double step_size = of_group(args.step_size, cut.index);
  const double eps = of_group(args.eps, cut.index);
  Ascent ascent;
  double known = -1;
  bool finite;
  if (kNorm == Norm::l2) {
    const auto sums = totals<3>(cut, [&](int64_t i, auto n, V* acc) {
      const V g = grad(i, n), d = x.load(i, n) - place.origin(i, n);
      acc[0] += g * g;
      acc[1] += g * d;
      acc[2] += d * d;
    });
    const double gg = sums.v[0];
    finite = gg < kInfinity || all_finite(cut, grad);
    if (finite) {
      ascent = along(cut, length_of_square(cut, gg, grad), step_size, grad);
      double square;
      if (ascent.unit == 1 && sums.v[2] < 0x1p900 && sums.v[2] > 0x1p-900 && gg > 0x1p-900 &&
          gg < 0x1p900 &&
          square_of_step(sums.v[2], sums.v[1], gg, ascent.a, args.delta.dtype, &square))
        known = __builtin_sqrt(square);
    }
  } else {
    finite = all_finite(cut, grad);
    if (finite) ascent = steepest<kNorm>(cut, step_size, args.rule.top, grad);
  }
  if (!finite) {
    if (args.nonfinite) ++args.nonfinite[cut.index];
    return project_group(cut, kNorm, args.delta, args.out, eps, args.box);
  }
  finish<kNorm>(cut, eps, place, Stepped<kNorm, T>{x, place, gradient, ascent}, known);
}

template <Norm kNorm, class T>
void step(const Cut& cut, const StepArgs& args, const Place<T>& place,
          const Elements<T>& gradient) {
  if (place.plain && plain_step<kNorm, T>(cut, args)) return;
  step_in_double<kNorm>(cut, args, place, gradient);
}

// ---- max_groups: which tokens of a sample move ----

constexpr int64_t kMasked = -2, kNonfinite = -1, kChosen = INT64_MAX;

// Marks the k largest of `keys` (the lowest index first among equals) as chosen.
void choose(int64_t* keys, int64_t count, int64_t k) {
  if (k <= 0) return;
  int64_t low = kMasked, high = kChosen;  // at least k keys are >= low
  while (k < count && low < high - 1) {
    // Unsigned: the distance from kMasked to kChosen is no int64.
    const uint64_t distance = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
    const int64_t middle = low + static_cast<int64_t>(distance / 2);
    int64_t reach = 0;
    for (int64_t i = 0; i < count; ++i) reach += keys[i] >= middle;
    (reach >= k ? low : high) = middle;
  }
  int64_t equal = k;
  for (int64_t i = 0; i < count; ++i) equal -= k < count && keys[i] > low;
  for (int64_t i = 0; i < count; ++i) {
    if (k >= count || keys[i] > low)
      keys[i] = kChosen;
    else if (keys[i] == low && equal-- > 0)
      keys[i] = kChosen;
  }
}

constexpr Norm dual(Norm norm) {
  return norm == Norm::l2 ? Norm::l2 : norm == Norm::l1 ? Norm::linf : Norm::l1;
}

// Orders groups by the norm of their gradient: non-negative doubles sort as their bits do.
template <Norm kNorm, class T>
int64_t key_of(const Cut& cut, const Elements<T>& gradient) {
  const auto grad = [&](int64_t i, auto n) { return gradient.load(i, n); };
  if (cut.count() == 0) return kMasked;
  if (!all_finite(cut, grad)) return kNonfinite;
  return bits(splat(length<dual(kNorm)>(cut, grad)))[0];
}

template <class T>
void run(const StepArgs& args, ParallelFor parallel_for) {
  const Groups& groups = args.groups;
  const Place<T> place(args.out, args.box);
  const Elements<T> grad(args.grad);
  with_norm(args.norm, [&](auto of) {
    constexpr Norm norm = decltype(of)::norm;
    if (args.rule.max_groups < 0) {
      const auto alone = [&](const Cut& cut) { step<norm>(cut, args, place, grad); };
      for_shares(groups, 0, groups.groups, parallel_for,
                 [&](int64_t begin, int64_t end, ParallelFor team) {
                   if (place.plain && !team && step_rows<norm, T>(args, begin, end, alone)) return;
                   for (int64_t g = begin; g < end; ++g) alone(cut_of(groups, g, team));
                 });
      return;
    }
    Scratch<int64_t> keys(groups.groups);
    for_groups(groups, 0, groups.groups, parallel_for,
               [&](const Cut& cut) { keys[cut.index] = key_of<norm>(cut, grad); });
    const int64_t width = args.groups_per_sample;
    for (int64_t at = 0; width > 0 && at < groups.groups; at += width) {
      for (int64_t i = at; i < at + width; ++i)
        if (keys[i] == kNonfinite && args.nonfinite) ++args.nonfinite[i];
      choose(keys.get() + at, width, args.rule.max_groups);
    }
    StepArgs counted = args;
    counted.nonfinite = nullptr;
    for_groups(groups, 0, groups.groups, parallel_for, [&](const Cut& cut) {
      keys[cut.index] == kChosen ? step<norm>(cut, counted, place, grad) : clear(cut, place);
    });
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(pgd_step)(const StepArgs& args, ParallelFor parallel_for) {
  const bool floats = args.delta.dtype == Dtype::f32 && args.grad.dtype == Dtype::f32;
  floats ? run<float>(args, parallel_for) : run<Any>(args, parallel_for);
}

}  // namespace embattle
