// The l1 projection and step in float lanes: Newton's method on sum max(|z| - tau, 0) = eps, as
// find_l1 in ball.h has it. A sample of a long group gives the first tau; of the passes over the
// group only the first comes from memory. As in plain.h, `false` means that nothing was written.
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

// Which threshold the pieces of a group suggest: Newton's method on a sample, from 0. Short groups
// begin at 0.
template <class T>
inline double guess_tau(const Cut& cut, double eps, const T* x) {
  constexpr int64_t kPiece = 2 * kFloats, kShare = 16, kFewestPieces = 16, kMost = 4096;
  const int64_t n = cut.end() - cut.begin(), dim = cut.groups.dim;
  if (n < 1024) return 0;
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
    F over[2] = {}, active[2] = {};
    for (int k = 0; k < count; k += 2)
      for (int j = 0; j < 2; ++j) {
        const F left = sample[k + j] - t;
        over[j] += larger(F{}, left);
        active[j] += left > 0 ? all(1) : F{};
      }
    const double many = total(halves(active[0] + active[1]));
    const float next = static_cast<float>(tau + (total(halves(over[0] + over[1])) - goal) / many);
    if (!(next > tau * 1.0001f) || !(next < 0x1p100f)) break;
    tau = next;
  }
  return tau;
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
  EMBATTLE_INLINE F left_of(F z) const { return larger(F{}, abs(z) - high - low); }
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

// Precondition of `true`: eps is neither so small nor so large that sums would over- or underflow.
template <class T, bool kMoved, class P>
inline bool project_l1(const Cut& cut, double eps, const Moved<T, kMoved>& z, const Sink<T>& out,
                       const P& place) {
  const auto copy = [&](double sum) {
    copy_group(cut, z.x, out);
    if (!kMoved) return true;
    const F stored = out.store(z.index, 1, all(z.value));
    keep_inside<Norm::l1>(cut, eps, place, sum + __builtin_fabs(stored[0] - double{z.value}));
    return true;
  };
  if (eps == kInfinity) return copy(0);
  const double extent = static_cast<double>(cut.end() - cut.begin());
  if (extent < kFewest || !(eps > extent * 0x1p-110 && eps < 0x1p100)) return false;

  const double guess = guess_tau(cut, eps, z.x);
  const F tau = all(static_cast<float>(guess));
  const auto first = float_sums<4, 8u>(cut, [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
    const F size = abs(z(i, n));
    const F left = size - tau;
    acc[0] = larger(F{}, left);
    acc[1] = left > 0 ? all(1) : F{};
    acc[2] = size;
    acc[3] = size;
  });
  double norm = first.v[2];
  const double most = first.v[3];
  if (!(norm < kInfinity)) return false;
  if (norm <= eps * (1 + kSumError) && norm * (1 + kSumError) > eps)
    norm = length<Norm::l1>(cut, [&](int64_t i, auto n) { return z.wide(i, n); });
  if (norm <= eps) return copy(norm);

  // `base` as in find_l1. The largest alone would have to leave the goal at `least`.
  const double goal =
      eps * aim(Type<T>::unit, static_cast<int64_t>(first.v[1])) * (1 - 2 * kSumError);
  const double base = goal < most / 2 ? most : 0;
  const double least = base > 0 ? -goal : most > goal ? most - goal : 0;
  const auto look = [&](double at) {
    const Threshold threshold(base, at);
    const auto sums = float_sums<2>(cut, [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
      acc[0] = threshold.left_of(z(i, n));
      acc[1] = acc[0] > 0 ? all(1) : F{};
    });
    return Left{at, sums.v[0], sums.v[1]};
  };
  const double at = find_threshold({guess - base, first.v[0], first.v[1]}, least, goal, look);
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
  if (size > eps * (1 + 8 * Type<T>::unit) && size * (1 + kSumError) < norm)
    return project_l1(cut, eps, Moved<T, false>{out.p}, Sink<T>(out.p), place);
  keep_inside<Norm::l1>(cut, eps, place, size);
  return true;
}

// ---- The step ----

struct Peak {
  double sum = 0;              // of |g|, roughly: whether all are finite
  double most = 0;             // |g|
  int64_t begin = 0, end = 0;  // where the first such element is
};

template <class T>
inline Peak peak_of(const Cut& cut, const T* g) {
  constexpr int64_t kChunk = 1024;
  Peak parts[kMaxBlocks];
  const auto merge = [](Peak& a, const Peak& b) {
    const double sum = a.sum + b.sum;
    if (b.most > a.most) a = b;
    a.sum = sum;
  };
  const int count = cut.blocks([&](int block, int64_t low, int64_t high) {
    Peak peak;
    cut.runs(low, high, [&](int64_t begin, int64_t end) {
      for (int64_t stop; begin < end; begin = stop) {
        stop = begin + kChunk < end ? begin + kChunk : end;
        F sum[2] = {}, most[2] = {};
        const auto add = [&](int64_t i, auto n, int k) EMBATTLE_INLINE {
          const F size = abs(fetch(g + i, n));
          sum[k] += size;
          most[k] = larger(size, most[k]);
        };
        int64_t i = begin;
        for (; i + 2 * kFloats <= stop; i += 2 * kFloats) {
          add(i, All{}, 0);
          add(i + kFloats, All{}, 1);
        }
        for (; i < stop; i += kFloats)
          add(i, static_cast<int>(stop - i < kFloats ? stop - i : kFloats), 0);
        merge(peak,
              {total(halves(sum[0] + sum[1])), largest(larger(most[0], most[1])), begin, stop});
      }
    });
    parts[block] = peak;
  });
  Peak peak;
  for (int b = 0; b < count; ++b) merge(peak, parts[b]);
  return peak;
}

// Steps that move one coordinate.
template <class T, class P>
inline bool step_l1(const Cut& cut, double step_size, double eps, double top, const T* x,
                    const T* grad, const Sink<T>& out, const P& place) {
  if (cut.end() - cut.begin() < kFewest || top_count(top, cut.count()) != 1) return false;
  const Peak peak = peak_of(cut, grad);
  if (!(peak.sum < kInfinity)) return false;
  if (peak.most == 0) return project_l1(cut, eps, Moved<T, false>{x}, out, place);
  int64_t index = peak.begin;
  while (__builtin_fabs(value_of(grad[index])) != peak.most) ++index;
  const double z = value_of(x[index]) + (value_of(grad[index]) > 0 ? step_size : -step_size);
  const float value = static_cast<float>(z);
  if (!(__builtin_fabs(value - z) <= 0x1p-23 * eps)) return false;
  return project_l1(cut, eps, Moved<T, true>{x, index, value}, out, place);
}

}  // namespace
}  // namespace embattle
