// The l1 projection and step in float lanes: Newton's method on sum max(|z| - tau, 0) = eps, as
// find_l1 in ball.h has it. A sample of a long group gives the first tau. The first pass, which is
// the only one that comes from memory, keeps a copy of the vectors that can matter to the threshold
// where these are few, and the method looks at those alone. As in plain.h, `false` means that
// nothing was written.
#pragma once

#include "inside.h"

namespace embattle {
namespace {

// A group's elements; kMoved: but for one, which has another value.
template <class T, bool kMoved>
struct Moved {
  const T* x;
  int64_t index = -1;
  float value = 0;

  template <class N>
  EMBATTLE_INLINE F operator()(int64_t i, N n) const {
    const F z = fetch(x + i, n);
    if (!kMoved || __builtin_expect(!is_among(i, n), 1)) return z;
    F changed = z;
    changed[index - i] = value;
    return changed;
  }
  template <class N>
  V wide(int64_t i, N n) const {
    V z = load(x + i, n);
    if (kMoved && is_among(i, n)) z[index - i] = value;
    return z;
  }

 private:
  bool is_among(int64_t i, int n) const {
    return static_cast<uint64_t>(index - i) < static_cast<uint64_t>(n);
  }
};

// Groups below this length begin at 0, and all of them is kept.
constexpr int64_t kSampled = 1024;

// Which threshold the pieces of a group suggest: Newton's method on a sample, from 0.
struct Guess {
  double tau = 0;
  float certain = 0;   // the threshold is hardly below it
  bool sparse = true;  // few vectors hold an element above `certain`
};

template <class T>
inline Guess guess_tau(const Cut& cut, double eps, const T* x) {
  constexpr int64_t kPiece = 2 * kFloats, kShare = 16, kFewestPieces = 16, kMost = 4096;
  const int64_t n = cut.end() - cut.begin(), dim = cut.groups.dim;
  if (n < kSampled) return {};
  F sample[kMost / kFloats];
  int64_t pieces = n / kShare / kPiece;
  pieces = pieces < kFewestPieces ? kFewestPieces : pieces;
  pieces = pieces > kMost / kPiece ? kMost / kPiece : pieces;
  const int64_t stride = n / pieces;
  int count = 0;
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t at = cut.begin() + p * stride;
    const bool* mask = cut.groups.mask;
    if (mask && !(mask[at / dim] && mask[(at + kPiece - 1) / dim])) continue;
    sample[count++] = abs(fetch(x + at, All{}));
    sample[count++] = abs(fetch(x + at + kFloats, All{}));
  }
  const double goal = eps * static_cast<double>(count * kFloats) / static_cast<double>(cut.count());
  float tau = 0;
  for (int pass = 0; pass < 20; ++pass) {
    const F t = all(tau);
    F over[2] = {};
    J active[2] = {};
    for (int k = 0; k < count; k += 2)
      for (int j = 0; j < 2; ++j) {
        const F left = sample[k + j] - t;
        over[j] += larger(F{}, left);
        active[j] -= left > 0;
      }
    const double many = total(halves(__builtin_convertvector(active[0] + active[1], F)));
    const float next = static_cast<float>(tau + (total(halves(over[0] + over[1])) - goal) / many);
    if (!(next > tau * 1.02f) || !(next < 0x1p100f)) break;
    tau = next;
  }
  const float certain = tau * 0.9f;
  int holding = 0;
  for (int k = 0; k < count; ++k) holding += any(sample[k] > certain);
  return {tau, certain, holding * 3 < count};
}

// Sizes of a group's elements: all those above a bound, and others.
struct Kept {
  static constexpr int kMost = (1 << 15) / kFloats;
  F sizes[kMost];
  int count = 0;
  double above = kInfinity;  // nothing is kept yet
};

// The sum of a group's sizes and the largest; keeps the vectors that hold a size above `above`, if
// there is room. Precondition: this thread has the group for itself.
template <class Z>
inline Totals<2, 2> keep_sizes(const Cut& cut, const Z& given, float above, Kept* kept) {
  constexpr int64_t kStride = 1024;
  const Z z = given;
  const F bound = all(above);
  F* const to = kept->sizes;
  double sum = 0;
  F most = {};
  int count = 0;
  bool room = true;
  cut.runs(cut.begin(), cut.end(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t stop = i + kStride < end ? i + kStride : end;
      if (count > Kept::kMost - kStride / kFloats - 1) {
        room = false;
        count = 0;
      }
      V acc = {};
      F largest_size = most;
      int at = count;
      const auto take = [&](int64_t k, auto n) EMBATTLE_INLINE {
        const F size = abs(z(k, n));
        to[at] = size;
        at += any(size > bound);
        largest_size = larger(size, largest_size);
        return size;
      };
      for (; i + 4 * kFloats <= stop; i += 4 * kFloats) {
        const F a = take(i, All{}), b = take(i + kFloats, All{});
        const F c = take(i + 2 * kFloats, All{}), d = take(i + 3 * kFloats, All{});
        acc += halves((a + b) + (c + d));
      }
      for (; i + kFloats <= stop; i += kFloats) acc += halves(take(i, All{}));
      if (i < stop) acc += halves(take(i, static_cast<int>(stop - i)));
      i = stop;
      sum += total(acc);
      most = largest_size;
      count = at;
    }
  });
  kept->count = count;
  if (room) kept->above = above;
  return {{sum, largest(most)}};
}

// The threshold `base + at` as two floats: the difference from the first is exact where it is
// small, so that what is left of |z| is good to some units in its own last place.
struct Threshold {
  F high, low;

  Threshold(double base, double at) {
    const float near = static_cast<float>(base + at);
    high = all(near);
    low = all(static_cast<float>(base - near + at));
  }
  EMBATTLE_INLINE F left_of_size(F size) const { return larger(F{}, size - high - low); }
  EMBATTLE_INLINE F left_of(F z) const { return left_of_size(abs(z)); }
};

// The sum of what is left at a threshold, and of how many elements.
struct Left {
  double at = 0, sum = 0, count = 0;
};

// at: base + at is the threshold that leaves `goal`. The sum falls in it and is convex: Newton's
// steps from the left do not pass the root, and one from the right lands on the left. `look(at)`
// gives what is left; `seen` is what the caller knows; the root is not below `least`.
template <class L>
inline double find_threshold(Left seen, double least, double goal, const L& look) {
  Left before;
  for (int pass = 0; pass < 100; ++pass) {
    double at = least;
    if (seen.count > 0) {
      const double excess = seen.sum - goal, step = excess / seen.count;
      at = seen.at + step > least ? seen.at + step : least;
      if (at == seen.at || __builtin_fabs(excess) <= 0x1p-25 * goal) return at;
      // By how much the step will miss, from how fast the count falls. Where that is next to
      // nothing it is the last one, and goes a little beyond.
      if (before.count > 0) {
        const double bend = (before.count - seen.count) / (seen.at - before.at);
        const double miss = 0.5 * __builtin_fabs(bend) * step * step;
        if (miss <= 0x1p-22 * goal) return at + 1.5 * miss / seen.count;
      }
    }
    before = seen;
    seen = look(at);
  }
  return seen.at;
}

// What is left of kept sizes.
inline Left left_of_kept(const Kept& kept, double base, double at) {
  const Threshold threshold(base, at);
  V acc = {};
  J seen = {};
  int k = 0;
  for (; k + 4 <= kept.count; k += 4) {  // in less time than Terms
    F left[4];
    for (int j = 0; j < 4; ++j) left[j] = threshold.left_of_size(kept.sizes[k + j]);
    acc += halves((left[0] + left[1]) + (left[2] + left[3]));
    seen -= ((left[0] > 0) + (left[1] > 0)) + ((left[2] > 0) + (left[3] > 0));
  }
  for (; k < kept.count; ++k) {
    const F left = threshold.left_of_size(kept.sizes[k]);
    acc += halves(left);
    seen -= left > 0;
  }
  return {at, total(acc), total(halves(__builtin_convertvector(seen, F)))};
}

// Precondition of `true`: eps is neither so small nor so large that sums would over- or underflow.
template <class T, bool kMoved>
inline bool project_l1(const Cut& cut, double eps, const Moved<T, kMoved>& z, const Sink<T>& out) {
  const auto copy = [&](double sum) {
    copy_group(cut, z.x, out);
    if (!kMoved) return true;
    const F stored = out.store(z.index, 1, all(z.value));
    keep_inside<Norm::l1>(cut, eps, out.p, sum + __builtin_fabs(stored[0] - double{z.value}));
    return true;
  };
  if (eps == kInfinity) return copy(0);
  const double extent = static_cast<double>(cut.end() - cut.begin());
  if (extent < kFewest || !(eps > extent * 0x1p-110 && eps < 0x1p100)) return false;

  const Guess guess = guess_tau(cut, eps, z.x);
  Kept kept;
  double norm, most;
  Left first;
  if (guess.sparse && !cut.parallel_for) {
    const auto sizes = keep_sizes(cut, z, guess.certain, &kept);
    norm = sizes.v[0];
    most = sizes.v[1];
    first = {0, norm, static_cast<double>(cut.count())};
  } else {
    const F tau = all(static_cast<float>(guess.tau));
    const auto sums = float_sums<4, 8u, 2u>(cut, [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
      const F size = abs(z(i, n));
      const F left = size - tau;
      acc[0] = larger(F{}, left);
      acc[1] = of_mask(left > 0);
      acc[2] = size;
      acc[3] = size;
    });
    norm = sums.v[2];
    most = sums.v[3];
    first = {guess.tau, sums.v[0], sums.v[1]};
  }
  if (!(norm < kInfinity)) return false;
  if (norm <= eps * (1 + kSumError) && norm * (1 + kSumError) > eps)
    norm = length<Norm::l1>(cut, [&](int64_t i, auto n) { return z.wide(i, n); });
  if (norm <= eps) return copy(norm);
  if (guess.tau > 0 && kept.above < kInfinity) first = left_of_kept(kept, 0, guess.tau);

  // `base` as in find_l1. The largest alone would have to leave the goal at `least`.
  const double goal = eps * aim(kUnit<T>, static_cast<int64_t>(first.count)) * (1 - 2 * kSumError);
  const double base = goal < most / 2 ? most : 0;
  const double least = base > 0 ? -goal : most > goal ? most - goal : 0;
  const auto look = [&](double at) {
    if (base + at >= kept.above) return left_of_kept(kept, base, at);
    const Threshold threshold(base, at);
    const auto sums = float_sums<2, 0u, 2u>(cut, [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
      acc[0] = threshold.left_of(z(i, n));
      acc[1] = of_mask(acc[0] > 0);
    });
    return Left{at, sums.v[0], sums.v[1]};
  };
  first.at -= base;
  const double at = find_threshold(first, least, goal, look);
  const Threshold threshold(base, at);
  const double size = float_sums<1, true>(
                          cut,
                          [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
                            const F x = z(i, n);
                            acc[0] = abs(out.store(i, n, with_sign(threshold.left_of(x), x)));
                          },
                          [&] { out.settle(); })
                          .v[0];
  // Where many equal elements made the last step wrong, go on from there: thresholds add up.
  if (size > eps * (1 + 8 * kUnit<T>) && size * (1 + kSumError) < norm)
    return project_l1(cut, eps, Moved<T, false>{out.p}, Sink<T>(out.p));
  keep_inside<Norm::l1>(cut, eps, out.p, size);
  return true;
}

// ---- The step ----

struct Peak {
  double most = 0;             // |g|; infinite if one is not finite
  int64_t begin = 0, end = 0;  // where the first such element is

  void add(const Peak& other) {
    if (other.most > most) *this = other;
  }
};

template <class T>
inline Peak peak_of(const Cut& cut, const T* g) {
  constexpr int64_t kChunk = 1024;
  const auto take = [=](int64_t begin, int64_t end) {
    Peak peak;
    for (int64_t stop; begin < end; begin = stop) {
      stop = begin + kChunk < end ? begin + kChunk : end;
      J most = {};  // sizes sort as their bits do, and NaNs beyond infinity
      each<kFloats>(begin, stop, [&](int64_t i, auto n) EMBATTLE_INLINE {
        const J size = as_mask(abs(fetch(g + i, n)));
        most = size > most ? size : most;
      });
      const bool finite = !any(most >= as_mask(all(__builtin_inff())));
      peak.add({finite ? largest(of_mask(most)) : kInfinity, begin, stop});
    }
    return peak;
  };
  return over_runs<Peak>(cut, take, [] {});
}

// The first element at or after `begin` whose size is `most`, which is not 0. Precondition: there
// is one before `end`.
template <class T>
inline int64_t find_size(const T* g, int64_t begin, int64_t end, double most) {
  const F size = all(static_cast<float>(most));
  while (begin + kFloats <= end && !any(abs(fetch(g + begin, All{})) == size)) begin += kFloats;
  while (__builtin_fabs(value_of(g[begin])) != most) ++begin;
  return begin;
}

// Steps that move one coordinate.
template <class T>
inline bool step_l1(const Cut& cut, double step_size, double eps, double top, const T* x,
                    const T* grad, const Sink<T>& out) {
  if (cut.end() - cut.begin() < kFewest || top_count(top, cut.count()) != 1) return false;
  const Peak peak = peak_of(cut, grad);
  if (peak.most == kInfinity) return false;
  if (peak.most == 0) return project_l1(cut, eps, Moved<T, false>{x}, out);
  const int64_t index = find_size(grad, peak.begin, peak.end, peak.most);
  const double z = value_of(x[index]) + (value_of(grad[index]) > 0 ? step_size : -step_size);
  const float value = static_cast<float>(z);
  if (!(__builtin_fabs(value - z) <= 0x1p-23 * eps)) return false;
  return project_l1(cut, eps, Moved<T, true>{x, index, value}, out);
}

}  // namespace
}  // namespace embattle
