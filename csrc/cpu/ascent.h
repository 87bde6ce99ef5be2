// The direction of steepest ascent of a group's gradient.
#pragma once

#include "ball.h"

namespace embattle {
namespace {

// step_size * u(g), element by element.
struct Ascent {
  bool moves = false;      // else zero, whatever g holds
  double unit = 1, a = 0;  // l2: (g * unit) * a, with a power of two that keeps both in range
  double threshold = 0;    // l1: these move: |g| above the threshold, or at it up to element `last`
  int64_t last = -1;
  double amount = 0;  // l1, linf: by how much

  template <Norm kNorm>
  V operator()(int64_t i, V g) const {
    if (!moves) return V{};
    if (kNorm == Norm::l2) return g * unit * a;
    const V size = abs(g);
    if (kNorm == Norm::linf) return size > 0 ? with_product(g) : V{};
    const V up_to_last = iota(i) <= static_cast<double>(last) ? size : V{};
    return (size > threshold) | ((up_to_last == threshold) & (size > 0)) ? with_product(g) : V{};
  }

  // The elements x(i, n), moved along g(i, n).
  template <Norm kNorm, class X, class G>
  auto of(const X& x, const G& g) const {
    return [x, g, own = *this](int64_t i, auto n) {
      const V before = x(i, n);
      return own.moves ? before + own.template operator()<kNorm>(i, g(i, n)) : before;
    };
  }

 private:
  V with_product(V g) const {  // sign(g) * amount, where g is not zero
    return from_bits(bits(splat(amount)) ^ (bits(g) & kSign));
  }
};

// The n-th element (from 1) in order whose |g| is `size`.
template <class F>
inline int64_t find_equal(const Cut& cut, double size, int64_t nth, const F& g) {
  int64_t found = -1;
  cut.runs(cut.begin(), cut.end(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && nth > 0; i += kLanes) {
      const int n = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
      const V value = abs(n == kLanes ? g(i, Whole{}) : g(i, n));
      if (total(value == size ? splat(1) : V{}) == 0) continue;  // whole vectors at a time
      for (int k = 0; k < n && nth > 0; ++k)
        if (value[k] == size && --nth == 0) found = i + k;
    }
  });
  return found;
}

// Finds what separates the k largest |g| from the others, by their bits from the top (a radix
// select): no sort, no copy. Precondition: at least k elements are not zero.
template <class F>
inline void select_largest(const Cut& cut, int64_t k, const F& g, Ascent* ascent) {
  uint64_t prefix = 0;
  int64_t need = k;
  for (int shift = 52, width = 11; shift >= 0;) {
    int64_t counts[2048] = {};
    cut.runs(cut.begin(), cut.end(), [&](int64_t begin, int64_t end) {
      each(begin, end, [&](int64_t i, auto n) {
        const I b = bits(abs(g(i, n)));
        for (int lane = 0; lane < n; ++lane) {
          const uint64_t word = static_cast<uint64_t>(b[lane]);
          counts[word >> shift & ((1u << width) - 1)] += word >> (shift + width) == prefix;
        }
      });
    });
    int bin = (1 << width) - 1;
    while (counts[bin] < need) need -= counts[bin--];
    prefix = prefix << width | static_cast<uint64_t>(bin);
    if (counts[bin] == need) {  // all of the bin move
      const uint64_t lowest = prefix << shift;
      ascent->threshold = from_bits(I{} + static_cast<int64_t>(lowest ? lowest - 1 : 0))[0];
      ascent->last = -1;
      return;
    }
    width = shift >= 11 ? 11 : shift;
    shift = shift == 0 ? -1 : shift - width;
  }
  ascent->threshold = from_bits(I{} + static_cast<int64_t>(prefix))[0];
  ascent->last = find_equal(cut, ascent->threshold, need, g);
}

// A power of two that brings x into the middle of the range.
inline double middling(double x) { return x < 0x1p-900 ? 0x1p600 : x > 0x1p900 ? 0x1p-600 : 1; }

// l2: the ascent along g of length `norm`. A tiny norm is denormal itself, with few bits left: take
// that of the scaled g.
template <class F>
inline Ascent along(const Cut& cut, double norm, double step_size, const F& g) {
  Ascent ascent;
  ascent.moves = norm > 0;
  if (!ascent.moves) return ascent;
  const double unit = middling(norm);
  if (unit > 1) norm = length<Norm::l2>(cut, [&](int64_t i, auto n) { return g(i, n) * unit; });
  ascent.unit = unit;
  ascent.a = step_size / (unit > 1 ? norm : norm * unit);
  return ascent;
}

// The ascent of a finite g.
template <Norm kNorm, class F>
inline Ascent steepest(const Cut& cut, double step_size, double top, const F& g) {
  if (kNorm == Norm::l2) return along(cut, length<Norm::l2>(cut, g), step_size, g);
  Ascent ascent;
  ascent.amount = step_size;
  ascent.moves = true;
  if (kNorm == Norm::linf) return ascent;
  const auto seen = totals<2, 1>(cut, [&](int64_t i, auto n, V* acc) {
    const V size = abs(g(i, n));
    acc[0] = larger(size, acc[0]);
    acc[1] += size > 0 ? splat(1) : V{};
  });
  const int64_t nonzero = static_cast<int64_t>(seen.v[1]);
  int64_t k = top_count(top, cut.count());
  k = k < nonzero ? k : nonzero;
  ascent.moves = k > 0;
  if (k == 0) return ascent;
  ascent.amount = step_size / static_cast<double>(k);
  if (k == 1) {
    ascent.threshold = seen.v[0];
    ascent.last = find_equal(cut, seen.v[0], 1, g);
  } else {
    select_largest(cut, k, g, &ascent);
  }
  return ascent;
}

// Whether all elements f(i, n) are finite.
template <class F>
inline bool all_finite(const Cut& cut, const F& f) {
  return totals<1>(cut, [&](int64_t i, auto n, V* acc) { acc[0] += f(i, n) * 0.; }).v[0] == 0;
}

}  // namespace
}  // namespace embattle
