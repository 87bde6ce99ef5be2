// The projection of a group on its ball and box, and how the result is stored.
//
// The Euclidean projection of a perturbation, which comes as a Source, moves every element towards
// zero by a rule with one multiplier per group:
//   l2    s |z|
//   l1    max(|z| - base - tau, 0)
//   linf  min(|z|, eps)
// and then puts it in the box, origin taken off. That holds wherever the origin lies. Where ball
// and box do not meet, the multiplier moves every element to zero, and the result is the point of
// the box that is nearest to the origin (linf: element by element). `find` looks for the
// multiplier, `finish` applies it, stores the result and sees to it that what was stored lies in
// the ball.
#pragma once

#include "multiplier.h"

namespace embattle {
namespace {

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
                        const auto still = z == given - centre;
                        V x = still ? given : centre + z;
                        if (boxed) {  // bounds are numbers of the type: rounding stays inside
                          const V low = place.lower(i, n), high = place.upper(i, n);
                          // The origin and what leads to a bound may add up to its neighbour; so
                          // may what leads to a neighbour that an element was given at.
                          x = between(x, low, high);
                          x = ~still & (z == low - centre) ? low : x;
                          x = ~still & (z == high - centre) ? high : x;
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
