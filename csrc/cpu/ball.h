// The projection of a group on its ball and box, and how the result is stored.
//
// A perturbation comes as a source: z(i, n) gives elements of the perturbation to be projected,
// given(i, n) those of the tensor as it came in (x itself where there is an origin). The Euclidean
// projection moves every element towards zero by a rule with one multiplier per group:
//   l2    s |z|
//   l1    max(|z| - base - tau, 0)
//   linf  min(|z|, eps)
// and then bounds it by the room that the box leaves. `find` looks for the multiplier, `finish`
// applies it, stores the result and sees to it that what was stored lies in the ball.
#pragma once

#include "../formulas.h"
#include "cut.h"

namespace embattle {
namespace {

constexpr double kInfinity = __builtin_inf();

// ---- Lengths
// -------------------------------------------------------------------------------------

template <Norm kNorm>
inline void add_length(V z, V& acc) {
  if (kNorm == Norm::l2)
    acc += z * z;
  else if (kNorm == Norm::l1)
    acc += abs(z);
  else
    acc = larger(abs(z), acc);
}

constexpr unsigned maxima_of(Norm norm) { return norm == Norm::linf ? 1u : 0u; }

// The l2 norm from a sum of squares that may have over- or underflowed (float64 elements only).
template <class F>
inline double length_of_square(const Cut& cut, double square, const F& f) {
  if (square > 1e-280 && square < 1e300) return __builtin_sqrt(square);
  if (square == 0 || !(square < kInfinity)) {
    const double most = totals<1, 1>(cut, [&](int64_t i, auto n, V* acc) {
                          acc[0] = larger(abs(f(i, n)), acc[0]);
                        }).v[0];
    if (most == 0 || most == kInfinity || square != square)
      return most == 0 ? square : most + square;
  }
  const double scale = square < 1 ? 0x1p600 : 0x1p-600;
  const double scaled = totals<1>(cut, [&](int64_t i, auto n, V* acc) {
                          const V z = f(i, n) * scale;
                          acc[0] += z * z;
                        }).v[0];
  return __builtin_sqrt(scaled) / scale;
}

// The norm of a group's elements f(i, n).
template <Norm kNorm, class F>
inline double length(const Cut& cut, const F& f) {
  const double sum = totals<1, maxima_of(kNorm)>(cut, [&](int64_t i, auto n, V* acc) {
                       add_length<kNorm>(f(i, n), acc[0]);
                     }).v[0];
  return kNorm == Norm::l2 ? length_of_square(cut, sum, f) : sum;
}

// ---- Where results lie ----

// The result and its bounds.
template <class T>
struct Place {
  typedef Elements<T> Tensor;
  Tensor out, x0, lower_elements, upper_elements;  // absent where there is none, or one number
  double lower_value = -kInfinity, upper_value = kInfinity;
  bool boxed;
  bool plain;  // there is neither an origin nor a box

  Place(const Data& result, const Box& box)
      : out(result), x0(box.x0), boxed(box.lower.data || box.upper.data), plain(!x0 && !boxed) {
    if (box.lower_broadcast)
      lower_value = Tensor(box.lower).at(0);
    else
      lower_elements = Tensor(box.lower);
    if (box.upper_broadcast)
      upper_value = Tensor(box.upper).at(0);
    else
      upper_elements = Tensor(box.upper);
  }

  template <class N>
  V origin(int64_t i, N n) const {
    return x0 ? x0.load(i, n) : V{};
  }
  template <class N>
  V lower(int64_t i, N n) const {
    return lower_elements ? lower_elements.load(i, n) : splat(lower_value);
  }
  template <class N>
  V upper(int64_t i, N n) const {
    return upper_elements ? upper_elements.load(i, n) : splat(upper_value);
  }

  // How far an element may be from its origin on the side of z, >= 0.
  template <class N>
  V room(int64_t i, N n, V z) const {
    const V centre = origin(i, n);
    return z >= 0 ? upper(i, n) - centre : centre - lower(i, n);
  }

  // z with its size bounded by the room.
  template <class N>
  V in_box(int64_t i, N n, V z) const {
    return with_sign(at_most(abs(z), room(i, n, z)), z);
  }
};

// ---- The multiplier
// ------------------------------------------------------------------------------

struct Multiplier {
  double limit = kInfinity;  // linf: eps
  double scale = 1;          // l2: s
  double base = 0, tau = 0;  // l1
  bool none = true;          // nothing moves, but for the box

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

// l1: sum max(|z| - base - tau, 0) = aim by Newton's method, which is Michelot's active set method:
// the sum is convex in tau, so that from the left the steps never pass the root, and a step from
// the right lands on the left. `base` is the largest |z| where eps is small, so that |z| - base,
// which is exact, loses nothing.
template <class F>
inline void find_l1(const Cut& cut, double sum, double most, double aim, const F& z,
                    Multiplier* found) {
  const double n = static_cast<double>(cut.count());
  const double base = aim < most / 2 ? most : 0;
  const double mean = (sum - aim) / n;
  double tau = (mean > most - aim ? mean : most - aim) - base;
  double active = -1;
  for (int pass = 0; pass < 100; ++pass) {
    const auto over = totals<2>(cut, [&](int64_t i, auto w, V* acc) {
      const V left = abs(z(i, w)) - base - tau;
      acc[0] += left > 0 ? left : V{};
      acc[1] += left > 0 ? splat(1) : V{};
    });
    if (over.v[1] == 0) {  // beyond the largest: rounding put it there
      tau = (most - base) - aim;
      active = -1;
      continue;
    }
    const double next = tau + (over.v[0] - aim) / over.v[1];
    const bool settled = over.v[1] == active || next == tau;
    active = over.v[1];
    tau = next;
    if (settled) break;
  }
  found->base = base;
  found->tau = tau;
}

// l2 with a box: sum min(s |z|, room)^2 = aim^2. From s below the root, those that are at their
// bound stay there, and s solved for the others is again below the root and not smaller.
template <class P, class F>
inline void find_l2_boxed(const Cut& cut, double norm, double aim, const P& place, const F& z,
                          Multiplier* found) {
  double s = aim / norm;
  for (int pass = 0; pass < 200; ++pass) {
    const auto sums = totals<2>(cut, [&](int64_t i, auto n, V* acc) {
      const V unit = z(i, n) * (1 / norm);
      const V room = place.room(i, n, unit) * (1 / norm);
      const V size = abs(unit);
      const auto free = size * s < room;
      acc[0] += free ? size * size : V{};
      acc[1] += free ? V{} : room * room;
    });
    const double goal = aim / norm * (aim / norm) - sums.v[1];
    if (!(goal > 0) || !(sums.v[0] > 0)) break;
    const double next = __builtin_sqrt(goal / sums.v[0]);
    if (!(next > s * (1 + 0x1p-52))) break;
    s = next;
  }
  found->scale = s;
}

// l1 with a box: the sum of min(max(|z| - t, 0), room) falls in t, and is neither convex nor
// concave: Newton's steps where they stay in the bracket, else bisection.
template <class P, class F>
inline void find_l1_boxed(const Cut& cut, double most, double aim, const P& place, const F& z,
                          Multiplier* found) {
  const double base = aim < most / 2 ? most : 0;
  double low = -base, high = most - base;  // sum above aim; at or below it
  // The root where the largest element is alone and has room: no step finds it from 1e30 away.
  double tau = base > 0 ? -aim : low;
  for (int pass = 0; pass < 1000; ++pass) {
    const auto sums = totals<2>(cut, [&](int64_t i, auto n, V* acc) {
      const V value = z(i, n);
      const V left = abs(value) - base - tau;
      const V room = place.room(i, n, value);
      acc[0] += left > 0 ? at_most(left, room) : V{};
      acc[1] += (left > 0) & (left < room) ? splat(1) : V{};
    });
    if (sums.v[0] > aim)
      low = tau;
    else
      high = tau;
    if (sums.v[0] == aim) break;
    const double newton = tau + (sums.v[0] - aim) / sums.v[1];
    const double half = low + (high - low) / 2;
    const double next = newton > low && newton < high && pass % 3 != 2 ? newton : half;
    if (!(next > low && next < high)) break;
    if (__builtin_fabs(next - tau) <= 0x1p-52 * __builtin_fabs(next)) {
      tau = next;
      high = next;
      break;
    }
    tau = next;
  }
  found->base = base;
  found->tau = high;
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
  double outside = norm;
  if (place.boxed && norm > eps)
    outside =
        length<kNorm>(cut, [&](int64_t i, auto n) { return place.in_box(i, n, value(i, n)); });
  if (!(outside > eps)) return found;
  found.none = false;
  const double goal = eps * aim(place.out.unit(), cut.count());
  if (!(goal > 0)) {
    found.scale = 0;
    found.base = 0;
    found.tau = most;
  } else if (kNorm == Norm::l1) {
    place.boxed ? find_l1_boxed(cut, most, goal, place, value, &found)
                : find_l1(cut, norm, most, goal, value, &found);
  } else {
    place.boxed ? find_l2_boxed(cut, norm, goal, place, value, &found)
                : void(found.scale = goal / norm);
  }
  return found;
}

// ---- Storing
// -------------------------------------------------------------------------------------

// Moves stored elements towards their origin by one unit in the last place, in their order, until
// the norm (linf: every element) is no longer above eps. `norm` is what it is now. That takes a
// round or two; where a group is far out all the same, its elements are scaled now and then.
template <Norm kNorm, class P>
inline void pull_in(const Cut& cut, double eps, const P& place, double norm) {
  for (int round = 1; norm > eps; ++round) {
    if (kNorm != Norm::linf && round % 16 == 0)
      for_elements(cut, [&](int64_t i, auto n) {
        const V centre = place.origin(i, n);
        place.out.store(i, n, centre + (place.out.load(i, n) - centre) * (eps / norm));
      });
    double excess = norm - eps, moved = 0;
    cut.runs(cut.begin(), cut.end(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && (kNorm == Norm::linf || moved <= excess); ++i) {
        const double centre = place.origin(i, 1)[0];
        const double before = __builtin_fabs(place.out.at(i) - centre);
        if (before == 0 || (kNorm == Norm::linf && before <= eps)) continue;
        place.out.move_toward(i, centre);
        const double gain = before - __builtin_fabs(place.out.at(i) - centre);
        moved += kNorm == Norm::l2 ? gain * (before / norm) : gain;
      }
    });
    norm = length<kNorm>(
        cut, [&](int64_t i, auto n) { return place.out.load(i, n) - place.origin(i, n); });
  }
}

// Stores origin + P(z) of the group and origins in the rows that take no part. Elements that P
// leaves where they were given keep their bits. `extra(i, n)` is called before elements are stored.
template <Norm kNorm, class P, class F, class E>
inline void apply(const Cut& cut, double eps, const P& place, const F& source, const Multiplier& by,
                  const E& extra) {
  const bool boxed = place.boxed, plain = place.plain;
  const double size = totals<1, maxima_of(kNorm)>(cut, [&](int64_t i, auto n, V* acc) {
                        V z = by.template operator()<kNorm>(source.z(i, n));
                        extra(i, n);
                        if (plain) {
                          add_length<kNorm>(place.out.store(i, n, z), acc[0]);
                          return;
                        }
                        const V centre = place.origin(i, n), given = source.given(i, n);
                        if (boxed) z = place.in_box(i, n, z);
                        V x = z == given - centre ? given : centre + z;
                        if (boxed) {  // bounds are numbers of the type: rounding stays inside
                          const V low = place.lower(i, n), high = place.upper(i, n);
                          x = x < low ? low : x;
                          x = x > high ? high : x;
                        }
                        add_length<kNorm>(place.out.store(i, n, x) - centre, acc[0]);
                      }).v[0];
  if (cut.groups.mask)
    for_elements(cut, [&](int64_t i, auto n) { place.out.store(i, n, place.origin(i, n)); }, false);
  if (eps == kInfinity) return;
  const double norm = kNorm == Norm::l2
                          ? length_of_square(cut, size,
                                             [&](int64_t i, auto n) {
                                               return place.out.load(i, n) - place.origin(i, n);
                                             })
                          : size;
  if (norm > eps) pull_in<kNorm>(cut, eps, place, norm);
}

struct Nothing {
  template <class N>
  void operator()(int64_t, N) const {}
};

template <Norm kNorm, class P, class F, class E = Nothing>
inline void finish(const Cut& cut, double eps, const P& place, const F& source, double known = -1,
                   const E& extra = {}) {
  Multiplier by = find<kNorm>(cut, eps, place, source, known);
  if (kNorm == Norm::linf && place.plain && eps < kInfinity) by.limit = place.out.round_down(eps);
  apply<kNorm>(cut, eps, place, source, by, extra);
}

// Puts the origin everywhere.
template <class P>
inline void clear(const Cut& cut, const P& place) {
  const auto put = [&](int64_t i, auto n) { place.out.store(i, n, place.origin(i, n)); };
  for_elements(cut, put);
  if (cut.groups.mask) for_elements(cut, put, false);
}

// Calls f(norm's type) for a norm known when the program runs.
template <Norm kNorm>
struct Of {
  static constexpr Norm norm = kNorm;
};
template <class F>
inline void with_norm(Norm norm, const F& f) {
  switch (norm) {
    case Norm::l1:
      return f(Of<Norm::l1>{});
    case Norm::l2:
      return f(Of<Norm::l2>{});
    case Norm::linf:
      return f(Of<Norm::linf>{});
  }
}

}  // namespace
}  // namespace embattle
