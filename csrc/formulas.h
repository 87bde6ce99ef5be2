// Rules that the CPU and the CUDA kernels share, as host and device functions: each of them is used
// by both. Their meaning is written out in python/embattle/ops/reference/.
#pragma once

#include <cstdint>

#include "launch.h"

#if defined(__CUDACC__)
#define EMBATTLE_HD __host__ __device__ inline
#else
#define EMBATTLE_HD inline
#endif

namespace embattle {
namespace {  // one copy per translation unit: SIMD levels must not share inline functions

// ---- Random numbers ----

struct Words {
  uint32_t w[4];
};

// What Philox4x32 multiplies words by, and adds to its keys after each round.
constexpr uint32_t kPhiloxTimes0 = 0xD2511F53u, kPhiloxTimes1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxPlus0 = 0x9E3779B9u, kPhiloxPlus1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The arithmetic of one block's words. cpu/draw.h has it for those of several blocks in lanes.
struct OneBlock {
  typedef uint32_t Word;
  static EMBATTLE_HD uint64_t product(Word a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
  static EMBATTLE_HD Word high(uint64_t x) { return static_cast<Word>(x >> 32); }
  static EMBATTLE_HD Word low(uint64_t x) { return static_cast<Word>(x); }
};

// A round of Philox4x32 (Salmon et al., SC 2011).
template <class A, class W = typename A::Word>
EMBATTLE_HD void philox_round(W& w0, W& w1, W& w2, W& w3, W key0, W key1) {
  const auto p0 = A::product(w0, kPhiloxTimes0), p1 = A::product(w2, kPhiloxTimes1);
  w0 = A::high(p1) ^ w1 ^ key0;
  w1 = A::low(p1);
  w2 = A::high(p0) ^ w3 ^ key1;
  w3 = A::low(p0);
}

// One block of Philox4x32-10. Stream 0 serves elements, stream 1 groups.
[[maybe_unused]] EMBATTLE_HD Words philox(uint64_t key0, uint64_t key1, uint64_t block,
                                          uint32_t stream) {
  uint32_t k0 = OneBlock::low(key0), k1 = OneBlock::high(key0);
  uint32_t w0 = OneBlock::low(block), w1 = OneBlock::high(block);
  uint32_t w2 = OneBlock::low(key1), w3 = OneBlock::high(key1) ^ (stream << 31);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round<OneBlock>(w0, w1, w2, w3, k0, k1);
    k0 += kPhiloxPlus0;
    k1 += kPhiloxPlus1;
  }
  return {{w0, w1, w2, w3}};
}

// The 53-bit integer of a pair of words, and the numbers made of it.
[[maybe_unused]] EMBATTLE_HD uint64_t bits53(uint32_t high, uint32_t low) {
  return (static_cast<uint64_t>(high) << 21) | (low >> 11);
}

// Group g's U in (0, 1], whose n-th root is its share of the ball's radius.
[[maybe_unused]] EMBATTLE_HD double radius_uniform(uint64_t key0, uint64_t key1, uint64_t group) {
  const Words r = philox(key0, key1, group, 1);
  return static_cast<double>(bits53(r.w[0], r.w[1]) + 1) * 0x1p-53;
}

// ---- Rules of groups ----

// How many coordinates an l1 step moves: `top`, or that fraction of the group's n elements.
[[maybe_unused]] EMBATTLE_HD int64_t top_count(double top, int64_t n) {
  if (top >= 1) return top < static_cast<double>(n) ? static_cast<int64_t>(top) : n;
  const int64_t k = static_cast<int64_t>(top * static_cast<double>(n) + 0.5);
  return k < 1 ? 1 : k;
}

// ---- Projection on a ball and a box ----

[[maybe_unused]] EMBATTLE_HD bool is_boxed(const Box& box) {
  return box.lower.data || box.upper.data || box.lower_value > -__builtin_huge_val() ||
         box.upper_value < __builtin_huge_val();
}

// x inside [low, high]. A bound that is a NaN bounds nothing; where low > high, high holds.
template <class T>
EMBATTLE_HD T between(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// The search for the multiplier with which a group's norm, monotone in it, reaches a goal. `inner`
// is known to give no more than the goal, `outer` more.
struct Bracket {
  double inner = 0, outer = 1;
  double at = 0;
  int round = 0;
};

// Takes whether `at` gives no more than the goal, and where Newton's method would go from there;
// moves on to the next place to look at, in the bracket. False: the answer is `inner`.
[[maybe_unused]] EMBATTLE_HD bool look_on(Bracket& b, bool inside, double newton) {
  (inside ? b.inner : b.outer) = b.at;
  const double low = b.inner < b.outer ? b.inner : b.outer;
  const double high = b.inner < b.outer ? b.outer : b.inner;
  // Newton's steps end on the right piece soon; halves, should they circle.
  const bool halve = ++b.round > 20 && b.round % 3 == 0;
  if (halve || !(newton > low && newton < high)) newton = low + (high - low) / 2;
  b.at = newton;
  return newton > low && newton < high && b.round < 1000;
}

// ---- Per-sample gradients ----

// A power of two that brings numbers up to `largest` near 1.
[[maybe_unused]] EMBATTLE_HD double scale_for(double largest) {
  double scale = 1;
  while (largest * scale > 0x1p20 && scale > 0x1p-1000) scale *= 0x1p-40;
  while (largest * scale < 0x1p-20 && scale < 0x1p1000) scale *= 0x1p40;
  return scale;
}

// What was found of two kinds of numbers that were scaled so. Where one went up and the other down
// they are taken back at once: half of it may leave the range.
[[maybe_unused]] EMBATTLE_HD double unscaled(double found, double one, double other) {
  return (one > 1) == (other > 1) ? found / one / other : found / (one * other);
}

// What a sample of this norm counts: clipped to `bound`, or scaled by bound / (norm + gamma). A
// sample that is not finite counts nothing, and a zero one adds nothing whatever its factor.
[[maybe_unused]] EMBATTLE_HD double clip_factor(bool automatic, double norm, double bound,
                                                double gamma) {
  if (!(norm < __builtin_huge_val()) || norm == 0) return 0;
  if (!automatic) return norm > bound ? bound / norm : 1;
  // Finite: an infinite factor would make a NaN of the zeros beside a tiny number.
  const double factor = bound / (norm + gamma);
  return factor < 0x1.fffffffffffffp1023 ? factor : 0x1.fffffffffffffp1023;
}

// ---- Row-wise Adagrad ----

// What multiplies a row's gradient, which `factor` has clipped. With eps 0 a row that never had a
// gradient stays: no 0 / 0.
[[maybe_unused]] EMBATTLE_HD double adagrad_step(double lr, double factor, double root,
                                                 double eps) {
  return root + eps == 0 ? 0 : lr * factor / (root + eps);
}

}  // namespace
}  // namespace embattle
