// The step and the projection in float lanes, where there is neither an origin nor a box. Each
// function returns false, with nothing written, where float32 does not do: numbers so large or
// small that their squares over- or underflow, sums that cancel, gradients that are not finite. The
// double path then takes the group; those of l2, which take several, hand it over themselves.
#pragma once

#include "batch.h"
#include "plain_l1.h"

namespace embattle {
namespace {

// ---- linf ----

template <class T>
inline bool project_linf(const Cut& cut, double eps, const T* x, const Sink<T>& out) {
  const F limit = all(static_cast<float>(eps < kInfinity ? round_down<T>(eps) : eps));
  float_sums<1>(
      cut,
      [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
        out.store(i, n, clamped(fetch(x + i, n), limit));
        acc[0] = F{};
      },
      [&] { out.settle(); });
  return true;
}

template <class T>
inline bool step_linf(const Cut& cut, double step_size, double eps, const T* x, const T* grad,
                      const Sink<T>& out) {
  const float amount = static_cast<float>(step_size);
  if (amount != step_size && !(__builtin_fabs(step_size) <= 4 * eps)) return false;
  if (!(__builtin_fabs(step_size) < 0x1p100)) return false;
  const auto poison = [](F g) { return g * 0.f; };  // not zero where g is not finite
  // In place a step cannot be taken back: look first.
  if (x == out.p && float_sums<1>(cut, [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
                      acc[0] = poison(fetch(grad + i, n));
                    }).v[0] != 0)
    return false;
  const F limit = all(static_cast<float>(eps < kInfinity ? round_down<T>(eps) : eps));
  const U step = reinterpret_cast<U>(all(amount));
  const double doubt =
      float_sums<1>(
          cut,
          [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
            const F g = fetch(grad + i, n);
            const U signs = reinterpret_cast<U>(g) & 0x80000000u;
            const U moved = reinterpret_cast<U>(g != 0) & (step ^ signs);
            out.store(i, n, clamped(fetch(x + i, n) + reinterpret_cast<F>(moved), limit));
            acc[0] = poison(g);
          },
          [&] { out.settle(); })
          .v[0];
  return doubt == 0;
}

// ---- l2: what is worked out once per group is worked out for all of a batch ----

// Stores what z(k, i, n) gives of the groups that are `taken`, and sees to it that they lie in
// their balls.
template <class T, class Z>
inline void store_inside(const Batch& batch, I taken, V eps, const Sink<T>& out, const Z& z) {
  V sums[1];
  const auto store = [&](int k) {
    return [=, of = z(k)](int64_t i, auto n, F* to) EMBATTLE_INLINE {
      const F stored = out.store(i, n, of(i, n));
      to[0] = stored * stored;
    };
  };
  batch_sums<1, true>(batch, taken, sums, store, [&] { out.settle(); });
  const I doubt = taken & ~is_inside<Norm::l2>(batch.cut(0), eps, sums[0]);
  for (int k = 0; any(doubt) && k < batch.count; ++k)
    if (doubt[k]) keep_inside<Norm::l2>(batch.cut(k), eps[k], out.p, sums[0][k]);
}

template <class T, class D>
inline bool project_l2(const Batch& batch, V eps, const T* x, const Sink<T>& out,
                       const D& in_double) {
  const Cut one = batch.cut(0);
  if (one.end() - one.begin() < kFewest) return false;
  const double n = static_cast<double>(one.end() - one.begin());
  const I bounded = eps < kInfinity;
  V sums[1];
  const auto terms = [=](int) {
    return [=](int64_t i, auto w, F* to) EMBATTLE_INLINE {
      const F d = fetch(x + i, w);
      to[0] = d * d;
    };
  };
  batch_sums<1>(batch, bounded, sums, terms, [] {});
  V norm = per_group(batch, [](auto square) { return root(square); }, sums[0]);
  const I good = (sums[0] >= n * 0x1p-120) & (sums[0] < kInfinity);
  const I doubt = good & (norm <= eps * (1 + kSumError)) & (norm * (1 + kSumError) > eps);
  for (int k = 0; any(doubt) && k < batch.count; ++k)
    if (doubt[k])
      norm[k] = length<Norm::l2>(batch.cut(k), [&](int64_t i, auto w) { return load(x + i, w); });
  const V scale = per_group(
      batch, [](auto goal, auto length) { return goal / length; }, float_aim<T>(one, eps), norm);
  const I stays = ~bounded | (good & (norm <= eps));
  const I moves = good & ~stays & (scale > 0) & fits_float(scale);
  for (int k = 0; any(~moves) && k < batch.count; ++k)
    if (stays[k])
      copy_group(batch.cut(k), x, out);
    else if (!moves[k])
      in_double(batch.cut(k));
  store_inside(batch, moves, eps, out, [=](int k) {
    const F s = all(static_cast<float>(scale[k]));
    return [=](int64_t i, auto w) EMBATTLE_INLINE { return fetch(x + i, w) * s; };
  });
  return true;
}

template <class T, class D>
inline bool step_l2(const Batch& batch, V step_size, V eps, const T* x, const T* grad,
                    const Sink<T>& out, const D& in_double) {
  const Cut one = batch.cut(0);
  if (one.end() - one.begin() < kFewest) return false;
  const double n = static_cast<double>(one.end() - one.begin());
  V sums[3];
  const auto terms = [=](int) {
    return [=](int64_t i, auto w, F* to) EMBATTLE_INLINE {
      const F g = fetch(grad + i, w), d = fetch(x + i, w);
      to[0] = g * g;
      to[1] = g * d;
      to[2] = d * d;
    };
  };
  batch_sums<3>(batch, I{} - 1, sums, terms, [] {});
  const V a =
      per_group(batch, [](auto size, auto gg) { return size / root(gg); }, step_size, sums[0]);
  // Zero: float32 does not do.
  const auto scale_of = [=](auto gg, auto gd, auto dd, auto a, auto goal) {
    const auto reach = root(dd) + abs(a) * root(gg), square = dd + 2 * a * gd + a * a * gg;
    const auto norm = root(square), zero = norm - norm;
    // What reaches the goal would leave it to rounding whether it is inside: FGM's steps end at
    // eps.
    const auto scale = norm > goal ? goal / norm : zero + 1;
    // The error of the sums is relative to reach^2.
    const auto good = (gg >= n * 0x1p-100) & (gg < kInfinity) & (dd < kInfinity) &
                      (square >= 0.25 * reach * reach) & (square >= n * 0x1p-120) &
                      (square < kInfinity) & fits_float(scale) & fits_float(scale * a);
    return good ? scale : zero;
  };
  const V scale = per_group(batch, scale_of, sums[0], sums[1], sums[2], a, float_aim<T>(one, eps));
  const V along = scale * a;
  const I good = scale > 0;
  for (int k = 0; any(~good) && k < batch.count; ++k)
    if (!good[k]) in_double(batch.cut(k));
  store_inside(batch, good, eps, out, [=](int k) {
    const F s = all(static_cast<float>(scale[k])), t = all(static_cast<float>(along[k]));
    return [=](int64_t i, auto w)
               EMBATTLE_INLINE { return fetch(x + i, w) * s + fetch(grad + i, w) * t; };
  });
  return true;
}

// ---- Any norm ----

template <Norm kNorm, class T, class D>
inline bool project_in_floats(const Batch& batch, const ProjectArgs& args, const Sink<T>& out,
                              const D& in_double) {
  const T* const x = static_cast<const T*>(args.x.data);
  const double eps = of_group(args.eps, batch.first);
  if (kNorm == Norm::linf) return project_linf(batch.joined(), eps, x, out);
  if (kNorm == Norm::l2) return project_l2(batch, batch.numbers(args.eps), x, out, in_double);
  return project_l1(batch.cut(0), eps, Moved<T, false>{x}, out);
}

template <Norm kNorm, class T, class D>
inline bool step_in_floats(const Batch& batch, const StepArgs& args, const Sink<T>& out,
                           const D& in_double) {
  const T* const x = static_cast<const T*>(args.x.data);
  const T* const grad = static_cast<const T*>(args.grad.data);
  const double step_size = of_group(args.step_size, batch.first);
  const double eps = of_group(args.eps, batch.first);
  if (kNorm == Norm::linf) return step_linf(batch.joined(), step_size, eps, x, grad, out);
  if (kNorm == Norm::l2)
    return step_l2(batch, batch.numbers(args.step_size), batch.numbers(args.eps), x, grad, out,
                   in_double);
  return step_l1(batch.cut(0), step_size, eps, args.rule.top, x, grad, out);
}

}  // namespace
}  // namespace embattle
