// What the float-lane paths of all norms share: what the projection aims at, and that what was
// stored lies in the ball.
#pragma once

#include <type_traits>

#include "ball.h"
#include "sink.h"

namespace embattle {
namespace {

// Calls f(T*) for the type that the elements have, where float lanes serve it. Kernels are compiled
// for float and for Any, which then is not float.
template <class T, class F>
inline bool with_short_type(Dtype dtype, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    return f(static_cast<float*>(nullptr));
  } else {
    if (dtype == Dtype::f16) return f(static_cast<f16*>(nullptr));
    return dtype == Dtype::bf16 && f(static_cast<bf16*>(nullptr));
  }
}

// Zeros in the rows that take no part.
template <class T>
inline void clear_masked(const Cut& cut, T* out) {
  if (!cut.groups.mask) return;
  cut.blocks([&](int, int64_t low, int64_t high) {
    cut.runs(
        low, high,
        [&](int64_t begin, int64_t end) {
          std::memset(static_cast<void*>(out + begin), 0,
                      sizeof(T) * static_cast<size_t>(end - begin));
        },
        false);
  });
}

// Whether what was stored certainly lies in the l1 or l2 ball; there is no origin. `sum` is the sum
// of its sizes or squares in float lanes.
template <Norm kNorm, class E>
inline auto is_inside(const Cut& cut, E eps, E sum) {
  const double vanished = static_cast<double>(cut.end() - cut.begin()) * 0x1p-148;
  return sum * (1 + kSumError) + vanished <= (kNorm == Norm::l2 ? eps * eps : eps);
}

// Sees to it that it does: where the sum leaves a doubt, the norm is taken in double.
template <Norm kNorm, class T>
inline void keep_inside(const Cut& cut, double eps, T* to, double sum) {
  if (eps == kInfinity || is_inside<kNorm>(cut, eps, sum)) return;
  const double norm = length<kNorm>(cut, [&](int64_t i, auto n) { return load(to + i, n); });
  if (norm > eps) pull_in<kNorm>(cut, eps, Place<T>(Elements<T>(to)), norm);
}

// Fewer elements than this go to the double path: float sums would only reach eps to some ulps, and
// of a handful of numbers a user expects the digits.
constexpr int64_t kFewest = 64;

// What the projection scales to: so far inside that keep_inside has no doubt.
template <class T, class E>
inline E float_aim(const Cut& cut, E eps) {
  return eps * aim(kUnit<T>, cut.count()) * (1 - 2 * kSumError);
}

template <class E>
inline auto fits_float(E x) {
  const E size = abs(x);
  return (size == 0) | ((size > 0x1p-60) & (size < 0x1p60));
}

template <class T>
inline void copy_group(const Cut& cut, const T* x, const Sink<T>& out) {
  if (x == out.p) return;
  cut.blocks([&](int, int64_t low, int64_t high) {
    cut.runs(low, high, [&](int64_t begin, int64_t end) { out.copy(x, begin, end); });
    out.settle();
  });
}

}  // namespace
}  // namespace embattle
