// Vectors as wide as the SIMD level has them: V of doubles, and F of twice as many floats.
//
// Double lanes serve everything: squares of the smallest and the largest float neither vanish nor
// overflow there. Float lanes are the fast paths of float32, float16 and bfloat16.
#pragma once

#include <cstring>

#include "level.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Lambdas that loops call for every vector.
#define EMBATTLE_INLINE __attribute__((always_inline))

namespace embattle {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
constexpr int kFloats = 2 * kLanes;

template <class E, int kCount>
struct VecOf {
  typedef E type __attribute__((vector_size(sizeof(E) * kCount)));
};
template <class E, int kCount>
using Vec = typename VecOf<E, kCount>::type;

typedef Vec<double, kLanes> V;
typedef Vec<int64_t, kLanes> I;
typedef Vec<float, kLanes> Floats;  // as many as a V has lanes
typedef Vec<float, kFloats> F;
typedef Vec<int32_t, kFloats> J;
typedef Vec<uint32_t, kFloats> U;

// The number of elements of a whole vector, as a type: loops over whole vectors know it when they
// are compiled, loops' ends pass an int.
template <int kCount>
struct Count {
  constexpr operator int() const { return kCount; }
};
typedef Count<kLanes> Whole;  // of doubles
typedef Count<kFloats> All;   // of floats

// ---- Doubles ----

inline V splat(double x) { return x - V{}; }
// x in the first n lanes, and zero in the others, as a load has them.
template <class N>
inline V first_lanes(double x, N n) {
  if (static_cast<int>(n) == kLanes) return splat(x);
  V first{};
  for (int k = 0; k < n; ++k) first[k] = x;
  return first;
}
inline I bits(V x) { return reinterpret_cast<I>(x); }
inline V from_bits(I x) { return reinterpret_cast<V>(x); }
constexpr int64_t kSign = INT64_MIN;
inline V abs(V x) { return from_bits(bits(x) & ~kSign); }
inline double abs(double x) { return __builtin_fabs(x); }
inline V with_sign(V size, V sign) { return from_bits(bits(size) | (bits(sign) & kSign)); }
inline V larger(V a, V b) { return a > b ? a : b; }               // b where a is NaN
inline V at_most(V x, V limit) { return x > limit ? limit : x; }  // a NaN stays

inline V iota(int64_t start) {
  I x;
  for (int k = 0; k < kLanes; ++k) x[k] = start + k;
  return __builtin_convertvector(x, V);
}

inline double total(V x) {  // of neighbours, of neighbouring pairs, and so on
  double sum[kLanes];
  std::memcpy(sum, &x, sizeof(x));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) sum[k] = sum[2 * k] + sum[2 * k + 1];
  return sum[0];
}

inline double root(double x) { return __builtin_sqrt(x); }
EMBATTLE_INLINE inline V root(V x) {  // one instruction
  for (int k = 0; k < kLanes; ++k) x[k] = __builtin_sqrt(x[k]);
  return x;
}

// Lane k: total(parts[k]).
inline V sums_of(const V* parts) {
#if defined(__AVX512F__)
  // Neighbours, neighbouring pairs, halves: of two vectors at a time.
  const auto pairs = [](V x, V y) {
    return __builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
  };
  const auto fours = [](V x, V y) {
    return __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
  };
  const V low = fours(pairs(parts[0], parts[1]), pairs(parts[2], parts[3]));
  const V high = fours(pairs(parts[4], parts[5]), pairs(parts[6], parts[7]));
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
#elif defined(__AVX__)
  const V a = __builtin_shufflevector(parts[0], parts[1], 0, 4, 2, 6) +
              __builtin_shufflevector(parts[0], parts[1], 1, 5, 3, 7);
  const V b = __builtin_shufflevector(parts[2], parts[3], 0, 4, 2, 6) +
              __builtin_shufflevector(parts[2], parts[3], 1, 5, 3, 7);
  return __builtin_shufflevector(a, b, 0, 1, 6, 7) + __builtin_shufflevector(a, b, 2, 3, 4, 5);
#else
  return __builtin_shufflevector(parts[0], parts[1], 0, 2) +
         __builtin_shufflevector(parts[0], parts[1], 1, 3);
#endif
}

inline double largest(V x) {
  double most = x[0];
  for (int k = 1; k < kLanes; ++k) most = x[k] > most ? x[k] : most;
  return most;
}

// ---- Floats ----

inline F all(float x) { return x - F{}; }
inline F abs(F x) { return reinterpret_cast<F>(reinterpret_cast<U>(x) & 0x7fffffffu); }
inline F with_sign(F size, F sign) {
  return reinterpret_cast<F>(reinterpret_cast<U>(size) | (reinterpret_cast<U>(sign) & 0x80000000u));
}
inline J as_mask(F comparison) { return reinterpret_cast<J>(comparison); }
inline F of_mask(J comparison) { return reinterpret_cast<F>(comparison); }
inline bool any(J comparison) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(comparison)) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(comparison)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(comparison)) != 0;
#else
  int32_t all = 0;
  for (int k = 0; k < kFloats; ++k) all |= comparison[k];
  return all != 0;
#endif
}
inline bool any(I comparison) { return any(reinterpret_cast<J>(comparison)); }
inline F larger(F a, F b) { return a > b ? a : b; }  // b where a is NaN
inline F clamped(F x, F limit) {                     // a NaN stays
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// ---- Between floats and doubles ----
//
// By name where the compiler would convert halves of vectors. (A mask of all lanes costs nothing;
// the plain forms make gcc 12 warn of what its own header leaves undefined.)

inline V widened(Floats x) {
#if defined(__AVX512F__)
  return reinterpret_cast<V>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<V>(_mm256_cvtps_pd(reinterpret_cast<__m128>(x)));
#else
  return __builtin_convertvector(x, V);
#endif
}
inline Floats narrowed(V x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_cvtpd_ps(0xff, reinterpret_cast<__m512d>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(x)));
#else
  return __builtin_convertvector(x, Floats);
#endif
}

// The first (0) or the second half of the lanes.
template <int kHalf>
inline V half(F x) {
#if defined(__AVX512F__)
  return widened(reinterpret_cast<Floats>(
      _mm512_maskz_extractf64x4_pd(0xf, reinterpret_cast<__m512d>(x), kHalf)));
#elif defined(__AVX__)
  return widened(
      reinterpret_cast<Floats>(_mm256_extractf128_ps(reinterpret_cast<__m256>(x), kHalf)));
#else
  Floats both[2];
  std::memcpy(both, &x, sizeof(x));
  return widened(both[kHalf]);
#endif
}
inline V halves(F x) { return half<0>(x) + half<1>(x); }
inline double largest(F x) { return largest(larger(half<0>(x), half<1>(x))); }

}  // namespace
}  // namespace embattle
