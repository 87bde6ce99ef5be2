// The search for the multiplier with which a group is projected on its ball and box (see ball.h).
#pragma once

#include "place.h"

namespace embattle {
namespace {

// How far inside the ball the l2 and l1 projections aim, so that rounding n elements to a type of
// unit roundoff u hardly ever leaves it: relative, and less than an ulp. Errors average over n
// elements, but over no more than the type has significands: elements that share one may be off in
// the same way. Small groups aim at eps itself, and are pulled in where rounding left the ball.
inline double aim(double u, int64_t n) {
  if (n < 64) return 1;
  const double independent = static_cast<double>(n) < 0.5 / u ? static_cast<double>(n) : 0.5 / u;
  double root = 8;  // a power of two not above the square root
  while (root * root * 4 <= independent) root *= 2;
  return 1 - 3 * u / root;
}

struct Multiplier {
  double limit = kInfinity;  // linf: eps
  double scale = 1;          // l2: s
  double base = 0, tau = 0;  // l1
  bool none = true;          // nothing moves, but for the box
  bool apart = false;        // ball and box do not meet

  template <Norm kNorm>
  V operator()(V z) const {
    const V size = abs(z);
    if (kNorm == Norm::linf) return with_sign(at_most(size, splat(limit)), z);
    if (none) return z;
    if (kNorm == Norm::l2) return z * scale;
    const V left = size - base - tau;
    return with_sign(left > 0 ? left : V{}, z);
  }
};

// l2 with a box: the length of s z, put in the box, rises in s. It is solved for on the elements
// that are free at s, until that changes nothing. In units of the goal, and s in units of what
// brings z there: near the solution no square that matters vanishes or overflows.
template <class P, class F>
inline void find_l2_boxed(const Cut& cut, double norm, double aim, const P& place, const F& z,
                          Multiplier* found) {
  Bracket bracket;
  bracket.outer = norm / aim < 0x1p1000 ? norm / aim : 0x1p1000;
  bracket.at = 1;
  for (;;) {
    const double s = bracket.at;
    const auto sums = totals<2>(cut, [&](int64_t i, auto n, V* acc) {
      const V moved = z(i, n) / norm * (s * aim);
      const V put = place.in_box(i, n, moved);
      const auto free = put == moved;
      const V part = put / aim, square = part * part;
      acc[0] += free ? square : V{};
      acc[1] += free ? V{} : square;
    });
    const double square = sums.v[0] + sums.v[1], left = 1 - sums.v[1];
    const double newton = left > 0 && sums.v[0] > 0 ? s * __builtin_sqrt(left / sums.v[0]) : 0;
    found->scale = newton * aim / norm;
    if (newton > 0 && __builtin_fabs(newton - s) <= 0x1p-52 * s) return;
    if (!look_on(bracket, square <= 1, newton)) break;
  }
  found->scale = bracket.inner * aim / norm;
}

// l1: the sum of max(|z| - base - tau, 0) falls in tau, and is solved for by Newton's method.
// `base` is the largest |z| where eps is small, so that |z| - base, which is exact, loses nothing.
// Without a box this is Michelot's active set method: the sum is convex, so that from the left the
// steps never pass the root, and are done when the active set stays. With one it is neither convex
// nor concave.
template <class P, class F>
inline void find_l1(const Cut& cut, double sum, double most, double aim, const P& place, const F& z,
                    Multiplier* found) {
  const double base = aim < most / 2 ? most : 0;
  const double mean = (sum - aim) / static_cast<double>(cut.count());
  const bool boxed = place.boxed;
  Bracket bracket{most - base, -base};
  // The root where the largest element is alone: no step finds it from 1e30 away.
  const double alone = base > 0 ? -aim : boxed ? 0 : most - aim;
  bracket.at = !boxed && mean - base > alone ? mean - base : alone;
  found->base = base;
  double active = -1;
  for (;;) {
    const double tau = bracket.at;
    const auto left_of = [=](V size) { return size - base - tau; };
    const auto of_ball = [&](int64_t i, auto n, V* acc) {
      const V left = left_of(abs(z(i, n)));
      acc[0] += left > 0 ? left : V{};
      acc[1] += left > 0 ? splat(1) : V{};
    };
    const auto of_both = [&](int64_t i, auto n, V* acc) {
      const V value = z(i, n), left = left_of(abs(value));
      const V shrunk = with_sign(left > 0 ? left : V{}, value);
      const V put = place.in_box(i, n, shrunk);
      acc[0] += abs(put);
      acc[1] += (left > 0) & (put == shrunk) ? splat(1) : V{};
    };
    const auto sums = boxed ? totals<2>(cut, of_both) : totals<2>(cut, of_ball);
    // Beyond the largest nothing is left: rounding put it there.
    const double newton = sums.v[1] > 0 ? tau + (sums.v[0] - aim) / sums.v[1] : alone;
    found->tau = newton;
    const bool settled = __builtin_fabs(newton - tau) <= 0x1p-52 * __builtin_fabs(newton) ||
                         (!boxed && sums.v[1] == active);
    if (sums.v[1] > 0 && settled) return;
    active = sums.v[1];
    if (!look_on(bracket, sums.v[0] <= aim, newton)) break;
  }
  found->tau = bracket.inner;
}

// The multiplier of the projection of z on the ball of radius eps and the box, in real numbers:
// what is stored may have to aim lower (`finish`). `known` is the l2 norm of z where the caller has
// it, else negative.
template <Norm kNorm, class P, class F>
inline Multiplier find(const Cut& cut, double eps, const P& place, const F& z, double known) {
  Multiplier found;
  found.limit = eps;
  if (kNorm == Norm::linf || eps == kInfinity) return found;
  const auto value = [&](int64_t i, auto n) { return z.z(i, n); };
  double norm = known, most = 0;
  if (kNorm == Norm::l1) {
    const auto both = totals<2, 2>(cut, [&](int64_t i, auto n, V* acc) {
      const V size = abs(value(i, n));
      acc[0] += size;
      acc[1] = larger(size, acc[1]);
    });
    norm = both.v[0];
    most = both.v[1];
  } else if (norm < 0) {
    norm = length<kNorm>(cut, value);
  }
  const auto boxed_length = [&](const auto& f) {
    return length<kNorm>(cut, [&](int64_t i, auto n) { return place.in_box(i, n, f(i, n)); });
  };
  const double outside = place.boxed ? boxed_length(value) : norm;
  if (!(outside > eps)) return found;
  found.none = false;
  found.apart = place.boxed && boxed_length([](int64_t, auto) { return V{}; }) > eps;
  const double goal = found.apart ? 0 : eps * aim(place.out.unit(), cut.count());
  if (!(goal > 0)) {
    found.scale = 0;
    found.base = 0;
    found.tau = most;
  } else if (kNorm == Norm::l1) {
    find_l1(cut, norm, most, goal, place, value, &found);
  } else {
    place.boxed ? find_l2_boxed(cut, norm, goal, place, value, &found)
                : void(found.scale = goal / norm);
  }
  return found;
}

}  // namespace
}  // namespace embattle
