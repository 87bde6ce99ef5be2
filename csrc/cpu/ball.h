// The projection of a group on its ball and box, and how the result is stored.
//
// A perturbation comes as a source: z(i, n) gives elements of the perturbation to be projected,
// given(i, n) those of the tensor as it came in (x itself where there is an origin). The Euclidean
// projection moves every element towards zero by a rule with one multiplier per group:
//   l2    s |z|
//   l1    max(|z| - base - tau, 0)
//   linf  min(|z|, eps)
// and then puts it in the box, origin taken off. That holds wherever the origin lies. Where ball
// and box do not meet, the multiplier moves every element to zero, and the result is the point of
// the box that is nearest to the origin (linf: element by element). `find` looks for the
// multiplier, `finish` applies it, stores the result and sees to it that what was stored lies in
// the ball.
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
      : out(result), x0(box.x0), boxed(is_boxed(box)), plain(!x0 && !boxed) {
    lower_value = place(box.lower, box.lower_broadcast, box.lower_value, &lower_elements);
    upper_value = place(box.upper, box.upper_broadcast, box.upper_value, &upper_elements);
  }

  template <class N>
  V origin(int64_t i, N n) const {
    return x0 ? x0.load(i, n) : V{};
  }
  template <class N>
  V lower(int64_t i, N n) const {
    return lower_elements ? lower_elements.load(i, n) : first_lanes(lower_value, n);
  }
  template <class N>
  V upper(int64_t i, N n) const {
    return upper_elements ? upper_elements.load(i, n) : first_lanes(upper_value, n);
  }

  // z, put where origin + z lies in the box.
  template <class N>
  V in_box(int64_t i, N n, V z) const {
    const V centre = origin(i, n);
    return between(z, lower(i, n) - centre, upper(i, n) - centre);
  }

  // The point of the box that is nearest to the origin: a number of the element type.
  template <class N>
  V nearest(int64_t i, N n) const {
    return boxed ? between(origin(i, n), lower(i, n), upper(i, n)) : origin(i, n);
  }

 private:
  double place(const ConstData& bound, bool broadcast, double value, Tensor* elements) const {
    if (!bound.data) return out.nearest(value);
    if (broadcast) return Tensor(bound).at(0);
    *elements = Tensor(bound);
    return value;
  }
};

// ---- The multiplier
// ------------------------------------------------------------------------------

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

// l1 with a box: the sum of max(|z| - t, 0), put in the box, falls in t, and is neither convex nor
// concave.
template <class P, class F>
inline void find_l1_boxed(const Cut& cut, double most, double aim, const P& place, const F& z,
                          Multiplier* found) {
  const double base = aim < most / 2 ? most : 0;
  Bracket bracket{most - base, -base};
  // The root where the largest element is alone and has room: no step finds it from 1e30 away.
  bracket.at = base > 0 ? -aim : 0;
  found->base = base;
  for (;;) {
    const double tau = bracket.at;
    const auto sums = totals<2>(cut, [&](int64_t i, auto n, V* acc) {
      const V value = z(i, n);
      const V left = abs(value) - base - tau;
      const V shrunk = with_sign(left > 0 ? left : V{}, value);
      const V put = place.in_box(i, n, shrunk);
      acc[0] += abs(put);
      acc[1] += (left > 0) & (put == shrunk) ? splat(1) : V{};
    });
    const double newton = tau + (sums.v[0] - aim) / sums.v[1];  // infinite where none is free
    found->tau = newton;
    if (sums.v[1] > 0 && __builtin_fabs(newton - tau) <= 0x1p-52 * __builtin_fabs(newton)) return;
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

// Moves stored elements towards what is nearest to their origin, by one unit in the last place and
// in their order, until the norm (linf: every element) is no longer above eps. `norm` is what it is
// now. What rounding took out of the ball takes a round or two; where a group is further out all
// the same, its elements are scaled now and then. Precondition: what is nearest lies in the ball,
// or linf; bounded all the same.
template <Norm kNorm, class P>
inline void pull_in(const Cut& cut, double eps, const P& place, double norm) {
  const auto each_element = [&](const auto& f) {
    cut.runs(cut.begin(), cut.end(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (!f(i, place.origin(i, 1)[0], place.nearest(i, 1)[0])) return;
    });
  };
  if (kNorm == Norm::linf)
    return each_element([&](int64_t i, double centre, double goal) {
      for (int k = 0; k < 4 && __builtin_fabs(place.out.at(i) - centre) > eps; ++k)
        place.out.move_toward(i, goal);
      return true;
    });
  for (int round = 1; norm > eps; ++round) {
    if (round % 16 == 0)  // the last time all the way
      for_elements(cut, [&](int64_t i, auto n) {
        const V goal = place.nearest(i, n);
        const double share = round < 256 ? eps / norm : 0;
        place.out.store(i, n, goal + (place.out.load(i, n) - goal) * share);
      });
    if (round >= 256) return;
    const double excess = norm - eps;
    double moved = 0;
    bool still = true;
    each_element([&](int64_t i, double centre, double goal) {
      if (moved > excess) return false;
      const double x = place.out.at(i), before = __builtin_fabs(x - centre);
      if (x == goal) return true;
      still = false;
      place.out.move_toward(i, goal);
      const double gain = before - __builtin_fabs(place.out.at(i) - centre);
      moved += kNorm == Norm::l2 ? gain * (before / norm) : gain;
      return true;
    });
    if (still) return;
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
                          // The origin and what leads to a bound may add up to its neighbour.
                          x = between(x, low, high);
                          x = z == low - centre ? low : x;
                          x = z == high - centre ? high : x;
                        }
                        add_length<kNorm>(place.out.store(i, n, x) - centre, acc[0]);
                      }).v[0];
  if (cut.groups.mask)
    for_elements(cut, [&](int64_t i, auto n) { place.out.store(i, n, place.origin(i, n)); }, false);
  if (eps == kInfinity || by.apart) return;
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

// Puts what is nearest to the origin everywhere, and origins in the rows that take no part.
template <class P>
inline void clear(const Cut& cut, const P& place) {
  for_elements(cut, [&](int64_t i, auto n) { place.out.store(i, n, place.nearest(i, n)); });
  if (cut.groups.mask)
    for_elements(cut, [&](int64_t i, auto n) { place.out.store(i, n, place.origin(i, n)); }, false);
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
