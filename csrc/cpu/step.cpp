// pgd_step and pgd_step_: steepest ascent and projection. l2 takes two passes, the second from
// cache: one reduction gives ||g||, <d, g> and ||d||, hence the length of the step's result.
#include "ascent.h"
#include "plain.h"
#include "project_group.h"
#include "scratch.h"

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
void step_in_double(const Cut& cut, const StepArgs& args, const Place<T>& place,
                    const Elements<T>& gradient, int32_t* nonfinite) {
  const Elements<T> x(args.x);
  const auto given = [=](int64_t i, auto n) { return x.load(i, n); };
  const auto delta = [=, &place](int64_t i, auto n) { return given(i, n) - place.origin(i, n); };
  const auto grad = [=](int64_t i, auto n) { return gradient.load(i, n); };
  const double step_size = of_group(args.step_size, cut.index);
  const double eps = of_group(args.eps, cut.index);
  Ascent ascent;
  double known = -1;
  bool finite;
  if (kNorm == Norm::l2) {
    const auto sums = totals<3>(cut, [&](int64_t i, auto n, V* acc) {
      const V g = grad(i, n), d = delta(i, n);
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
          gg < 0x1p900 && square_of_step(sums.v[2], sums.v[1], gg, ascent.a, args.x.dtype, &square))
        known = __builtin_sqrt(square);
    }
  } else {
    finite = all_finite(cut, grad);
    if (finite) ascent = steepest<kNorm>(cut, step_size, args.rule.top, grad);
  }
  if (!finite) {
    if (nonfinite) ++nonfinite[cut.index];
    return project_group(cut, args, args.x, eps);
  }
  finish<kNorm>(cut, eps, place, Source{given, ascent.of<kNorm>(delta, grad)}, known);
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

// Marks the groups that move, where max_groups says how many of a sample do, and counts those whose
// gradient is not finite.
template <Norm kNorm, class T>
void choose_groups(const StepArgs& args, const Elements<T>& grad, ParallelFor parallel_for,
                   int64_t* keys) {
  for_groups(args.groups, parallel_for,
             [&](const Cut& cut) { keys[cut.index] = key_of<kNorm>(cut, grad); });
  const int64_t width = args.groups_per_sample;
  for (int64_t at = 0; width > 0 && at < args.groups.groups; at += width) {
    for (int64_t i = at; i < at + width; ++i)
      if (keys[i] == kNonfinite && args.nonfinite) ++args.nonfinite[i];
    choose(keys + at, width, args.rule.max_groups);
  }
}

template <class T>
void run(const StepArgs& args, ParallelFor parallel_for) {
  const Groups& groups = args.groups;
  const Place<T> place(args.out, args.box);
  const Elements<T> grad(args.grad);
  const bool all_move = args.rule.max_groups < 0;
  const bool alike = is_one_number(args.eps) && is_one_number(args.step_size);
  const bool plain = place.plain && args.x.dtype == args.grad.dtype;
  const int64_t size = !plain ? 0 : all_move ? batch_size(groups, args.norm, alike) : 1;
  with_norm(args.norm, [&]<Norm kNorm>(Of<kNorm>) {
    Scratch<int64_t> keys(all_move ? 0 : groups.groups);
    if (!all_move) choose_groups<kNorm>(args, grad, parallel_for, keys.get());
    int32_t* const nonfinite = all_move ? args.nonfinite : nullptr;  // else they are counted
    const auto moves = [&](int64_t group) { return all_move || keys[group] == kChosen; };
    const auto in_double = [&](const Cut& cut) {
      moves(cut.index) ? step_in_double<kNorm>(cut, args, place, grad, nonfinite)
                       : clear(cut, place);
    };
    const auto in_floats = [&](const Batch& batch, const auto& out) {
      return moves(batch.first) && step_in_floats<kNorm>(batch, args, out, in_double);
    };
    for_shares(groups, parallel_for, [&](const Share& share) {
      take_share<T>(share, size, args.out, args.x.data, in_floats, in_double);
    });
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(pgd_step)(const StepArgs& args, ParallelFor parallel_for) {
  const bool floats = args.x.dtype == Dtype::f32 && args.grad.dtype == Dtype::f32;
  floats ? run<float>(args, parallel_for) : run<Any>(args, parallel_for);
}

}  // namespace embattle
