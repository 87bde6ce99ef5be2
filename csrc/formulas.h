// Rules that the CPU and the CUDA kernels share, as host and device functions. Their meaning is
// written out in python/embattle/reference.py.
#pragma once

#include <cstdint>

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

// One block of Philox4x32-10 (Salmon et al., SC 2011). Stream 0 serves elements, stream 1 groups.
[[maybe_unused]] EMBATTLE_HD Words philox(uint64_t key0, uint64_t key1, uint64_t block,
                                          uint32_t stream) {
  uint32_t k0 = static_cast<uint32_t>(key0), k1 = static_cast<uint32_t>(key0 >> 32);
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(key1),
           c3 = static_cast<uint32_t>(key1 >> 32) ^ (stream << 31);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
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

// ||d + a g||^2 by the three sums of one pass: exact to 1e-8 unless the terms cancel, which is when
// `false` comes back and the sum has to be taken over the elements themselves.
[[maybe_unused]] EMBATTLE_HD bool square_of_step(double dd, double dg, double gg, double a,
                                                 double* square) {
  const double gain = a * a * gg;
  *square = dd + 2 * a * dg + gain;
  return *square >= 1e-8 * (dd + gain);
}

// How far inside the ball the l2 and l1 projections aim, so that rounding n elements to a type of
// unit roundoff u hardly ever leaves it: relative, and less than an ulp. Errors average over n
// elements, but over no more than the type has significands: elements that share one may be off in
// the same way. Small groups aim at eps itself, and are pulled in where rounding left the ball.
[[maybe_unused]] EMBATTLE_HD double aim(double u, int64_t n) {
  if (n < 64) return 1;
  const double independent = static_cast<double>(n) < 0.5 / u ? static_cast<double>(n) : 0.5 / u;
  double root = 8;  // a power of two not above the square root
  while (root * root * 4 <= independent) root *= 2;
  return 1 - 3 * u / root;
}

// ---- Per-sample clipping ----

// What a sample of this norm counts: clipped to `bound`, or scaled by bound / (norm + gamma). A
// sample that is not finite counts nothing, and a zero one adds nothing whatever its factor.
[[maybe_unused]] EMBATTLE_HD double clip_factor(bool automatic, double norm, double bound,
                                                double gamma) {
  if (!(norm < __builtin_huge_val()) || norm == 0) return 0;
  if (automatic) return bound / (norm + gamma);
  return norm > bound ? bound / norm : 1;
}

}  // namespace
}  // namespace embattle
