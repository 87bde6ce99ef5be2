// The projection of a group on its ball and box, and how it is stored.
#pragma once

#include "../formulas.h"
#include "direction.cuh"

namespace embattle::cuda {

// How much an l2 or l1 ball is shrunk so that rounding in the sums cannot leave it.
template <class T>
constexpr double kInside = sizeof(T) == 8 ? 1 - 1e-15 : 1 - 1e-13;

enum class Fit : int { inside, scaled, shifted };

// The projection of a group, as numbers that give each element's image.
struct Projection {
  Fit fit = Fit::inside;
  double scale = 1;  // l2
  double base = 0;   // l1: max(|v| - base - shift, 0)
  double shift = 0;
  double eps = 0;
};

template <class T, bool kFull>
class Group : public Steepest<T, kFull> {
  using Base = Steepest<T, kFull>;

 public:
  using Base::Base, Base::kElements, Base::each, Base::write, Base::count_valid;
  using typename Base::A, typename Base::V;

  // Finds the projection of what source(k, chunk, valid, values) gives on the ball and the box;
  // where again(projection) is true, that of what source gives from then on; and ends with
  // finish(k, chunk, valid, values, projection) for each chunk.
  //
  // All passes over the group are rounds of one loop, so that `source`, which is long, is compiled
  // once. kKeeps: what it gives is kept where it reads x, and it is asked once for each chunk that
  // shared memory holds; it does nothing else then, and there is no again.
  template <Norm kNorm, bool kKeeps = false, class Source, class Again, class Finish>
  __device__ __forceinline__ void project(Source source, double eps, Again again, Finish finish) {
    Projection result;
    Search search;
    begin<kNorm>(search, eps, result);
    int kept = 0;  // chunks of this thread
#pragma unroll 1
    for (;;) {
      if (search.pass == Pass::finish && again(result)) {
        begin<kNorm>(search, eps, result);
        continue;
      }
      Sums s;
      int from = 0;
      if constexpr (kKeeps && kNorm == Norm::l1) {
        if (search.pass == Pass::shift) {
#pragma unroll 1
          for (; from < kept; ++from) {
            const V x{this->kept_values(from)};
            add_beyond(search, result, x, s);
          }
        }
      }
      each(
          [&](int k, int64_t c, unsigned valid) {
            V x;
            if (kKeeps && k < kept) {
              x.v = this->kept_values(k);
            } else {
              source(k, c, valid, x);
              if constexpr (kKeeps) {
                if (search.pass != Pass::finish && k < p_.resident && p_.x.slot >= 0) {
                  this->keep_values(k, x);
                  kept = k + 1;
                }
              }
            }
            if (kNorm == Norm::linf || search.pass == Pass::finish)
              finish(k, c, valid, x, result);
            else
              measure<kNorm>(search, result, x, s);
          },
          from);
      if (kNorm == Norm::linf || search.pass == Pass::finish) return;
      next<kNorm>(search, s, result);
    }
  }

  // Projects the group, and stores it. `source` reads, and no more.
  template <Norm kNorm, class Source>
  __device__ __forceinline__ void project(Source source, double eps) {
    constexpr bool kKeeps = kNorm != Norm::linf && !kFull && std::is_same_v<T, A>;
    project<kNorm, kKeeps>(
        source, eps, [](const Projection&) { return false; },
        [&](int, int64_t c, unsigned valid, const V& x, const Projection& projection) {
          store<kNorm>(c, valid, x, projection);
        });
  }

  // An element's image under the projection, before it is stored.
  template <Norm kNorm>
  __device__ __forceinline__ static A image(const Projection& p, const V& x, int i) {
    A v = x.v[i];
    if constexpr (kNorm == Norm::linf) {
      const A eps = A(p.eps);
      v = v > eps ? eps : v < -eps ? -eps : v;
    } else if constexpr (kNorm == Norm::l2) {
      if (p.fit == Fit::scaled) {
        if (sizeof(A) == 8 || p.scale > 0x1p-100)
          v = mul_toward_zero(v, toward_zero<A>(p.scale));
        else  // below float's range, the product perhaps not
          v = toward_zero<A>(double(v) * p.scale);
      }
    } else {
      if (p.fit == Fit::shifted) {
        const double rest = larger(double(magnitude(v)) - p.base - p.shift, 0.0);
        const A size = toward_zero<A>(rest);
        v = v < 0 ? -size : size;
      }
    }
    if constexpr (kFull) v = boxed(x, i, v);
    return v;
  }

  // The result as it is stored: the origin plus the image, rounded so that it stays in the ball.
  template <Norm kNorm>
  __device__ __forceinline__ static T stored(const Projection& p, const V& x, int i) {
    if constexpr (!kFull) {
      if constexpr (kNorm == Norm::linf) {
        const A bound = A(widen(toward_zero<T>(p.eps)));
        const T near = nearest<T>(x.v[i]);
        return widen(near) > bound    ? nearest<T>(bound)
               : widen(near) < -bound ? nearest<T>(-bound)
                                      : near;
      }
      const A v = image<kNorm>(p, x, i);
      return p.fit == Fit::inside ? nearest<T>(v) : toward_zero<T>(v);
    } else {
      const A v = image<kNorm>(p, x, i);
      const double most = kNorm == Norm::linf    ? p.eps
                          : p.fit == Fit::inside ? kInfinity
                                                 : magnitude(v);
      return settled(x, i, v, most);
    }
  }

  // Writes a chunk: stored values, and the origin (or zero) where masked out.
  template <Norm kNorm>
  __device__ __forceinline__ void store(int64_t c, unsigned valid, const V& x,
                                        const Projection& projection) const {
    typename Base::Raw result;
#pragma unroll
    for (int i = 0; i < kElements; ++i) result[i] = stored<kNorm>(projection, x, i);
    write(p_.out, p_.out_aligned, c, valid, result, p_.x0.data);
  }

 private:
  // v, put where x0 + v lies in the box.
  __device__ __forceinline__ static A boxed(const V& x, int i, A v) {
    return between(v, A(x.low(i) - x.x0(i)), A(x.high(i) - x.x0(i)));
  }

  // Rounds x0 + v to T, nearest to it, but not farther than `most` from x0, and inside the box.
  __device__ __forceinline__ static T settled(const V& x, int i, A v, double most) {
    const double x0 = x.x0(i);
    const bool still = v == x.x(i) - x0;
    T r = still ? x.given[i] : nearest<T>(x0 + v);
    if (magnitude(double(widen(r)) - x0) > most) r = step_toward(r, x0);
    // At a bound the result is the bound: x0 and what leads there may add up to its neighbour. So
    // may what leads to a neighbour that the element was given at.
    if (double(widen(r)) < x.low(i) || (!still && v == x.low(i) - x0)) r = x.lower[i];
    if (double(widen(r)) > x.high(i) || (!still && v == x.high(i) - x0)) r = x.upper[i];
    return r;
  }

  // How far from the origin an element is once it is stored without projection.
  __device__ __forceinline__ static A kept(const V& x, int i) {
    if constexpr (!kFull)
      return A(widen(nearest<T>(x.v[i])));
    else
      return A(widen(settled(x, i, boxed(x, i, x.v[i]), kInfinity))) - x.x0(i);
  }

  // What a pass over the group is for. Numbered from 1: from 0 on nvcc 13.0 makes longer loops of
  // l1 with a box.
  enum class Pass : int {
    measure = 1,  // whether the values lie in the ball, and what the search starts with
    shift,        // l1: a step towards the threshold
    nearest,      // how far the box is from the origin
    box,          // a step towards the scale or the threshold, with a box
    finish,
  };

  struct Search {
    Pass pass = Pass::measure;
    int round = 0;
    A unit = 1;   // l2: power of two that brings the values into range
    A inner = 1;  // l2: the same of the radius, for what may be inside: a box may leave little
    double radius = 0;
    double at = 0;    // where the search is: l1: the threshold; l2 with a box: the scale
    Bracket bracket;  // with a box: what that lies between
  };

  __device__ bool has_box() const { return kFull && p_.boxed; }

  template <Norm kNorm>
  __device__ __forceinline__ void begin(Search& search, double eps, Projection& result) const {
    search = Search{};
    result = Projection{};
    result.eps = search.radius = eps;
    if (kNorm == Norm::linf || !(eps < kInfinity)) search.pass = Pass::finish;
    if (kNorm == Norm::l2 && sizeof(T) == 8) search.inner = range_scale<A>(eps);
  }

  // Adds a chunk to the sums that a pass forms. Where it is not valid there are zeros, not bounded,
  // which add nothing.
  template <Norm kNorm>
  __device__ __forceinline__ static void measure(const Search& search, const Projection& result,
                                                 const V& x, Sums& s) {
    if (search.pass == Pass::measure) {
      // a: of what would be stored as it is; b: of the values themselves; m: the largest.
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        constexpr bool kScales = kNorm == Norm::l2 && sizeof(T) == 8;
        const double v = double(x.v[i] * (kScales ? search.unit : A(1)));
        const double r = double(kept(x, i)) * double(kScales ? search.inner : A(1));
        if constexpr (kNorm == Norm::l2) {
          s.a += r * r;
          s.b += v * v;
        } else {
          s.a += magnitude(r);
          s.b += magnitude(v);
          s.m = larger(s.m, magnitude(v));
        }
      }
    } else if (kNorm == Norm::l1 && search.pass == Pass::shift) {
      add_beyond(search, result, x, s);
    } else if constexpr (kFull) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const double v = x.v[i];
        double w = 0;  // how far the origin is from where the search would put the element
        if (search.pass == Pass::box) {
          if (kNorm == Norm::l2)
            w = v * (search.at * result.scale);
          else
            w = larger(magnitude(v) - result.base - search.at, 0.0);
          if (kNorm == Norm::l1 && v < 0) w = -w;
        }
        const double put = boxed(x, i, w);
        const bool free = search.pass == Pass::box && put == w && (kNorm == Norm::l2 || w != 0);
        if constexpr (kNorm == Norm::l2) {
          // Squares in units of eps; a: of the free elements; b: of the others.
          const double part = put / result.eps;
          if (free)
            s.a += part * part;
          else
            s.b += part * part;
        } else {
          // a: the sum; b: how many elements are free.
          s.a += magnitude(put);
          s.b += free;
        }
      }
    }
  }

  // l1. a: how far the elements beyond the threshold reach; b: how many they are.
  __device__ __forceinline__ static void add_beyond(const Search& search, const Projection& result,
                                                    const V& x, Sums& s) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const double w = double(magnitude(x.v[i])) - result.base;
      if (w > search.at) {
        s.a += w;
        s.b += 1;
      }
    }
  }

  // Takes a thread's sums of a pass; says what the next pass is for.
  template <Norm kNorm>
  __device__ __forceinline__ void next(Search& search, Sums s, Projection& result) {
    if (search.pass == Pass::measure) {
      constexpr bool kSame = !kFull && sizeof(T) == 4;  // stored values are the values
      s = team_.agree((kSame ? 0 : kSumA) | kSumB | (kNorm == Norm::l1 ? kMax : 0), s);
      if (kSame) s.a = s.b;
      const double radius = search.radius, limit = result.eps * double(search.inner);
      search.pass = Pass::finish;
      if (!(s.a > (kNorm == Norm::l2 ? limit * limit : limit))) return;
      if constexpr (kNorm == Norm::l2) {
        if (sizeof(T) == 8 && search.unit == 1 && !(s.b > 1e-280 && s.b < 1e280)) {
          search.unit = s.b < 1 ? 0x1p600 : 0x1p-600;  // squares have left the range of doubles
          search.radius = result.eps * double(search.unit);
          search.pass = Pass::measure;
          return;
        }
        result.fit = Fit::scaled;
        // What brings the values to the ball's surface; with a box in units of that.
        result.scale = radius > 0 ? radius / sqrt(s.b) : 0;
        if (has_box() && radius > 0) {
          search.bracket.outer = smaller(1 / result.scale, 0x1p1000);
          search.bracket.at = search.at = 1;
          search.pass = Pass::nearest;
          return;
        }
        result.scale = smaller(result.scale, 1.0) * kInside<T>;
      } else {
        result.fit = Fit::shifted;
        if (has_box()) {
          result.base = radius < s.m / 2 ? s.m : 0;
          result.shift = search.bracket.inner = s.m - result.base;
          search.bracket.outer = -result.base;
          search.bracket.at = search.at = result.base > 0 ? -radius : 0;
          search.pass = Pass::nearest;
          return;
        }
        begin_shift(search, s, result);
      }
    } else if (kNorm == Norm::l1 && search.pass == Pass::shift) {
      next_shift(search, team_.agree(kSumA | kSumB, s), result);
    } else if constexpr (kFull) {
      s = team_.agree(kSumA | kSumB, s);
      const double radius = search.radius;
      if (search.pass == Pass::nearest) {
        // Where ball and box do not meet, the box wins: nothing is left of the values.
        const bool apart = kNorm == Norm::l2 ? s.b > 1 : s.a > radius;
        search.pass = apart ? Pass::finish : Pass::box;
        if (kNorm == Norm::l2 && apart) result.scale = 0;
      } else if constexpr (kNorm == Norm::l2) {
        double answer = search.bracket.inner;
        next_in_box(search, s.a + s.b, 1, search.at * sqrt(larger(1 - 1e-15 - s.b, 0.0) / s.a),
                    answer);
        if (search.pass == Pass::finish)
          result.scale = smaller(answer * result.scale, 1.0) * kInside<T>;
      } else {
        next_in_box(search, s.a, radius, search.at + (s.a - radius * (1 - 1e-15)) / s.b,
                    result.shift);
      }
    }
  }

  // No search is longer: it ends where rounding ends it.
  static constexpr int kMostRounds = 1000;

  // With a box: a step of the search for the scale or the threshold at which the norm, which is
  // `now` where the search is, is `goal`. Newton's method, which aims a little inside, would go to
  // `newton`. The answer is inside, or next to nothing.
  __device__ __forceinline__ static void next_in_box(Search& search, double now, double goal,
                                                     double newton, double& answer) {
    const bool inside = now <= goal;
    if (inside) answer = search.at;
    const bool on =
        !(inside && now >= goal * (1 - 2e-15)) && look_on(search.bracket, inside, newton);
    search.at = search.bracket.at;
    if (!on) search.pass = Pass::finish;
  }

  // The threshold with sum max(|v| - shift, 0) = eps: Newton's iteration from below (Michelot, "A
  // finite algorithm for finding the projection of a point onto the canonical simplex", 1986). For
  // a small ball magnitudes are taken relative to the largest: the differences are then exact.
  __device__ __forceinline__ void begin_shift(Search& search, const Sums& all, Projection& result) {
    const double eps = search.radius = result.eps * kInside<T>, n = count_valid();
    result.base = eps < all.m / 2 ? all.m : 0;
    search.at = -eps;  // relative to the largest; the mean would be rounded
    if (result.base == 0) search.at = larger(larger(all.m - eps, (all.b - eps) / n), 0.0);
    search.pass = Pass::shift;
  }
  __device__ __forceinline__ static void next_shift(Search& search, const Sums& s,
                                                    Projection& result) {
    const double next = (s.a - search.radius) / s.b;
    if (next > search.at) {
      search.at = next;
      if (++search.round < kMostRounds) return;
    }
    result.shift = search.at;
    search.pass = Pass::finish;
  }

  using Base::p_, Base::team_;
};

// f(group, index) for each group of this team.
template <class T, bool kFull, class F>
__device__ __forceinline__ void each_group(const GroupParams& p, F f) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Team team(p.shape, shared, p.team_global, p.team_slots);
  for (int64_t index = team.index; index < p.groups.groups; index += team.count()) {
    Group<T, kFull> group(p, team, shared, index);
    f(group, index);
  }
}

}  // namespace embattle::cuda
