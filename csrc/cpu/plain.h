// The step and the projection in float lanes, where there is neither an origin nor a box. Each
// function returns false, with nothing written, where float32 does not do: numbers so large or
// small that their squares over- or underflow, sums that cancel, gradients that are not finite. The
// double path then takes the group.
#pragma once

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

// ---- l2 ----

template <class T>
inline bool project_l2(const Cut& cut, double eps, const T* x, const Sink<T>& out) {
  if (eps == kInfinity) {
    copy_group(cut, x, out);
    return true;
  }
  if (cut.end() - cut.begin() < kFewest) return false;
  const double n = static_cast<double>(cut.end() - cut.begin());
  const double square = float_sums<1>(cut, [=](int64_t i, auto w, F* acc) EMBATTLE_INLINE {
                          const F d = fetch(x + i, w);
                          acc[0] = d * d;
                        }).v[0];
  if (!(square >= n * 0x1p-120 && square < kInfinity)) return false;
  double norm = __builtin_sqrt(square);
  if (norm <= eps * (1 + kSumError) && norm * (1 + kSumError) > eps)
    norm = length<Norm::l2>(cut, [&](int64_t i, auto w) { return load(x + i, w); });
  if (norm <= eps) {
    copy_group(cut, x, out);
    return true;
  }
  const double scale = float_aim<T>(cut, eps) / norm;
  if (scale == 0 || !fits_float(scale)) return false;
  const F s = all(static_cast<float>(scale));
  const double size = float_sums<1, true>(
                          cut,
                          [=](int64_t i, auto w, F* acc) EMBATTLE_INLINE {
                            const F z = out.store(i, w, fetch(x + i, w) * s);
                            acc[0] = z * z;
                          },
                          [&] { out.settle(); })
                          .v[0];
  keep_inside<Norm::l2>(cut, eps, out.p, size);
  return true;
}

template <class T>
inline bool step_l2(const Cut& cut, double step_size, double eps, const T* x, const T* grad,
                    const Sink<T>& out) {
  if (cut.end() - cut.begin() < kFewest) return false;
  const double n = static_cast<double>(cut.end() - cut.begin());
  const auto sums = float_sums<3>(cut, [=](int64_t i, auto w, F* acc) EMBATTLE_INLINE {
    const F g = fetch(grad + i, w), d = fetch(x + i, w);
    acc[0] = g * g;
    acc[1] = g * d;
    acc[2] = d * d;
  });
  const double gg = sums.v[0], dd = sums.v[2];
  if (!(gg >= n * 0x1p-100 && gg < kInfinity && dd < kInfinity)) return false;
  const double length_g = __builtin_sqrt(gg), a = step_size / length_g;
  const double reach = __builtin_sqrt(dd) + __builtin_fabs(a) * length_g;
  const double square = dd + 2 * a * sums.v[1] + a * a * gg;
  // The error of the sums is relative to reach^2.
  if (!(square >= 0.25 * reach * reach && square >= n * 0x1p-120 && square < kInfinity))
    return false;
  const double norm = __builtin_sqrt(square);
  const double goal = float_aim<T>(cut, eps);
  // What reaches the goal would leave it to rounding whether it is inside: FGM's steps end at eps.
  const double scale = norm > goal ? goal / norm : 1;
  if (scale == 0 || !fits_float(scale) || !fits_float(scale * a)) return false;
  const F s = all(static_cast<float>(scale)), t = all(static_cast<float>(scale * a));
  const double size = float_sums<1, true>(
                          cut,
                          [=](int64_t i, auto w, F* acc) EMBATTLE_INLINE {
                            const F z =
                                out.store(i, w, fetch(x + i, w) * s + fetch(grad + i, w) * t);
                            acc[0] = z * z;
                          },
                          [&] { out.settle(); })
                          .v[0];
  keep_inside<Norm::l2>(cut, eps, out.p, size);
  return true;
}

// ---- Any norm and type ----

template <Norm kNorm, class T>
inline bool plain_project_of(const Cut& cut, const ProjectArgs& args) {
  const T* x = static_cast<const T*>(args.delta.data);
  const Sink<T> out(args.out, x, cut.groups.rows, cut.groups.dim);
  const double eps = of_group(args.eps, cut.index);
  bool done = false;
  if (kNorm == Norm::linf) done = project_linf(cut, eps, x, out);
  if (kNorm == Norm::l2) done = project_l2(cut, eps, x, out);
  if (kNorm == Norm::l1) done = project_l1(cut, eps, Moved<T, false>{x}, out);
  if (done) clear_masked(cut, out.p);
  return done;
}

template <Norm kNorm, class T>
inline bool plain_step_of(const Cut& cut, const StepArgs& args) {
  const T* x = static_cast<const T*>(args.delta.data);
  const T* grad = static_cast<const T*>(args.grad.data);
  const Sink<T> out(args.out, x, cut.groups.rows, cut.groups.dim);
  const double step_size = of_group(args.step_size, cut.index);
  const double eps = of_group(args.eps, cut.index);
  bool done = false;
  if (kNorm == Norm::linf) done = step_linf(cut, step_size, eps, x, grad, out);
  if (kNorm == Norm::l2) done = step_l2(cut, step_size, eps, x, grad, out);
  if (kNorm == Norm::l1) done = step_l1(cut, step_size, eps, args.rule.top, x, grad, out);
  if (done) clear_masked(cut, out.p);
  return done;
}

// Projects the group if float lanes do.
template <Norm kNorm, class T>
inline bool plain_project(const Cut& cut, const ProjectArgs& args) {
  return with_short_type<T>(args.delta.dtype, [&](auto* type) {
    return plain_project_of<kNorm, std::remove_pointer_t<decltype(type)>>(cut, args);
  });
}

// Steps and projects the group if float lanes do.
template <Norm kNorm, class T>
inline bool plain_step(const Cut& cut, const StepArgs& args) {
  if (args.delta.dtype != args.grad.dtype) return false;
  return with_short_type<T>(args.delta.dtype, [&](auto* type) {
    return plain_step_of<kNorm, std::remove_pointer_t<decltype(type)>>(cut, args);
  });
}

}  // namespace
}  // namespace embattle
