// Vectors as wide as the SIMD level has them: V of doubles, and F of twice as many floats. This is
// the one place that knows how the four element types are read into them and written from them, and
// what the processor calls that.
//
// Double lanes serve everything: squares of the smallest and the largest float neither vanish nor
// overflow there. Float lanes are the fast paths of float32, float16 and bfloat16.
#pragma once

#include <cstring>
#include <type_traits>

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
inline V root(V x) {
#if defined(__AVX512F__)
  return reinterpret_cast<V>(_mm512_maskz_sqrt_pd(0xff, reinterpret_cast<__m512d>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<V>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<V>(_mm_sqrt_pd(reinterpret_cast<__m128d>(x)));
#else
  for (int k = 0; k < kLanes; ++k) x[k] = __builtin_sqrt(x[k]);
  return x;
#endif
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

// ---- Half types ----

// Their storage, by its bits.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
template <class T>
constexpr bool is_half = sizeof(T) == 2;
template <class T>
using Word = std::conditional_t<is_half<T>, uint16_t, T>;  // vectors are of these

template <class T>
inline Word<T>* words_of(T* p) {
  return reinterpret_cast<Word<T>*>(p);
}
template <class T>
inline const Word<T>* words_of(const T* p) {
  return reinterpret_cast<const Word<T>*>(p);
}

// Sixteen bits to and from 32.
template <int n>
inline Vec<uint32_t, n> spread_out(Vec<uint16_t, n> x) {
#if defined(__AVX512F__)
  if constexpr (n == 16)
    return reinterpret_cast<U>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(x)));
#endif
#if defined(__AVX2__)
  if constexpr (n == 8)
    return reinterpret_cast<Vec<uint32_t, n>>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#endif
  return __builtin_convertvector(x, Vec<uint32_t, n>);
}
template <int n>
inline Vec<uint16_t, n> packed_up(Vec<uint32_t, n> x) {  // of numbers below 2^16
#if defined(__AVX2__)
  if constexpr (n == 8) {
    const __m256i y = reinterpret_cast<__m256i>(x);
    return reinterpret_cast<Vec<uint16_t, n>>(
        _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
  }
#endif
  return __builtin_convertvector(x, Vec<uint16_t, n>);
}

template <int n>
inline Vec<float, n> of_halves(Vec<uint16_t, n> x) {
#if defined(__AVX512F__)
  if constexpr (n == 16)
    return reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x)));
#endif
#if defined(__F16C__)
  if constexpr (n == 8)
    return reinterpret_cast<Vec<float, n>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x)));
#endif
  // A half's exponent and mantissa, shifted into place, are 2^-112 times its value.
  typedef Vec<uint32_t, n> Us;
  const Us h = spread_out<n>(x), size = (h & 0x7fffu) << 13;
  const Us finite = reinterpret_cast<Us>(reinterpret_cast<Vec<float, n>>(size) * 0x1p112f);
  const Us value = size >= 0x0f800000u ? size | 0x7f800000u : finite;
  return reinterpret_cast<Vec<float, n>>(value | ((h & 0x8000u) << 16));
}
template <int n>
inline Vec<uint16_t, n> to_halves(Vec<float, n> x) {
#if defined(__AVX512F__)
  if constexpr (n == 16)
    return reinterpret_cast<Vec<uint16_t, n>>(
        _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  if constexpr (n == 8)
    return reinterpret_cast<Vec<uint16_t, n>>(
        _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#endif
  // Subnormal halves: adding 0.5 rounds to their unit, 2^-24.
  typedef Vec<uint32_t, n> Us;
  const Us b = reinterpret_cast<Us>(x), size = b & 0x7fffffffu;
  const Us small = reinterpret_cast<Us>(reinterpret_cast<Vec<float, n>>(size) + 0.5f) - 0x3f000000u;
  const Us normal = (size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13;
  const Us special = size > 0x7f800000u ? Us{} + 0x7e00u : Us{} + 0x7c00u;
  const Us value = size >= 0x47800000u ? special : size < 0x38800000u ? small : normal;
  return packed_up<n>(value | ((b >> 16) & 0x8000u));
}

// What n stored elements are worth.
template <class T, int n>
inline Vec<float, n> to_floats(Vec<Word<T>, n> x) {
  if constexpr (std::is_same_v<T, bf16>)
    return reinterpret_cast<Vec<float, n>>(spread_out<n>(x) << 16);
  else if constexpr (std::is_same_v<T, f16>)
    return of_halves<n>(x);
  else
    return x;
}

// What is stored of x, to nearest even, and in *stored what that is worth.
template <class T, int n>
inline Vec<Word<T>, n> to_words(Vec<float, n> x, Vec<float, n>* stored) {
  if constexpr (std::is_same_v<T, bf16>) {
    typedef Vec<uint32_t, n> Us;
    const Us b = reinterpret_cast<Us>(x);
    const Us near = (b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u;
    const Us value = x == x ? near : (b & 0xffff0000u) | 0x400000u;
    *stored = reinterpret_cast<Vec<float, n>>(value);
    return packed_up<n>(value >> 16);
  } else if constexpr (std::is_same_v<T, f16>) {
    const Vec<uint16_t, n> half = to_halves<n>(x);
    *stored = of_halves<n>(half);
    return half;
  } else {
    return *stored = x;
  }
}

// ---- Memory ----

// The first n words, n below kCount; the others are zero. By masks of bytes, or of four bytes each,
// where the processor has them: a call of memcpy takes longer than what it copies.
#if defined(__AVX2__) && !defined(__AVX512F__)
template <int kBytes>
inline Vec<int32_t, kBytes / 4> lanes_below(int bytes) {
  Vec<int32_t, kBytes / 4> end;
  for (int k = 0; k < kBytes / 4; ++k) end[k] = 4 * (k + 1);
  return end <= bytes;
}
#endif
template <class W, int kCount>
EMBATTLE_INLINE inline Vec<W, kCount> words_at(const W* p, int n) {
  typedef Vec<W, kCount> Words;
  [[maybe_unused]] const unsigned bytes = static_cast<unsigned>(n) * sizeof(W);
#if defined(__AVX512F__)
  const uint64_t mask = _bzhi_u64(~uint64_t{0}, bytes);
  if constexpr (sizeof(Words) == 64)
    return reinterpret_cast<Words>(_mm512_maskz_loadu_epi8(mask, p));
  else if constexpr (sizeof(Words) == 32)
    return reinterpret_cast<Words>(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), p));
  else
    return reinterpret_cast<Words>(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), p));
#else
#if defined(__AVX2__)
  if constexpr (sizeof(W) >= 4) {
    const auto mask = lanes_below<sizeof(Words)>(static_cast<int>(bytes));
    const auto* const from = reinterpret_cast<const float*>(p);
    if constexpr (sizeof(Words) == 32)
      return reinterpret_cast<Words>(_mm256_maskload_ps(from, reinterpret_cast<__m256i>(mask)));
    else
      return reinterpret_cast<Words>(_mm_maskload_ps(from, reinterpret_cast<__m128i>(mask)));
  }
#endif
  Words x{};
  std::memcpy(&x, p, bytes);
  return x;
#endif
}
template <class W, int kCount>
EMBATTLE_INLINE inline void put_words(W* p, int n, Vec<W, kCount> x) {
  [[maybe_unused]] const unsigned bytes = static_cast<unsigned>(n) * sizeof(W);
#if defined(__AVX512F__)
  const uint64_t mask = _bzhi_u64(~uint64_t{0}, bytes);
  if constexpr (sizeof(x) == 64)
    _mm512_mask_storeu_epi8(p, mask, reinterpret_cast<__m512i>(x));
  else if constexpr (sizeof(x) == 32)
    _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(mask), reinterpret_cast<__m256i>(x));
  else
    _mm_mask_storeu_epi8(p, static_cast<__mmask16>(mask), reinterpret_cast<__m128i>(x));
#else
#if defined(__AVX2__)
  if constexpr (sizeof(W) >= 4) {
    const auto mask = lanes_below<sizeof(x)>(static_cast<int>(bytes));
    auto* const to = reinterpret_cast<float*>(p);
    if constexpr (sizeof(x) == 32)
      _mm256_maskstore_ps(to, reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256>(x));
    else
      _mm_maskstore_ps(to, reinterpret_cast<__m128i>(mask), reinterpret_cast<__m128>(x));
    return;
  }
#endif
  std::memcpy(p, &x, bytes);
#endif
}

// All of them.
template <class W, int kCount>
EMBATTLE_INLINE inline Vec<W, kCount> words_at(const W* p, Count<kCount>) {
  Vec<W, kCount> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class W, int kCount>
EMBATTLE_INLINE inline void put_words(W* p, Count<kCount>, Vec<W, kCount> x) {
  std::memcpy(p, &x, sizeof(x));
}

// n elements; the lanes beyond n are zero.
template <class T, class N>
EMBATTLE_INLINE inline F fetch(const T* p, N n) {
  return to_floats<T, kFloats>(words_at<Word<T>, kFloats>(words_of(p), n));
}
template <class T, class N>
inline V load(const T* p, N n) {
  const auto words = words_at<Word<T>, kLanes>(words_of(p), n);
  if constexpr (std::is_same_v<T, double>)
    return words;
  else
    return widened(to_floats<T, kLanes>(words));
}

// x as floats that a half type can be rounded from: to odd, which keeps what the second rounding
// has to know.
inline Floats rounded_to_odd(V x) {
  typedef Vec<int32_t, kLanes> Ints;
  const Floats near = narrowed(x);
  const V back = widened(near);
  const Ints b = reinterpret_cast<Ints>(near);
  const Ints inexact = __builtin_convertvector((back < x) | (back > x), Ints);  // no NaN
  const Ints short_of = __builtin_convertvector(abs(back) < abs(x), Ints);
  const Ints towards = (short_of & 1) | (~short_of & -1);
  return reinterpret_cast<Floats>(b + (towards & inexact & ((b & 1) - 1)));
}

// Rounds x to T, once, writes its first n lanes, and returns what was written.
template <class T, class N>
inline V store(T* p, N n, V x) {
  if constexpr (std::is_same_v<T, double>) {
    put_words<double, kLanes>(p, n, x);
    return x;
  } else {
    Floats stored;
    const auto words = to_words<T, kLanes>(is_half<T> ? rounded_to_odd(x) : narrowed(x), &stored);
    put_words<Word<T>, kLanes>(words_of(p), n, words);
    return widened(stored);
  }
}

}  // namespace
}  // namespace embattle
