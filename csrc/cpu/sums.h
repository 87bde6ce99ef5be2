// Reductions over a group in a fixed order: a group is cut into blocks by its size alone, and the
// blocks' partial results are combined in their order. The bits of a result depend neither on the
// number of threads nor on which of them did what.
//
// In float lanes terms are rounded to float32 and summed in fours before they go on in double, so
// that a sum of numbers >= 0 is within 3 units of roundoff (kSumError) of the exact one, however
// long it is. Callers see to over- and underflow: a sum that is not finite, or so small that
// squares may have vanished, is theirs to take again in double lanes.
#pragma once

#include "cut.h"

namespace embattle {
namespace {

constexpr double kSumError = 3.5 * 0x1p-24;  // relative; float32's roundoff and some of double's

// K totals; those whose bit is set in `kMaxima` are maxima of numbers >= 0.
template <int K, unsigned kMaxima = 0>
struct Totals {
  double v[K] = {};

  void add(const Totals& other) {
    for (int k = 0; k < K; ++k)
      v[k] = kMaxima >> k & 1 ? (other.v[k] > v[k] ? other.v[k] : v[k]) : v[k] + other.v[k];
  }
};

// What take(begin, end) gives of the runs of a group's elements that take part, added up: R{} is
// the sum of nothing, and r.add(later) adds. settle() is called on the thread that did a block.
template <class R, bool kBackwards = false, class T, class S>
inline R over_runs(const Cut& cut, const T& take, const S& settle) {
  const auto of_block = [&](int64_t low, int64_t high) {
    R part;
    cut.runs(low, high, [&](int64_t begin, int64_t end) { part.add(take(begin, end)); });
    settle();
    return part;
  };
  if (cut.end() - cut.begin() <= cut.block()) return of_block(cut.begin(), cut.end());
  R sum, parts[kMaxBlocks];
  const int count =
      cut.blocks([&](int block, int64_t low, int64_t high) { parts[block] = of_block(low, high); },
                 kBackwards);
  for (int b = 0; b < count; ++b) sum.add(parts[b]);
  return sum;
}

// ---- In double lanes ----

// K vectors of sums over elements [begin, end), whose lanes are yet to be added up: f(i, n, acc)
// adds to acc[0..K) what the n elements from i on give.
template <int K, unsigned kMaxima = 0, class F>
inline void lanes_of_run(int64_t begin, int64_t end, const F& f, V (&lanes)[K]) {
  V even[K] = {}, odd[K] = {};
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    f(i, Whole{}, even);
    f(i + kLanes, Whole{}, odd);
  }
  each(i, end, [&](int64_t at, auto n) { f(at, n, even); });
  for (int k = 0; k < K; ++k)
    lanes[k] = kMaxima >> k & 1 ? larger(even[k], odd[k]) : even[k] + odd[k];
}

// The totals.
template <int K, unsigned kMaxima = 0, class F>
inline Totals<K, kMaxima> totals_of_run(int64_t begin, int64_t end, const F& f) {
  V lanes[K];
  lanes_of_run<K, kMaxima>(begin, end, f, lanes);
  Totals<K, kMaxima> sum;
  for (int k = 0; k < K; ++k) sum.v[k] = kMaxima >> k & 1 ? largest(lanes[k]) : total(lanes[k]);
  return sum;
}

// The same over a group.
template <int K, unsigned kMaxima = 0, class F>
inline Totals<K, kMaxima> totals(const Cut& cut, const F& f) {
  return over_runs<Totals<K, kMaxima>>(
      cut, [&](int64_t begin, int64_t end) { return totals_of_run<K, kMaxima>(begin, end, f); },
      [] {});
}

// ---- In float lanes ----

// K sums of what f(i, n, terms) gives, K vectors of terms of the elements from i on. The sums whose
// bit is set in `kMaxima` are maxima of numbers >= 0 instead, those in `kCounts` count the lanes in
// which the term is what a comparison gives.
template <int K, unsigned kMaxima = 0, unsigned kCounts = 0>
struct Terms {
  V acc[K] = {};
  F most[kMaxima ? K : 1] = {};  // clearing what is not used takes time
  J seen[kCounts ? K : 1] = {};

  static constexpr bool is_most(int k) { return kMaxima >> k & 1; }
  static constexpr bool is_count(int k) { return kCounts >> k & 1; }

  // Adds those of elements [begin, end), four vectors at a time.
  template <class Fn>
  [[gnu::always_inline]] void add(int64_t begin, int64_t end, const Fn& f) {
    int64_t i = begin;
    for (; i + 4 * kFloats <= end; i += 4 * kFloats) {
      F a[K], b[K], c[K], d[K];
      f(i, All{}, a);
      f(i + kFloats, All{}, b);
      f(i + 2 * kFloats, All{}, c);
      f(i + 3 * kFloats, All{}, d);
      for (int k = 0; k < K; ++k)
        if (is_most(k))
          most[k] = larger(larger(larger(a[k], b[k]), larger(c[k], d[k])), most[k]);
        else if (is_count(k))
          seen[k] -= (as_mask(a[k]) + as_mask(b[k])) + (as_mask(c[k]) + as_mask(d[k]));
        else
          acc[k] += halves((a[k] + b[k]) + (c[k] + d[k]));
    }
    each<kFloats>(i, end, [&](int64_t at, auto n) EMBATTLE_INLINE {
      F a[K];
      f(at, n, a);
      for (int k = 0; k < K; ++k)
        if (is_most(k))
          most[k] = larger(a[k], most[k]);
        else if (is_count(k))
          seen[k] -= as_mask(a[k]);
        else
          acc[k] += halves(a[k]);
    });
  }

  Totals<K, kMaxima> result() const {
    Totals<K, kMaxima> sum;
    for (int k = 0; k < K; ++k)
      sum.v[k] = is_most(k)    ? largest(most[k])
                 : is_count(k) ? total(halves(__builtin_convertvector(seen[k], F)))
                               : total(acc[k]);
    return sum;
  }
};

// Terms over a group. kBackwards: from the last element to the first, chunk by chunk, so that a
// second pass begins with what the first one has left in the cache.
template <int K, bool kBackwards = false, unsigned kMaxima = 0, unsigned kCounts = 0, class Fn,
          class S>
inline Totals<K, kMaxima> float_sums(const Cut& cut, const Fn& given, const S& settle) {
  constexpr int64_t kChunk = 4096;
  return over_runs<Totals<K, kMaxima>, kBackwards>(
      cut,
      [&](int64_t begin, int64_t end) {
        const Fn f = given;  // a copy of one's own: what it holds stays in registers
        Totals<K, kMaxima> sum;
        while (end > begin) {
          const int64_t start = kBackwards && end - begin > kChunk ? end - kChunk : begin;
          Terms<K, kMaxima, kCounts> terms;
          terms.add(start, end, f);
          sum.add(terms.result());
          end = start;
        }
        return sum;
      },
      settle);
}

template <int K, unsigned kMaxima = 0, unsigned kCounts = 0, class Fn>
inline Totals<K, kMaxima> float_sums(const Cut& cut, const Fn& f) {
  return float_sums<K, false, kMaxima, kCounts>(cut, f, [] {});
}

}  // namespace
}  // namespace embattle
